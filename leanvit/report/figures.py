"""An explained photo as matplotlib figures: patches by token, heads and sub-layers used, what attends to what."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from .plots import DENSE, FRONTIER, LEAN

if TYPE_CHECKING:
    from leanvit.explain import BlockTrace, Explanation

COLUMNS = 4
MAP_TITLES = {
    "static_attention": "static",
    "dynamic_attention": "dynamic",
    "linear_attention": "linear-angular",
    "softmax_attention": "softmax",
    "connections": "connections",
}
ABOUT = {
    "predictions": "What the photo is taken for, with the multiply-accumulates (MACs) and the time that took.",
    "tokens": "Patches by block. White: left out. Lines part tokens; patches that share one take on its mean colour.",
    "usage": "Heads and sub-layers by block. Filled: used for this photo; empty: skipped.",
    "attention": "What the marked patch attends to, by block: brighter is more (scaled, mean over heads).",
}
"""What each figure shows; it stands above the figure, and is its alternative text."""

LETTERS_AN_INCH = 14
"""Of a figure's heading, roughly: how long its lines can be."""
TINT = 0.55
"""How strongly a token's mean colour covers its patches, from 0 to 1."""


def draw(explanation: Explanation) -> dict[str, Figure]:
    """The figures that there is something to draw in, by name, as in `ABOUT`."""
    figures = {"predictions": _predictions(explanation)}
    blocks = [block for block in explanation.blocks if block.reduced or block.takes_part is not None]
    if blocks:
        figures["tokens"] = _tokens(explanation, _changes(blocks))
    if any(block.heads is not None or block.sublayers is not None for block in explanation.blocks):
        figures["usage"] = _usage(explanation)
    if any(block.maps for block in explanation.blocks):
        figures["attention"] = _attention(explanation)
    for name, figure in figures.items():
        lines = textwrap.wrap(ABOUT[name], int(LETTERS_AN_INCH * figure.get_figwidth()))
        figure.set_figheight(figure.get_figheight() + 0.2 * len(lines))
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    return figures


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def as_html(explanation: Explanation) -> str:
    """The figures as a piece of HTML that needs no other file, for a notebook."""
    pictures = (
        f'<img style="max-width:100%" alt="{html.escape(ABOUT[name])}" '
        f'src="data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}">'
        for name, figure in explanation.figures().items()
    )
    return f"<figure>{''.join(pictures)}</figure>"


