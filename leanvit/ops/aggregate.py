"""Token aggregation: many tokens to few, by weights that depend on the content, starting from local pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .processor import never_emulated


@never_emulated
def aggregation_weights(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Softmax over the tokens of the scores ``x·W + b``: rows sum to one.

    Args:
        x: Tokens, normalised, ``(B, N, C)``.
        weight: W, ``(C, M)``.
        bias: b, ``(N, M)``.

    Returns:
        ``(B, M, N)``.
    """
    if torch.compiler.is_exporting():  # an engine would copy the scores to transpose them; it transposes factors free
        return (weight.t() @ x.transpose(1, 2) + bias.t()).softmax(dim=-1)
    bias, weight = (each.t().expand(len(x), -1, -1) for each in (bias, weight))
    return torch.baddbmm(bias, weight, x.transpose(1, 2)).softmax(dim=-1)


@never_emulated
def aggregate(x: Tensor, weights: Tensor) -> Tensor:
    """Few tokens as weighted means of many: ``(B, N, C)`` by ``(B, M, N)`` to ``(B, M, C)``."""
    return weights @ x


def partition(positions: Tensor, cells: int) -> Tensor:
    """Split tokens into compact cells of nearly equal size.

    Tokens on a grid that the cells divide get rectangles, as square as can be; others are halved along their longer
    side, again and again.

    Args:
        positions: Where each token lies, ``(N, 2)``.
        cells: How many cells, at most N.

    Returns:
        The cell of each token, ``(N,)``, each of ``0 … cells − 1`` used at least once.
    """
    regular = _rectangles(positions, cells)
    return _halves(positions, cells) if regular is None else regular


def _rectangles(positions: Tensor, cells: int) -> Tensor | None:
    (rows, row), (columns, column) = (
        positions[:, axis].round(decimals=6).unique(return_inverse=True) for axis in (0, 1)
    )
    height, width = len(rows), len(columns)
    if height * width != len(positions):
        return None
    sizes = [(h, w) for h in _divisors(height) for w in _divisors(width) if height * width == cells * h * w]
    if not sizes:
        return None
    spacing = (rows[0] + rows[-1]) / height, (columns[0] + columns[-1]) / width
    h, w = min(sizes, key=lambda size: abs(math.log(size[0] * spacing[0] / (size[1] * spacing[1]))))
    return row // h * (width // w) + column // w


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _halves(positions: Tensor, cells: int) -> Tensor:
    labels = torch.empty(len(positions), dtype=torch.long)
    todo = [(torch.arange(len(positions)), 0, cells)]
    while todo:
        members, first, count = todo.pop()
        if count == 1:
            labels[members] = first
            continue
        points = positions[members]
        across = points.amax(0) - points.amin(0)
        along = int(across.argmax())
        # Ties along the axis are ordered by the other one, so that rows are cut in a straight line.
        order = members[torch.argsort(points[:, along] * 1e6 + points[:, 1 - along])]
        left = count // 2
        cut = round(len(members) * left / count)
        todo += [(order[:cut], first, left), (order[cut:], first + left, count - left)]
    return labels


def cell_centres(positions: Tensor, labels: Tensor, cells: int) -> Tensor:
    """Mean position of the tokens in each cell, ``(cells, 2)``."""
    total = torch.zeros(cells, 2, dtype=positions.dtype).index_add_(0, labels, positions)
    return total / torch.bincount(labels, minlength=cells).unsqueeze(1)
