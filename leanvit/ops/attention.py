"""Softmax attention for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient
from .processor import has_bf16

SLICE = 2e6
"""Bytes of attention maps that are formed at a time: they stay in cache, and memory stays bounded."""
LARGEST = 16e6
"""Bytes of one image's maps above which none is formed."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None) -> Tensor:
    """`attention` by its formula, without dropout."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if size is not None:
        logits = logits + size.log()[:, None, None, :]
    return logits.softmax(dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(q·kᵀ/√d + log size)·v``.

    Args:
        q, k, v: ``(B, H, N, d)``.
        size: How many patches each key stands for, ``(B, N)``, positive; None where each stands for one.
        dropout: Share of the map that is dropped.

    Returns:
        ``(B, H, N, d)``.
    """
    bias = None if size is None else size.log().to(q.dtype)[:, None, None, :]  # (B, 1, 1, N)
    if dropout or not _forms_the_map(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # torch's fused CPU kernel computes in fp32 whatever it is given. In bf16, at batch 32, two matrix products and a
    # softmax take 0.4 of its time at N = 197, 0.35 at N = 99, and at batch 4 0.4 at N = 1025; at batch 1 and few tokens
    # it is the faster one.
    _, heads, tokens, width = q.shape
    images = max(1, int(SLICE / (heads * tokens**2 * q.element_size())))
    parts = [tensor.split(images) for tensor in (q * width**-0.5, k, v)]
    biases = [None] * len(parts[0]) if bias is None else bias.split(images)
    return torch.cat([_by_the_map(*part) for part in zip(*parts, biases, strict=True)])


def _by_the_map(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-2, -1)
    return (logits if bias is None else logits.add_(bias)).softmax(dim=-1) @ v


def _forms_the_map(q: Tensor) -> bool:
    if q.dtype is not torch.bfloat16 or not q.is_cpu or needs_gradient(q) or torch.compiler.is_compiling():
        return False
    if not has_bf16():
        return False
    batch, heads, tokens, _ = q.shape
    return batch * tokens >= 256 and heads * tokens**2 * q.element_size() <= LARGEST
