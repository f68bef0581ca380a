"""How fast models are and how much memory they take: lean against dense, in one run, taking turns."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from .count import Cost, count, deployed_form, random_images
from .data import image_batches
from .engines import ENGINES, Engine, check_engines
from .errors import ConfigError, LeanVitWarning
from .model import LeanModel, data_dependent
from .ops.processor import has_bf16, warn_of_emulation
from .report.tables import Row

if TYPE_CHECKING:
    from .data import ImageSource

SECONDS, FEWEST, MOST = 10.0, 10, 300
"""A point takes so many seconds, but at least and at most so many rounds, unless told how many."""

SHORT = 0.05
"""Where a call takes fewer seconds, all are made twice in their turns, and the second one counts: the first brings back
to the caches what the other models drove out, and a model that is in use runs alone."""

ROTATION = 4
"""Of real images, so many batches take turns: where cost differs by image, one batch says little."""


def bench(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    *,
    img_size: int | tuple[int, int] | None = None,
    images: ImageSource | Mapping[str, ImageSource] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    precisions: Sequence[str] | None = None,
    engines: Sequence[str] = ("torch",),
    threads: int = 2,
    iterations: int | None = None,
    warmup: int = 3,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[Row]:
    """Time models against the first of them, one batch each in every round: what disturbs one disturbs all.

    A row holds medians over the rounds: images/s, step time and latency percentiles in ms, `latency_spread`
    (the middle half of the step times, over their median), `speedup` over the first model at the same point,
    and `realised_share`, the time saved over the MACs saved, both as fractions of the first model's. What
    `peak_memory_mb` holds is said at `peak_memory`; it is empty for engines that do not allocate through torch.

    Args:
        models: The dense model and lean ones by name, the dense one first; or just (dense, lean). Lean models
            are deployed first.
        img_size: Height and width in pixels; each model's own when not given.
        images: Real images to run on, as a path, data set, loader or tensor ``(n, channels, H, W)``; random
            ones when not given, which is good enough only for models whose cost does not depend on the image. Or one
            of these for each model, by its name.
        batch_sizes: Images a batch.
        precisions: "fp32", "bf16", "fp16" or "int8", as the engines have them (`leanvit.engines`); in torch, weights
            and images are cast, nothing is done by autocast. When not given, fp32, and bf16 where the device computes
            in it.
        engines: What runs the models: "torch", "compile", "onnxruntime", "openvino". In each, models take turns with
            the first one in the same engine.
        threads: CPU threads.
        iterations: Rounds at each point; about ten seconds' worth when not given.
        warmup: Rounds before those, not counted.
        device: Where to run.
        progress: Show a progress bar.

    Raises:
        ConfigError: An argument is out of range, or an engine is not installed or does not have a precision.
        ExportError: A model cannot be exported to an engine.
        InputSizeError: A model does not take images of this size.
    """
    if img_size is not None and images is not None:
        raise ConfigError("both img_size and images are given; images have their size")
    models = _named(models)
    device = torch.device(device)
    if precisions is None:
        usual = has_bf16(device.type) and all("bf16" in ENGINES[name].precisions for name in engines if name in ENGINES)
        precisions = ("fp32", "bf16") if usual else ("fp32",)
    _check(batch_sizes, precisions, threads, iterations, warmup)
    check_engines(engines, precisions, device)
    models = {name: deployed_form(model) for name, model in models.items()}
    _warn_of_random_images(models, images)
    if "bf16" in precisions:
        warn_of_emulation(device.type)
    own_images = images if isinstance(images, Mapping) else dict.fromkeys(models, images)
    costs = {name: _cost(model, img_size, own_images[name]) for name, model in models.items()}
    rows: list[Row] = []
    with (
        _threads(threads),
        Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar,
    ):
        points = list(product(engines, precisions))
        task = bar.add_task("", total=len(points) * len(batch_sizes))
        for engine, precision in points:
            bar.update(task, description=f"preparing {engine}, {precision}")
            ready = {name: ENGINES[engine](model, precision, threads, device) for name, model in models.items()}
            for batch_size in batch_sizes:
                bar.update(task, description=f"timing {engine}, {precision}, batch {batch_size}")
                runners = {
                    name: _Runner(run, _batches(models[name], img_size, own_images[name], batch_size), device)
                    for name, run in ready.items()
                }
                seconds = take_turns(list(runners.values()), iterations=iterations, warmup=warmup)
                point = {
                    "infer_batch_size": batch_size,
                    "precision": precision,
                    "engine": engine,
                    "threads": threads,
                    "device": str(device),
                    "torch": torch.__version__,
                }
                for (name, runner), times in zip(runners.items(), seconds, strict=True):
                    rows.append(_row(name, models[name], costs[name], times, runner.peak_memory(), point))
                bar.advance(task)
    _compare_with_first(rows, costs)
    return rows


def take_turns(
    runs: Sequence[Callable[[], Any]], *, iterations: int | None = None, warmup: int = 3, settle: float = SHORT
) -> list[list[float]]:
    """Seconds that each of several functions takes, round by round; each goes first in its turn.

    Args:
        runs: What to time.
        iterations: Rounds; about ten seconds' worth when not given.
        warmup: Rounds before those, not counted.
        settle: Where a call of any takes fewer seconds, all are made twice in their turns, and the second one counts.
    """
    times: list[list[float]] = [[] for _ in runs]
    with no_garbage_collection():
        shortest = 0.0
        for _ in range(warmup):
            shortest = min(map(_timed, runs))
        calls = 2 if shortest < settle else 1
        rounds, start = 0, time.perf_counter()
        while rounds < (iterations or FEWEST) or (
            iterations is None and rounds < MOST and time.perf_counter() - start < SECONDS
        ):
            for turn in range(len(runs)):
                which = (rounds + turn) % len(runs)
                times[which].append([_timed(runs[which]) for _ in range(calls)][-1])
            rounds += 1
    return times


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_memory(run: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes that what `run` allocates takes at one time.

    Counted at torch's allocator, on the CPU by its profiler as on a GPU by `torch.cuda.max_memory_allocated`:
    every tensor, and what kernels ask torch for; the same figure on every run. Scratch of libraries (inputs
    reordered by oneDNN, say) is not seen. The process's resident size would hold it, but also what the C
    library keeps for later, which depends on what ran before. `bench` adds the model's weights, in every form that
    is kept of them, and the batch: its ``peak_memory_mb`` (millions of bytes) is what one forward pass needs.

    Args:
        run: What to measure; it should have run before, so that what is made once is made.
        device: Where it runs.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notes to stderr, read when it first starts
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    live = np.cumsum([bytes_ for _, bytes_ in sorted(changes, key=lambda change: change[0])])
    return int(live.max(initial=0))


# ---- one point


class _Runner:
    """Runs a model on one batch, the next one at every second call: a turn may be two calls."""

    def __init__(self, run: Engine, batches: Sequence[Tensor], device: torch.device) -> None:
        self.run = run
        self.batches = [batch.to(device, run.dtype) for batch in batches]
        self.device = device
        self.calls = 0

    def __call__(self) -> None:
        self.run(self.batches[self.calls // 2 % len(self.batches)])
        self.calls += 1

    def peak_memory(self) -> int | None:
        """Bytes that one forward pass needs: held ones, batch, and what it allocates; None where torch cannot tell."""
        held = self.run.held()
        if not held:
            return None
        return sum(tensor.nbytes for tensor in [*held, self.batches[0]]) + peak_memory(self, self.device)


def _row(name: str, model: nn.Module, cost: Cost, seconds: Sequence[float], memory: int | None, point: Row) -> Row:
    p25, p50, p75, p90, p99 = (1e3 * float(value) for value in np.percentile(seconds, (25, 50, 75, 90, 99)))
    height, width = cost.img_size
    return {
        "model": name,
        "method": str(model.lean) if isinstance(model, LeanModel) else "dense",
        "infer_img_size": height if height == width else f"{height}x{width}",
        "infer_samples_per_sec": 1e3 * point["infer_batch_size"] / p50,
        "infer_step_time": p50,
        "param_count": cost.params / 1e6,
        "infer_gmacs": cost.macs / 1e9,
        "infer_macts": cost.macts / 1e6,
        "latency_p50": p50,
        "latency_p90": p90,
        "latency_p99": p99,
        "latency_spread": (p75 - p25) / p50,
        "iterations": len(seconds),
        "peak_memory_mb": None if memory is None else memory / 1e6,
        **point,
    }


def _compare_with_first(rows: list[Row], costs: Mapping[str, Cost]) -> None:
    """Add to every row its speedup and realised share against the first model's row at the same point."""
    first = next(iter(costs))
    for index, row in enumerate(rows):
        dense = rows[index - index % len(costs)]
        row["speedup"] = row["infer_samples_per_sec"] / dense["infer_samples_per_sec"]
        row["realised_share"] = realised_share(row["speedup"], costs[row["model"]].macs / costs[first].macs)