def _predictions(explanation: Explanation) -> Figure:
    outcomes = explanation.outcomes
    figure = _figure(3.0 + 3.8 * len(outcomes), 3.2)
    photo, *panels = figure.subplots(1, 1 + len(outcomes), width_ratios=[1.1, *[1.0] * len(outcomes)])
    photo.imshow(explanation.photo)
    photo.set_title(explanation.label or explanation.name, fontsize=10, loc="left", parse_math=False)
    photo.axis("off")
    for axes, outcome in zip(panels, outcomes, strict=True):
        top = outcome.top[::-1]
        axes.barh(
            range(len(top)),
            [one.probability for one in top],
            color=DENSE if outcome.model == "dense" else LEAN,
            height=0.3,
        )
        for place, one in enumerate(top):
            axes.text(0, place + 0.24, f"{one.name}  {one.probability:.0%}", fontsize=9, va="bottom", parse_math=False)
        axes.set(xlim=(0, 1), ylim=(-0.4, len(top)), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(
            f"{outcome.model}: {outcome.macs / 1e9:.3g} GMACs, {1e3 * outcome.seconds:.1f} ms", fontsize=10, loc="left"
        )
    return figure


def _changes(blocks: list[BlockTrace]) -> list[BlockTrace]:
    """The blocks that differ from the one before in what became of the patches."""
    kept = blocks[:1]
    for block in blocks[1:]:
        same_tokens = block.tokens == kept[-1].tokens and bool((block.owner == kept[-1].owner).all())
        if not same_tokens or bool((block.left_out != kept[-1].left_out).any()):
            kept.append(block)
    return kept


def _tokens(explanation: Explanation, blocks: list[BlockTrace]) -> Figure:
    figure, axes = _panels(1 + len(blocks))
    axes[0].imshow(explanation.photo)
    axes[0].set_title(f"{len(blocks[0].owner)} patches", fontsize=9, loc="left")
    for panel, block in zip(axes[1:], blocks, strict=False):
        panel.imshow(explanation.photo)
        if block.reduced:
            _tint(panel, explanation, block)
        _veil(panel, explanation, block.left_out)
        if block.reduced:
            _borders(panel, explanation, block.owner)
        panel.set_title(f"block {block.index}: {_became(block)}", fontsize=9, loc="left")
    return figure


def _became(block: BlockTrace) -> str:
    """What became of the patches in a block, in few words."""
    left_out = int(block.left_out.sum())
    if not block.reduced:
        return f"{left_out} of {len(block.owner)} left out"
    return f"{block.tokens} tokens" + (f", {left_out} left out" if left_out else "")


def _usage(explanation: Explanation) -> Figure:
    blocks = explanation.blocks
    heads = max((len(block.heads) for block in blocks if block.heads is not None), default=0)
    names = [f"head {head}" for head in range(heads)]
    if any(block.sublayers is not None for block in blocks):
        from leanvit.explain import SUBLAYERS

        names += SUBLAYERS
    figure = _figure(max(1.0 + 0.3 * len(names), 3.0), 0.8 + 0.3 * len(blocks))
    (axes,) = [figure.subplots()]
    for block in blocks:
        used = [True] * heads if block.heads is None else block.heads.tolist()
        if len(names) > heads:
            used += [True, True] if block.sublayers is None else block.sublayers.tolist()
        for place, on in enumerate(used):
            axes.add_patch(
                Rectangle(
                    (place - 0.4, block.index - 0.4), 0.8, 0.8, facecolor=LEAN if on else "white", edgecolor="0.6"
                )
            )
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(blocks) - 0.4, -0.6), ylabel="block", aspect="equal", anchor="W")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(blocks)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _attention(explanation: Explanation) -> Figure:
    shown = [(block.index, found) for block in explanation.blocks for found in block.maps]
    kinds = len({found.kind for _, found in shown})
    figure, axes = _panels(len(shown), kinds * max(1, COLUMNS // kinds))  # all of a block in one row
    for panel, (index, found) in zip(axes, shown, strict=False):
        row = found.around(explanation.query, explanation.prefix)
        panel.imshow(explanation.photo)
        _veil(panel, explanation, 1 - (row / row.max().clamp_min(1e-9)).sqrt(), colour="black")
        _mark(panel, explanation, explanation.query)
        title = "patch left out" if found.absent[explanation.query] else MAP_TITLES[found.kind]
        panel.set_title(f"block {index}: {title}", fontsize=9, loc="left")
    return figure


def _panels(count: int, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = _figure(2.6 * columns, 2.85 * rows)
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for panel in axes:
        panel.axis("off")
    return figure, axes


def _veil(axes: Axes, explanation: Explanation, strength: Tensor, colour: str = "white") -> None:
    """Cover patches, each as much as its strength ``(h·w,)`` says, from 0 to 1."""
    veil = np.zeros((*explanation.grid, 4))
    veil[..., :3] = 1.0 if colour == "white" else 0.0
    veil[..., 3] = 0.85 * strength.float().reshape(explanation.grid).numpy()
    width, height = explanation.photo.size
    axes.imshow(veil, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")


def _tint(axes: Axes, explanation: Explanation, block: BlockTrace) -> None:
    """Cover patches that share a token with their mean colour, so that those far from each other are seen to belong."""
    rows, columns = explanation.grid
    width, height = explanation.photo.size
    small = explanation.photo.resize((columns, rows), Image.Resampling.BOX)
    colours = np.asarray(small, dtype=float).reshape(rows * columns, 3) / 255
    owner, there = block.owner.numpy(), ~block.left_out.numpy()
    tint = np.zeros((rows * columns, 4))
    for token in np.unique(owner[there]):
        patches = there & (owner == token)
        if patches.sum() > 1:
            tint[patches] = (*colours[patches].mean(axis=0), TINT)
    axes.imshow(tint.reshape(rows, columns, 4), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")


def _borders(axes: Axes, explanation: Explanation, owner: Tensor) -> None:
    """Lines between patches of different tokens, white on black so that they show on any photo."""
    rows, columns = explanation.grid
    width, height = explanation.photo.size
    token = owner.reshape(rows, columns).numpy()
    lines = [
        [(column + 1, row), (column + 1, row + 1)]
        for row, column in zip(*np.nonzero(token[:, :-1] != token[:, 1:]), strict=True)
    ] + [
        [(column, row + 1), (column + 1, row + 1)]
        for row, column in zip(*np.nonzero(token[:-1] != token[1:]), strict=True)
    ]
    scaled: Any = np.array(lines, dtype=float).reshape(-1, 2, 2) * (width / columns, height / rows) - 0.5
    for colour, thickness in (("black", 1.6), ("white", 0.7)):
        axes.add_collection(LineCollection(scaled, colors=colour, linewidths=thickness))


def _mark(axes: Axes, explanation: Explanation, patch: int) -> None:
    rows, columns = explanation.grid
    width, height = explanation.photo.size
    row, column = divmod(patch, columns)
    corner = (column * width / columns - 0.5, row * height / rows - 0.5)
    axes.add_patch(Rectangle(corner, width / columns, height / rows, fill=False, edgecolor=FRONTIER, linewidth=2))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no state left behind
    return figure
