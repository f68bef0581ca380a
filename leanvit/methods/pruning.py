"""Token pruning: at some blocks, the patch tokens that get least attention leave the model.

Source: EViT (Liang et al., 2022, arXiv 2202.07800). Scoring by the mean attention received, for models that pool their
patch tokens, is ours, and so is the weighted mean as the fused token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self, cast

from torch import Tensor

from ..attention import Attended
from ..errors import ConfigError
from ..model import classifies_by_class_token
from ..ops.tokens import attention_received, class_attention
from . import register
from .base import Method, Plan, Reducer, block_indices, check_shares, one_each

if TYPE_CHECKING:
    from ..model import LeanVisionTransformer, Tokens


@register
@dataclass(frozen=True)
class TokenPruning(Method):
    """Remove the patch tokens that the class token attends to least, between attention and MLP of some blocks.

    A model that does not classify by a class token scores its tokens by the mean attention they receive.

    Args:
        keep: Share of the patch tokens that stays at a block, one for all or one each: ``0.7`` makes 196 → 138.
        at: Blocks where tokens leave, in ascending order; empty places three at 1/4, 1/2 and 3/4 of the depth (3, 6, 9
            of 12).
        fuse: Whether the tokens that leave go into one more token, their mean weighted by that attention. To the next
            of these blocks it is a token like any other.

    Raises:
        ConfigError: A value out of range.
    """

    name: ClassVar[str] = "pruning"
    reduces_tokens: ClassVar[bool] = True

    keep: float | tuple[float, ...] = 0.7
    at: tuple[int, ...] = ()
    fuse: bool = True

    def __post_init__(self) -> None:
        check_shares(self.name, "keep", self.keep)
        at = block_indices(self.name, "at", self.at)
        if isinstance(at, str):
            raise ConfigError(f"pruning: at={at!r} is not a list of blocks; it is not measured")
        if isinstance(self.at, (tuple, list)) and tuple(self.at) != at:
            raise ConfigError(f"pruning: at={tuple(self.at)} is out of order; give the blocks from first to last")
        object.__setattr__(self, "at", at)
        if not isinstance(self.fuse, bool):
            raise ConfigError(f"pruning: fuse={self.fuse!r} is neither true nor false")

    def reductions(self, depth: int) -> tuple[int, ...]:
        return self.at

    def resolve(self, plan: Plan) -> Self:
        at = self.at or tuple(sorted({plan.depth * part // 4 for part in (1, 2, 3)}))
        plan.check_blocks(self.name, at)
        one_each(self.name, "keep", self.keep, len(at))
        return replace(self, at=at)

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        by_class_token = classifies_by_class_token(lean)
        for index, keep in zip(self.at, one_each(self.name, "keep", self.keep, len(self.at)), strict=True):
            lean.blocks[index].reducers[self.name] = Pruning(keep, self.fuse, by_class_token)


class Pruning(Reducer):
    """``(B, P + M, C)`` → ``(B, P + K, C)`` with ``K = ⌈keep·M⌉``, and one token more with `fuse`.

    Args:
        keep: Share of the patch tokens that stays.
        fuse: Whether those that leave go into one more token.
        by_class_token: Whether the class token's attention scores the tokens, or the mean over all queries.
    """

    method: ClassVar[str] = TokenPruning.name
    keeps_positions: ClassVar[bool] = True
    needs_attention: ClassVar[tuple[str, ...]] = ("queries", "keys")
    purpose: ClassVar[str] = "score tokens"

    def __init__(self, keep: float, fuse: bool, by_class_token: bool) -> None:
        super().__init__()
        self.keep, self.fuse, self.by_class_token = keep, fuse, by_class_token

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        patches = tokens.x.shape[1] - tokens.prefix
        count = tokens_kept(patches, self.keep)
        if count + self.fuse >= patches:  # one token fused alone is that token
            return tokens
        score = class_attention if self.by_class_token else attention_received
        scores = score(cast(Tensor, attended.q), cast(Tensor, attended.k), tokens.size)[:, tokens.prefix :]  # (B, M)
        kept = scores.topk(count).indices.sort().values
        if not self.fuse:
            return tokens.keep(kept)
        left = scores.scatter(1, kept, 0.0)
        return tokens.keep(kept, fused=left / left.sum(dim=1, keepdim=True))

    def set_pooling(self, by_class_token: bool) -> None:
        self.by_class_token = by_class_token

    def __repr__(self) -> str:
        return f"pruning keeps {self.keep:g}{', fuses the rest' if self.fuse else ''}"


def tokens_kept(tokens: int, keep: float) -> int:
    """How many tokens stay: ``⌈keep·M⌉``."""
    return math.ceil(tokens * keep - 1e-9)  # 0.07 of 100 is 7.000…01
