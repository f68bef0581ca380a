"""Pictures of results: accuracy against measured throughput, and how a training run went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from leanvit.errors import ConfigError

from ..files import written_whole
from .charts import counted
from .tables import Row, read_csv

# Okabe and Ito's colours, told apart by colour-blind readers; black is the dense model's.
DENSE, LEAN, FRONTIER = "#000000", "#0072B2", "#D55E00"
LESS_IS_BETTER = ("infer_gmacs", "param_count")
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# Where a label may stand: to which side of its mark, and how far from it in points; close by first.
_PLACES = tuple(
    (across, up, distance)
    for distance in (8, 16, 28, 42, 58)
    for across, up in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
)
_SIDES = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}


def pareto(
    rows: Iterable[Row],
    path: str | Path,
    *,
    x: str = "infer_samples_per_sec",
    y: str = "top1",
    title: str = "",
) -> None:
    """Draw accuracy against measured throughput or another column: the dense model marked, a line through what
    nothing beats in both.

    Rows that were measured at different points (engine, precision, batch size) get a panel each: they are not to be
    compared. What is counted and not timed, such as MACs, is the same at each: one panel, each model once.

    Args:
        rows: As `leanvit.compare` gives them; of each, `model` is the label, and `method` "dense" marks the
            dense model.
        path: The picture, ``.png``, ``.svg`` or ``.pdf``.
        x: Column along; of MACs and parameters less is better, of all others more.
        y: Column up, better above.
        title: What stands above.

    Raises:
        ConfigError: No row has both columns.
    """
    usable = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not usable:
        raise ConfigError(f"no row has both {x} and {y} to draw")

    def point(row: Row) -> tuple[str, str, int]:
        return str(row.get("engine", "")), str(row.get("precision", "")), int(row.get("infer_batch_size") or 0)

    if x in LESS_IS_BETTER:
        first = point(usable[0])
        usable = [row for row in usable if point(row) == first]
    panels = [list(group) for _, group in groupby(sorted(usable, key=point), key=point)]
    figure = _figure(len(panels), title)
    for axes, panel in zip(figure.axes, panels, strict=True):
        _pareto_panel(axes, panel, x, y)
        name = "" if x in LESS_IS_BETTER else point_name(panel[0])
        axes.set_title(name, fontsize=10, loc="left", color="0.3")
    figure.axes[0].set_ylabel(_AXES.get(y, y))
    # Names go where there is room, which is known once everything else has its place.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, panel in zip(figure.axes, panels, strict=True):
        _label_points(figure, axes, [(row[x], row[y]) for row in panel], [str(row.get("model", "")) for row in panel])
    with written_whole(path) as part:
        figure.savefig(part)


def training_curves(csv: str | Path, path: str | Path) -> None:
    """Draw a run's losses and accuracies by epoch, from its ``metrics.csv``.

    Args:
        csv: A CSV file with a column ``epoch``; every column whose name holds "loss" is a loss, "top1" an
            accuracy.
        path: The picture, ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ConfigError: The file cannot be read or holds nothing to draw.
    """
    rows = read_csv(csv)
    names = list(rows[0]) if rows else []
    panels = {label: columns for key, label in _CURVES.items() if (columns := [name for name in names if key in name])}
    if "epoch" not in names or not panels:
        raise ConfigError(
            f"{csv} has no epochs with losses or accuracies; its columns are {', '.join(names) or 'none'}"
        )
    figure = _figure(len(panels))
    for axes, (label, columns) in zip(figure.axes, panels.items(), strict=True):
        for name, colour in zip(columns, LINES, strict=False):
            known = [(row["epoch"], row[name]) for row in rows if row[name] is not None]
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
    with written_whole(path) as part:
        figure.savefig(part)


_AXES = {
    "infer_samples_per_sec": "throughput, images/s",
    "infer_gmacs": "GMACs an image",
    "top1": "top-1 accuracy, %",
    "speedup": "speed against dense",
}
_CURVES = {"loss": "loss", "top1": "accuracy, %"}


def frontier(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """The rows that no other row equals or beats in both columns, by rising `x`."""
    worse = 1 if x in LESS_IS_BETTER else -1
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (worse * row[x], -row[y])):
        if not best or row[y] > best[-1][y]:
            best.append(row)
    return sorted(best, key=lambda row: row[x])


def _pareto_panel(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    best = frontier(rows, x, y)
    axes.plot([row[x] for row in best], [row[y] for row in best], color=FRONTIER, linewidth=1.2, alpha=0.7, zorder=1)
    for row in rows:
        is_dense = row.get("method", row.get("model")) == "dense"
        axes.scatter(
            row[x],
            row[y],
            marker="*" if is_dense else "o",
            s=160 if is_dense else 45,
            color=DENSE if is_dense else LEAN,
            zorder=3,
        )
    axes.set_xlabel(_AXES.get(x, x))
    axes.margins(x=0.18, y=0.18)


def _label_points(figure: Figure, axes: Axes, marks: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write a name at every mark, at the nearest place where it covers no mark, no other name and no edge."""
    pixels = figure.dpi / 72
    inside = axes.get_window_extent()
    anchors = axes.transData.transform(marks)
    taken = [_around(anchor, 8 * pixels) for anchor in anchors]
    for line in axes.lines:  # names keep off the frontier too
        corners = axes.transData.transform(line.get_xydata())
        for start, end in pairwise(corners):
            taken += [_around(start + (end - start) * part, pixels) for part in np.linspace(0, 1, 100)]
    for mark, (x, y), name in zip(marks, anchors, names, strict=True):
        label = axes.annotate(
            name, mark, xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=4, parse_math=False
        )
        size = label.get_window_extent()
        for across, up, distance in _PLACES:
            # The box's lower left corner: away from the mark on either axis, or centred on it.
            left = x + across * distance * pixels - size.width * (1 - across) / 2
            bottom = y + up * distance * pixels - size.height * (1 - up) / 2
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            if box.count_overlaps(taken) == 0 and inside.contains(*box.min) and inside.contains(*box.max):
                break
        taken.append(box)
        label.set(position=(across * distance, up * distance), ha=_SIDES[0][across], va=_SIDES[1][up])
        if distance > _PLACES[0][2]:  # no longer at its mark: a line leads there
            axes.annotate(
                "",
                mark,
                xytext=(across * distance, up * distance),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
            )


def _around(centre: np.ndarray, distance: float) -> Bbox:
    x, y = centre
    return Bbox.from_bounds(x - distance, y - distance, 2 * distance, 2 * distance)


def point_name(row: Row) -> str:
    """The point of measurement of a row, for people."""
    parts = [
        str(row.get("engine") or ""),
        str(row.get("precision") or ""),
        f"batch {row['infer_batch_size']}" if row.get("infer_batch_size") else "",
        f"{row['infer_img_size']} px" if row.get("infer_img_size") else "",
        str(row.get("device") or ""),
        counted(row["threads"], "thread") if row.get("threads") and row.get("device") == "cpu" else "",
    ]
    return ", ".join(part for part in parts if part)


def _figure(panels: int, title: str = "") -> Figure:
    figure = Figure(figsize=(min(6.4 * panels, 19.2), 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no state left behind
    figure.subplots(1, panels)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure
