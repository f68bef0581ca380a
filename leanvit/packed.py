"""A timm block for inference that computes only what a policy asks for: some patches, heads and sub-layers an image.

Tokens that take part are packed, those of all images in one matrix; what takes no part is not computed, and keeps its
value. The policies are AdaViT's (Meng et al., CVPR 2022, arXiv 2111.15668); the packing is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from .attention import project
from .fast import FastLinear, FastMlp
from .model import LeanBlock, Tokens
from .ops.linear import linear
from .ops.packed import packed_attention, packed_rows, rounded_up
from .record import offer

Heads = tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """What takes part in a block.

    Args:
        keep: Tokens, ``(B, N)`` bool.
        heads: The attention heads that each image uses.
        sublayers: Whether each image runs the attention, and the MLP.
    """

    keep: Tensor
    heads: Sequence[Heads]
    sublayers: Sequence[Sequence[bool]]

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens of each image take part."""
        return self.keep.sum(dim=1).tolist()

    @cached_property
    def images(self) -> list[int]:
        """The images that anything runs for: first those with attention, with the same heads side by side."""
        some = [image for image, row in enumerate(self.sublayers) if any(row) and self.lengths[image]]
        return sorted(some, key=lambda image: (not self.sublayers[image][0], self.heads[image], self.lengths[image]))

    @cached_property
    def groups(self) -> list[tuple[Heads, list[int]]]:
        """Heads, and the lengths of the images that use them; for the images with attention, in order."""
        attending = (image for image in self.images if self.sublayers[image][0])
        alike = groupby(attending, key=lambda image: self.heads[image])
        return [(heads, [self.lengths[image] for image in some]) for heads, some in alike]

    @cached_property
    def whole(self) -> bool:
        """Whether something runs for every image, in order, and all tokens take part."""
        batch, tokens = self.keep.shape
        return min(self.lengths) == tokens and self.images == list(range(batch))

    def offer(self, layer: int, prefix: int, heads: int) -> None:
        """Offer to the recorder which patches ``(B, M)``, heads ``(B, H)`` and sub-layers ``(B, 2)`` are used."""
        offer("patch_usage", layer, lambda: self.keep[:, prefix:].float())
        offer("head_usage", layer, lambda: self._table(heads))
        offer("sublayer_usage", layer, lambda: torch.tensor(self.sublayers, device=self.keep.device).float())

    def _table(self, heads: int) -> Tensor:
        rows = [[float(head in some) for head in range(heads)] for some in self.heads]
        return torch.tensor(rows, device=self.keep.device)


