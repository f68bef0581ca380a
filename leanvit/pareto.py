"""A set of models in the same axes: accuracy against throughput, engine by engine, and against MACs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bench import bench
from .count import deployed_form
from .data import open_data
from .engines import ENGINES, PRECISIONS, check_engines
from .measure import decides_per_image, evaluate
from .report.plots import pareto as draw
from .report.tables import Row, Table

if TYPE_CHECKING:
    from .data import ClassMap


def measure(
    models: Mapping[str, nn.Module],
    data: str,
    *,
    split: str | None = None,
    class_map: ClassMap = "",
    engines: Sequence[str] = ("torch",),
    precisions: Sequence[str] = ("fp32",),
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 2,
    iterations: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = True,
) -> Table:
    """Accuracy, MACs and speed of several models in one table; unlike `compare`, they may take images of other sizes.

    Each model gets the images as it asks for them. Top-1 is taken in each precision, in torch where that has it, else
    in the engine. An engine that cannot run a model (`Engine.takes`) has no row of it.

    Args:
        models: By name, the dense one first: the reference of `speedup` and `top1_diff`, in each engine.
        data: Path of labelled images, as `open_data` takes it; all but the first batches serve for accuracy alone.
        split, class_map: How it is opened; see `open_data`.
        engines, precisions, batch_sizes, threads, iterations, device, progress: See `bench`.
        workers: Processes that read images.

    Raises:
        ConfigError: An argument is out of range, or an engine is not installed or does not have a precision.
        DataError: The data is missing, damaged or of other classes.
    """
    check_engines(engines, precisions, torch.device(device))
    models = {name: deployed_form(model) for name, model in models.items()}
    first = next(iter(models))
    opened = {name: open_data(data, model, split=split, class_map=class_map) for name, model in models.items()}
    rows: list[Row] = []
    top1: dict[tuple[str, str], Row] = {}
    for precision in precisions:
        for name, model in models.items():
            engine = "torch" if precision in PRECISIONS else next(name for name in engines)
            if not ENGINES[engine].takes(model):
                continue
            ready = InEngine(model, engine, precision, threads, torch.device(device))
            top1[name, precision] = evaluate(ready, opened[name], workers=workers, progress=progress).row()
    for engine in engines:
        taken = {name: model for name, model in models.items() if ENGINES[engine].takes(model)}
        rows += bench(
            taken,
            # What decides by the image is timed on real ones, and the others with it.
            images=opened if any(map(decides_per_image, taken.values())) else None,
            engines=(engine,),
            precisions=precisions,
            batch_sizes=batch_sizes,
            threads=threads,
            iterations=iterations,
            device=device,
            progress=progress,
        )
    for row in rows:
        row |= top1[row["model"], row["precision"]]
        row["top1_diff"] = row["top1"] - top1[first, row["precision"]]["top1"]
    return Table(rows, title=f"{data}: accuracy and speed")


def plots(table: Table, folder: Path) -> list[Path]:
    """Draw ``pareto-throughput.png``, a panel for each point of measurement, and ``pareto-macs.png``."""
    pictures = {"pareto-throughput.png": "infer_samples_per_sec", "pareto-macs.png": "infer_gmacs"}
    for name, column in pictures.items():
        draw(table.rows, folder / name, x=column)
    return [folder / name for name in pictures]


class InEngine(nn.Module):
    """A model in an engine, as a module that can be evaluated.

    Args:
        model: A timm model or a deployed lean one.
        engine: One of `ENGINES`.
        precision, threads, device: See `Engine`.
    """

    def __init__(self, model: Any, engine: str, precision: str, threads: int, device: torch.device) -> None:
        super().__init__()
        self.run, self.device = ENGINES[engine](model, precision, threads, device), device
        self.num_classes, self.pretrained_cfg = model.num_classes, copy.copy(model.pretrained_cfg)
        self.patch_embed = model.patch_embed

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.run(images.to(self.device, self.run.dtype))
        return logits
