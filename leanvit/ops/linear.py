"""Linear layers for inference: one call for the product, its bias and what follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", residual: Tensor | None = None
) -> Tensor:
    """A linear layer and the GELU or residual addition behind it; arguments and result of `linear_reference`.

    On a CPU it goes to oneDNN, which adds the bias and does what follows while the product is in registers: nothing the
    size of an MLP's hidden layer is written twice. oneDNN's fp32 product alone takes half the time of torch's default
    (MKL) on AMD processors, and is fastest where the weight lies column by column (`column_major`).
    """
    if not _takes_onednn(x, weight):
        return linear_reference(x, weight, bias, gelu=gelu, residual=residual)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")  # type: ignore[no-any-return]
    post = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], gelu)  # type: ignore[no-any-return]


def column_major(weight: Tensor) -> Tensor:
    """The same matrix, laid out column by column."""
    return weight.t().contiguous().t()


_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and (x.dtype is torch.float32 or x.dtype is torch.bfloat16)
        and x.dtype is weight.dtype
        and not torch.is_autocast_enabled("cpu")
    )