class PackedBlock(LeanBlock):
    """A block for inference that skips what its `decide` leaves out, for any mixture of policies in a batch."""

    decide: Any
    attn: Any

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        for stage in self.stages.values():
            tokens = stage(tokens)
        normed = self.norm1(tokens.x)
        policy: Policy = self.decide.policy(normed, tokens.prefix)
        policy.offer(self.decide.layer, tokens.prefix, self.decide.heads)
        offer("macs", self.decide.layer, lambda: self.macs(policy, tokens.prefix))
        x = self._run(tokens.x.flatten(0, 1), normed.flatten(0, 1), policy, tokens.size)
        return tokens.with_x(x.view_as(tokens.x))

    def _run(self, x: Tensor, normed: Tensor, policy: Policy, size: Tensor | None) -> Tensor:
        """Both sub-layers, added to the tokens that take part: ``(B·N, C)``, with all of them or the packed ones."""
        if not policy.images:
            return x
        rows = None if policy.whole else self._rows(policy)
        packed = x if rows is None else x.index_select(0, rows)
        if policy.groups:
            if size is not None:
                size = size.flatten() if rows is None else size.flatten().index_select(0, rows)
            packed = self._attend(packed, normed if rows is None else normed.index_select(0, rows), policy, size)
        packed = self._transform(packed, policy)
        if rows is None:
            return packed
        total = sum(policy.lengths[image] for image in policy.images)
        return x.index_copy(0, rows[:total], packed[:total])

    def _rows(self, policy: Policy) -> Tensor:
        """Places of the tokens that take part, and a few more, since products take a few rows more than a group has.

        Those are the next group's, and their results are dropped.
        """
        rows = packed_rows(policy.keep, policy.images)
        ends = [0, *accumulate(sum(lengths) for _, lengths in policy.groups)]
        needed = [rounded_up(len(rows)), *(start + rounded_up(end - start) for start, end in pairwise(ends))]
        return nn.functional.pad(rows, (0, max(needed) - len(rows)))

    def _attend(self, x: Tensor, normed: Tensor, policy: Policy, size: Tensor | None) -> Tensor:
        """Attention, added to the tokens that take part; images that use the same heads go together."""
        groups, tokens = policy.groups, policy.keep.shape[1]
        if len(groups) == 1 and len(groups[0][1]) == len(policy.images):
            return self.attn(normed, x, *groups[0], tokens, size)
        out, start = x.clone() if policy.whole else x, 0  # packed ones are a copy already
        for heads, lengths in groups:
            end = start + sum(lengths)
            part = slice(start, start + rounded_up(end - start))
            mixed = self.attn(normed[part], x[part], heads, lengths, tokens, None if size is None else size[part])
            out[start:end] = mixed[: end - start]
            start = end
        return out

    def _transform(self, x: Tensor, policy: Policy) -> Tensor:
        """The MLP, added to the tokens that take part."""
        runs = [policy.sublayers[image][1] for image in policy.images]
        if all(runs):
            return self.feed(x)
        if not any(runs):
            return x
        lengths = torch.tensor([policy.lengths[image] for image in policy.images], device=x.device)
        rows = torch.tensor(runs, device=x.device).repeat_interleave(lengths).nonzero().squeeze(1)
        total = len(rows)
        rows = nn.functional.pad(rows, (0, rounded_up(total) - total))
        out = x.clone() if policy.whole else x
        return out.index_copy_(0, rows[:total], self.feed(x.index_select(0, rows))[:total])

    def feed(self, x: Tensor) -> Tensor:
        if isinstance(self.mlp, FastMlp):
            return self.mlp(self.norm2(x), x)
        return super().feed(x)

    def macs(self, policy: Policy, prefix: int) -> Tensor:
        """MACs of this block for each image, ``(B,)``, by formula: what its policy asks for, nothing rounded up."""
        tokens, heads, attention, mlp = (
            torch.tensor([float(value) for value in values])
            for values in (policy.lengths, map(len, policy.heads), *zip(*policy.sublayers, strict=True))
        )
        tokens, heads = tokens.double(), heads.double()
        patches = policy.keep.shape[1] - prefix
        hidden = sum(module.weight.numel() for module in self.mlp.modules() if isinstance(module, nn.Linear))
        attending = self.attn.macs(tokens, heads)
        return attention * attending + mlp * tokens * hidden + self.decide.macs(patches)


