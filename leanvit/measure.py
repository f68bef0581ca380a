"""What a lean model is worth beside the dense one: accuracy, cost, speed and memory of the form that
ships."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from .bench import bench, peak_memory, realised_share
from .count import Cost, Share, check_images, constant_macs, count, deployed_form, evaluating, macs_of_each
from .data import check_labels, labelled, loader, open_data
from .engines import PRECISIONS, check_engines
from .errors import ConfigError, DataError, UnsupportedModelError
from .model import LeanModel
from .objective import Teacher
from .ops.processor import has_bf16, warn_of_emulation
from .record import Recorder, record
from .report.tables import Row, Table

if TYPE_CHECKING:
    from .data import ClassMap, ImageSource

__all__ = [
    "Comparison",
    "Cost",
    "EvalResult",
    "Share",
    "Table",
    "bench",
    "compare",
    "count",
    "environment",
    "evaluate",
    "peak_memory",
    "realised_share",
]

AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvalResult:
    """How often a classifier was right, in percent.

    Args:
        top1: Images whose label scored highest.
        top5: Images whose label was among the five highest.
        agreement: Images for which the teacher's highest class was the same; None without a teacher.
        count: How many images were classified.
        damaged: Names of the images that could not be read and were skipped.
        labels: The images' labels, ``(count,)``.
        predictions: The highest class of each image, ``(count,)``.
        confidences: Its probability, ``(count,)``.
        density: Share of the keys that queries attend to, mean over images and queries, by layer and head: ``{layer:
            (H,)}``, of the layers that choose their keys.
        macs: What each image cost, ``(count,)``, where a deployed model decides that by the image; else None.
    """

    top1: float
    top5: float
    agreement: float | None
    count: int
    damaged: tuple[str, ...] = ()
    labels: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.empty(0, dtype=torch.long))
    predictions: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.empty(0, dtype=torch.long))
    confidences: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.empty(0))
    macs: Tensor | None = field(repr=False, compare=False, default=None)
    density: dict[int, Tensor] = field(repr=False, compare=False, default_factory=dict)

    @property
    def top1_err(self) -> float:
        """Images whose label did not score highest, in percent."""
        return 100 - self.top1

    @property
    def top5_err(self) -> float:
        """Images whose label was not among the five highest, in percent."""
        return 100 - self.top5

    def row(self) -> Row:
        """The figures under the names of timm's results files."""
        row: Row = {name: getattr(self, name) for name in ("top1", "top1_err", "top5", "top5_err")}
        if self.agreement is not None:
            row["agreement"] = self.agreement
        if self.macs is not None:
            low, high = self.macs.quantile(torch.tensor([0.05, 0.95], dtype=self.macs.dtype)).tolist()
            row |= {"gmacs_mean": float(self.macs.mean()) / 1e9, "gmacs_p5": low / 1e9, "gmacs_p95": high / 1e9}
        if self.density:
            row["density"] = float(torch.stack(list(self.density.values())).mean())
            row["density_by_layer"] = {layer: heads.tolist() for layer, heads in self.density.items()}
        return row


