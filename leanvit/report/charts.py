"""Charts of a page as SVG: sizes in the text's own scale, colours left to the page's style sheet, no script needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
LETTER = 7.4
"""Mean width of a letter at the charts' text size; what decides whether names meet."""


@dataclass(frozen=True)
class Point:
    """A mark in a scatter chart.

    Args:
        name: What stands beside it.
        x, y: Where.
        dense: Whether it is the dense model.
        about: What is said of it on hovering, one fact a line.
    """

    name: str
    x: float
    y: float
    dense: bool = False
    about: Sequence[str] = field(default=())


class Scale:
    """Values of an axis to places on the page, and round values to mark."""

    def __init__(self, values: Iterable[float], start: float, end: float, *, zero: bool = False, margin: float = 0.08):
        values = list(values)
        low, high = min(values), max(values)
        space = (high - low) * margin if high > low else abs(high) * margin or 1.0
        self.low, self.high = (0.0 if zero else low - space), high + space
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5, *, whole: bool = False) -> list[float]:
        """Round values within the scale, about so many; only whole numbers if asked."""
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        step = max(step, 1.0) if whole else step
        first = math.ceil(self.low / step)
        return [round(index * step, 10) for index in range(first, math.floor(self.high / step) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str, best: Sequence[Point] = ()) -> Markup:
    """Named points with a line through the best of them; each can be reached by keyboard and says what it is.

    Args:
        points: At least one.
        x_label, y_label: What the axes show.
        best: Points to join by a line, by rising x.
    """
    x = Scale((point.x for point in points), LEFT, WIDTH - RIGHT, margin=0.18)
    y = Scale((point.y for point in points), HEIGHT - BOTTOM, TOP, margin=0.18)
    line = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in best)
    parts = [_axes(x, y, x_label, y_label), Markup('<polyline class="best" points="{}"/>').format(line)]
    boxes = [_around(x(point.x), y(point.y), 5) for point in points]
    for start, end in pairwise(best):  # names keep off the line too
        steps = (step / 40 for step in range(41))
        boxes += [_around(x(start.x + (end.x - start.x) * s), y(start.y + (end.y - start.y) * s), 1) for s in steps]
    for point in points:
        anchor, left, baseline, box = _free_place(point.name, x(point.x), y(point.y), boxes)
        boxes.append(box)
        about = "\n".join((point.name, *point.about))
        parts.append(
            Markup(
                '<g class="point {}" tabindex="0" role="img" aria-label="{}" data-about="{}">'
                '<circle cx="{:.1f}" cy="{:.1f}" r="5"/><text class="{}" x="{:.1f}" y="{:.1f}">{}</text></g>'
            ).format(
                "dense" if point.dense else "lean",
                about.replace("\n", ", "),
                about,
                x(point.x),
                y(point.y),
                anchor,
                left,
                baseline,
                point.name,
            )
        )
    return _svg(f"{y_label} against {x_label}: " + "; ".join(point.name for point in points), HEIGHT, parts)


def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], unit: str) -> Markup:
    """Bars side by side, one line of the chart for each group, one bar in it for each name.

    Args:
        groups: Values by group, as many as there are names.
        names: What the bars of a group are, the dense model first.
        unit: Of the values.
    """
    row, label = 13 * len(names) + 8, max(map(len, groups)) * LETTER + 8
    x = Scale([0, *(value for values in groups.values() for value in values)], label, WIDTH - 62, zero=True, margin=0)
    parts = []
    for place, (group, values) in enumerate(groups.items()):
        top = place * row + 4
        parts.append(
            Markup('<text class="end" x="{:.1f}" y="{:.1f}">{}</text>').format(label - 6, top + row / 2, group)
        )
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="10">'
                    "<title>{} {}: {} {}</title></rect>"
                    '<text class="small" x="{:.1f}" y="{:.1f}">{}</text>'
                ).format(
                    "lean" if index else "dense",
                    label,
                    top + 13 * index,
                    max(x(value) - label, 0),
                    group,
                    name,
                    brief(value),
                    unit,
                    x(value) + 4,
                    top + 13 * index + 9,
                    brief(value),
                )
            )
    return _svg(f"{unit} by part, {' beside '.join(names)}", len(groups) * row + 8, parts)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """Lines over a common axis, each with its name at its end.

    Args:
        series: Points ``(x, y)`` of each line, by name; at least one, none of them empty.
        x_label, y_label: What the axes show.
    """
    room = max(map(len, series)) * LETTER + 10
    x = Scale((x for points in series.values() for x, _ in points), LEFT, WIDTH - room, margin=0.02)
    y = Scale((y for points in series.values() for _, y in points), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, x_label, y_label, whole=True)]
    ends = _spread({name: y(points[-1][1]) for name, points in series.items()})
    for place, (name, points) in enumerate(series.items()):
        where = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        last = x(points[-1][0])
        parts.append(
            Markup('<polyline class="line s{}" points="{}"/><text class="s{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
                place % 6, where, place % 6, last + 5, ends[name] + 4, name
            )
        )
        mark = Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>')
        parts += [mark.format(place % 6, x(a), y(b)) for a, b in points]
    return _svg(f"{y_label} by {x_label}: {', '.join(series)}", HEIGHT, parts)


