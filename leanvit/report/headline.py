"""A page in one sentence, and the few figures that a reader wants first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .charts import brief, counted
from .tables import Row

if TYPE_CHECKING:
    from ..explain import Explanation
    from .page import Page

DENSE = "dense"
"""What rows and costs call the model that the others are compared with."""

WITHIN = 1.0
"""A lean model is put forward if it is the fastest within so many points of the dense model's accuracy."""


@dataclass(frozen=True)
class Figure:
    """A figure of the dense model, the lean model's, and what that makes."""

    name: str
    dense: str
    lean: str
    change: str = ""


@dataclass(frozen=True)
class Headline:
    """The page in a sentence, and its figures.

    Args:
        model: The lean model that it speaks of.
        title: What was measured.
        sentence: How much faster, at what accuracy.
        chosen: Why this model is put forward, where there are several.
        machine: Where it was measured.
        figures: Dense beside lean.
    """

    model: str
    title: str
    sentence: str
    chosen: str
    machine: str
    figures: Sequence[Figure]


def headline(page: Page) -> Headline | None:
    """The summary of a page that compares at least one lean model with the dense one."""
    points = [dict(zip(names, rows, strict=True)) for names, rows in by_point(page.rows)]
    points = [models for models in points if DENSE in models and len(models) > 1]
    if not points:
        return None
    largest = max(points, key=_rank)
    name, chosen = _put_forward(largest)
    lean, dense = largest[name], largest[DENSE]
    same_work = [models for models in points if _work(models[DENSE]) == _work(dense) and name in models]
    figures = [_speed(models[DENSE], models[name]) for models in same_work]
    figures += _accuracy(dense, lean, page.count) + _paper(dense, lean)
    ratio = lean["infer_samples_per_sec"] / dense["infer_samples_per_sec"]
    sentence = f"{name} classifies {ratio:.2f} times as many images a second as the dense model"
    if ratio < 1:
        sentence = f"{name} is slower than the dense model: it classifies {ratio:.2f} times as many images a second"
    if "top1" in lean and "top1" in dense:
        sentence += f", at {lean['top1']:.1f}\u00a0% accuracy instead of {dense['top1']:.1f}\u00a0%"
    elif "top1" in lean:
        sentence += f", at {lean['top1']:.1f}\u00a0% accuracy"
    machine = page.sources[lean.get("source", 0)].environment if page.sources else {}
    return Headline(
        model=name,
        title=page.sources[lean.get("source", 0)].title if page.sources else "",
        sentence=sentence + ".",
        chosen=chosen,
        machine=_machine(lean, machine),
        figures=figures,
    )


def by_point(rows: Sequence[Row]) -> list[tuple[list[str], list[Row]]]:
    """The rows of each point of measurement (data, size, precision, batch …), with their models' names."""

    def point(row: Row) -> tuple[str, ...]:
        names = ("source", "data", "infer_img_size", "precision", "engine", "device", "threads", "infer_batch_size")
        return tuple(str(row.get(name, "")) for name in names)

    timed = [row for row in rows if row.get("infer_samples_per_sec") is not None]
    groups = [list(group) for _, group in groupby(sorted(timed, key=point), key=point)]
    return [([str(row["model"]) for row in group], group) for group in groups]


def _rank(models: Mapping[str, Row]) -> tuple[bool, bool, int]:
    """The point to put forward: with accuracy, in fp32, in large batches."""
    row = next(row for name, row in models.items() if name != DENSE)
    return "top1" in row, row.get("precision") == "fp32", int(row.get("infer_batch_size") or 0)


def _work(row: Row) -> tuple[Any, ...]:
    return row.get("source"), row.get("data"), row.get("infer_img_size")


def _put_forward(models: Mapping[str, Row]) -> tuple[str, str]:
    """The lean model to speak of, and why this one."""
    lean = {name: row for name, row in models.items() if name != DENSE}
    accuracy = models[DENSE].get("top1")
    if len(lean) == 1:
        return next(iter(lean)), ""
    if accuracy is None or any("top1" not in row for row in lean.values()):
        name = max(lean, key=lambda name: lean[name]["infer_samples_per_sec"])
        return name, f"The fastest of {len(lean)} lean models."
    close = [name for name, row in lean.items() if row["top1"] >= accuracy - WITHIN]
    if close:
        name = max(close, key=lambda name: lean[name]["infer_samples_per_sec"])
        return name, f"Of {len(lean)} lean models, the fastest that stays within {WITHIN:.0f} point of the dense one."
    name = max(lean, key=lambda name: lean[name]["top1"])
    return name, f"None of {len(lean)} lean models stays within {WITHIN:.0f} point of the dense one; this is closest."


