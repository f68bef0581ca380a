"""Pictures of what images use of a model: by block, by class, the cheapest and dearest, learned against random."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..files import written_whole
from .plots import LEAN, LINES

if TYPE_CHECKING:
    from ..data import ImageData
    from ..usage import Usage

PICTURE = 224
"""Side of an image on the contact sheet, in pixels."""


def draw_usage(report: dict[str, Any], data: ImageData, usage: Usage, folder: Path) -> None:
    """Write the pictures of a usage report, as `leanvit.usage.write_usage` makes it."""
    pictures = {
        "blocks": by_block(report["blocks"]),
        "classes": by_class(report["classes"]),
        "images": contact_sheet(report, data, usage),
        "random": learned_and_random(report["policies"]),
    }
    for name, figure in pictures.items():
        with written_whole(folder / f"{name}.png") as part:
            figure.savefig(part)


def by_block(blocks: list[dict[str, Any]]) -> Figure:
    """Usage of patches, heads, attention and MLP in each block."""
    figure = _figure(7.2, 3.6)
    axes = figure.subplots()
    place = np.arange(len(blocks))
    kinds = {
        "patches": [block["patches"] for block in blocks],
        "heads": [float(np.mean(block["heads"])) for block in blocks],
        "attention": [block["attention"] for block in blocks],
        "MLP": [block["mlp"] for block in blocks],
    }
    for offset, ((name, values), colour) in enumerate(zip(kinds.items(), LINES, strict=False)):
        axes.bar(place + 0.2 * (offset - 1.5), values, width=0.19, label=name, color=colour)
    axes.set(xlabel="block", ylabel="mean usage", ylim=(0, 1.02), xticks=place)
    axes.set_xticklabels([str(block["block"]) for block in blocks])
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _plain(axes)
    return figure


def by_class(classes: list[dict[str, Any]], most: int = 20) -> Figure:
    """Mean cost of each class's images; of many classes, the cheapest and the dearest."""
    shown = classes if len(classes) <= most else classes[: most // 2] + classes[-most // 2 :]
    figure = _figure(7.2, 0.9 + 0.27 * len(shown))
    axes = figure.subplots()
    names = [row["class"].split(",")[0] for row in shown]
    axes.barh(range(len(shown)), [row["gmacs"] for row in shown], color=LEAN)
    axes.set(yticks=range(len(shown)), xlabel="mean GMACs an image")
    axes.set_yticklabels(names, parse_math=False)
    axes.set_xlim(left=0.9 * min(row["gmacs"] for row in shown))
    axes.invert_yaxis()
    _plain(axes, along="x")
    return figure


def contact_sheet(report: dict[str, Any], data: ImageData, usage: Usage) -> Figure:
    """The cheapest images above, the dearest below: a patch is the whiter the fewer blocks it took part in."""
    columns = max(len(report["cheapest"]), 1)
    figure = _figure(1.5 * columns, 3.9)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes_row, name in zip(grid, ("cheapest", "dearest"), strict=True):
        for axes in axes_row:
            axes.axis("off")
        for axes, image in zip(axes_row, report[name], strict=False):
            axes.imshow(_picture(data, usage, image["place"]))
            mark = "" if image["right"] else ", wrong"
            axes.set_title(f"{image['gmacs']:.2f} G{mark}", fontsize=9)
        axes_row[0].text(-0.06, 0.5, name, rotation=90, va="center", ha="right", transform=axes_row[0].transAxes)
    return figure


def learned_and_random(policies: list[dict[str, Any]]) -> Figure:
    """Accuracy of learned policies beside random ones of the same usage."""
    figure = _figure(4.6, 3.4)
    axes = figure.subplots()
    names = [f"{row['policies']}\n{row['gmacs_mean']:.3f} GMACs" for row in policies]
    bars = axes.bar(range(len(policies)), [row["top1"] for row in policies], color=[LEAN] + ["0.7"] * len(policies))
    axes.bar_label(bars, fmt="%.1f")
    axes.set(xticks=range(len(policies)), ylabel="top-1 accuracy, %", ylim=(0, 108))
    axes.set_xticklabels(names, fontsize=9)
    _plain(axes)
    return figure


def _picture(data: ImageData, usage: Usage, place: int) -> np.ndarray:
    """An image as the model saw it, its patches whitened by the share of blocks in which they took no part.

    Where tokens were merged or removed before, they have no place in the image, and it is shown as it is.
    """
    sample = data[usage.index[place]]
    assert sample is not None
    pixels = sample[0].numpy().transpose(1, 2, 0)
    pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-6)
    shown = Image.fromarray((255 * pixels).astype(np.uint8).squeeze()).convert("RGB").resize((PICTURE, PICTURE))
    took_part = usage.patches[place].mean(dim=0).numpy()  # (M,)
    if len(took_part) != usage.grid[0] * usage.grid[1]:
        return np.asarray(shown)
    mask = Image.fromarray(took_part.reshape(usage.grid).astype(np.float32))
    part = np.asarray(mask.resize((PICTURE, PICTURE), Image.Resampling.NEAREST))[..., None]
    return np.asarray(shown) / 255 * part + (1 - part)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, along: Literal["x", "y"] = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=along, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
