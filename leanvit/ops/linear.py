"""Linear layers for inference: one call for the product, its bias and what follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    time of torch's default (MKL) on such AMD processors. Both are fastest where the weight lies column by column
    (`column_major`). On other CPUs what follows the product is done in its place.
    """
    if not infers_on_cpu(x, weight):
        return linear_reference(x, weight, bias, gelu=gelu, residual=residual)
    if not prefers_onednn(x.dtype):
        out = F.linear(x, weight, bias)
        if residual is not None:
            return out.add_(residual)
        return torch.ops.aten.gelu_(out, approximate=gelu) if gelu else out  # type: ignore[no-any-return]
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


def infers_on_cpu(x: Tensor, *others: Tensor) -> bool:
    """Whether a form for inference on a CPU can run on these tensors, now."""
    return (
        x.is_cpu
        and all(tensor.dtype is x.dtype for tensor in others)
        and not needs_gradient(x, *others)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