def realised_share(speedup: float, macs_ratio: float) -> float | None:
    """The time saved over the MACs saved, both as fractions of the dense model's; None where no MACs were
    saved.

    Args:
        speedup: Dense time over lean time.
        macs_ratio: Lean MACs over dense MACs.
    """
    return (1 - 1 / speedup) / (1 - macs_ratio) if macs_ratio < 1 else None


# ---- setting up


def _named(models: Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(models, Mapping):
        named = dict(models)
    elif len(models) == 2:
        named = dict(zip(("dense", "lean"), models, strict=True))
    else:
        raise ConfigError(
            f"{len(models)} models without names; give (dense, lean) or a dict by name, the dense model first"
        )
    if not named:
        raise ConfigError("no model to time; give a dict by name, the dense model first")
    return named


def _check(
    batch_sizes: Sequence[int], precisions: Sequence[str], threads: int, iterations: int | None, warmup: int
) -> None:
    lowest = {"batch size": (min(batch_sizes, default=0), 1), "threads": (threads, 1), "warmup": (warmup, 0)}
    if iterations is not None:
        lowest["iterations"] = (iterations, 1)
    for name, (value, least) in lowest.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if not precisions:
        raise ConfigError("no precision to time in; fp32 and bf16 are usual")


def _warn_of_random_images(models: Mapping[str, nn.Module], images: object) -> None:
    for name, model in models.items():
        if images is None and data_dependent(model):
            warnings.warn(
                f"{name}: what it costs depends on the image, and random images say little of photos; give images "
                "(--data-dir)",
                LeanVitWarning,
                stacklevel=3,
            )


def _cost(model: nn.Module, img_size: int | tuple[int, int] | None, images: ImageSource | None) -> Cost:
    if images is None:
        return count(model, img_size)
    return count(model, images=_batches(model, img_size, images, 32)[0])


def _batches(
    model: nn.Module, img_size: int | tuple[int, int] | None, images: ImageSource | None, batch_size: int
) -> list[Tensor]:
    if images is None:
        return [random_images(model, img_size, batch_size)]
    batches = list(image_batches(images, model, batch_size, limit=ROTATION * batch_size))
    whole = [batch for batch in batches if len(batch) == batch_size]
    if whole:
        return whole
    # Fewer images than one batch: the same ones again.
    few = torch.cat(batches)
    return [few.repeat(-(-batch_size // len(few)), 1, 1, 1)[:batch_size]]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not until the end; inside another such block, nothing more happens."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