def evaluate(
    model: nn.Module,
    data: str | os.PathLike[str] | Dataset[Any] | DataLoader[Any],
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 50,
    workers: int = 0,
    device: str | torch.device = "cpu",
    amp: str = "",
    progress: bool = True,
) -> EvalResult:
    """Classify every image of a data set and compare with the labels and, in the same pass, with a teacher.

    The model is evaluated as it is, on `device`, where it stays; a lean model in training with its dynamic
    part still on is not what ships, so deploy it first. Images are given in the precision of its weights.

    Args:
        model: A classifier ``(B, channels, H, W)`` → ``(B, classes)``.
        data: Labelled images: a path as `open_data` takes it, a data set of (image, label), or a loader of
            such batches.
        teacher: The dense model, given the same images in its own normalisation.
        batch_size: Images a batch; a loader brings its own.
        workers: Processes that read images.
        device: Where to run.
        amp: Autocast: "bf16", "fp16", or "" for none.
        progress: Show a progress bar.

    Raises:
        ConfigError: An argument is out of range, or the teacher has other classes or takes another size.
        DataError: No images, too many damaged ones, or labels the model has no class for.
        InputSizeError: The model does not take images of this size.
        UnsupportedModelError: The model is no classifier.
    """
    if amp not in AMP:
        raise ConfigError(f"amp is {amp!r}; known are 'bf16', 'fp16' and '' for none")
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be at least 1")
    if getattr(model, "num_classes", None) == 0:
        raise UnsupportedModelError(
            f"{_name(model)} has no classifier (num_classes=0); reset_classifier() gives it one"
        )
    if isinstance(data, str | os.PathLike):
        data = open_data(data, model)
    if not isinstance(data, Dataset | DataLoader):
        raise DataError(f"labelled images are given as a path, a data set or a loader, not a {type(data).__name__}")
    batches = data if isinstance(data, DataLoader) else loader(data, batch_size, workers=workers)
    device = torch.device(device)
    model.to(device)
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    autocast = torch.autocast(device.type, AMP[amp]) if amp else nullcontext()
    if amp == "bf16":
        warn_of_emulation(device.type)
    counts, varying = _Counts(), decides_per_image(model)
    constant = constant_macs(model) if varying else 0.0
    with evaluating(model), evaluating(model if teacher is None else teacher), torch.inference_mode(), autocast:
        guide = None if teacher is None else Teacher(teacher.to(device), model, tokens=False)
        for batch in track(batches, "evaluating", console=Console(stderr=True), transient=True, disable=not progress):
            images, labels = labelled(batch)
            if len(images):
                check_images(model, images)
                images = images.to(device, non_blocking=True)
                with record("macs", "density") as found:
                    logits = model(images.to(dtype or images.dtype))
                macs = macs_of_each(model, images, found, constant) if varying else None
                counts.add(logits, labels, None if guide is None else guide(images)[0], macs, found)
    return counts.result(_damaged(batches.dataset), agreement=teacher is not None)


class _Counts:
    """What adds up over the batches of an evaluation."""

    def __init__(self) -> None:
        self.macs: list[Tensor] = []
        self.density: dict[int, Tensor] = {}
        self.in_top5 = 0
        self.agreeing = 0
        self.labels: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.confidences: list[Tensor] = []

    def add(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, macs: Tensor | None, found: Recorder
    ) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            output = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(f"the model is no classifier: its output has {output}, not (images, classes)")
        classes = logits.shape[1]
        check_labels(labels, classes)
        scores = logits.float().cpu()
        best = scores.topk(min(5, classes), dim=1).indices  # (B, 5)
        self.in_top5 += int((best == labels[:, None]).sum())
        if teacher_logits is not None:
            self.agreeing += int((teacher_logits.argmax(dim=1).cpu() == best[:, 0]).sum())
        if macs is not None:
            self.macs.append(macs)
        for offered in found["density"]:
            self.density[offered.layer] = self.density.get(offered.layer, 0) + offered.value.float().sum(dim=0).cpu()
        self.labels.append(labels)
        self.predictions.append(best[:, 0])
        self.confidences.append(scores.softmax(dim=1).amax(dim=1))

    def result(self, damaged: tuple[str, ...], agreement: bool) -> EvalResult:
        if not self.labels:
            raise DataError("no images to evaluate on; give at least one that can be read")
        labels, predictions = torch.cat(self.labels), torch.cat(self.predictions)
        percent = 100 / len(labels)
        return EvalResult(
            top1=percent * int((labels == predictions).sum()),
            top5=percent * self.in_top5,
            agreement=percent * self.agreeing if agreement else None,
            count=len(labels),
            damaged=damaged,
            labels=labels,
            predictions=predictions,
            confidences=torch.cat(self.confidences),
            macs=torch.cat(self.macs) if self.macs else None,
            density={layer: total / len(labels) for layer, total in self.density.items()},
        )


def decides_per_image(model: nn.Module) -> bool:
    """Whether what a deployed model computes, and so its cost, depends on the image."""
    return isinstance(model, LeanModel) and model.lean.deployed and model.lean.data_dependent


def _damaged(dataset: Dataset[Any]) -> tuple[str, ...]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return tuple(getattr(dataset, "damaged", ()))


@dataclass(frozen=True)
class Comparison(Table):
    """A table that also keeps what each image was taken for.

    Args:
        results: By model, in the first precision.
        images: What they were measured on.
    """

    results: Mapping[str, EvalResult] = field(default_factory=dict, repr=False)
    images: Any = field(default=None, repr=False)


