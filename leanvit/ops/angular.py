"""Linear-angular attention: what is linear in the angular kernel between query and key, so no N×N map is needed.

Source: You et al., CVPR 2023, arXiv 2211.10526, section 3: with ``θ`` the angle between query and key, the kernel
``1 − θ/π`` is ``1/2 + cos θ / π`` and a residual, and only the first two are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linear import needs_gradient
from .processor import never_emulated

SHORTEST = 1e-6
"""Length below which a vector is not stretched to one: a zero vector stays zero."""


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
