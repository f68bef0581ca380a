"""Linear layers for inference: one call for the product, its bias and what follows."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .processor import never_emulated, prefers_onednn


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", residual: Tensor | None = None
) -> Tensor:
    """`linear` by its formula.

    Args:
        x: ``(…, C_in)``.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)``.
        gelu: A GELU that follows: ``"none"`` (exact) or ``"tanh"``, as torch names its approximation; empty for no
            GELU.
        residual: ``(…, C_out)``, added to the product; not together with a GELU.
    """
    out = F.linear(x, weight, bias)
    if residual is not None:
        return residual + out
    return F.gelu(out, approximate=gelu) if gelu else out


@never_emulated
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", residual: Tensor | None = None
) -> Tensor:
    """A linear layer and the GELU or residual addition behind it; arguments and result of `linear_reference`.

    On a CPU with AVX-512 it goes to oneDNN, which adds the bias and does what follows while the product is in
    registers: nothing the size of an MLP's hidden layer is written twice. oneDNN's fp32 product alone takes half the
    time of torch's default (MKL) on such AMD processors. In fp32 it is fastest where the weight lies column by column
    (`column_major`), in bf16 where it is `blocked`. On other CPUs what follows the product is done in its place.
    """
    if not infers_on_cpu(x, weight):
        return linear_reference(x, weight, bias, gelu=gelu, residual=residual)
    if not prefers_onednn(x.dtype):
        out = F.linear(x, weight, bias)
        if residual is not None:
            return out.add_(residual)
        return torch.ops.aten.gelu_(out, approximate=gelu) if gelu else out  # type: ignore[no-any-return]
    if x.dtype is torch.bfloat16:
        weight = blocked(weight)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")  # type: ignore[no-any-return]
    post = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], gelu)  # type: ignore[no-any-return]


class _Blocked(NamedTuple):
    """A weight in blocks, and what to know it by."""

    owner: weakref.ref[nn.Parameter]
    blocks: Tensor
    state: tuple[Any, ...]
    storage: torch.UntypedStorage
    """The memory it was made from; while this is held, its address is no other tensor's."""


_BLOCKED: dict[int, _Blocked] = {}
"""By the identity of each parameter that was multiplied by; an entry goes when the parameter does, and is never copied
or saved. A `WeakTensorKeyDictionary` would be the same, and takes longer to look up than a small product."""


def blocked(weight: Tensor) -> Tensor:
    """A parameter in the order that oneDNN's product reads it in, for oneDNN alone; kept until the parameter changes.

    Otherwise each bf16 product puts the whole weight in that order first, which at batch 1 takes a tenth of DeiT-T's
    time. It costs the memory of the weight once more. What is no parameter, or was made in inference mode, comes back
    as it is. A change that torch does not count goes unseen (``weight.data.mul_()``, or through NumPy): call
    `forget_blocks` after one.

    Args:
        weight: ``(C_out, C_in)``, on the CPU.
    """
    if type(weight) is not nn.Parameter or weight.is_inference():  # a fake tensor, say, has no memory to read
        return weight
    state = (weight.data_ptr(), weight._version, weight.shape, weight.stride())
    key = id(weight)
    found = _BLOCKED.get(key)
    if found is None or found.state != state or found.owner() is not weight:
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        owner = weakref.ref(weight, lambda _: _BLOCKED.pop(key, None))
        found = _BLOCKED[key] = _Blocked(owner, blocks, state, weight.untyped_storage())
    return found.blocks


def forget_blocks(weight: Tensor) -> None:
    """Let go of the blocks that are kept for a parameter, if any."""
    _BLOCKED.pop(id(weight), None)


def blocks_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The blocks that are kept for some of these parameters."""
    found = (_BLOCKED.get(id(parameter)) for parameter in parameters)
    return [kept.blocks for kept in found if kept is not None]


def column_major(weight: Tensor) -> Tensor:
    """The same matrix, laid out column by column."""
    return weight.t().contiguous().t()


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd must see what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def infers_on_cpu(x: Tensor, *others: Tensor) -> bool:
    """Whether a form for inference on a CPU can run on these tensors, now."""
    dtype = x.dtype
    for tensor in others:  # this runs before every product, and a generator would take as long as all the rest
        if tensor.dtype is not dtype:
            return False
    return (
        x.is_cpu
        and not needs_gradient(x, *others)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
