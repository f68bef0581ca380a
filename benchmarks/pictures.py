"""The pictures of the README and the docs, drawn from what the library counts and measures.

    python benchmarks/pictures.py              those that need no data
    python benchmarks/pictures.py DATA_DIR     all, also statistics of attention over real photos

DATA_DIR holds ``deit_tiny_patch16_224.safetensors`` and ``imagenette-train.tar``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import leanvit
from leanvit.analysis import LayerStatistics
from leanvit.methods.base import grid_positions
from leanvit.ops.aggregate import cell_centres, partition
from leanvit.store import resolve_model

MODEL = "deit_tiny_patch16_224"
GRID = (14, 14)
PHOTOS = 256
QUERY = (6, 4)
"""Row and column of the patch whose attention is shown."""

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#BBBBBB"

TRAINED = Path("docs/results/trained")
FAMILIES = {"dgssa": BLUE, "castling": ORANGE, "sparsifiner": GREEN, "adavit": "#CC79A7"}
"""The first method of a student, and its colour."""
ABLATIONS = (
    *("main", "main, short", "no warm start", "no guidance", "first layers"),
    *("castling, short", "castling, no auxiliary", "castling, no warm start", "castling, along the tokens"),
)
"""Students that show what a part is worth, and are not drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = {"macs-by-block": macs_by_block(), "glad-pyramid": glad_pyramid(), "trained": trained()}
    if args.data_dir:
        vit = resolve_model(MODEL, checkpoint=args.data_dir / f"{MODEL}.safetensors")
        photos = str(args.data_dir / "imagenette-train.tar")
        layers = leanvit.attention_statistics(vit, photos, limit=PHOTOS)
        for layer in layers:
            print(layer)
        calmest = min(layers, key=lambda layer: layer.relative_variance).index
        pictures["dgssa-static"] = static_attention(layers, calmest, mean_attention(vit, photos, calmest))
        pictures["glad-rank"] = effective_rank(layers)
    for name, picture in pictures.items():
        picture.savefig(args.output / f"{name}.png")


def macs_by_block() -> Figure:
    """MACs of every block of DeiT-T, dense and lean, as counted on the deployed form."""
    vit: Any = timm.create_model(MODEL).eval()
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0, 1, 2, 3, 4, 5)), leanvit.GLAD(at=(6, 8, 10)))
    dense_cost, lean_cost = leanvit.count(vit), leanvit.count(lean)
    dense, slimmed = (
        [cost.by_layer[f"blocks.{index}"].macs / 1e6 for index in range(len(vit.blocks))]
        for cost in (dense_cost, lean_cost)
    )
    tokens: list[int] = []
    for block in lean.blocks:
        block.register_forward_hook(lambda _, given, left: tokens.append(left.x.shape[1]))
    lean(torch.zeros(1, 3, 224, 224))
    figure = _figure(7.6, 3.9)
    axes = figure.subplots()
    blocks = np.arange(len(dense))
    axes.bar(blocks, dense, width=0.86, color="white", edgecolor="0.35", linestyle="--", zorder=2)
    axes.bar(blocks, slimmed, width=0.86, color=[ORANGE] * 6 + [BLUE] * 6, zorder=3)
    for index, (height, count) in enumerate(zip(slimmed, tokens, strict=True)):
        axes.text(index, height + 1.5, f"{count}", ha="center", fontsize=9, zorder=4)
    for stage in (6, 8, 10):
        axes.axvline(stage - 0.5, color=GREEN, linewidth=2.5, zorder=5)
    keys = [
        Patch(facecolor="white", edgecolor="0.35", linestyle="--", label="dense"),
        Patch(color=ORANGE, label="static attention (DGSSA)"),
        Patch(color=BLUE, label="dense attention, fewer tokens"),
        Patch(color=GREEN, label="aggregation (GLAD)"),
    ]
    axes.legend(
        handles=keys,
        ncols=4,
        frameon=False,
        fontsize=9,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.2,
    )
    axes.set_title(
        f"DeiT-T, 224 px: {dense_cost.macs / 1e9:.2f} → {lean_cost.macs / 1e9:.2f} GMACs an image", fontsize=11, pad=30
    )
    axes.set(
        xlabel="block (on its bar: the tokens that pass through it)",
        ylabel="million MACs an image",
        xticks=blocks,
        ylim=(0, 112),
    )
    _plain(axes)
    return figure


def glad_pyramid() -> Figure:
    """Which patches start out in which token, on DeiT-T's grid, after each of three stages that halve."""
    positions, labels = grid_positions(GRID), torch.arange(GRID[0] * GRID[1])
    stages = [labels]
    for _ in range(3):
        count = len(positions) // 2
        cells = partition(positions, count)
        positions, labels = cell_centres(positions, cells, count), cells[labels]
        stages.append(labels)
    figure = _figure(9.6, 2.9)
    for axes, labels, where in zip(figure.subplots(1, 4), stages, ("blocks 0–5", "6–7", "8–9", "10–11"), strict=True):
        _draw_cells(axes, labels.reshape(GRID))
        axes.set_title(f"{where}: {int(labels.max()) + 1} tokens", fontsize=11)
    return figure


