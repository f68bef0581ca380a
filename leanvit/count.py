"""What a model costs on paper: MACs, activations and parameters, by layer and by kind of operation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .data import data_config
from .errors import ConfigError, DataError, InputSizeError, UnsupportedModelError
from .model import LeanModel, deploy
from .record import Recorder, record

KINDS = ("linear", "attention", "convolution", "other")
REST = "(model)"
"""The layer that holds what belongs to no child of the model: class token, position embedding."""


class Share(NamedTuple):
    """The part of a cost that one layer or kind of operation has."""

    macs: float
    params: int


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Args:
        macs: Multiply-accumulates an image. Papers on Vision Transformers call them FLOPs.
        macts: Activations an image: values that products and convolutions put out, attention scores included,
            as timm's results count them.
        params: Values the model holds: parameters, and floating-point buffers that are saved with it (a
            static attention matrix costs the same under either name).
        img_size: Height and width in pixels.
        by_layer: MACs and parameters of every block and every other child of the model; they add up to the
            whole.
        by_kind: The same by kind of operation: "linear" (a weight times tokens), "attention" (products of
            activations and of attention matrices), "convolution", "other".
    """

    macs: float
    macts: float
    params: int
    img_size: tuple[int, int]
    by_layer: Mapping[str, Share] = field(repr=False)
    by_kind: Mapping[str, Share]

    def rows(self, shares: Mapping[str, Share] | None = None) -> list[dict[str, Any]]:
        """One row a layer, or one for each of `shares`: its MACs and parameters, and its share of the MACs."""
        total = self.macs or 1.0
        return [
            {
                "layer": name,
                "gmacs": share.macs / 1e9,
                "param_count": share.params / 1e6,
                "macs_share": share.macs / total,
            }
            for name, share in (self.by_layer if shares is None else shares).items()
        ]


