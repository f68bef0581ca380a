"""One page that shows what lean models are worth: everything in a single HTML file that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..errors import ConfigError
from ..files import written_whole
from ..version import __version__
from . import charts
from .gallery import gallery
from .headline import DENSE, by_point, gmacs, headline, ignored, in_macs
from .plots import frontier, point_name
from .tables import Row

if TYPE_CHECKING:
    from ..count import Cost, Share
    from ..explain import Explanation

NOTHING = 1e-3
"""Parts of a model below this share of its cost are not drawn."""

SURENESS_UP_TO = 3
"""Of so many models each photo's caption says how sure they are; of more, only what they take it for."""

FEW = 500
"""Below so many photos, differences in accuracy are mostly chance, and the page says so."""


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Args:
        title: What was measured.
        command: The command line, or the Python call.
        seed: Of everything random in it.
        settings: Every setting, seeds among them.
        environment: Machine and versions, as `leanvit.measure.environment` gives them.
        notes: What else must be known to judge the figures.
    """

    title: str
    command: str = ""
    seed: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class About:
    """What a lean model is.

    Args:
        base: The model it was made of, and the size of its images.
        methods: What each method does, by its text.
    """

    base: str
    methods: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """What a page shows; what is empty is left out of it.

    Args:
        models: What the lean models are, by name.
        rows: As `leanvit.compare` gives them, with `source`, the index of where each comes from.
        costs: What each model costs on paper, the dense one's under "dense".
        curves: Rows of ``metrics.csv`` by run.
        galleries: Explained photos by lean model: the same photos, from the easiest to the hardest.
        difficulty: By lean model, a row for each quarter of the test images, from the easiest to the hardest.
        sources: Where everything comes from.
        count: Images that accuracy was measured on, where known.
        missing: What the page cannot show, and what to do about it.
    """

    models: Mapping[str, About] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    galleries: Mapping[str, Sequence[Explanation]] = field(default_factory=dict)
    difficulty: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    sources: Sequence[Source] = ()
    count: int | None = None
    missing: Sequence[str] = ()


def check_file(path: str | Path, overwrite: bool) -> None:
    """Refuse a place for a page that is taken.

    Raises:
        ConfigError: The file is there and not to be replaced, or it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of an HTML file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; give another --output, or --overwrite")


