"""What each image of a data set costs: its MACs by its own policy, and its time at batch 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .count import constant_macs, count, deployed_form, evaluating, macs_of_each
from .data import ImageData
from .errors import DataError
from .measure import decides_per_image
from .record import record
from .report.tables import Row, Table

REPEATS = 3
"""Times that each image is run; its latency is their median."""
WARMUP = 20


def per_image(model: nn.Module, data: ImageData, *, device: str | torch.device = "cpu", progress: bool = True) -> Table:
    """One row an image: its name, label, prediction, GMACs, and latency in ms at batch 1.

    Args:
        model: A classifier; a lean model is deployed first.
        data: Labelled images.
        device: Where to run.
        progress: Show a progress bar.

    Raises:
        DataError: There are no images that can be read.
    """
    model = deployed_form(model).to(device)
    same = 0.0 if decides_per_image(model) else count(model).macs
    constant = 0.0 if same else constant_macs(model)
    weight = next(model.parameters())
    rows: list[Row] = []
    with evaluating(model), torch.inference_mode():
        for index in track(
            range(len(data)), "image by image", console=Console(stderr=True), transient=True, disable=not progress
        ):
            sample = data[index]
            if sample is None:  # a damaged image
                continue
            image = sample[0].unsqueeze(0).to(weight)
            with record("macs") as found:
                logits = model(image)
            repeats = REPEATS if rows else WARMUP
            rows.append(
                {
                    "image": data.reader.filename(index),
                    "label": sample[1],
                    "prediction": int(logits.argmax()),
                    "gmacs": (same or float(macs_of_each(model, image, found, constant))) / 1e9,
                    "latency": 1e3 * statistics.median([_seconds(model, image) for _ in range(repeats)]),
                }
            )
    if not rows:
        raise DataError("no images to measure; give at least one that can be read")
    return Table(rows)


def correlation(rows: Sequence[Row], one: str = "gmacs", other: str = "latency") -> float | None:
    """Pearson's correlation of two columns; None where one of them is the same in every row."""
    values = torch.tensor([[row[one], row[other]] for row in rows], dtype=torch.float64).T
    if len(rows) < 2 or bool((values.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(values)[0, 1])


def _seconds(model: nn.Module, image: Tensor) -> float:
    start = time.perf_counter()
    model(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