def count(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    *,
    images: Tensor | None = None,
    batch: int = 1,
) -> Cost:
    """Count what a model costs from the operations that run on its deployed form.

    torch's `FlopCounterMode` watches one forward pass; two of its FLOPs are one MAC. Normalisation,
    activation functions and additions count nothing, as in the papers.

    Args:
        model: A timm model, or a lean one, which is deployed first.
        img_size: Height and width in pixels; the model's own when not given.
        images: Images ``(B, channels, H, W)`` to count on, for models whose cost differs by image; the cost
            is then their mean. Random ones when not given.
        batch: How many random images.

    Raises:
        InputSizeError: The model does not take images of this size.
        UnsupportedModelError: An operation ran for which there is no formula, by name.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}; it must be at least 1")
    model = deployed_form(model)
    if images is None:
        images = random_images(model, img_size, batch)
    check_images(model, images)
    with evaluating(model), torch.no_grad():
        images = images.to(next(model.parameters()))
        counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        # The recorder is the outer one: it sees what the counter could not break into smaller operations.
        with _Recorder(counter.flop_registry) as recorder, counter:
            model(images)
    if recorder.unknown:
        names = ", ".join(sorted(recorder.unknown))
        raise UnsupportedModelError(
            f"no formula counts {names}; give it one with torch.utils.flop_counter.register_flop_formula"
        )

    macs = _macs_by_module(model, counter, len(images))
    params = _saved_values(model)
    height, width = images.shape[-2:]
    return Cost(
        macs=sum(macs[""].values()),
        macts=recorder.activations / len(images),
        params=sum(tensor.numel() for _, tensor in params.values()),
        img_size=(height, width),
        by_layer=_by_layer(model, macs, params),
        by_kind=_by_kind(macs[""], params),
    )


def forms(model: nn.Module) -> list[str]:
    """Which form of its operations a deployed model runs, where there are several and one of them skips nothing."""
    return sorted({str(module.runs_as) for module in model.modules() if hasattr(module, "runs_as")})


def constant_macs(model: nn.Module) -> float:
    """MACs of the layers that cost the same for every image, in a deployed model where others do not.

    Args:
        model: A deployed model, some of whose blocks offer ``"macs"`` to the recorder, ``(B,)`` by a formula.
    """
    with record("macs") as found:
        cost = count(model)
    varying = {f"blocks.{one.layer}" for one in found["macs"]}
    return sum(share.macs for layer, share in cost.by_layer.items() if layer not in varying)


def macs_of_each(model: nn.Module, images: Tensor, found: Recorder, constant: float) -> Tensor:
    """MACs of each image of a batch, ``(B,)``; counted image by image where the blocks have no formula to offer.

    Args:
        model: A deployed model whose cost depends on the image.
        images: ``(B, C, H, W)``.
        found: What its forward pass offered as ``"macs"``.
        constant: From `constant_macs`.
    """
    if found["macs"]:
        return image_macs(found, constant)
    return torch.tensor([count(model, images=image.unsqueeze(0)).macs for image in images], dtype=torch.float64)


def image_macs(found: Recorder, constant: float) -> Tensor:
    """MACs of each image of a batch, ``(B,)``, from what the recorder found in its forward pass and `constant_macs`."""
    return constant + torch.stack([one.value for one in found["macs"]]).sum(dim=0).cpu()


# ---- what runs


def _sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _fused_linear(x: Any, *others: Any, **kwargs: Any) -> int:
    # (input, weight, bias, what follows, …), or (input, residual, weight, bias, …) where it adds a residual
    weight = others[0] if isinstance(others[2], str) else others[1]
    return int(2 * math.prod(x) * weight[0])


aten = torch.ops.aten
# Formulas that torch's own table lacks, some of them in some releases only (the CPU's fused attention:
# pytorch 195460). They take shapes and give FLOPs.
_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_fused_attention_overrideable: _sdpa,
    aten.mv: lambda a, b, **_: 2 * math.prod(a),
    aten.addmv: lambda c, a, b, **_: 2 * math.prod(a),
    aten.dot: lambda a, b, **_: 2 * math.prod(a),
    aten.addbmm: lambda c, a, b, **_: 2 * math.prod(a) * b[-1],
    aten._int_mm: lambda a, b, **_: 2 * math.prod(a) * b[-1],
}
_FREE: set[Any] = set()
"""Operations outside `_KNOWN` that only move data."""
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in builds without oneDNN
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = _fused_linear
    _FREE.add(torch.ops.mkldnn._reorder_linear_weight)
# An operation of torch's own without a formula is free unless its name says otherwise; others need one.
_KNOWN = ("aten", "prim", "prims", "profiler")
_WORK = re.compile(r"attention|convolution|mm\b|_mm_|multi_head|encoder_layer")


class _Recorder(TorchDispatchMode):
    """Adds up activations, and collects operations without a formula that must not pass as free."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.formulas = formulas
        self.activations = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        if packet in self.formulas:
            self.activations += (out[0] if isinstance(out, tuple) else out).numel()
            if "scaled_dot_product" in str(packet):
                query, key = args[:2]  # (B, H, N, d): fused or not, the scores (B, H, N, N) are worked out
                self.activations += math.prod(query.shape[:-1]) * key.shape[-2]
        elif packet not in _FREE and (getattr(func, "namespace", "") not in _KNOWN or _WORK.search(str(packet))):
            self.unknown.add(str(packet))
        return out


def _kind(operation: Any) -> str:
    name = str(operation)
    if "attention" in name or "bmm" in name:
        return "attention"
    if "conv" in name:
        return "convolution"
    return "linear" if re.search(r"m[mv]$|dot$|linear", name) else "other"


def _macs_by_module(model: nn.Module, counter: FlopCounterMode, images: int) -> dict[str, dict[Any, float]]:
    """MACs an image by module path ("" is the whole) and operation, each module with all it contains."""
    root = f"{type(model).__name__}."  # what the counter calls the model itself
    return {
        "": {},
        **{
            module.removeprefix(root) if module != "Global" else "": {
                operation: flops / 2 / images for operation, flops in operations.items()
            }
            for module, operations in counter.get_flop_counts().items()
        },
    }


