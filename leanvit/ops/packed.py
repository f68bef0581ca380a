"""Packed tokens: of a whole batch only the active ones, side by side in one matrix, whatever image they are of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention

varlen_attn: Any = None
with suppress(ImportError):  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn  # type: ignore[no-redef]


def packed_rows(keep: Tensor, images: Sequence[int]) -> Tensor:
    """Places of the active tokens of some images, image by image, in the order given.

    Args:
        keep: Which tokens are active, ``(B, N)`` bool.
        images: Their indices.

    Returns:
        Indices into the tokens of all images laid end to end, ``(T,)``.
    """
    batch, tokens = keep.shape
    if len(images) == batch and all(image == place for place, image in enumerate(images)):
        return keep.flatten().nonzero().squeeze(1)
    order = torch.tensor(images, dtype=torch.long, device=keep.device)
    image, token = keep[order].nonzero(as_tuple=True)
    return order[image] * tokens + token


def rounded_up(rows: int) -> int:
    """A number of rows that products are done with in place of `rows`: at most 1/16 more, or a multiple of 8.

    Where every batch has another number of active tokens, oneDNN would compile its kernels anew for each, which takes
    longer than a small product itself (0.3 ms), and keep no more than 1024 of them.
    """
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """`packed_attention` by its formula; takes no rows beyond the images'."""
    mixed = []
    for queries, keys, values in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * q.shape[-1] ** -0.5
        mixed.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values))
    return torch.cat(mixed)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], whole: int = 0, size: Tensor | None = None
) -> Tensor:
    """Softmax attention of each image over its own tokens, however many they are.

    Args:
        q, k, v: ``(T, H, d)``, the tokens of all images packed.
        lengths: How many of the rows belong to each image, in order; rows behind those belong to none, and what comes
            out there means nothing. Images of equal length cost least side by side.
        whole: The length of an image of which all tokens are active: the one that is sure to come again.
        size: How many patches each key stands for, ``(T,)``; None where each stands for one.

    Returns:
        ``(T, H, d)``.
    """
    if varlen_attn is not None and size is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _on_gpu(q, k, v, lengths)
    if len(lengths) == 1 and size is None:
        return _one_image(q, k, v, lengths[0], whole)
    mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
    start = 0
    for length, alike in groupby(lengths):
        images = len(list(alike))
        rows = slice(start, start + images * length)
        some_q, some_k, some_v = (x[rows].unflatten(0, (images, length)).transpose(1, 2) for x in (q, k, v))
        # The op for whole batches would compile kernels for each new length: worth it only for many images at once.
        if size is not None:
            some = attention(some_q, some_k, some_v, size=size[rows].unflatten(0, (images, length)))
        else:
            attend = attention if images > 1 or length == whole else F.scaled_dot_product_attention
            some = attend(some_q, some_k, some_v)
        mixed[rows].unflatten(0, (images, length)).copy_(some.transpose(1, 2))
        start = rows.stop
    mixed[start:] = 0  # a gradient passes through rows that belong to none, and what memory held may be no number
    return mixed


def _one_image(q: Tensor, k: Tensor, v: Tensor, length: int, whole: int) -> Tensor:
    """One image: all rows may ask, then what comes out needs no copy."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k[:length], v[:length]))  # (1, H, T, d)
    attend = attention if length == whole else F.scaled_dot_product_attention
    return attend(q, k, v).squeeze(0).transpose(0, 1)


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """One kernel for all images, where torch has it; rows that belong to none are an image of their own."""
    total = sum(lengths)
    ends = torch.tensor([0, *lengths], device=q.device).cumsum(0)
    if total < q.shape[0]:
        ends = torch.cat([ends, ends.new_tensor([q.shape[0]])])
    longest, ends = max(*lengths, q.shape[0] - total), ends.int()
    mixed: Tensor = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest)
    return mixed
