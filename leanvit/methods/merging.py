"""Token merging: in every block, the patch tokens whose keys are most alike become one.

Source: ToMe (Bolya et al., 2023, arXiv 2210.09461).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self, cast

import torch
from torch import Tensor

from ..attention import Attended
from ..errors import ConfigError, MethodError
from ..ops.merge import match, merge
from . import register
from .base import Method, Plan, Reducer, check_shares

if TYPE_CHECKING:
    from ..model import LeanVisionTransformer, Tokens


@register
@dataclass(frozen=True)
class TokenMerging(Method):
    """Merge similar patch tokens between attention and MLP, block by block; attention weighs each by its size.

    Args:
        r: How many tokens each block merges away, one number for all or one a block; at most half of the patch tokens
            of a block merge, whatever r is. 8 where neither r nor keep is given.
        keep: In place of r: share of the patch tokens that is left after the last block. Every block merges away
            about the same number.
        first: The first block that merges. Static layers come before it: they have no keys to compare.

    Raises:
        ConfigError: A value out of range, or both r and keep.
    """

    name: ClassVar[str] = "merging"
    reduces_tokens: ClassVar[bool] = True

    r: int | tuple[int, ...] | None = None
    keep: float | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if self.r is not None and self.keep is not None:
            raise ConfigError(f"merging: r={self.r} and keep={self.keep} are both given; give one of them")
        for r in self.r if isinstance(self.r, (tuple, list)) else (self.r or 0,):
            if not isinstance(r, int) or isinstance(r, bool) or r < 0:
                raise ConfigError(f"merging: r={r!r} is not a number of tokens from 0 on")
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        if self.keep is not None:
            if isinstance(self.keep, (tuple, list)):
                raise ConfigError(f"merging: keep={self.keep} must be one share, of the tokens left at the end")
            check_shares(self.name, "keep", self.keep)
        if not isinstance(self.first, int) or isinstance(self.first, bool) or self.first < 0:
            raise ConfigError(f"merging: first={self.first!r} is not a block from 0 on")
        if self.first and isinstance(self.r, tuple):
            raise ConfigError(
                f"merging: first={self.first} beside r for each block; give 0 for blocks that shall not merge"
            )

    def reductions(self, depth: int) -> tuple[int, ...]:
        return tuple(index for index, share in enumerate(self.schedule(depth)) if share)

    def resolve(self, plan: Plan) -> Self:
        plan.check_blocks(self.name, [self.first])
        resolved = self if self.keep is not None else replace(self, r=8 if self.r is None else self.r)
        resolved.schedule(plan.depth)
        return resolved

    def schedule(self, depth: int) -> tuple[int | float, ...]:
        """What each block merges away: a number of tokens, or a share (below 1) of those that enter it."""
        if isinstance(self.r, tuple):
            if len(self.r) != depth:
                raise MethodError(f"merging: r has {len(self.r)} values for {depth} blocks; give one, or one a block")
            return self.r
        blocks = depth - self.first
        if self.keep is None:
            return (0,) * self.first + (cast(int, self.r),) * blocks
        # Of M tokens each of n blocks takes (1 - keep)/n·M away: as a share of those that are still there.
        away = (1 - self.keep) / blocks
        shares = tuple(away / (1 - index * away) for index in range(blocks))
        if shares[-1] > 0.5:
            raise MethodError(
                f"merging: keep={self.keep} would merge more than half of the tokens of one block, over {blocks} "
                "blocks; use a larger keep or an earlier first"
            )
        return (0,) * self.first + shares

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for block, amount in zip(lean.blocks, self.schedule(len(lean.blocks)), strict=True):
            if amount:
                block.reducers[self.name] = Merging(amount)


class Merging(Reducer):
    """``(B, P + M, C)`` → ``(B, P + M - r, C)``.

    Args:
        amount: r, or a share of the patch tokens below 1; at most half of them are merged away.
    """

    method: ClassVar[str] = TokenMerging.name
    needs_attention: ClassVar[tuple[str, ...]] = ("keys",)
    purpose: ClassVar[str] = "match tokens"

    def __init__(self, amount: int | float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        patches = tokens.x.shape[1] - tokens.prefix
        r = min(round(self.amount * patches) if self.amount < 1 else int(self.amount), patches // 2)
        if r == 0:
            return tokens
        size = tokens.size
        if size is None:
            size = torch.ones(tokens.x.shape[:2], device=tokens.x.device)
        with torch.no_grad():
            matching = match(cast(Tensor, attended.k), size, r, tokens.prefix)
        return tokens.merge(partial(merge, matching=matching), matching.size)

    def __repr__(self) -> str:
        return f"merging {self.amount} tokens" if self.amount >= 1 else f"merging {self.amount:.1%} of tokens"