def write(page: Page, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a page as one HTML file, the file there only when whole.

    Raises:
        ConfigError: The file exists and is not to be replaced, or cannot be written.
    """
    check_file(path, overwrite)
    text = render(page)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def render(page: Page) -> str:
    """The page as HTML."""
    head = headline(page)
    first = head.model if head else ""
    galleries = dict(sorted(page.galleries.items(), key=lambda item: item[0] != first))  # the one spoken of comes first
    data = gallery(galleries) if galleries else None
    return _template().render(
        page=page,
        head=head,
        galleries=galleries,
        ignores=ignored(galleries),
        scatters=scatters(page.rows),
        table_columns=_varying(columns(page.rows)),
        everywhere=_constant(columns(page.rows)),
        costs=cost_charts(page.costs),
        curves=[(f"{run}: {what}", chart) for run, rows in page.curves.items() for what, chart in curve_charts(rows)],
        photos=photo_cells(galleries),
        data=None if data is None else Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        surest=DENSE if any(row["model"] == DENSE and "top1" in row for row in page.rows) else "lean",
        quarters={name: columns(rows) for name, rows in page.difficulty.items()},
        few=page.count is not None and page.count < FEW,
        legend=charts.legend({"dense": "dense", "lean": "lean"}),
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        version=__version__,
        made=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
    )


# ---- charts and tables


def scatters(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """A chart of accuracy against throughput for each point of measurement."""
    usable = [row for row in rows if row.get("top1") is not None and row.get("infer_samples_per_sec") is not None]
    found = []
    for names, group in by_point(usable):
        points = {
            name: charts.Point(
                name,
                row["infer_samples_per_sec"],
                row["top1"],
                dense=name == DENSE,
                about=_about(row),
            )
            for name, row in zip(names, group, strict=True)
        }
        best = [points[row["model"]] for row in frontier(group, "infer_samples_per_sec", "top1")]
        chart = charts.scatter(list(points.values()), "images a second", "accuracy (top-1), %", best)
        title = point_name(group[0])
        if len({row.get("source") for row in usable}) > 1:
            title += f", source {group[0]['source'] + 1}"
        found.append((title, chart))
    return found


def _about(row: Row) -> list[str]:
    facts = [f"{row['top1']:.1f} % top-1", f"{charts.brief(row['infer_samples_per_sec'])} images/s"]
    if row.get("speedup") is not None:
        facts.append(f"{row['speedup']:.2f}× the dense model's speed")
    if macs := gmacs(row):
        facts.append(f"{in_macs(macs)} multiply-accumulates")
    if row.get("latency_p50") is not None:
        facts.append(f"{row['latency_p50']:.1f} ms a batch (median)")
    return facts


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and the text of each cell beside the value it is sorted by."""

    heading: str
    cells: Sequence[tuple[str, Any]]
    numbers: bool


HEADINGS = {
    "model": "Model",
    "quarter": "Quarter",
    "data": "Images",
    "infer_img_size": "Pixels",
    "precision": "Precision",
    "infer_batch_size": "Batch",
    "infer_samples_per_sec": "Images/s",
    "speedup": "Speedup",
    "confidence": "Sureness",
    "dense_top1": "Dense top-1 %",
    "top1": "Top-1 %",
    "top1_diff": "Top-1 change",
    "agreement": "Agreement %",
    "infer_gmacs": "GMACs",
    "gmacs_mean": "GMACs, mean",
    "realised_share": "Realised share",
    "latency_p50": "Median ms",
    "latency_p99": "p99 ms",
    "peak_memory_mb": "Memory MB",
    "param_count": "Parameters, M",
    "method": "Method",
    "trained": "Trained",
    "source": "Source",
}
CURVES = {
    "train_loss": "whole loss",
    "train_ce": "labels",
    "train_kd": "teacher",
    "val_top1": "held-out images",
}
"""What columns of ``metrics.csv`` are called; the terms of methods keep their names."""

FORMATS = {
    "top1": "{:.1f}",
    "dense_top1": "{:.1f}",
    "top1_diff": "{:+.1f}",
    "agreement": "{:.1f}",
    "confidence": "{:.0%}",
    "infer_gmacs": "{:.3f}",
    "gmacs_mean": "{:.3f}",
    "speedup": "{:.2f}×",
    "realised_share": "{:.2f}",
    "latency_p50": "{:.1f}",
    "latency_p99": "{:.1f}",
    "peak_memory_mb": "{:.0f}",
    "param_count": "{:.2f}",
}


def columns(rows: Sequence[Row]) -> list[Column]:
    """The rows as columns for reading: those that say something, in a fixed order."""
    found = []
    for name, heading in HEADINGS.items():
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        if known and not (name == "method" and all(row.get("method") in (row.get("model"), DENSE) for row in rows)):
            numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
            found.append(Column(heading, [(_cell(name, value), value) for value in values], numbers))
    return found


def _varying(found: Sequence[Column]) -> list[Column]:
    """The columns of a table but for those that say the same in every row."""
    return [column for column in found if not _says_one_thing(column)]


def _constant(found: Sequence[Column]) -> str:
    """What those columns say, once."""
    same = [f"{column.heading.lower()} {column.cells[0][0]}" for column in found if _says_one_thing(column)]
    return f"Everywhere: {', '.join(same)}." if same else ""


def _says_one_thing(column: Column) -> bool:
    same = len({text for text, _ in column.cells}) == 1
    return same and column.heading in (HEADINGS[name] for name in ("infer_img_size", "precision", "data", "trained"))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "source":
        return str(value + 1)
    return FORMATS.get(name, "{}").format(value) if name in FORMATS else _plain(value)


def _plain(value: Any) -> str:
    return charts.brief(value) if isinstance(value, float) else str(value)


def cost_charts(costs: Mapping[str, Cost]) -> dict[str, tuple[Markup, Markup]]:
    """For each lean model, bars by layer and by kind of operation, beside the dense model's."""
    dense = costs.get(DENSE)
    found = {}
    for name, cost in costs.items():
        if name == DENSE:
            continue
        beside = {DENSE: dense, name: cost} if dense else {name: cost}
        parts = [_shares([one.by_layer for one in beside.values()]), _shares([one.by_kind for one in beside.values()])]
        by_layer, by_kind = (charts.bars(part, list(beside), "million multiply-accumulates") for part in parts)
        found[name] = by_layer, by_kind
    return found


def _shares(costs: Sequence[Mapping[str, Share]]) -> dict[str, list[float]]:
    """Million MACs of each part in each model, parts as images meet them; those of next to nothing are left out."""

    def place(part: str) -> tuple[int, int]:
        name, _, index = part.partition(".")
        return {"patch_embed": 0, "blocks": 1}.get(name, 2), int(index) if index.isdigit() else 0

    parts = sorted({part for cost in costs for part in cost}, key=place)
    found = {part: [cost[part].macs / 1e6 if part in cost else 0.0 for cost in costs] for part in parts}
    least = NOTHING * sum(map(max, found.values()))
    return {part: values for part, values in found.items() if max(values) > least}


def curve_charts(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Losses, and accuracy where it was measured, by epoch: what each chart shows, and the chart."""
    if not rows or "epoch" not in rows[0]:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    groups = {
        ("loss", "loss"): [name for name in names if name.startswith("train_")],
        ("accuracy", "accuracy, %"): [name for name in names if name.endswith("top1")],
    }
    found = []
    for (title, label), group in groups.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for name in group:
            points = [(row["epoch"], row[name]) for row in rows if _is_number(row.get(name))]
            if points and points not in series.values():  # a loss of one term is that term
                series[CURVES.get(name) or name.removeprefix("train_")] = points
        if series:
            found.append((title, charts.lines(series, "epoch", label)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def photo_cells(galleries: Mapping[str, Sequence[Explanation]]) -> list[dict[str, Any]]:
    """For each photo, what every model takes it for, in words: readable without a script, and on paper."""
    if not galleries:
        return []
    names = list(galleries) if len(galleries) > 1 else ["lean"]
    cells = []
    for photos in zip(*galleries.values(), strict=True):
        first = photos[0]
        best = {DENSE: first.dense.top[0]} if first.dense else {}
        best |= {name: one.lean.top[0] for name, one in zip(names, photos, strict=True)}
        said: dict[str, list[str]] = {}
        for name, prediction in best.items():
            sure = f" {prediction.probability:.0%}" if len(names) <= SURENESS_UP_TO else ""
            said.setdefault(prediction.name, []).append(name + sure)
        cells.append({"name": first.name, "label": first.label, "said": said})
    return cells


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