def brief(value: float) -> str:
    """A value in three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def counted(number: int, thing: str) -> str:
    """So many things: "1 thread", "2 threads"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _svg(about: str, height: float, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="group" aria-label="{}">{}</svg>').format(
        WIDTH, height, about, Markup("").join(parts)
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, *, whole: bool = False) -> Markup:
    bottom, right = HEIGHT - BOTTOM, x.end
    upright = Markup(
        '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        '<text class="mid" x="{0:.1f}" y="{3}">{4}</text>'
    )
    level = Markup(
        '<line class="grid" x1="{0}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text class="end" x="{3}" y="{4:.1f}">{5}</text>'
    )
    marks = [upright.format(x(tick), TOP, bottom, bottom + 16, brief(tick)) for tick in x.ticks(whole=whole)]
    marks += [level.format(LEFT, right, y(tick), LEFT - 6, y(tick) + 4, brief(tick)) for tick in y.ticks()]
    names = Markup(
        '<text class="mid muted" x="{:.1f}" y="{}">{}</text>'
        '<text class="mid muted" transform="translate(11 {:.1f}) rotate(-90)">{}</text>'
    ).format((LEFT + right) / 2, HEIGHT - 6, x_label, (TOP + bottom) / 2, y_label)
    return Markup("").join([*marks, names])


Box = tuple[float, float, float, float]


def _around(x: float, y: float, distance: float) -> Box:
    return x - distance, y - distance, x + distance, y + distance


def _free_place(name: str, x: float, y: float, taken: Sequence[Box]) -> tuple[str, float, float, Box]:
    """Where a name can stand beside its mark without meeting a mark, the line, another name or the edge.

    Returns:
        Style class of the text's anchor, where that is, and what the text takes.
    """
    width = len(name) * LETTER
    places = [("start", x + 9, y + 4), ("end", x - 9, y + 4), ("mid", x, y - 10), ("mid", x, y + 20)]
    beside = (("start", x + 9), ("end", x - 9))
    places += [(anchor, at, y + 4 + up) for up in (-14, 14, -28, 28, -42, 42, -56, 56) for anchor, at in beside]
    for anchor, at, baseline in places:
        left = at - width * {"start": 0, "mid": 0.5, "end": 1}[anchor]
        box = (left, baseline - 10, left + width, baseline + 3)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_meet(box, other) for other in taken):
            return anchor, at, baseline, box
    return "end" if x > WIDTH / 2 else "start", x, y - 8, _around(x, y, 0)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spread(places: Mapping[str, float], apart: float = 13) -> dict[str, float]:
    """The same heights, moved down where two names would meet."""
    moved: dict[str, float] = {}
    for name in sorted(places, key=places.__getitem__):
        moved[name] = max(places[name], max(moved.values(), default=-apart) + apart)
    return moved


def legend(names: Mapping[str, str]) -> Markup:
    """What each colour stands for: style class by name."""
    items = (Markup('<span class="key {}">{}</span>').format(style, escape(name)) for name, style in names.items())
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))
