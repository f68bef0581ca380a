"""Results as rows of named columns: printed as a table, written as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from leanvit.errors import ConfigError

from ..files import written_whole

Row = dict[str, Any]

COLUMNS = (
    # timm's results files
    *(
        "model",
        "img_size",
        "top1",
        "top1_err",
        "top5",
        "top5_err",
        "param_count",
        "crop_pct",
        "interpolation",
    ),
    *(
        "infer_img_size",
        "infer_samples_per_sec",
        "infer_step_time",
        "infer_batch_size",
        "infer_gmacs",
        "infer_macts",
    ),
    # ours
    *("method", "budget", "teacher", "top1_diff", "agreement", "gmacs_mean", "gmacs_p5", "gmacs_p95", "density"),
    *(
        "latency_p50",
        "latency_p90",
        "latency_p99",
        "latency_spread",
        "speedup",
        "realised_share",
        "peak_memory_mb",
    ),
    *("iterations", "engine", "precision", "threads", "device", "torch", "trained"),
)
"""The order of columns in a file; any other column follows them."""

# What is printed: heading and format of each column, in reading order. Columns of `COLUMNS` that are not here
# are for files.
_PRINTED = {
    "photo": ("photo", "{}"),
    "model": ("model", "{}"),
    "method": ("method", "{}"),
    "policies": ("policies", "{}"),
    "budget": ("budget", "{:.2f}"),
    "prediction": ("prediction", "{}"),
    "layer": ("layer", "{}"),
    "top1": ("top-1 %", "{:.1f}"),
    "top1_diff": ("diff", "{:+.1f}"),
    "top5": ("top-5 %", "{:.1f}"),
    "agreement": ("agree %", "{:.1f}"),
    "infer_gmacs": ("GMACs", "{:.3f}"),
    "gmacs": ("GMACs", "{:.4f}"),
    "gmacs_mean": ("GMACs mean", "{:.3f}"),
    "gmacs_p5": ("5 %", "{:.3f}"),
    "gmacs_p95": ("95 %", "{:.3f}"),
    "density": ("keys", "{:.1%}"),
    "macs_share": ("share", "{:.1%}"),
    "param_count": ("params M", "{:.3f}"),
    "infer_img_size": ("px", "{}"),
    "relative_variance": ("relative variance", "{:.3f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "engine": ("engine", "{}"),
    "device": ("device", "{}"),
    "threads": ("threads", "{}"),
    "precision": ("precision", "{}"),
    "infer_batch_size": ("batch", "{}"),
    "infer_samples_per_sec": ("images/s", "{:.1f}"),
    "speedup": ("speedup", "{:.2f}x"),
    "realised_share": ("realised", "{:.2f}"),
    "latency_p50": ("p50 ms", "{:.1f}"),
    "latency_p99": ("p99 ms", "{:.1f}"),
    "latency_spread": ("spread", "{:.0%}"),
    "peak_memory_mb": ("peak MB", "{:.1f}"),
}
# What says the same in every row stands below the table once.
_BELOW = ("infer_img_size", "engine", "device", "threads", "precision", "infer_batch_size")


@dataclass(frozen=True)
class Table:
    """Rows of results that print as a table: `print(table)`, or `rich.print(table)` in colour.

    Args:
        rows: One dict a row, by column name.
        title: What stands above the table.
    """

    rows: Sequence[Row]
    title: str = ""

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, columns in timm's order, whole or not at all; nested values are for JSON."""
        flat = [{name: value for name, value in row.items() if not _nested(value)} for row in self.rows]
        columns = column_order(flat)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _in_file(value) for name, value in row.items()} for row in flat)
        _write(path, text.getvalue())

    def to_json(self, path: str | Path, **about: Any) -> None:
        """Write the rows as JSON, the file there only when whole.

        Args:
            path: The file.
            about: What else to write beside the rows, such as ``settings`` and ``environment``.
        """
        _write(path, json.dumps({**about, "rows": list(self.rows)}, indent=2, default=str) + "\n")

    def __rich__(self) -> RichTable:
        known = {name for row in self.rows for name, value in row.items() if value is not None and not _nested(value)}
        columns = [name for name in _PRINTED if name in known]
        columns += [name for name in column_order(self.rows) if name in known and name not in (*_PRINTED, *COLUMNS)]
        if all(row.get("method") in (row.get("model"), None, "dense") for row in self.rows):
            columns = [name for name in columns if name != "method"]  # says no more than the names do
        same = [name for name in columns if name in _BELOW and len({row.get(name) for row in self.rows}) == 1]
        below = ", ".join(f"{_heading(name)} {self.rows[0][name]}" for name in same)
        table = RichTable(
            title=escape(self.title) or None,
            caption=below or None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        shown = [name for name in columns if name not in same]
        for name in shown:
            is_text = any(isinstance(row.get(name), str) for row in self.rows)
            table.add_column(
                _heading(name), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
            )
        for row in self.rows:
            table.add_row(*(_printed(name, row.get(name)) for name in shown))
        return table

    def __str__(self) -> str:
        table = self.__rich__()
        console = Console(file=io.StringIO(), width=1000)
        console.width = console.measure(table).maximum  # nothing is cut where the terminal's width is not known
        console.print(table)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines if line.strip())


def column_order(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column of the rows: those of `COLUMNS` first and in that order, others as they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in COLUMNS if name in names] + [name for name in names if name not in COLUMNS]


def read_csv(path: str | Path) -> list[Row]:
    """Read rows by column name: numbers as numbers, an empty field as None.

    Raises:
        ConfigError: The file is missing or has no header.
    """
    try:
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames
            rows = [{name: _from_file(value) for name, value in row.items() if name} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path} as CSV: {error}") from error
    if not columns:
        raise ConfigError(f"{path} is empty; a CSV file starts with its column names")
    return rows


def _write(path: str | Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text)


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _heading(name: str) -> str:
    return _PRINTED[name][0] if name in _PRINTED else name


def _printed(name: str, value: Any) -> str:
    if value is None:
        return ""
    form = _PRINTED[name][1] if name in _PRINTED else "{:.4g}" if isinstance(value, float) else "{}"
    return escape(form.format(value))


def _in_file(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _from_file(value: str | None) -> Any:
    for kind in (int, float):
        try:
            return kind(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return value or None