class HeadwiseLinear(FastLinear):
    """The rows of a joint projection that belong to some heads, and only those; ordered head by head.

    Args:
        joint: timm's projection, rows ordered query, key, value, in each of them by head.
        heads: H.
        parts: Which of query, key and value (0, 1, 2) it holds.
        split: Whether some heads may be asked for without the others.
    """

    def __init__(self, joint: nn.Linear, heads: int, parts: Sequence[int], split: bool = False) -> None:
        weight, bias = (
            None if x is None else x.detach().unflatten(0, (3, heads, -1))[list(parts)].transpose(0, 1).flatten(0, 2)
            for x in (joint.weight, joint.bias)
        )
        assert weight is not None
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.heads, self.parts, self.split = heads, len(parts), split
        self.weight = nn.Parameter(self.lay_out(weight))
        if bias is not None:
            self.bias = nn.Parameter(bias.contiguous())

    def lay_out(self, weight: Tensor) -> Tensor:
        # The rows of some heads are a matrix that oneDNN takes only where the weight lies row by row.
        return weight.contiguous() if self.split else super().lay_out(weight)

    def forward(self, x: Tensor, ranges: Sequence[range]) -> Tensor:  # type: ignore[override]
        """``(T, C)`` → ``(T, heads in the ranges, parts, d)``."""
        width = self.out_features // self.heads
        outs = []
        for heads in ranges:
            weight: Tensor = self.weight
            bias: Tensor | None = self.bias
            if len(heads) < self.heads:
                rows = slice(heads.start * width, heads.stop * width)
                weight, bias = weight[rows], None if bias is None else bias[rows]
            outs.append(linear(x, weight, bias))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.unflatten(1, (-1, self.parts, width // self.parts))


class PackedAttention(nn.Module):
    """timm's attention for inference over packed tokens, of the heads that are used.

    Args:
        attention: timm's; a head that is not used has no query, key, value nor output.
        split: Whether images may use some heads without the others.
        partial: A head that is not used puts its values out as they are.
    """

    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any
    proj: Any
    proj_drop: Any

    def __init__(self, attention: Attention, split: bool, partial: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.partial = attention.num_heads, attention.head_dim, partial
        self.headwise = HeadwiseLinear(attention.qkv, self.num_heads, (0, 1) if partial else (0, 1, 2), split)
        self.v = HeadwiseLinear(attention.qkv, self.num_heads, (2,)) if partial else None
        for name in ("q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"):
            setattr(self, name, getattr(attention, name))
        self.all_heads = partial or attention.gate is not None or not isinstance(attention.norm, nn.Identity)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        heads: Heads,
        lengths: Sequence[int],
        whole: int,
        size: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of some images that use the same heads, and add the residual.

        Args:
            x: Normed tokens, packed, ``(T, C)``.
            residual: ``(T, C)``.
            heads: The heads that the images use.
            lengths: How many of the rows belong to each image; rows behind those are not to be used.
            whole: How many an image has of which all take part.
            size: How many patches each row stands for, ``(T,)``; None where each stands for one.
        """
        used = ranges(heads)
        values = None if self.v is None else self.v(x, [range(self.num_heads)]).squeeze(2)  # (T, H, d)
        mixed = self._mix(x, values, heads, lengths, whole, size) if heads else None  # (T, heads, d)
        if not self.all_heads:
            assert mixed is not None
            return self._project(mixed, residual, used)
        if values is None:
            values = (x if mixed is None else mixed).new_zeros(x.shape[0], self.num_heads, self.head_dim)
        every = values
        if mixed is not None:
            every[:, list(heads)] = mixed
        return project(self, x, every.flatten(1), residual)

    def _mix(
        self,
        x: Tensor,
        values: Tensor | None,
        heads: Heads,
        lengths: Sequence[int],
        whole: int,
        size: Tensor | None,
    ) -> Tensor:
        q, k, *v = self.headwise(x, ranges(heads)).unbind(2)
        v = v[0] if values is None else values[:, list(heads)]
        return packed_attention(self.q_norm(q), self.k_norm(k), v, lengths, whole, size)

    def _project(self, mixed: Tensor, residual: Tensor, used: Sequence[range]) -> Tensor:
        """The output projection of some heads: the columns of its weight that are theirs."""
        bias, place = self.proj.bias, 0
        for heads in used:
            weight: Tensor = self.proj.weight
            if len(heads) < self.num_heads:
                weight = weight[:, heads.start * self.head_dim : heads.stop * self.head_dim]
            part = mixed[:, place : place + len(heads)].flatten(1)
            residual = linear(part.contiguous(), weight, bias, residual=residual)
            bias, place = None, place + len(heads)
        return residual

    def macs(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """MACs of images with so many tokens and used heads, both ``(B,)``."""
        width = self.head_dim * self.headwise.in_features
        per_head = tokens * self.headwise.parts * width + 2 * tokens**2 * self.head_dim
        if not self.all_heads:
            return heads * (per_head + tokens * width)
        fixed = self.proj.weight.numel() + (0 if self.v is None else self.v.weight.numel())
        gate = 0 if self.gate is None else self.gate.weight.numel()
        return heads * per_head + tokens * (fixed + gate)

    def __repr__(self) -> str:
        return f"packed attention, {self.num_heads} heads"


def ranges(heads: Heads) -> list[range]:
    """Consecutive numbers as ranges: ``(0, 1, 3)`` → ``[range(0, 2), range(3, 4)]``."""
    runs = groupby(enumerate(heads), lambda item: item[1] - item[0])
    return [range(run[0][1], run[-1][1] + 1) for run in (list(members) for _, members in runs)]