def _speed(dense: Row, lean: Row) -> Figure:
    ratio = lean["infer_samples_per_sec"] / dense["infer_samples_per_sec"]
    batch = lean.get("infer_batch_size")
    return Figure(
        f"Images a second, {'one at a time' if batch == 1 else f'in batches of {batch}'} ({lean.get('precision', '')})",
        brief(dense["infer_samples_per_sec"]),
        brief(lean["infer_samples_per_sec"]),
        f"{ratio:.2f}×",
    )


def _accuracy(dense: Row, lean: Row, count: int | None) -> list[Figure]:
    if "top1" not in lean:
        return []
    known = "top1" in dense
    change = f"{lean['top1'] - dense['top1']:+.1f} points" if known else ""
    of = f" of {count} images (± {standard_error(lean['top1'], count):.1f})" if count else ""
    before = f"{dense['top1']:.1f}" if known else "?"
    figures = [Figure(f"Accuracy (top-1), %{of}", before, f"{lean['top1']:.1f}", change)]
    if lean.get("agreement") is not None:
        figures.append(Figure("Same class named as by the dense model, %", "", f"{lean['agreement']:.1f}"))
    return figures


def _paper(dense: Row, lean: Row) -> list[Figure]:
    before, after = dense.get("infer_gmacs"), gmacs(lean)
    if not before or not after:
        return []
    saved = 1 - after / before
    unit, factor = ("billions", 1) if before >= 0.1 else ("millions", 1e3)
    figures = [
        Figure(
            f"Multiply-accumulates an image, {unit}",
            brief(factor * before),
            brief(factor * after),
            f"{saved:.0%} fewer" if saved >= 0 else f"{-saved:.0%} more",
        )
    ]
    if dense.get("peak_memory_mb") and lean.get("peak_memory_mb"):
        ratio = lean["peak_memory_mb"] / dense["peak_memory_mb"]
        figures.append(
            Figure("Memory, MB", f"{dense['peak_memory_mb']:.0f}", f"{lean['peak_memory_mb']:.0f}", f"{ratio:.2f}×")
        )
    return figures


def gmacs(row: Row) -> float | None:
    """Billion multiply-accumulates an image: the images' mean where they differ."""
    return row.get("gmacs_mean") or row.get("infer_gmacs")


def in_macs(value: float) -> str:
    """Billion multiply-accumulates, in the unit that reads best."""
    return f"{brief(value)} G" if value >= 0.1 else f"{brief(1e3 * value)} M"


def standard_error(percent: float, count: int) -> float:
    """By how much an accuracy in percent, measured on so many images, may be off by chance (one sigma)."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count)


def _machine(row: Row, environment: Mapping[str, Any]) -> str:
    device = str(row.get("device") or "cpu")
    gpus = environment.get("gpus") or ()
    processor = environment.get("processor") or "a processor that was not recorded"
    where = gpus[0] if gpus and device != "cpu" else processor
    threads = f", {counted(row['threads'], 'thread')}" if row.get("threads") and device == "cpu" else ""
    versions = environment.get("versions") or {}
    torch = versions.get("torch") or row.get("torch")
    return f"{where}{threads}" + (f", torch {torch}" if torch else "")


def ignored(galleries: Mapping[str, Sequence[Explanation]]) -> str:
    """What the model that is shown first leaves out of the photos, in a sentence; empty if nothing."""
    photos = next(iter(galleries.values()), ())
    if not photos:
        return ""
    last = [one.blocks[-1] for one in photos]
    patches = last[0].source.shape[1]
    tokens = sum(block.tokens for block in last) / len(last)
    out = sum(block.left_out.float().mean().item() for one in photos for block in one.blocks)
    out /= sum(len(one.blocks) for one in photos)
    parts = []
    if tokens < patches:
        several = "s" if tokens > 1 else ""
        parts.append(f"its last block works on {brief(tokens)} token{several} in place of {patches} patches")
    if out >= 0.005:
        parts.append(f"over all blocks it leaves out {out:.0%} of the patches")
    shown = f"{len(photos)} photos" if len(photos) > 1 else "photo"
    return f"In the {shown} below, {' and '.join(parts)}." if parts else ""
