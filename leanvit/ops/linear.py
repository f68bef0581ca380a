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
    if not takes_onednn(x, weight):
        return linear_reference(x, weight, bias, gelu=gelu, residual=residual)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")  # type: ignore[no-any-return]
    post = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], gelu)  # type: ignore[no-any-return]


def column_major(weight: Tensor) -> Tensor:
    """The same matrix, laid out column by column."""
    return weight.t().contiguous().t()


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd must see what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (torch.float32,)
    return torch.float32, torch.bfloat16


_ONEDNN_DTYPES = _onednn_dtypes()


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused linear layer can run on these tensors, now."""
    return (
        x.is_cpu
        and x.dtype in _ONEDNN_DTYPES
        and x.dtype is weight.dtype
        and not needs_gradient(x, weight)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
