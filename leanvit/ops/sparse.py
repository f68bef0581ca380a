"""Sparse attention whose pattern is predicted: each query attends to the keys that a cheap estimate ranks highest.

Source: Wei et al., Sparsifiner, CVPR 2023, arXiv 2303.13755, section 3. On a CPU, prediction, selection and attention
are one operation (`sparse_kernel`) that never forms an N×N array; elsewhere, and where gradients are wanted, the
reference selects a mask for `scaled_dot_product_attention`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .kernels import compiled, run
from .linear import needs_gradient

TOP = 8
"""Coefficients kept of each query."""
LANES = 16
"""Columns of the basis that the kernel keeps or leaves out together."""
SCRATCH = 2e6
"""Bytes of packed keys and values at a time: they stay in cache, and memory stays bounded."""
PARTS = 8
"""Parts of a head's keys that are pooled on their own, at most, so that all threads get their share."""

NOTICE = "leanvit: compiling sparse attention for this processor; it takes some seconds, once"


class Predictor(NamedTuple):
    """What estimates, before any query meets a key, which keys each query will attend to.

    Args:
        q_weight, k_weight: Projections of queries and keys to half their width, ``(H, d, d/2)``.
        pooling: E, which pools the keys of the L positions to n, ``(H, L, n)``.
        basis: U, n patterns of attention over the positions, ``(H, n, L)``, none negative.
    """

    q_weight: Tensor
    k_weight: Tensor
    pooling: Tensor
    basis: Tensor

    def in_fp32(self) -> Predictor:
        """The same in fp32: what it costs is small, and what it chooses is not."""
        return Predictor(*(table.float() for table in self))

    def basis_at(self, places: Tensor | None) -> Tensor:
        """U over patches at some positions ``(B, M)``: ``(B, H, n, M)``; without any, over all: ``(H, n, L)``."""
        return self.basis if places is None else self.basis[:, :, places.long()].permute(2, 0, 1, 3)


class Packed(NamedTuple):
    """A predictor as the kernel reads it: in fp32, the basis without most of its zeros.

    Args:
        q_weight, k_weight: ``(H, d, d/2)``.
        pooling: ``(H, L, n')``, n' being n and some zeros.
        starts: First block of each row of the basis, and the number of blocks: ``(H·n + 1,)``.
        blocks: Which 16 neighbouring columns a block holds: ``(blocks,)``.
        values: The blocks, ``(blocks, 16)``.
    """

    q_weight: Tensor
    k_weight: Tensor
    pooling: Tensor
    starts: Tensor
    blocks: Tensor
    values: Tensor


