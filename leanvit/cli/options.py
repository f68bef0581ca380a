"""Options in groups that commands share, named as timm names them, and the YAML file that can hold them.

A command takes a group as one argument; `takes_groups` turns the group's fields into options of the command.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, get_type_hints

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    from ..data import ImageData
    from ..report.tables import Table
    from ..train import TrainConfig


class AmpDtype(StrEnum):
    """The reduced precisions of `--amp`."""

    bfloat16 = "bfloat16"
    float16 = "float16"


class Precision(StrEnum):
    """The precisions that speed is measured in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: their fields become its options, in order."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if _is_group(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _fields_as_parameters(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_group(hint: Any) -> TypeGuard[type[Any]]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _fields_as_parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)

    def default(field: dataclasses.Field[Any]) -> Any:
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default

    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default(field), annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


# ---- values checked before the work starts


def _known_device(value: str) -> str:
    import torch

    if value == "auto":
        return value
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{value!r} is no device of this machine: {reason}") from error
    return value


def best_device(value: str) -> str:
    """The device that `auto` means here; any other as it is."""
    import torch

    if value != "auto":
        return value
    rank = os.environ.get("LOCAL_RANK")  # of several processes, each has its GPU
    return ("cuda" if rank is None else f"cuda:{rank}") if torch.cuda.is_available() else "cpu"


def _known_trackers(names: list[str]) -> list[str]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise typer.BadParameter(f"the package {name} is missing: pip install {name}")
    return names


def data_there(path: str | None) -> str | None:
    """Refuse a folder or file of images that does not exist before a model is fetched for them."""
    from ..data import check_there

    if path is not None:
        check_there(path)
    return path


def new_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before the work starts, not after."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; give the name of a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        problem = "read-only" if above.is_dir() else "a file"
        raise typer.BadParameter(f"{str(path)!r} cannot be written: {str(above)!r} is {problem}")
    return path