def _by_layer(
    model: nn.Module, macs: Mapping[str, Mapping[Any, float]], params: Mapping[str, tuple[nn.Module, Tensor]]
) -> dict[str, Share]:
    shares = {
        layer: Share(
            sum(macs.get(layer, {}).values()),
            sum(tensor.numel() for name, (_, tensor) in params.items() if name.startswith(f"{layer}.")),
        )
        for layer in _layers(model)
    }
    total = Share(sum(macs[""].values()), sum(tensor.numel() for _, tensor in params.values()))
    rest = Share(
        total.macs - sum(share.macs for share in shares.values()),
        total.params - sum(share.params for share in shares.values()),
    )
    return {name: share for name, share in ({REST: rest} | shares).items() if any(share)}


def _layers(model: nn.Module) -> Iterator[str]:
    """Paths of the model's children, a container's children in its place: patch_embed, blocks.0, ..."""
    for name, child in model.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from (f"{name}.{index}" for index, _ in child.named_children())
        else:
            yield name


def _by_kind(macs: Mapping[Any, float], params: Mapping[str, tuple[nn.Module, Tensor]]) -> dict[str, Share]:
    work, held = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for operation, value in macs.items():
        work[_kind(operation)] += value
    for owner, tensor in params.values():
        held[_kind_of_module(owner)] += tensor.numel()
    return {kind: Share(work[kind], held[kind]) for kind in KINDS}


def _kind_of_module(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    return "attention" if "attention" in type(module).__name__.lower() else "other"


def _saved_values(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every floating-point tensor of the state dict with the module that owns it; a shared one once."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            key = f"{path}.{name}" if path else name
            if key in state and tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                found[key] = (module, tensor)
    return found


# ---- what goes in


def deployed_form(model: nn.Module) -> nn.Module:
    """The form that gets counted and timed: a lean model deployed, any other model as it is."""
    return deploy(model) if isinstance(model, LeanModel) and not model.lean.deployed else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode with nothing to train, and every module and parameter of it back as it was.

    torch's counter asks each module's inputs for their gradient, and trips over a parameter that is one.
    """
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_()


def input_size(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images a model takes.

    Args:
        model: A timm model.
        img_size: Another height and width in pixels than the model's own.

    Raises:
        InputSizeError: The model does not take images of this size.
    """
    channels, *own = data_config(model)["input_size"]
    if img_size is None:
        return channels, own[0], own[1]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patches = getattr(model, "patch_embed", None)
    if [height, width] != own and patches is not None:
        if getattr(patches, "strict_img_size", False):
            raise InputSizeError(
                f"image size {height}x{width} does not fit a model made for {own[0]}x{own[1]}; "
                "call its set_input_size() or create it with that img_size"
            )
        patch = getattr(patches, "patch_size", (1, 1))
        if (height % patch[0] or width % patch[1]) and not getattr(patches, "dynamic_img_pad", False):
            raise InputSizeError(f"image size {height}x{width} is no multiple of the patch size {patch[0]}x{patch[1]}")
    return channels, height, width


def check_images(model: nn.Module, images: Tensor) -> None:
    """Refuse images that a model does not take.

    Args:
        model: A timm model.
        images: ``(B, C, H, W)``.

    Raises:
        DataError: They have another shape, or are integers.
        InputSizeError: They have another size, or another number of channels.
    """
    if images.ndim != 4:
        raise DataError(f"a batch of images has the shape (B, C, H, W), not {tuple(images.shape)}")
    if not hasattr(model, "patch_embed"):  # what another module takes is not known
        return
    if not images.is_floating_point():
        raise DataError(f"images are floating point, normalised as the model asks (data_config), not {images.dtype}")
    channels, *_ = input_size(model, (images.shape[-2], images.shape[-1]))
    if images.shape[1] != channels:
        raise InputSizeError(f"the images have {images.shape[1]} channels, the model takes {channels}")


def random_images(model: nn.Module, img_size: int | tuple[int, int] | None = None, batch: int = 1) -> Tensor:
    """Random images ``(batch, channels, H, W)`` of a size the model takes; the same ones every time."""
    return torch.randn(batch, *input_size(model, img_size), generator=torch.Generator().manual_seed(0))
