"""Softmax attention for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient

SLICE = 2e6
"""Bytes of attention maps that are formed at a time: they stay in cache, and memory stays bounded."""
LARGEST = 16e6
"""Bytes of one image's maps above which none is formed."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q·kᵀ/√d)·v``; `scaled_dot_product_attention` is its reference.

    Args:
        q, k, v: ``(B, H, N, d)``.

    Returns:
        ``(B, H, N, d)``.
    """
    _, heads, tokens, width = q.shape
    if not _forms_the_map(q):
        return F.scaled_dot_product_attention(q, k, v)
    # torch's fused CPU kernel computes in fp32 whatever it is given. In bf16, at batch 32, two matrix products and a
    # softmax take 0.4 of its time at N = 197, 0.35 at N = 99, and at batch 4 0.4 at N = 1025; at batch 1 and few tokens
    # it is the faster one.
    images = max(1, int(SLICE / (heads * tokens**2 * q.element_size())))
    slices = zip((q * width**-0.5).split(images), k.split(images), v.split(images), strict=True)
    return torch.cat(
        [(some_q @ some_k.transpose(-2, -1)).softmax(dim=-1) @ some_v for some_q, some_k, some_v in slices]
    )


def _forms_the_map(q: Tensor) -> bool:
    if q.dtype is not torch.bfloat16 or not q.is_cpu or needs_gradient(q) or torch.compiler.is_compiling():
        return False
    batch, heads, tokens, _ = q.shape
    return batch * tokens >= 128 and heads * tokens**2 * q.element_size() <= LARGEST
