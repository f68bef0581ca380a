"""A model as one file for another engine: written, run on real images, and kept only if it gives the same answers."""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.models import VisionTransformer
from torch import Tensor, nn

from .count import deployed_form
from .data import ImageSource, data_config, image_batches, known_classes
from .engines import OnnxFile, OnnxRuntime, has_graph, require
from .errors import ConfigError, ExportError, LeanVitWarning, UnsupportedModelError
from .files import written_whole
from .headwise import for_graph
from .methods import available
from .model import LeanModel
from .version import __version__

TOLERANCE = 1e-3
"""Largest difference of a logit from torch's that a file is kept with."""
CHECKED = 8
"""Real images that a file is compared on."""
LOWEST_OPSET = 18
"""The oldest version of the ONNX operators that torch's exporter writes."""
LARGEST_ONNX = 2e9
"""Bytes that fit into an ONNX file."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Args:
        path: The file.
        format: One of `FORMATS`.
        difference: The largest difference of a logit from torch's.
        images: How many real images it was compared on.
    """

    path: Path
    format: str
    difference: float
    images: int

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        return (
            f"{self.path}: {size:.1f} MB, largest difference from torch {self.difference:.1e} on {self.images} images"
        )


@dataclass(frozen=True)
class Axes:
    """Which axes of the images a file leaves open.

    Args:
        batch: Any number of images.
        size: Any height and width that the patch size divides.
        patch: Height and width of a patch.
    """

    batch: bool
    size: bool
    patch: tuple[int, int]

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """As `torch.export.export` takes them, for a model of one input."""
        dims = {0: torch.export.Dim("batch")} if self.batch else {}
        if self.size:
            names = zip((2, 3), ("rows", "columns"), self.patch, strict=True)
            dims |= {axis: patch * torch.export.Dim(name, max=256) for axis, name, patch in names}
        return (dims,)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "",
    images: ImageSource | None = None,
    class_names: Sequence[str] | None = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    batch_size: int = 1,
    overwrite: bool = False,
) -> Exported:
    """Write a model as one file for another engine; a file that does not give torch's outputs is not kept.

    Preprocessing, method and class names go into the file: as ``metadata_props`` in ONNX, as the extra file
    ``leanvit.json`` in a program, as its metadata in a compiled package.

    Args:
        model: A lean model, which is deployed first if need be, or a timm model. Its weights are fp32.
        path: The file. Its ending says the format: ``.onnx``, or ``.pt2`` for a `torch.export` program.
        format: "onnx", "program", or "aotinductor" for machine code in a ``.pt2``, made for this kind of machine by
            torch's compiler, which needs a C++ compiler.
        images: Real images to compare on, as a path, data set, loader or tensor ``(B, C, H, W)``. When not given,
            parts of the two photos inside scikit-learn, or its digits for a model of one channel.
        class_names: The name of each class; when not given, those the model came with, else ImageNet's synsets for
            1000 classes.
        opset: Version of the ONNX operators, from 18 on; torch's choice when not given.
        dynamic_batch: Take any number of images at once.
        dynamic_size: Take images of any size. Only a model without methods can, made with timm's ``dynamic_img_size``.
        batch_size: How many images at once a file takes that does not take any number.
        overwrite: Replace a file that is there.

    Raises:
        ConfigError: A parameter is out of range, the file exists or cannot be written, or a package is missing.
        ExportError: The model has no graph to export, or the outputs of the file differ from torch's.
        UnsupportedModelError: The model is no Vision Transformer.
        InputSizeError: The model does not take images of this size.
    """
    path = Path(path).expanduser()
    kind = _format(path, format)
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"{type(model).__name__} is not supported; timm's VisionTransformer is")
    axes = Axes(dynamic_batch, dynamic_size, model.patch_embed.patch_size)
    check_exportable(model)
    _check(model, path, kind, opset, axes, batch_size, overwrite)
    if isinstance(model, LeanModel) and not model.lean.deployed:
        warnings.warn("the model is not deployed; its deployed form is exported", LeanVitWarning, stacklevel=2)
    model = copy.deepcopy(deployed_form(model)).cpu().eval().requires_grad_(False)
    photos = torch.cat(list(image_batches(sample_photos(model) if images is None else images, model, CHECKED, CHECKED)))
    with written_whole(path) as part, torch.no_grad():
        with _explained(axes):
            # Of a batch of one, torch would freeze the batch size.
            example = _repeat(photos, 2 if dynamic_batch else batch_size)
            kind.write(model, example, axes, opset, metadata(model, class_names), part)
            run = kind.load(part)
        difference = max(float((run(batch) - model(batch)).abs().max()) for batch in _checks(photos, axes, batch_size))
        if not difference <= TOLERANCE:  # not a number is no match either
            raise ExportError(
                f"{path}: its outputs differ from torch's by {difference:.1e}, more than {TOLERANCE:g}: it is not kept"
            )
    return Exported(path, kind.name, difference, len(photos))


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that an exported graph could not run as the deployed form does.

    Raises:
        ExportError: By name of the method, with what can be exported.
    """
    for method in model.lean.methods if isinstance(model, LeanModel) else ():
        if not has_graph(method):
            fixed = ", ".join(name for name, kind in available().items() if has_graph(kind))
            reason = method.no_graph or "it computes something else for every image, and a graph is the same for all"
            raise ExportError(
                f"{method.name} is not exported: {reason}; run it in torch (leanvit.load, leanvit.deploy), or export a "
                f"model of {fixed}"
            )


def metadata(model: nn.Module, class_names: Sequence[str] | None = None) -> dict[str, str]:
    """What goes into a file beside the graph, as text; sizes and names as JSON."""
    config = data_config(model)
    classes: int = model.num_classes  # type: ignore[assignment]
    names = list(class_names or known_classes(model))
    if class_names is None and len(names) != classes:  # of the head it had before
        names = []
    if not names and classes == 1000:
        names = ImageNetInfo("imagenet-1k").label_names()
    if names and len(names) != classes:
        raise ConfigError(f"{len(names)} class names for a model of {classes} classes")
    origin: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return {
        "producer": f"leanvit {__version__}",
        "architecture": str(origin.get("architecture") or type(model).__name__),
        "method": str(getattr(model, "lean", "dense")),
        "license": str(origin.get("license") or "unknown"),
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()},
        "class_names": json.dumps(names),
    }


def sample_photos(model: nn.Module, count: int = CHECKED) -> Tensor:
    """Real images that everybody has, prepared for a model: ``(count, C, H, W)``.

    Parts of the two photos inside scikit-learn; its digits for a model that does not take three channels.
    """
    from sklearn.datasets import load_sample_images

    config = data_config(model)
    if config["input_size"][0] != 3:
        return torch.cat(list(image_batches("digits", model, count, count)))
    transform = create_transform(**config)
    photos = [Image.fromarray(np.asarray(photo)) for photo in load_sample_images().images]
    corners = [(x, y) for y in (0, 1) for x in (0, 1)]
    quarters = [
        photo.resize((photo.width // 2, photo.height // 2), box=_quarter(photo, *corner))
        for corner in corners
        for photo in photos
    ]
    return torch.stack([transform(quarters[index % len(quarters)]) for index in range(count)])  # type: ignore[operator, arg-type]


# ---- formats


@dataclass(frozen=True)
class Format:
    """How a file is written and run.

    Args:
        name: What `export` calls it.
        suffix: The ending of its files.
        write: Takes model, example images, open axes, opset, metadata and the path to write to.
        load: Makes of a file a function from images to logits.
        packages: What it needs that leanvit does not come with.
    """

    name: str
    suffix: str
    write: Callable[[nn.Module, Tensor, Axes, int | None, Mapping[str, str], Path], None]
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()


def _write_onnx(
    model: nn.Module, example: Tensor, axes: Axes, opset: int | None, about: Mapping[str, str], path: Path
) -> None:
    import onnx

    program = torch.onnx.export(
        for_graph(model),
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=axes.dynamic_shapes(),
        opset_version=opset,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if opset not in (None, written):
        raise ExportError(f"torch wrote opset {written} and not {opset}; use another opset")
    onnx.helper.set_model_props(proto, dict(about))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _write_program(
    model: nn.Module, example: Tensor, axes: Axes, opset: int | None, about: Mapping[str, str], path: Path
) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=axes.dynamic_shapes())
    file = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.export.save(program, file, extra_files={"leanvit.json": json.dumps(about, indent=2)})
    path.write_bytes(file.getbuffer())


def _load_program(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_package(
    model: nn.Module, example: Tensor, axes: Axes, opset: int | None, about: Mapping[str, str], path: Path
) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=axes.dynamic_shapes())
    configs = {"aot_inductor.metadata": dict(about)}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def _load_package(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))  # type: ignore[return-value]


FORMATS = {
    kind.name: kind
    for kind in (
        Format("onnx", ".onnx", _write_onnx, OnnxFile, OnnxRuntime.packages),
        Format("program", ".pt2", _write_program, _load_program),
        Format("aotinductor", ".pt2", _write_package, _load_package),
    )
}
"""Every format by name; of those with the same ending, the first is what the ending means."""


# ---- what is checked


def _format(path: Path, name: str) -> Format:
    if name:
        if name not in FORMATS:
            raise ConfigError(f"format is {name!r}; known are {', '.join(FORMATS)}")
        if path.suffix != FORMATS[name].suffix:
            raise ConfigError(f"{path} does not end in {FORMATS[name].suffix}, as a file of format {name} does")
        return FORMATS[name]
    for kind in FORMATS.values():
        if path.suffix == kind.suffix:
            return kind
    endings = " and ".join(dict.fromkeys(kind.suffix for kind in FORMATS.values()))
    raise ConfigError(f"{path}: the ending says the format; {endings} are known")


def _check(
    model: Any, path: Path, kind: Format, opset: int | None, axes: Axes, batch_size: int, overwrite: bool
) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; overwrite it (overwrite=True, --overwrite) or give another name")
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be at least 1")
    weights = {parameter.dtype for parameter in model.parameters()}
    if weights != {torch.float32}:
        raise ExportError(f"the weights are {', '.join(map(str, weights))}; export takes torch.float32 (model.float())")
    if axes.size:
        _check_dynamic_size(model)
    for package in kind.packages:
        require(package, "onnx")
    if kind.name == "onnx":
        if sum(parameter.nbytes for parameter in model.parameters()) > LARGEST_ONNX:
            raise ExportError("an ONNX file holds at most 2 GB; export to .pt2")
        _check_opset(opset)
    elif opset is not None:
        raise ConfigError(f"opset={opset} is for ONNX files; {path} is a {kind.suffix}")


def _check_opset(opset: int | None) -> None:
    import onnx

    highest = onnx.defs.onnx_opset_version()
    if opset is not None and not LOWEST_OPSET <= opset <= highest:
        raise ConfigError(f"opset={opset} cannot be written; {LOWEST_OPSET} to {highest} can")


def _check_dynamic_size(model: Any) -> None:
    if isinstance(model, LeanModel) and model.lean.methods:
        raise ExportError(
            f"dynamic size: {model.lean} is made for one image size; write one file a size (set_input_size, --img-size)"
        )
    if model.patch_embed.strict_img_size:
        raise ExportError("dynamic size: the model takes one image size; create it with dynamic_img_size=True")


def _checks(photos: Tensor, axes: Axes, batch_size: int) -> Iterator[Tensor]:
    """The batches a file is compared on: what it was told to take, at more than one size."""
    if not axes.batch:
        yield from (_repeat(part, batch_size) for part in photos.split(batch_size))
        return
    yield from (photos, photos[:1])
    if axes.size:
        height, width = photos.shape[-2:]
        size = (height + axes.patch[0], width + 2 * axes.patch[1])
        yield F.interpolate(photos, size=size, mode="bilinear", antialias=True)


@contextmanager
def _explained(axes: Axes) -> Iterator[None]:
    """Turn whatever torch's exporters raise into one line."""
    try:
        yield
    except (ConfigError, ExportError, OSError):
        raise
    except Exception as error:  # there is no class of errors that they keep to
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        fixed = "; a fixed batch size may work (dynamic_batch=False, --no-dynamic-batch)" if axes.batch else ""
        raise ExportError(f"torch cannot export this model: {reason.strip()[:300]}{fixed}") from error


def _repeat(images: Tensor, count: int) -> Tensor:
    """Exactly so many images, the same ones again where there are too few."""
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def _quarter(photo: Image.Image, x: int, y: int) -> tuple[float, float, float, float]:
    width, height = photo.width / 2, photo.height / 2
    return x * width, y * height, (x + 1) * width, (y + 1) * height