@torch.no_grad()
def pack(predictor: Predictor) -> Packed:
    """Lay a predictor out for the kernel."""
    q_weight, k_weight, pooling, basis = (table.detach().float().contiguous() for table in predictor)
    rows = F.pad(basis.flatten(0, 1), (0, -basis.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    row, block = rows.any(dim=-1).nonzero(as_tuple=True)  # (blocks,), (blocks,)
    starts = torch.searchsorted(row, torch.arange(len(rows) + 1, device=row.device))
    padded = (F.pad(table, (0, -table.shape[-1] % LANES)) for table in (q_weight, k_weight, pooling))
    return Packed._make([*padded, starts.int(), block.int(), rows[row, block].contiguous()])


def coefficients(q: Tensor, k: Tensor, predictor: Predictor, places: Tensor | None = None) -> Tensor:
    """Each patch's coefficients on the basis, ``softmax(q_c·k_nᵀ/√d)``, before any is left out: ``(B, H, M, n)``.

    Args:
        q, k: Queries and keys of the patches, ``(B, H, M, d)``.
        predictor: See there.
        places: The position of each patch, ``(B, M)``; None where all L are there in order.
    """
    pooling = predictor.pooling if places is None else predictor.pooling[:, places.long()].transpose(0, 1)
    q_small, k_small = q @ predictor.q_weight, k @ predictor.k_weight  # (B, H, M, d/2)
    pooled = pooling.transpose(-2, -1) @ k_small  # (B, H, n, d/2)
    return (q_small @ pooled.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def scores_reference(q: Tensor, k: Tensor, predictor: Predictor, places: Tensor | None = None) -> Tensor:
    """How much each patch is expected to attend to each, ``c·U`` with c's largest entries alone: ``(B, H, M, M)``."""
    predictor = predictor.in_fp32()
    c = coefficients(q.float(), k.float(), predictor, places)
    kept, which = c.topk(min(TOP, c.shape[-1]), dim=-1)
    return torch.zeros_like(c).scatter(-1, which, kept) @ predictor.basis_at(places)


def connections_reference(
    q: Tensor, k: Tensor, predictor: Predictor, places: Tensor | None, budget: int, threshold: float = 0.0
) -> Tensor:
    """Which keys each query attends to, ``(B, H, N, N)``, by the formula.

    Prefix tokens (class, registers), the first ones, are attended to by all and attend to all.

    Args:
        q, k: ``(B, H, N, d)``, N = P + M.
        predictor: See there.
        places: The position of each patch, ``(B, M)``; None where all L are there in order.
        budget: Keys of a patch's query, prefix tokens included: the best-scored ones, ties to the lower index.
        threshold: Leave out patches whose predicted attention is less, too.
    """
    prefix = prefix_of(q, predictor, places)
    scores = scores_reference(q[:, :, prefix:], k[:, :, prefix:], predictor, places)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : budget - prefix]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    if threshold:
        least = scores.amax(dim=-1, keepdim=True).clamp_max(threshold) if prefix == 0 else threshold
        mask = mask & (scores >= least)
    return F.pad(mask, (prefix, 0, prefix, 0), value=True)


def prefix_of(q: Tensor, predictor: Predictor, places: Tensor | None) -> int:
    """How many tokens come before the patches."""
    return q.shape[2] - (predictor.basis.shape[-1] if places is None else places.shape[1])


def sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, predictor: Predictor, places: Tensor | None, budget: int, threshold: float = 0.0
) -> Tensor:
    """`sparse_attention` by its formula: a mask and `scaled_dot_product_attention`."""
    mask = connections_reference(q, k, predictor, places, budget, threshold)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, predictor: Predictor, packed: Packed, places: Tensor | None, budget: int,
    threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """Predict which keys each query attends to, select them, and attend to them alone.

    Args:
        q, k, v: ``(B, H, N, d)``, N = P + M: prefix tokens, then patches.
        predictor: See there.
        packed: The same, from `pack`.
        places: The position of each patch, ``(B, M)``; None where all L are there in order.
        budget: Keys of a patch's query, prefix tokens included.
        threshold: Leave out patches whose predicted attention is less, too.

    Returns:
        ``(B, N, H·d)``.
    """
    if not takes_kernel(q) or needs_gradient(q, k, v) or exporting():
        return sparse_attention_reference(q, k, v, predictor, places, budget, threshold)
    places = None if places is None else places.int()
    rows, positions = predictor.basis.shape[1:]
    return torch.ops.leanvit.sparse_attention(q, k, v, list(packed), places, positions, rows, budget, threshold)  # type: ignore[no-any-return]


@torch.no_grad()
def connections(
    q: Tensor, k: Tensor, predictor: Predictor, places: Tensor | None, budget: int, threshold: float = 0.0
) -> Tensor:
    """Which keys each query attends to, ``(B, H, N, N)``; arguments as those of `connections_reference`."""
    if not takes_kernel(q) or torch.compiler.is_compiling():
        return connections_reference(q, k, predictor, places, budget, threshold)
    mask = torch.empty(*q.shape[:3], q.shape[2], dtype=torch.bool)
    places = None if places is None else places.int()
    rows, positions = predictor.basis.shape[1:]
    _sparse(q, k, k, pack(predictor), places, positions, rows, budget, threshold, None, mask)
    return mask


def takes_kernel(q: Tensor) -> bool:
    """Whether the CPU's operation can run on these queries; the reference runs on all others."""
    return q.is_cpu and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] % LANES == 0


def exporting() -> bool:
    """Whether a graph is being made for other engines, which know nothing of the operation."""
    return torch.compiler.is_exporting()


# ---- the CPU's operation


