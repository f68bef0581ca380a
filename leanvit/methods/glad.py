"""GLAD: later layers work on few tokens, aggregated by a learned map that depends on the content.

Source: Yu et al., 2023, arXiv 2310.07664. Starting from local pooling and placing the stages by the effective rank of
attention are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..errors import InputSizeError, MethodError
from ..model import Tokens
from ..ops.aggregate import aggregate, aggregation_weights, cell_centres, partition
from ..record import offer
from . import register
from .base import LeanModule, Method, Plan, auto_count, block_indices, check_shares, grid_positions, one_each

if TYPE_CHECKING:
    from ..model import Grid, LeanVisionTransformer

POOLING_SHARE = 0.98
"""Share of its own cell in a token that starts as local pooling; the rest keeps gradients alive for every patch."""


@register
@dataclass(frozen=True)
class GLAD(Method):
    """Aggregate tokens in stages: the global aggregation pyramid of later layers.

    Args:
        at: Blocks in front of which a stage sits; empty places three at 1/2, 2/3 and 5/6 of the depth (6, 8, 10 of
            12). ``"auto"`` or ``"auto:K"`` places three or K by the effective rank of the attention that follows,
            which needs images.
        keep: Share of the tokens that leave a stage, one for all or one each: ``0.5`` makes 196 → 98 → 49 → 24.

    Raises:
        ConfigError: A value out of range.
    """

    name: ClassVar[str] = "glad"
    positional: ClassVar[bool] = True
    reduces_tokens: ClassVar[bool] = True

    at: tuple[int, ...] | str = ()
    keep: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", block_indices(self.name, "at", self.at))
        check_shares(self.name, "keep", self.keep)

    def reductions(self, depth: int) -> tuple[int, ...]:
        return cast(tuple[int, ...], self.at)

    def resolve(self, plan: Plan) -> Self:
        if isinstance(self.at, str):
            count = auto_count(self.at, default=3)
            ranks = [layer.effective_rank for layer in plan.statistics]
            at = place_stages(
                ranks, one_each(self.name, "keep", self.keep, count), math.prod(plan.model.patch_embed.grid_size)
            )
        else:
            at = self.at or tuple(sorted({plan.depth * part // 6 for part in (3, 4, 5)}))
        plan.check_blocks(self.name, at)
        one_each(self.name, "keep", self.keep, len(at))
        return replace(self, at=at)

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        positions = grid_positions(lean.blocks.grid)
        at = cast(tuple[int, ...], self.at)
        for index, keep in zip(at, one_each(self.name, "keep", self.keep, len(at)), strict=True):
            stage = Aggregation(lean.embed_dim, positions, keep, index)
            lean.blocks[index].stages[self.name] = stage.to(lean.patch_embed.proj.weight)
            positions = stage.positions_out


class Aggregation(LeanModule):
    """One stage: ``X' = softmax(LN(X)·W + b)ᵀ·X`` over the patch tokens; prefix tokens pass through.

    Args:
        dim: C.
        positions: Where the N tokens that enter lie, ``(N, 2)``.
        keep: Share of the tokens that leave.
        layer: The block it sits in front of.

    Shapes:
        ``(B, P + N, C)`` → ``(B, P + M, C)`` with ``M = max(1, ⌊keep·N⌋)``.
    """

    method: ClassVar[str] = GLAD.name
    needs_fixed_tokens: ClassVar[bool] = True
    reduces_tokens: ClassVar[bool] = True
    keeps_fixed_tokens: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, dim: int, positions: Tensor, keep: float, layer: int) -> None:
        super().__init__()
        self.keep, self.layer = keep, layer
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._lay_out(positions)
        self.weight = nn.Parameter(torch.zeros(dim, self.count))  # (C, M)
        self.bias = nn.Parameter(self.pooling_bias())  # (N, M)

    def _lay_out(self, positions: Tensor) -> None:
        self.positions = positions
        self.count = tokens_left(len(positions), self.keep)
        self.cells = partition(positions, self.count)
        self.positions_out = cell_centres(positions, self.cells, self.count)

    def pooling_bias(self) -> Tensor:
        """Scores ``(N, M)`` that make each new token the mean of its cell but for a small share of all others."""
        inside = nn.functional.one_hot(self.cells, self.count).float()
        sizes = inside.sum(dim=0)
        outside = (len(self.positions) - sizes).clamp_min(1)
        return inside * torch.log(outside * POOLING_SHARE / (sizes * (1 - POOLING_SHARE))).clamp_min(0)

    def forward(self, tokens: Tokens) -> Tokens:
        patches = tokens.patches
        if patches.shape[1] != self.bias.shape[0]:
            raise InputSizeError(
                f"glad: block {self.layer} gets {patches.shape[1]} patch tokens and was made for {self.bias.shape[0]}; "
                "call set_input_size() for another image size"
            )
        weights = aggregation_weights(self.norm(patches), self.weight, self.bias)  # (B, M, N)
        offer("aggregation", self.layer, lambda: weights)
        return tokens.aggregate(aggregate(patches, weights), weights)

    def resize(self, old: Grid, new: Grid, positions: Tensor) -> Tensor:
        learned = self.bias.detach() - self.pooling_bias().to(self.bias)
        before, before_out = self.positions, self.positions_out
        self._lay_out(positions)
        rows, columns = nearest(self.positions, before), nearest(self.positions_out, before_out)
        self.weight = nn.Parameter(self.weight.detach()[:, columns], self.weight.requires_grad)
        bias = self.pooling_bias().to(learned) + learned[rows][:, columns]
        self.bias = nn.Parameter(bias, self.bias.requires_grad)
        return self.positions_out

    def __repr__(self) -> str:
        return f"glad {len(self.positions)}→{self.count} tokens"


def tokens_left(tokens: int, keep: float) -> int:
    """How many tokens leave a stage: ``⌊keep·N⌋``, at least one."""
    return max(1, int(tokens * keep + 1e-9))  # 0.29 of 100 is 28.999…


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Index of the nearest of `others` ``(K, 2)`` to each of `points` ``(N, 2)``, both stretched to a square."""
    points, others = (positions / (positions.amin(dim=0) + positions.amax(dim=0)) for positions in (points, others))
    return torch.cdist(points, others).argmin(dim=1)


def place_stages(ranks: Sequence[float], keeps: Sequence[float], tokens: int) -> tuple[int, ...]:
    """Put each stage in front of the earliest block from which on attention needs no more tokens than are left.

    Args:
        ranks: Effective rank of each layer's attention.
        keeps: Share of tokens kept by each stage.
        tokens: Patch tokens that enter the model.

    Raises:
        MethodError: A stage has no such place, or the stages do not fit.
    """
    at: list[int] = []
    for keep in keeps:
        tokens = tokens_left(tokens, keep)
        earliest = at[-1] + 1 if at else 1
        places = [block for block in range(earliest, len(ranks)) if max(ranks[block:]) <= tokens]
        if not places:
            found = ", ".join(f"{rank:.0f}" for rank in ranks)
            raise MethodError(
                f"glad: no place for stage {len(at) + 1} of {len(keeps)}: {tokens} tokens would be fewer than the "
                f"effective rank of the attention that follows ({found} by layer); use fewer stages, a larger keep, "
                "or name the blocks"
            )
        at.append(places[0])
    return tuple(at)
