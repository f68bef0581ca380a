"""Softmax attention for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient

SMALL = 32e6
"""Bytes of attention maps, all images and heads, that are formed; beyond, the fused kernel, which forms none."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q·kᵀ/√d)·v``; `scaled_dot_product_attention` is its reference.

    Args:
        q, k, v: ``(B, H, N, d)``.

    Returns:
        ``(B, H, N, d)``.
    """
    if not _forms_the_map(q):
        return F.scaled_dot_product_attention(q, k, v)
    # torch's fused CPU kernel computes in fp32 whatever it is given. In bf16, at batch 32, two matrix products and a
    # softmax take 0.4 of its time at N = 197 and 0.3 at N = 99; at batch 1 and few tokens it is the faster one.
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def _forms_the_map(q: Tensor) -> bool:
    batch, heads, tokens, _ = q.shape
    if q.dtype is not torch.bfloat16 or not q.is_cpu or needs_gradient(q) or torch.compiler.is_compiling():
        return False
    return batch * tokens >= 128 and batch * heads * tokens**2 * q.element_size() <= SMALL
