"""What engines that run an exported graph run fastest: attention head by head, and of the last block what is read."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from .attention import Attended, project
from .fast import FastAttention, FastBlock

if TYPE_CHECKING:
    from .model import Tokens


def for_graph(model: nn.Module) -> nn.Module:
    """A copy of a deployed model in that form; the same logits."""
    model = copy.deepcopy(model)
    blocks: Any = model.blocks
    for block in blocks:
        if isinstance(block, FastBlock) and isinstance(block.attn, FastAttention):
            block.attn = HeadwiseAttention(block.attn)  # type: ignore[assignment]
    last = blocks[-1]
    reads_prefix = getattr(model, "global_pool", "") == "token"
    if reads_prefix and type(last) is FastBlock and isinstance(last.attn, HeadwiseAttention) and not last.reducers:
        last.__class__ = PrefixBlock
    return model


class HeadwiseAttention(nn.Module):
    """A dense attention as plain products: query, key and value each by a projection, then head after head.

    timm's form computes query, key and value of all heads in one product and permutes them apart. In onnxruntime these
    permutations are copies by a single thread: attention at N = 197, C = 192 and batch 32 takes 9.6 ms a layer with
    them, and 7.0 ms like this. The scale is part of the queries' projection, and the bias of the values, which passes
    through a mean, part of the last one.

    Args:
        attention: A deployed dense attention, which is left as it is.
    """

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.head_dim**-0.5
        for part in ("q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"):
            setattr(self, part, copy.copy(getattr(attention, part)))
        weights: Any = attention.qkv.weight.chunk(3)
        biases: Any = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        self.q, self.k, self.v = (linear_layer(*parts) for parts in zip(weights, biases, strict=True))
        if self.v.bias is not None and isinstance(self.norm, nn.Identity) and self.gate is None:
            carried = self.proj.weight @ self.v.bias
            self.proj.bias = nn.Parameter(carried if self.proj.bias is None else self.proj.bias + carried, False)
            self.v.bias = None

    def attend(self, x: Tensor, tokens: Tokens, *residual: Tensor, queries: int | None = None) -> Attended:
        """As `leanvit.attention.attend` calls it.

        Args:
            x: Tokens, normalised, ``(B, N, C)``.
            tokens: What they are the normalised form of.
            residual: Added to the output, ``(B, queries, C)``.
            queries: How many tokens attend, counted from the first; all when not given.
        """
        heads = self.num_heads
        asking = x[:, :queries]
        q = [self.q_norm(head) for head in self.q(asking).chunk(heads, dim=-1)]  # each (B, N, d)
        k = [self.k_norm(head) for head in self.k(x).chunk(heads, dim=-1)]
        v = self.v(x).chunk(heads, dim=-1)
        maps = [some_q * self.scale @ some_k.transpose(1, 2) for some_q, some_k in zip(q, k, strict=True)]  # (B, N, N)
        if tokens.size is not None:
            bias = tokens.size.log().unsqueeze(1)  # (B, 1, N)
            maps = [logits + bias for logits in maps]
        mixed = torch.cat([logits.softmax(dim=-1) @ some_v for logits, some_v in zip(maps, v, strict=True)], dim=-1)
        # An exported graph holds these stacks only where somebody uses them.
        return Attended(project(self, asking, mixed, *residual), torch.stack(q, dim=1), torch.stack(k, dim=1))


class PrefixBlock(FastBlock):
    """The last block of a model whose head reads the prefix tokens: only these attend and pass through the MLP."""

    def mix(self, tokens: Tokens) -> Attended:
        attention: Any = self.attn
        first = tokens.x[:, : tokens.prefix]
        return attention.attend(self.norm1(tokens.x), tokens, first, queries=tokens.prefix)  # type: ignore[no-any-return]


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given weights, ``(C_out, C_in)`` and ``(C_out,)``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