@cache
def _kernels(width: int) -> tuple[Any, Any]:
    """The two stages of the kernel for heads of a width."""
    from . import sparse_kernel

    return compiled(sparse_kernel.compile_kernels, width, NOTICE)  # type: ignore[no-any-return]


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, places: Tensor | None, positions: int, rows: int,
    budget: int, threshold: float, out: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    """Run both stages, on as many images at a time as fit the scratch."""
    from . import sparse_kernel as at

    stages = _kernels(q.shape[-1])
    _, heads, tokens, width = q.shape
    wide = packed.pooling.shape[-1]
    prefix = tokens - (positions if places is None else places.shape[1])
    a_head = tokens * width
    images = max(1, min(int(SCRATCH / (8 * heads * a_head)), q.shape[0]))
    parts = max(1, min(PARTS, (tokens - prefix) // at.KEYS_AT_A_TIME))
    pooled = packed.q_weight.shape[-1] * wide
    scratch = torch.empty(images * heads * (2 * a_head + (1 + parts) * pooled) + at.LANES * width)
    done = np.empty(images * heads, np.int64)
    a = [0] * at.FIELDS  # filled in one by one, which an array takes much longer for
    a[at.HEADS : at.BF16 + 1] = (
        heads, tokens, prefix, positions, rows, wide, TOP, min(budget, tokens) - prefix, round(threshold * 1e9),
        q.dtype is torch.bfloat16,
    )  # fmt: skip
    a[at.KEYS] = scratch.data_ptr()
    a[at.VALUES] = a[at.KEYS] + 4 * images * heads * a_head
    a[at.POOLED] = a[at.VALUES] + 4 * images * heads * a_head
    a[at.POOLED_PARTS] = a[at.POOLED] + 4 * images * heads * pooled
    a[at.PARTS], a[at.POOLED_DONE] = parts, done.ctypes.data
    a[at.Q_WEIGHT : at.BASIS_VALUES + 1] = [table.data_ptr() for table in packed]
    for first in range(0, q.shape[0], images):
        some = slice(first, first + images)
        for field, x in ((at.Q, q), (at.K, k), (at.V, v), (at.OUT, out)):
            if x is not None:
                a[field : field + 4] = (x.data_ptr() + first * x.stride(0) * x.element_size(), *x.stride()[:3])
        if mask is not None:
            a[at.MASK] = mask[some].data_ptr()
        if places is not None:
            a[at.PLACES] = places[some].data_ptr()
        count = min(images, q.shape[0] - first)
        blocks = -(-tokens // at.QUERIES)
        done.fill(0)
        for stage, tasks in zip(stages, (count * heads * parts, count * heads * blocks), strict=True):
            a[at.NEXT_TASK], a[at.TASKS] = 0, tasks
            run(stage, np.array(a, np.int64), tasks)


@torch.library.custom_op("leanvit::sparse_attention", mutates_args=(), device_types="cpu")
def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: list[Tensor], places: Tensor | None, positions: int, rows: int,
    budget: int, threshold: float,
) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    images, heads, tokens, width = q.shape
    out = q.new_empty(images, tokens, heads * width)
    spread = out.view(images, tokens, heads, width).transpose(1, 2)
    _sparse(q, k, v, Packed(*packed), places, positions, rows, budget, threshold, spread, None)
    return out


@_sparse_attention.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    images, heads, tokens, width = q.shape
    return q.new_empty(images, tokens, heads * width)


@register_flop_formula(torch.ops.leanvit.sparse_attention, get_raw=True)  # type: ignore[untyped-decorator]
def _flops(
    q: Tensor, k: Tensor, v: Tensor, packed: list[Tensor], places: Tensor | None, positions: int, rows: int,
    budget: int, threshold: float, **_: Any,
) -> int:  # fmt: skip
    """Two for each MAC: predictor ``M·C·d + M·n·C + nnz(c)·mean nnz(U row)``, attention ``2·nnz(mask)·d``."""
    images, heads, tokens, width = q.shape
    patches = positions if places is None else places.shape[1]
    table = Packed(*packed)
    row = int(table.values.count_nonzero()) / (heads * rows)
    predictor = images * heads * patches * (width**2 + rows * width + min(TOP, rows) * row)
    if threshold:
        mask = torch.empty(images, heads, tokens, tokens, dtype=torch.bool)
        _sparse(q, k, k, table, places, positions, rows, budget, threshold, None, mask)
        connected = int(mask.sum())
    else:
        connected = images * heads * (patches * min(budget, tokens) + (tokens - patches) * tokens)
    return round(2 * (predictor + 2 * connected * width))
