"""Token aggregation: many tokens to few, by weights that depend on the content, starting from local pooling."""

from __future__ import annotations

import torch
from torch import Tensor


def aggregation_weights(scores: Tensor) -> Tensor:
    """Softmax over the tokens: ``(B, N, M)`` scores to ``(B, M, N)`` weights, rows summing to one."""
    return scores.transpose(1, 2).softmax(dim=-1)


def partition(positions: Tensor, cells: int) -> Tensor:
    """Split tokens into compact cells of nearly equal size, by halving the longer side again and again.

    Args:
        positions: Where each token lies, ``(N, 2)``.
        cells: How many cells, at most N.

    Returns:
        The cell of each token, ``(N,)``, each of ``0 … cells − 1`` used at least once.
    """
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