def check_output(folder: Path, patterns: list[str], overwrite: bool) -> None:
    """Refuse a folder that cannot take the files, or that holds some of them already, before the work starts."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder")
    there = [path.name for pattern in patterns for path in folder.glob(pattern)]
    if there and not overwrite:
        raise ConfigError(f"{folder} holds {there[0]} already; give another --output, or --overwrite")


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the command's options; what the command line says wins."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{str(path)!r} does not hold lines of the form option: value")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in ctx.command.params} - {"config"}
    unknown = [key for key in named if key not in known]
    if unknown:
        raise typer.BadParameter(f"{str(path)!r} has {unknown[0]!r}, which is no option of {ctx.info_name}")
    ctx.default_map = {key: _as_typed(value) for key, value in named.items() if value is not None}
    return path


def _as_typed(value: Any) -> Any:
    """A YAML value as it would be typed on the command line, so that it meets the same checks."""
    if isinstance(value, list):
        return [_as_typed(item) for item in value]
    return value if isinstance(value, bool) else str(value)


# ---- the groups

_option = typer.Option

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A timm name, hf-hub:owner/name, or the folder of a saved model or run."),
]
MethodText = Annotated[str, _option(metavar="TEXT", help="Such as dgssa:layers=auto:4+glad:at=6,8,10.")]
DataDir = Annotated[
    str, _option(metavar="PATH", callback=data_there, help="Image folder, .tar, wds/…, hfds/… or 'digits'.")
]
TrainSplit = Annotated[str | None, _option(metavar="NAME", help="Folder or .tar in it to train on.")]
ValSplit = Annotated[str | None, _option(metavar="NAME", help="Folder or .tar in it to measure on.")]
ClassMap = Annotated[str, _option(metavar="FILE", help="Text file of the class names in order.")]
Workers = Annotated[int, _option("--workers", "-j", min=0, metavar="N", help="Processes that load images.")]
Device = Annotated[
    str, _option(metavar="NAME", callback=_known_device, help="cpu, cuda, cuda:1, …; auto: a GPU if any.")
]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace what is there.")]
Amp = Annotated[bool, _option("--amp", help="Mixed precision.")]
AmpType = Annotated[AmpDtype, _option(help="Its precision.")]
JsonFile = Annotated[
    Path | None, _option(metavar="FILE", callback=new_file, help="Write figures, settings, versions here.")
]
ReportFile = Annotated[
    Path | None, _option("--report", metavar="FILE", callback=new_file, help="Write a page (HTML) about it here.")
]
Config = Annotated[
    Path | None,
    _option(
        "--config",
        "-c",
        metavar="FILE",
        is_eager=True,
        exists=True,
        dir_okay=False,
        callback=_read_config,
        help="YAML file of options; typed ones win.",
    ),
]


@dataclass(frozen=True)
class ModelChoice:
    """Which model, with which weights."""

    model: ModelName
    checkpoint: Annotated[Path | None, _option(metavar="FILE", help="Weights: safetensors file or saved model.")] = None
    pretrained: Annotated[
        bool | None, _option("--pretrained/--no-pretrained", help="Fetch timm's weights for a timm name.")
    ] = None
    num_classes: Annotated[int | None, _option(min=1, metavar="N", help="Classes of the head.")] = None
    img_size: Annotated[int | None, _option(metavar="N", help="Height and width of the images.")] = None

    def load(self, num_classes: int | None = None, pretrained: bool = True) -> VisionTransformer:
        """Build the model.

        Args:
            num_classes: Classes of the head where `--num-classes` is not given.
            pretrained: Whether to fetch weights where the options do not say.
        """
        from ..store import resolve_model

        return resolve_model(
            self.model,
            checkpoint=self.checkpoint,
            pretrained=pretrained if self.pretrained is None else self.pretrained,
            num_classes=self.num_classes or num_classes,
            img_size=self.img_size,
        )


@dataclass(frozen=True)
class EvalData:
    """Which images to measure on."""

    data_dir: DataDir
    val_split: ValSplit = None
    class_map: ClassMap = ""
    crop_pct: Annotated[
        float | None, _option(min=0.01, max=1.0, metavar="X", help="Share of the image that is kept; else the model's.")
    ] = None
    workers: Workers = 0

    def open(self, model: nn.Module) -> ImageData:
        """The labelled images, prepared as the model asks."""
        from ..data import open_data

        self.crop(model)
        return open_data(self.data_dir, model, split=self.val_split, class_map=self.class_map)

    def crop(self, model: nn.Module) -> None:
        """Let the model ask for the share of the image that is to be kept, where one was given."""
        if self.crop_pct is not None:
            model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": self.crop_pct}  # type: ignore[dict-item, assignment]


@dataclass(frozen=True)
class Timing:
    """How to time."""

    batch_size: Annotated[
        list[int], _option("--batch-size", "-b", metavar="N", help="Images a batch; may be repeated.")
    ] = field(default_factory=lambda: [1, 32])
    precision: Annotated[
        list[Precision], _option(metavar="NAME", help="fp32, bf16, fp16 or int8; may be repeated.")
    ] = field(default_factory=lambda: [Precision.fp32])
    engine: Annotated[
        list[str], _option(metavar="NAMES", help="Of torch,compile,onnxruntime,openvino; may be repeated.")
    ] = field(default_factory=lambda: ["torch"])
    threads: Annotated[int, _option(metavar="N", help="CPU threads.")] = 2
    num_bench_iter: Annotated[int | None, _option(metavar="N", help="Rounds; else ten seconds' worth.")] = None
    device: Device = "auto"

    def arguments(self) -> dict[str, Any]:
        """The options as `leanvit.bench` and `leanvit.compare` call them."""
        return {
            "batch_sizes": self.batch_size,
            "precisions": [str(precision) for precision in self.precision],
            "engines": [name.strip() for names in self.engine for name in names.split(",")],
            "threads": self.threads,
            "iterations": self.num_bench_iter,
            "device": best_device(self.device),
        }


@dataclass(frozen=True)
class Output:
    """Where the figures go beside the screen."""

    json: JsonFile = None
    results_file: Annotated[
        Path | None, _option(metavar="FILE", callback=new_file, help="Write the rows here, as CSV.")
    ] = None

    def write(self, ctx: typer.Context, table: Table, folder: Path | None = None) -> None:
        """Print a table and write the files that were asked for, and those of a run into its folder."""
        from .printing import provenance, show

        show(table)
        for path in filter(None, (self.results_file, folder and folder / "results.csv")):
            table.to_csv(path)
        for path in filter(None, (self.json, folder and folder / "results.json")):
            table.to_json(path, **provenance(ctx))


@dataclass(frozen=True)
class Training:
    """How to train; the fields here and in `Teaching` are those of `leanvit.train.TrainConfig`, which says more."""

    train_split: TrainSplit = None
    val_split: ValSplit = None
    class_map: ClassMap = ""
    workers: Workers = 0
    batch_size: Annotated[int, _option("--batch-size", "-b", metavar="N", help="Images a step and process.")] = 64
    lr: Annotated[float, _option(metavar="X", help="Peak learning rate.")] = 3e-4
    inherited_lr_scale: Annotated[float, _option(metavar="X", help="Its factor for inherited weights.")] = 1.0
    opt: Annotated[str, _option(metavar="NAME", help="timm optimiser.")] = "adamw"
    weight_decay: Annotated[float, _option(metavar="X", help="Weight decay.")] = 0.05
    sched: Annotated[str, _option(metavar="NAME", help="timm schedule.")] = "cosine"
    warmup_epochs: Annotated[float, _option(metavar="X", help="Epochs of rising rate.")] = 0.5
    grad_accum_steps: Annotated[int, _option(metavar="N", help="Batches to an update.")] = 1
    clip_grad: Annotated[float | None, _option(metavar="X", help="Limit of the gradient's norm; 0 is none.")] = 1.0
    model_ema: Annotated[bool, _option("--model-ema", help="Keep the weights' moving average.")] = False
    model_ema_decay: Annotated[float, _option(metavar="X", help="Its decay.")] = 0.9998
    smoothing: Annotated[float, _option(metavar="X", help="Label smoothing.")] = 0.1
    mixup: Annotated[float, _option(metavar="X", help="Mixup alpha; 0 is off.")] = 0.0
    cutmix: Annotated[float, _option(metavar="X", help="CutMix alpha; 0 is off.")] = 0.0
    hflip: Annotated[float | None, _option(metavar="X", help="Probability of a mirrored image.")] = None
    scale: Annotated[tuple[float, float] | None, _option(metavar="X X", help="Share that a crop shows.")] = None
    color_jitter: Annotated[float | None, _option(metavar="X", help="Strength of colour changes.")] = None
    aa: Annotated[str | None, _option(metavar="TEXT", help="AutoAugment policy, as in timm.")] = None
    reprob: Annotated[float | None, _option(metavar="X", help="Probability of random erasing.")] = None
    seed: Annotated[int, _option(metavar="N", help="Of everything random.")] = 0
    device: Device = "auto"
    amp: Amp = False
    amp_dtype: AmpType = AmpDtype.bfloat16
    track: Annotated[
        list[str],
        _option(metavar="NAME", callback=_known_trackers, help="tensorboard, wandb, …; may be repeated."),
    ] = field(default_factory=list)

    def config(self, epochs: int, **more: Any) -> TrainConfig:
        """The library's training configuration.

        Raises:
            ConfigError: A value is out of range.
        """
        from ..train import TrainConfig

        values = vars(self) | {
            "epochs": epochs,
            "amp": amp_name(self.amp, self.amp_dtype),
            "device": "" if self.device == "auto" else self.device,
            "track": tuple(self.track),
            **more,
        }
        return TrainConfig(**{key: value for key, value in values.items() if key != "amp_dtype"})


@dataclass(frozen=True)
class Teaching:
    """What a student learns from its teacher, beside the labels."""

    kd_weight: Annotated[float, _option(metavar="X", help="Weight of the teacher's classes.")] = 0.5
    token_weight: Annotated[float, _option(metavar="X", help="Weight of its tokens.")] = 0.5
    kd_temperature: Annotated[float, _option(metavar="X", help="Temperature of the classes.")] = 1.0


def amp_name(amp: bool, dtype: AmpDtype) -> str:
    """The library's name for `--amp --amp-dtype`: empty for full precision."""
    return {AmpDtype.bfloat16: "bf16", AmpDtype.float16: "fp16"}[dtype] if amp else ""