def compare(
    dense: nn.Module,
    lean: nn.Module | Mapping[str, nn.Module],
    data: str | os.PathLike[str] | Dataset[Any] | DataLoader[Any],
    *,
    split: str | None = None,
    class_map: ClassMap = "",
    img_size: int | tuple[int, int] | None = None,
    images: ImageSource | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    precisions: Sequence[str] = ("fp32",),
    engines: Sequence[str] = ("torch",),
    threads: int = 2,
    iterations: int | None = None,
    device: str | torch.device = "cpu",
    eval_batch_size: int = 50,
    workers: int = 0,
    progress: bool = True,
) -> Comparison:
    """Accuracy, MACs, latency, throughput and memory of lean models beside the dense one's, in one table.

    Lean models are deployed first: what is measured is what ships. Accuracy is taken in each precision, weights
    and images cast as for the timing.

    Args:
        dense: The dense model, also the teacher whose predictions in fp32 `agreement` refers to.
        lean: A lean model, or several by name.
        data: Labelled images, as `evaluate` takes them; a path is opened for each model as it needs.
        split, class_map: How a path is opened; see `open_data`.
        eval_batch_size: Images a batch when taking accuracy.
        workers: Processes that read images.
        img_size, images, batch_sizes, precisions, engines, threads, iterations, device, progress: See `bench`. Where a
            model's cost depends on the image, speed is measured on `data` unless other images are given.

    Raises:
        ConfigError: There is nothing to compare with, an argument is out of range, or a model takes images of
            another size than the dense one.
        DataError: The data is missing, damaged or of other classes.
        InputSizeError: A model does not take the images' size.
    """
    models = {"dense": dense, **(lean if isinstance(lean, Mapping) else {"lean": lean})}
    if lean is dense or len(models) < 2:
        raise ConfigError("nothing to compare with: give the dense model, then lean ones, none of them named 'dense'")
    by_path = isinstance(data, str | os.PathLike)
    if not by_path and (split or class_map):
        raise ConfigError("split and class_map say how a path is opened; this data is open already")
    check_engines(engines, precisions, torch.device(device))
    models = {name: deployed_form(model) for name, model in models.items()}
    opened = {
        name: open_data(data, model, split=split, class_map=class_map) if by_path else data  # type: ignore[arg-type]
        for name, model in models.items()
    }
    teacher = _in_precision(dense, "fp32")
    for model in models.values():  # one that does not fit is to be known before the work starts
        Teacher(teacher, model, tokens=False)
    results = {
        (name, precision): evaluate(
            _in_precision(model, precision),
            opened[name],
            teacher=None if name == "dense" else teacher,
            batch_size=eval_batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
        for precision in precisions
        for name, model in models.items()
    }
    per_image = [name for name, model in models.items() if decides_per_image(model)]
    if per_image and images is None:  # on random images, what they cost means nothing
        images, img_size = opened[per_image[0]], None
    rows = bench(
        models,
        img_size=img_size,
        images=images,
        batch_sizes=batch_sizes,
        precisions=precisions,
        engines=engines,
        threads=threads,
        iterations=iterations,
        device=device,
        progress=progress,
    )
    for row in rows:
        result, reference = results[row["model"], row["precision"]], results["dense", row["precision"]]
        row |= result.row()
        if row["model"] != "dense":
            row |= {"top1_diff": result.top1 - reference.top1, "teacher": "dense"}
    first = {name: results[name, precisions[0]] for name in models}
    title = f"{_name(dense)}, {reference.count} images"
    return Comparison(rows, title=title, results=first, images=opened["dense"])


def _in_precision(model: nn.Module, precision: str) -> nn.Module:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; accuracy is taken in torch, in {', '.join(PRECISIONS)}")
    return copy.deepcopy(model).to(PRECISIONS[precision])


def environment() -> dict[str, Any]:
    """What the figures were measured with: versions, processor, threads, build, date; for `--json`."""
    installed = ("leanvit", "torch", "torchvision", "timm", "accelerate", "numba", "numpy", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions((*installed, "huggingface_hub")),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": has_bf16(),
        "onednn": torch.backends.mkldnn.is_available(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_config": _torch_config(),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _torch_config() -> list[str]:
    """Compilers and libraries torch was built with, without the flags it was built by."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines() if line.startswith("  -")]
    return [line for line in lines if not line.startswith("Build settings")]


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__
