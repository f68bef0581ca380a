"""Choosing tokens, and how much attention each one gets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 4e6
"""Bytes of attention maps that are formed at a time: memory stays bounded."""


def take(values: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by index, image by image.

    Args:
        values: ``(B, N, D)``.
        index: ``(B, K)``.

    Returns:
        ``(B, K, D)``.
    """
    batch, tokens, width = values.shape
    first = tokens * torch.arange(batch, device=index.device).unsqueeze(1)
    # Whole rows are copied: on a CPU this takes a tenth of the time of torch.gather, which goes value by value.
    return F.embedding(index + first, values.reshape(-1, width))


def class_attention(q: Tensor, k: Tensor, size: Tensor | None = None) -> Tensor:
    """Attention that the first token, the class token, pays to each token, mean over heads: ``N·C`` MACs an image.

    Args:
        q, k: ``(B, H, N, d)``.
        size: How many patches each key stands for, ``(B, N)``; None where each stands for one.

    Returns:
        ``(B, N)``, in fp32, rows summing to one.
    """
    return _maps(q[:, :, :1], k, size)[:, :, 0].mean(dim=1)


def attention_received(q: Tensor, k: Tensor, size: Tensor | None = None) -> Tensor:
    """Attention that each token gets from all, mean over heads and queries: ``N²·C`` MACs an image.

    Arguments and result as those of `class_attention`. Maps are formed for some images at a time.
    """
    if torch.compiler.is_compiling():  # the number of slices would freeze the batch size
        return _maps(q, k, size).mean(dim=(1, 2))
    _, heads, tokens, _ = q.shape
    images = max(1, int(SLICE / (heads * tokens**2 * 4)))
    some_q, some_k = q.split(images), k.split(images)
    sizes = [None] * len(some_q) if size is None else size.split(images)
    return torch.cat([_maps(*part).mean(dim=(1, 2)) for part in zip(some_q, some_k, sizes, strict=True)])


def _maps(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, queries, N)
    bias = 0.0 if size is None else size.log()[:, None, None, :]
    return (logits.float() + bias).softmax(dim=-1)
