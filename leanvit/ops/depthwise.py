"""Depthwise convolution over tokens: along their axis, or over the patch grid. Every head or channel has its filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient
from .processor import never_emulated


def convolve_reference(image: Tensor, weight: Tensor) -> Tensor:
    """`convolve` by its formula: shifted images, weighted and added up, zero outside."""
    filters, rows, columns = weight.shape
    height, width = image.shape[1:3]
    weight = weight.repeat_interleave(image.shape[-1] // filters, dim=0)
    padded = F.pad(image, (0, 0, columns // 2, columns // 2, rows // 2, rows // 2))
    out = torch.zeros_like(image)
    for row in range(rows):
        for column in range(columns):
            out = out + weight[:, row, column] * padded[:, row : row + height, column : column + width]
    return out


@never_emulated
def convolve(image: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution that keeps the size, zero outside: ``h·w·C·k`` MACs an image, k the taps of a filter.

    Args:
        image: ``(B, h, w, C)``.
        weight: A filter for each of F equal groups of channels, ``(F, rows, columns)``, both odd.

    Returns:
        ``(B, h, w, C)``.
    """
    filters, rows, columns = weight.shape
    channels = image.shape[-1]
    if filters < channels:
        weight = weight.repeat_interleave(channels // filters, dim=0)
    # Channels last is how tokens lie in memory, and what the CPU's kernel is fastest on.
    out = F.conv2d(image.permute(0, 3, 1, 2), weight.unsqueeze(1), padding=(rows // 2, columns // 2), groups=channels)
    return out.permute(0, 2, 3, 1)


def add_convolved(mixed: Tensor, v: Tensor, weight: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """``mixed + dwconv(v)`` over the patch grid; a prefix token has no neighbours and meets a filter's middle alone.

    Args:
        mixed: ``(B, P + h·w, C)``; where nothing is differentiated, the result is written into it.
        v: ``(B, P + h·w, C)``, the patches in order.
        weight: ``(F, k, k)``.
        prefix: P.
        grid: h and w.

    Returns:
        ``(B, P + h·w, C)``.
    """
    middle = weight[:, weight.shape[1] // 2, weight.shape[2] // 2]  # (F,)
    if len(middle) < v.shape[-1]:
        middle = middle.repeat_interleave(v.shape[-1] // len(middle))
    alone, local = v[:, :prefix] * middle, convolve_grid(v[:, prefix:], weight, grid)
    if needs_gradient(mixed, v, weight) or torch.compiler.is_compiling():
        return mixed + torch.cat([alone, local], dim=1)
    mixed[:, :prefix] += alone
    mixed[:, prefix:] += local
    return mixed


def convolve_tokens(v: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution along the token axis.

    Args:
        v: ``(B, N, C)``.
        weight: ``(F, taps)``.

    Returns:
        ``(B, N, C)``.
    """
    return convolve(v.unsqueeze(2), weight.unsqueeze(2)).squeeze(2)


def convolve_grid(v: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Depthwise convolution over the patch grid.

    Args:
        v: All patch tokens in order, ``(B, h·w, C)``.
        weight: ``(F, k, k)``.
        grid: h and w.

    Returns:
        ``(B, h·w, C)``.
    """
    return convolve(v.unflatten(1, grid), weight).flatten(1, 2)