def trained() -> Figure:
    """Accuracy of the trained students against their MACs, from the files of ``docs/results/trained``."""
    rows = [json.loads(file.read_text())["row"] for file in sorted(TRAINED.glob("*.json"))]
    sizes = sorted({row["img_size"] for row in rows})
    figure = _figure(9.6, 3.9)
    for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes), sharey=True)), sizes, strict=True):
        here = [row for row in rows if row["img_size"] == size]
        (teacher,) = (row["top1"] for row in here if row["student"] == "teacher")
        for (family, colour), marker in zip(FAMILIES.items(), "osD^", strict=True):
            points = [
                (1 / point["macs_ratio"], point["top1"])
                for row in here
                if row.get("method", "").partition(":")[0] == family and row["student"] not in ABLATIONS
                for point in row.get("budgets", [row])
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker, color=colour, label=family, zorder=3)
        axes.axhline(teacher, color="0.35", linewidth=1)
        axes.axhline(teacher - 1, color="0.35", linewidth=1, linestyle=":")
        axes.annotate("teacher; dotted: one point below", (0.02, teacher), (0, 3), "data", "offset points", fontsize=8)
        axes.set_title(f"{size} px, ten classes", fontsize=11)
        axes.set(xlabel="MACs, share of the teacher's", ylabel="top-1, %", xlim=(0, 1.05))
        axes.legend(frameon=False, fontsize=9, loc="lower left")
        _plain(axes)
    return figure


def static_attention(layers: Sequence[LayerStatistics], block: int, attention: Tensor) -> Figure:
    """How much each layer's attention varies between photos, and what is put in its place in one of them.

    Args:
        layers: Of the dense model.
        block: Whose attention is shown.
        attention: Its mean over the photos, ``(H, N, N)``.
    """
    figure = _figure(10.4, 3.3)
    bars, *maps = figure.subplots(1, 1 + len(attention), width_ratios=[1.9, *[1] * len(attention)])
    variance = [layer.relative_variance for layer in layers]
    chosen = sorted(range(len(layers)), key=lambda index: variance[index])[:4]
    bars.bar(range(len(layers)), variance, color=[ORANGE if index in chosen else GREY for index in range(len(layers))])
    bars.set(xlabel="block", ylabel="relative variance of attention", xticks=range(len(layers)))
    bars.set_title("orange: the four that vary least", fontsize=10, loc="left")
    _plain(bars)
    place = 1 + QUERY[0] * GRID[1] + QUERY[1]  # the class token is first
    for head, axes in enumerate(maps):
        axes.imshow(attention[head, place, 1:].reshape(GRID), cmap="cividis", vmin=0)
        axes.plot(
            QUERY[1],
            QUERY[0],
            marker="s",
            markersize=8,
            markerfacecolor="none",
            markeredgecolor="white",
            markeredgewidth=1.6,
        )
        axes.set_title(f"block {block}, head {head}", fontsize=10)
        axes.set(xticks=[], yticks=[])
    maps[len(maps) // 2].set_xlabel("mean attention of the marked query over the patches", fontsize=10)
    return figure


def effective_rank(layers: Sequence[LayerStatistics]) -> Figure:
    """How many tokens each layer's attention needs, beside how many GLAD's default stages leave it."""
    figure = _figure(6.6, 3.3)
    axes = figure.subplots()
    blocks = [layer.index for layer in layers]
    axes.bar(
        blocks,
        [layer.effective_rank for layer in layers],
        color=GREY,
        label="effective rank of attention (95 % of energy)",
    )
    left = [196] * 6 + [98] * 2 + [49] * 2 + [24] * 2
    axes.step(
        [-0.5, *(block + 0.5 for block in blocks)],
        [left[0], *left],
        where="pre",
        color=BLUE,
        linewidth=2,
        label="tokens left by GLAD at 6, 8, 10",
    )
    axes.set(xlabel="block", ylabel="patch tokens", xticks=blocks, ylim=(0, 235))
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    _plain(axes)
    return figure


def mean_attention(vit: VisionTransformer, photos: str, block: int) -> Tensor:
    """The mean over the photos of a block's attention, ``(H, N, N)``: a static layer's start in closed form."""
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(block,)))
    leanvit.warm_start(lean, vit, photos, steps=0, limit=PHOTOS, progress=False)
    return lean.blocks[block].attn.static.detach()


def _draw_cells(axes: Axes, cells: Tensor) -> None:
    """A line wherever two neighbouring patches belong to different cells, and a tint for each cell."""
    height, width = cells.shape
    axes.imshow(_tints(cells), cmap="Blues", vmin=0, vmax=10, extent=(0, width, height, 0))
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal", xticks=[], yticks=[])
    edge: dict[str, Any] = {"color": BLUE, "linewidth": 1.6, "solid_capstyle": "projecting"}
    for row in range(height):
        for column in range(width):
            if column == 0 or cells[row, column] != cells[row, column - 1]:
                axes.plot([column, column], [row, row + 1], **edge)
            if row == 0 or cells[row, column] != cells[row - 1, column]:
                axes.plot([column, column + 1], [row, row], **edge)
    axes.plot([0, width, width], [height, height, 0], **edge)
    axes.spines[:].set_visible(False)


def _tints(cells: Tensor) -> np.ndarray:
    """A number from 0 up for each patch, such that cells that touch have different ones."""
    grid = cells.numpy()
    touching: dict[int, set[int]] = {int(cell): set() for cell in np.unique(grid)}
    for one, other in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):
        for pair in zip(one.flat, other.flat, strict=True):
            touching[int(pair[0])].add(int(pair[1]))
            touching[int(pair[1])].add(int(pair[0]))
    tint: dict[int, int] = {}
    for cell, neighbours in touching.items():
        used = {tint[neighbour] for neighbour in neighbours if neighbour in tint}
        tint[cell] = next(number for number in range(len(touching)) if number not in used)
    return np.vectorize(tint.get)(grid)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
