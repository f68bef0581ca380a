"""Linear-angular attention: what is linear in the angular kernel between query and key, so no N×N map is needed.

Source: You et al., CVPR 2023, arXiv 2211.10526, section 3: with ``θ`` the angle between query and key, the kernel
``1 − θ/π`` is ``1/2 + cos θ / π`` and a residual, and only the first two are kept. On a CPU, the attention and the
depthwise convolution that goes with it are one operation (`angular_kernel`).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .depthwise import convolve_reference
from .kernels import compiled, run
from .linear import infers_on_cpu, needs_gradient
from .processor import never_emulated

SHORTEST = 1e-6
"""Length below which a vector is not stretched to one: a zero vector stays zero."""
LANES = 16
"""Channels that the kernel treats together."""
IDLE = 0.15
"""Share of the threads' time that may be lost to heads that do not divide among them, before each is shared out."""
SHARES = 4
"""Tasks a thread, where heads are shared out."""
NOTICE = "leanvit: compiling linear-angular attention for this processor; it takes some seconds, once"


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last axis."""
    return x / length(x)


def length(x: Tensor) -> Tensor:
    """Length along the last axis, kept as one entry and never zero: ``(…, d)`` → ``(…, 1)``.

    In half precision torch adds up in fp32 and rounds the result; told to give fp32, it copies its input first.
    """
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST)


def angular_map(q: Tensor, k: Tensor) -> Tensor:
    """The map that linear-angular attention stands for: ``I/2 + q̂·k̂ᵀ/π``, ``(B, H, N, d)`` → ``(B, H, N, N)``."""
    identity = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    return identity / 2 + unit(q) @ unit(k).transpose(-2, -1) / math.pi


def linear_angular_reference(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, *, beside: Tensor | None = None, size: Tensor | None = None
) -> Tensor:
    """`linear_angular` by its formula, through the N×N map."""
    kernel = unit(q) @ unit(k).transpose(-2, -1) / math.pi
    if size is not None:
        kernel = kernel * size[:, None, None, :].to(kernel.dtype)
    mixed = v / 2 + kernel @ v
    if beside is not None:
        mixed = mixed + beside
    return (unit(mixed) * gain[:, None, None]).transpose(1, 2).flatten(2)


def angular_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, filters: Tensor, prefix: int, grid: tuple[int, int],
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`angular_attention` by its formula: the N×N map, and shifted images of the values."""
    values = v.transpose(1, 2).flatten(2)  # (B, N, C)
    image = values[:, prefix:]
    if positions is not None:
        where = positions.long().unsqueeze(-1).expand_as(image)
        image = values.new_zeros(len(values), grid[0] * grid[1], values.shape[2]).scatter(1, where, image)
    local = convolve_reference(image.unflatten(1, grid), filters).flatten(1, 2)
    if positions is not None:
        local = local.gather(1, where)
    middle = filters[:, filters.shape[1] // 2, filters.shape[2] // 2]
    alone = values[:, :prefix] * middle.repeat_interleave(values.shape[2] // len(middle))
    return linear_angular_reference(q, k, v, gain) + torch.cat([alone, local], dim=1)


def angular_attention(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, filters: Tensor, prefix: int, grid: tuple[int, int],
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear_angular` and beside it a depthwise convolution of the values, where `takes_kernel` holds.

    A prefix token has no neighbours and meets a filter's middle alone.

    Args:
        q, k, v, gain: As those of `linear_angular`.
        filters: One for each head, or for each channel: ``(F, rows, columns)``, both odd.
        prefix: P.
        grid: h and w of the patches' grid; ``(N, 1)`` and no prefix for a convolution along the tokens.
        positions: Where on the grid each patch lies, ``(B, M)``; None where all h·w are there in order.

    Returns:
        ``(B, N, H·d)``.
    """
    return torch.ops.leanvit.angular_attention(q, k, v, gain, filters, prefix, list(grid), positions)  # type: ignore[no-any-return]


def takes_kernel(q: Tensor, *others: Tensor) -> bool:
    """Whether the CPU's operation can run on these tensors, now: queries, keys and values first."""
    return q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] % LANES == 0 and infers_on_cpu(q, *others)


@never_emulated
def linear_angular(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, *, beside: Tensor | None = None, size: Tensor | None = None
) -> Tensor:
    """``gain · normalise(beside + v/2 + q̂·(k̂ᵀ·v)/π)``, ``2·N·C·min(N, d)`` MACs an image.

    Args:
        q, k, v: ``(B, H, N, d)``.
        gain: Length of each head's output, ``(H,)``.
        beside: What is added before the output is normalised, ``(B, H, N, d)``.
        size: How many patches each key stands for, ``(B, N)``; None where each stands for one.

    Returns:
        The heads side by side, ``(B, N, H·d)``.
    """
    if beside is None and size is None and not needs_gradient(q, k, v, gain) and not torch.compiler.is_compiling():
        return _in_few_passes(q, k, v, gain)
    q, k = unit(q), unit(k)
    if size is not None:
        k = k * size[:, None, :, None].to(k.dtype)
    mixed = v / 2 + _product(q, k, v) / math.pi
    if beside is not None:
        mixed = mixed + beside
    return (unit(mixed) * gain[:, None, None]).transpose(1, 2).flatten(2)


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q·kᵀ·v``, the smaller of ``q·kᵀ`` (N×N) and ``kᵀ·v`` (d×d) first."""
    tokens, width = q.shape[-2:]
    return (q @ k.transpose(-2, -1)) @ v if tokens < width else q @ (k.transpose(-2, -1) @ v)


def _in_few_passes(q: Tensor, k: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """`linear_angular` for inference.

    The output is normalised, so a common factor of ``v/2`` and ``q̂·(…)/π`` does not matter: their sum is one product
    that starts from ``π/2·v``. A head (or an image, where there are fewer) is done from the first step to the last
    before the next: what it needs stays in cache, and queries, keys and values are read where they lie in the joint
    projection, not copied together first, which takes longer than the products. For DeiT-T at 224 px and 32 images that
    is 0.3 of the time of the formula as it is written, in fp32, and 0.7 in bf16.
    """
    batch, heads, tokens, width = q.shape
    out = q.new_empty(batch, tokens, heads, width)
    places = out.transpose(1, 2)  # (B, H, N, d)
    across = int(heads <= batch)
    for index in range((batch, heads)[across]):
        some_q, some_k, some_v, place = (tensor.select(across, index) for tensor in (q, k, v, places))
        scale = gain[index] if across else gain[:, None, None]
        mixed = _half_pi_times_formula(some_q, some_k, some_v)
        torch.mul(mixed, scale / length(mixed), out=place)
    return out.flatten(2)


def _half_pi_times_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``π·(v/2 + q̂·k̂ᵀ·v/π)`` of one head of several images, or of several heads: ``(…, N, d)``."""
    q = _scaled(q, length(q).reciprocal_())
    if q.shape[-2] < q.shape[-1]:
        return torch.baddbmm(v, q @ unit(k).transpose(-2, -1), v, beta=math.pi / 2)
    summary = k.transpose(-2, -1) @ _scaled(v, length(k).reciprocal_())  # (…, d, d)
    return torch.baddbmm(v, q, summary, beta=math.pi / 2)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x · factor``, laid out as a matrix product wants it, which would copy it else."""
    return torch.mul(x, factor, out=x.new_empty(x.shape))


# ---- the CPU's operation


@cache
def _kernel(width: int) -> Any:
    """The kernel for heads of a width."""
    from . import angular_kernel

    return compiled(angular_kernel.compile_kernel, width, NOTICE)


@lru_cache(maxsize=64)
def places(prefix: int, grid: tuple[int, int], kernel: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """A row of places where patches lie on their grid with zeros around it, long enough for prefix tokens behind.

    Zeros between two rows of the grid serve both. Prefix tokens lie so far from all others that no tap reaches these.

    Args:
        prefix: P.
        grid: h and w.
        kernel: Rows and columns of the filters.

    Returns:
        The place of each token ``(P + h·w,)``, how far away each tap's value is ``(taps,)``, and the number of places.
    """
    (height, width), (above, beside) = grid, (kernel[0] // 2, kernel[1] // 2)
    line = width + beside
    row, column = np.divmod(np.arange(height * width), width)
    per_row = max(width // (beside + 1), 1)
    prefix_row, prefix_column = np.divmod(np.arange(prefix), per_row)
    rows = np.concatenate([height + above + prefix_row * (above + 1), row])
    columns = np.concatenate([prefix_column * (beside + 1), column])
    taps = np.arange(-above, above + 1)[:, None] * line + np.arange(-beside, beside + 1)
    room = (int(rows.max()) + 2 * above + 1) * line + beside
    tables = ((rows + above) * line + columns + beside, taps.ravel())
    place, distances = (torch.from_numpy(table.astype(np.int32)) for table in tables)
    return place, distances, room


def _stages(heads: int, tokens: int, width: int, block: int) -> list[tuple[int, int, int]]:
    """How the work is shared out: for each stage, tasks a head, planes a task and queries a task."""
    planes, threads = width // LANES, torch.get_num_threads()
    if -(-heads // threads) * threads <= (1 + IDLE) * heads:
        return [(1, planes, tokens)]
    some = -(-planes // min(-(-SHARES * threads // heads), planes))
    return [(-(-planes // some), some, 0), (-(-tokens // block), 0, block)]


# Not by `torch.library.custom_op`, which adds some 10 µs to each call: with one image that shows.
torch.library.define(
    "leanvit::angular_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor gain, Tensor filters, SymInt prefix, SymInt[] grid, Tensor? positions) "
    "-> Tensor",
)


@torch.library.impl("leanvit::angular_attention", "CPU")
def _angular_attention(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, filters: Tensor, prefix: int, grid: list[int],
    positions: Tensor | None,
) -> Tensor:  # fmt: skip
    from . import angular_kernel as at

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    images, heads, tokens, width = q.shape
    out = q.new_empty(images, tokens, heads * width)
    place, distances, room = places(prefix, (grid[0], grid[1]), (filters.shape[1], filters.shape[2]))
    if positions is not None:
        order = torch.arange(prefix).expand(images, -1)
        place = place[torch.cat([order, prefix + positions], dim=1)]  # (B, N)
    if len(filters) < heads * width:
        filters = filters.repeat_interleave(heads * width // len(filters), dim=0)
    filters, gain = filters.flatten(1).t().float().contiguous(), gain.float().contiguous()  # (taps, C), (H,)
    spread = out.view(images, tokens, heads, width).transpose(1, 2)
    strides = [number for x in (q, k, v, spread) for number in (x.data_ptr(), *x.stride()[:3])]
    tables = (
        place.data_ptr(), tokens if positions is not None else 0, room,
        len(distances), distances.data_ptr(), filters.data_ptr(), gain.data_ptr(),
    )  # fmt: skip
    stages = _stages(images * heads, tokens, width, at.BLOCK)
    kept = torch.empty(images * heads * width * (width + room) if len(stages) > 1 else 0)
    for parts, planes, queries in stages:
        tasks = images * heads * parts
        counts = (0, tasks, heads, tokens, q.dtype is torch.bfloat16, parts, planes, queries)
        # In the order of the kernel's fields; one conversion takes a third of the time of several.
        run(_kernel(width), np.array([*counts, *strides, *tables, kept.data_ptr()], np.int64), tasks)
    return out


@torch.library.register_fake("leanvit::angular_attention")
def _(q: Tensor, *others: Any) -> Tensor:
    images, heads, tokens, width = q.shape
    return q.new_empty(images, tokens, heads * width)


@register_flop_formula(torch.ops.leanvit.angular_attention)  # type: ignore[untyped-decorator]
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, gain_shape: Any, filters_shape: Any, *_: Any, **__: Any) -> int:
    """Two for each MAC, ``2·N·C·d + N·C·k``, k the taps of a filter."""
    images, heads, tokens, width = q_shape
    return int(2 * images * tokens * heads * width * (2 * width + math.prod(filters_shape[1:])))
