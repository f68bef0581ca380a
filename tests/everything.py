"""A method that offers data of every kind that explanations and pages know: half of the patches are dropped in front
of one block, and all blocks offer maps and usage. It computes nothing useful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanvit.methods import LeanModule, Method
from leanvit.model import LeanVisionTransformer, Tokens
from leanvit.record import offer

HEADS = 3


@dataclass(frozen=True)
class Everything(Method):
    """Not registered, so that tests over all methods do not meet it."""

    name: ClassVar[str] = "everything"
    reduces_tokens: ClassVar[bool] = True
    drop_at: int = 2

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for index, block in enumerate(lean.blocks):
            block.stages[self.name] = Offers(index, index == self.drop_at)


class Offers(LeanModule):
    method: ClassVar[str] = Everything.name

    def __init__(self, layer: int, drops: bool) -> None:
        super().__init__()
        self.layer, self.drops = layer, drops

    def forward(self, tokens: Tokens) -> Tokens:
        if self.drops:
            brightest = tokens.patches.mean(dim=-1).topk(tokens.patches.shape[1] // 2).indices.sort().values  # (B, M')
            kept = torch.nn.functional.one_hot(brightest, tokens.patches.shape[1]).to(tokens.x.dtype)
            tokens = tokens.aggregate(kept @ tokens.patches, kept)
        images, count = tokens.x.shape[0], tokens.x.shape[1]
        attention = torch.eye(count).roll(1, dims=1).expand(images, HEADS, count, count)  # each to the next token
        offer("static_attention", self.layer, lambda: attention[0])
        for kind in ("dynamic_attention", "linear_attention", "softmax_attention"):
            offer(kind, self.layer, lambda: attention)
        offer("connections", self.layer, lambda: attention > 0)
        offer("patch_usage", self.layer, lambda: self._every_other(images, tokens.patches.shape[1]))
        offer("head_usage", self.layer, lambda: self._every_other(images, HEADS))
        offer("sublayer_usage", self.layer, lambda: torch.tensor([[1.0, float(self.layer % 2)]]).expand(images, 2))
        return tokens

    @staticmethod
    def _every_other(images: int, count: int) -> Tensor:
        return (torch.arange(count) % 2).float().expand(images, count)
