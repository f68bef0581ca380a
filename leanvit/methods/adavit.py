"""AdaViT: which patches, heads and sub-layers take part is decided for each image, in front of every block.

Source: Meng et al., CVPR 2022, arXiv 2111.15668. Starting with everything on, targets that move, noise that fades and
a threshold that sets the budget afterwards are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..attention import project
from ..count import count, evaluating, random_images
from ..errors import ConfigError, MethodError
from ..fast import BlockedLinear
from ..model import LeanBlock, Tokens
from ..ops.linear import linear
from ..packed import PackedAttention, PackedBlock, Policy
from ..record import Record, Recorder, offer
from . import register
from .base import LeanModule, Method, Plan

if TYPE_CHECKING:
    from ..model import LeanVisionTransformer

MANY = 512
"""Rows from which on oneDNN's product is worth its call."""
START = 3.0
"""Logit of every decision before training: on in 95 of 100 draws, and always without noise."""


@register
@dataclass(frozen=True)
class AdaViT(Method):
    """Decide per image which patches, heads and sub-layers of each block take part.

    Args:
        patches: Share of the patches that a block shall use; 1 or None leaves all patches on, and so for the others.
        heads: Share of the attention heads, counted where the attention runs.
        blocks: Share of the sub-layers, attention and MLP apart.
        first: The first block that decides; those before it are whole.
        partial: What a head does that is left out: nothing (full deactivation), or its values go on as they are.
        temperature: Of the gradient through a decision (Gumbel-softmax, straight-through).
        usage_weight: Weight of the loss ``Σ |mean usage − target|``.
        ramp: Share of training over which the targets move from 1 to those above.

    Raises:
        ConfigError: A value out of range, or nothing is left to decide.
    """

    name: ClassVar[str] = "adavit"
    data_dependent: ClassVar[bool] = True
    has_budget: ClassVar[bool] = True
    loss_kinds: ClassVar[tuple[str, ...]] = ("patch_usage", "head_usage", "sublayer_usage", "usage_target")

    patches: float | None = 0.7
    heads: float | None = 0.7
    blocks: float | None = 0.65
    first: int = 1
    partial: bool = False
    temperature: float = 5.0
    usage_weight: float = 2.0
    ramp: float = 0.5

    def __post_init__(self) -> None:
        for name in ("patches", "heads", "blocks"):
            target = getattr(self, name)
            if target is None:
                object.__setattr__(self, name, 1.0)
            elif not _is_number(target) or not 0 < target <= 1:
                raise ConfigError(f"adavit: {name}={target!r} is not in (0, 1]; 1 leaves all of them on")
        if self.targets == (1, 1, 1):
            raise ConfigError("adavit: patches, heads and blocks are all 1, nothing is left to decide; lower one")
        for name in ("temperature", "usage_weight", "ramp"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"adavit: {name}={value!r} must be a number of at least 0")
        if self.temperature == 0:
            raise ConfigError("adavit: temperature=0 must be above 0")
        if self.ramp > 1:
            raise ConfigError(f"adavit: ramp={self.ramp} is a share of training, in [0, 1]")
        if not isinstance(self.first, int) or self.first < 0:
            raise ConfigError(f"adavit: first={self.first!r} must be the index of a block")
        if not isinstance(self.partial, bool):
            raise ConfigError(f"adavit: partial={self.partial!r} must be true or false")

    @property
    def targets(self) -> tuple[float, float, float]:
        """Shares of patches, heads and sub-layers that shall be used."""
        return self.patches or 1.0, self.heads or 1.0, self.blocks or 1.0

    def resolve(self, plan: Plan) -> Self:
        plan.check_blocks(self.name, [self.first])
        return self

    def for_budget(self, model: Any, macs: float, beside: Any = None) -> Self:
        """The same share of every kind that is decided, such that the expected cost is the budget.

        Args:
            model: The dense model.
            macs: A share of its MACs.
            beside: The model with the other methods that shall run beside this one, if any.
        """
        beside = model if beside is None else beside
        dense, others, entering = count(model).macs, count(beside).macs, _tokens_entering(beside, self.first)

        def expected(usage: float) -> float:
            return (others - self._saved(model, entering, usage)) / dense

        low, high = 1e-3, 1.0
        least, most = expected(low), expected(high)
        if not isinstance(macs, (int, float)) or not least <= macs <= most:
            raise ConfigError(
                f"adavit: no usage gives a budget of {macs}: from block {self.first} on, what it decides reaches "
                f"{least:.3f} to {most:.3f} of the dense model's MACs"
            )
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if expected(middle) < macs else (low, middle)
        patches, heads, blocks = (round(high, 3) if target < 1 else 1.0 for target in self.targets)
        return replace(self, patches=patches, heads=heads, blocks=blocks)

    def _saved(self, model: Any, tokens: int, usage: float) -> float:
        """MACs of an image that are saved where every kind that is decided is used to this degree."""
        patches, heads, blocks = (usage if target < 1 else 1.0 for target in self.targets)
        kept = model.num_prefix_tokens + patches * (tokens - model.num_prefix_tokens)
        saved = 0.0
        for block in model.blocks[self.first :]:
            attention, inner = block.attn, block.attn.attn_dim
            inputs, proj = attention.qkv.weight.numel(), attention.proj.weight.numel()
            mlp = sum(part.weight.numel() for part in block.mlp.modules() if isinstance(part, nn.Linear))
            always = inputs / 3 + proj if self.partial else 0.0  # of a token: what runs for heads that are left out too
            of_heads = inputs + proj - always
            whole = tokens * (inputs + proj + mlp) + 2 * tokens**2 * inner
            left = blocks * (kept * (always + mlp + heads * of_heads) + heads * 2 * kept**2 * inner)
            saved += whole - left
        return saved

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for index, block in enumerate(lean.blocks):
            if index >= self.first:
                AdaptiveBlock.adopt(block, Decisions(lean.embed_dim, block.attn.num_heads, index, self))

    def start(
        self, lean: LeanVisionTransformer, vit: Any, inputs: Sequence[Tokens], generator: torch.Generator
    ) -> None:
        from ..importance import fit_decisions
        from ..model import slim

        fitted = slim(vit, self).requires_grad_(False)
        fit_decisions(fitted, inputs, generator)
        for block, source in zip(lean.blocks, fitted.blocks, strict=True):
            if isinstance(block, AdaptiveBlock):
                block.decide.load_state_dict(source.decide.state_dict())

    def losses(self, found: Recorder) -> dict[str, Tensor]:
        patches, heads, sublayers = (_stacked(found[kind]) for kind in self.loss_kinds[:3])
        if not len(sublayers):
            return {}
        running = sublayers[..., :1].detach()  # (L, B, 1): heads count where their attention runs
        usage = torch.stack(
            [patches.mean(), (heads * running).sum() / (running.sum() * heads.shape[-1]).clamp_min(1), sublayers.mean()]
        )
        target = found["usage_target"][0].value
        return {"usage": self.usage_weight * (usage - target).abs().sum()}


def _tokens_entering(model: Any, index: int) -> int:
    """How many tokens of an image reach a block; 0 where there is no such block."""
    seen = [0]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(getattr(args[0], "x", args[0]).shape[1]))
        for block in model.blocks[index : index + 1]
    ]
    with evaluating(model), torch.inference_mode():
        model(random_images(model).to(next(model.parameters())))
    for hook in hooks:
        hook.remove()
    return seen[-1]


class Decisions(LeanModule):
    """The decision network of one block: from the class token to heads and sub-layers, from each patch to itself.

    A decision is on where its logit is above `threshold`, which sets the budget of a trained model. In training, noise
    is added first (the difference of two Gumbel variables); it fades out as training goes, so that what is trained at
    the end is what ships.

    Args:
        dim: C.
        heads: H.
        layer: The block it belongs to.
        config: Which kinds it decides, and how it trains.
    """

    method: ClassVar[str] = AdaViT.name

    threshold: Tensor
    progress: Tensor
    begin: Tensor

    def __init__(self, dim: int, heads: int, layer: int, config: AdaViT) -> None:
        super().__init__()
        self.heads, self.layer, self.config = heads, layer, config
        patches, some_heads, sublayers = (target < 1 for target in config.targets)
        self.split = [heads * some_heads, 2 * sublayers]
        self.patch = DecisionLayer(dim, 1) if patches else None
        self.image = DecisionLayer(dim, sum(self.split)) if sum(self.split) else None
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("begin", torch.ones(3))
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def logits(self, x: Tensor, prefix: int) -> tuple[Tensor | None, Tensor | None]:
        """Logits of patches ``(B, M)``, and of what is decided for an image as a whole: heads, then sub-layers.

        Args:
            x: The block's normed input, ``(B, P + M, C)``.
            prefix: P; without a class token, the mean of the patches stands for the image.
        """
        patches = None if self.patch is None else self.patch(x[:, prefix:]).squeeze(-1)
        return patches, None if self.image is None else self.image(self.image_token(x, prefix))

    def image_token(self, x: Tensor, prefix: int) -> Tensor:
        """What stands for an image: the class token or, without one, the mean of the patches; ``(B, C)``."""
        return x[:, 0] if prefix else x.mean(dim=1)

    def parts(self) -> list[tuple[DecisionLayer, slice] | None]:
        """Layer and rows that decide about patches, heads and sub-layers; None where all are on."""
        patches = None if self.patch is None else (self.patch, slice(None))
        if self.image is None:
            return [patches, None, None]
        heads, sublayers = slice(0, self.split[0]), slice(self.split[0], None)
        return [
            patches,
            (self.image, heads) if self.split[0] else None,
            (self.image, sublayers) if self.split[1] else None,
        ]

    def policy(self, x: Tensor, prefix: int) -> Policy:
        """What takes part, as the deployed form asks: prefix tokens always do, attention without a head is off."""
        batch, tokens, _ = x.shape
        patches, image = self.logits(x, prefix)
        keep = x.new_ones(batch, tokens, dtype=torch.bool)
        if patches is not None:
            keep[:, prefix:] = patches > self.threshold
        on: list[list[bool]] = [[]] * batch if image is None else (image > self.threshold).tolist()
        heads, sublayers = self.split
        used = [tuple(compress(range(self.heads), row)) if heads else tuple(range(self.heads)) for row in on]
        running = [row[heads:] if sublayers else [True, True] for row in on]
        for some, row in zip(used, running, strict=True):
            row[0] &= bool(some) or self.config.partial
        return Policy(keep, used, running)

    def draw(self, x: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches ``(B, M)``, heads ``(B, H)`` and sub-layers ``(B, 2)``: 1 where used, with a gradient in training."""
        batch, tokens, _ = x.shape
        patches, image = self.logits(x, prefix)
        heads, sublayers = (None, None) if image is None else image.split(self.split, dim=1)
        patches, heads, sublayers = (
            x.new_ones(batch, count) if logits is None or not logits.shape[1] else self._decide(logits).to(x.dtype)
            for logits, count in zip((patches, heads, sublayers), (tokens - prefix, self.heads, 2), strict=True)
        )
        return patches, heads, self._without_heads(heads, sublayers)

    def _without_heads(self, heads: Tensor, sublayers: Tensor) -> Tensor:
        """The sub-layers, attention off for images that use none of its heads."""
        if self.config.partial or not self.split[0]:
            return sublayers
        some = heads.detach().bool().any(dim=1)
        return torch.stack([sublayers[:, 0] * some, sublayers[:, 1]], dim=1)

    def _decide(self, logits: Tensor) -> Tensor:
        logits = logits.float() - self.threshold
        if not self.training:
            return (logits > 0).float()
        draws = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits + (1 - self.progress) * draws.logit()
        soft = (logits / self.config.temperature).sigmoid()
        return (logits > 0).float() + soft - soft.detach()

    def target(self) -> Tensor:
        """The shares that training aims at now, ``(3,)``: from 1 to the budget."""
        done = (self.progress / self.config.ramp).clamp(max=1) if self.config.ramp else torch.ones_like(self.progress)
        return torch.lerp(self.begin, done.new_tensor(self.config.targets), done)

    def macs(self, patches: int) -> int:
        """MACs of deciding, for an image of so many patches."""
        return sum(layer.weight.numel() * times for layer, times in ((self.patch, patches), (self.image, 1)) if layer)

    def set_progress(self, progress: float) -> None:
        self.progress.fill_(progress)

    def settled(self, progress: float) -> bool:
        return progress >= self.config.ramp or bool((self.begin == self.begin.new_tensor(self.config.targets)).all())

    def check_block(self, block: Any) -> None:
        for module in block.lean_modules():
            if module.reduces_tokens:
                raise MethodError(
                    f"adavit: block {self.layer} decides for each image how many patches take part, and "
                    f"{module.method} fixes that for the whole batch; use first={self.layer + 1} or other blocks"
                )
            if module is not self and module in (block.attn, block.mlp):
                raise MethodError(
                    f"adavit: block {self.layer} decides over dense attention and MLP, and {module.method} replaces "
                    f"one of them; use first={self.layer + 1} or other blocks"
                )

    def __repr__(self) -> str:
        decided = zip(("patches", "heads", "blocks"), self.config.targets, strict=True)
        return f"adavit {', '.join(name for name, target in decided if target < 1)}"


class RandomDecisions(Decisions):
    """Decisions drawn at random: what learned ones are compared with, and what skipping is timed with."""

    rates: tuple[float, float, float | Tensor]
    generator: torch.Generator

    @classmethod
    def adopt(cls, decisions: Any, rates: tuple[float, float, float | Tensor], generator: torch.Generator) -> None:
        """Let a block's decisions be drawn from now on, in place.

        Args:
            decisions: Its decision network, which still runs, so that it costs what it costs.
            rates: Shares of patches, heads and sub-layers to be used; of kinds that the network does not decide,
                everything is.
            generator: Where the draws come from.
        """
        decisions.__class__ = cls
        decisions.rates, decisions.generator = rates, generator

    def logits(self, x: Tensor, prefix: int) -> tuple[Tensor | None, Tensor | None]:
        patches, image = super().logits(x, prefix)
        if patches is not None:
            patches = self._drawn(patches.shape, self.rates[0])
        if image is not None:
            parts = zip(self.split, self.rates[1:], strict=True)
            image = torch.cat([self._drawn((len(x), count), rate) for count, rate in parts if count], dim=1)
        return patches, image

    def _drawn(self, shape: Sequence[int], rate: float | Tensor) -> Tensor:
        return self.threshold + rate - torch.rand(shape, generator=self.generator)


class AdaptiveBlock(LeanBlock):
    """A timm block of which each image runs a part, as it trains: all is computed, what takes no part is masked."""

    decide: Decisions

    @classmethod
    def adopt(cls, block: Any, decide: Decisions) -> None:
        """Turn a lean block into an adaptive one in place."""
        block.__class__ = cls
        block.decide = decide.to(block.attn.qkv.weight).train(block.training)

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        for stage in self.stages.values():
            tokens = stage(tokens)
        x, decide = tokens.x, self.decide
        normed = self.norm1(x)
        patches, heads, sublayers = decide.draw(normed, tokens.prefix)
        offer("patch_usage", decide.layer, patches.float)
        offer("head_usage", decide.layer, heads.float)
        offer("sublayer_usage", decide.layer, sublayers.float)
        offer("usage_target", decide.layer, decide.target)
        keep = torch.cat([patches.new_ones(patches.shape[0], tokens.prefix), patches], dim=1)  # (B, N)
        attention, mlp = (keep * sublayers[:, [which]] for which in (0, 1))
        mixed = masked_attention(self.attn, normed, keep, heads, decide.config.partial, tokens.size)
        x = x + attention.unsqueeze(-1) * self.drop_path1(self.ls1(mixed))
        x = x + mlp.unsqueeze(-1) * self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return tokens.with_x(x)

    def lean_modules(self) -> list[LeanModule]:
        return [self.decide, *super().lean_modules()]

    def deployed(self) -> None:
        self.__class__ = PackedBlock  # type: ignore[assignment]
        attention: Any = self.attn
        self.attn = PackedAttention(attention, bool(self.decide.split[0]), self.decide.config.partial)  # type: ignore[assignment]

    def original(self) -> None:
        del self.decide
        super().original()

    def __repr__(self) -> str:
        return f"{self.decide!r}, {super().__repr__()}"


def masked_attention(
    attention: Any, x: Tensor, keep: Tensor, heads: Tensor, partial: bool, size: Tensor | None = None
) -> Tensor:
    """timm's attention among the tokens that take part, of the heads that do; with gradients to both decisions.

    Args:
        attention: timm's module.
        x: ``(B, N, C)``.
        keep: 1 for tokens that take part, ``(B, N)``. What comes out for the others means nothing.
        heads: 1 for heads that do, ``(B, H)``.
        partial: Whether the values of a head that does not are its output, in place of zeros.
        size: How many patches each token stands for, ``(B, N)``; None where each stands for one.
    """
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    scores = (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1)
    each = keep if size is None else keep * size
    weights = scores.float().softmax(dim=-1) * each[:, None, None]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    used = heads[:, :, None, None]
    mixed = used * (attention.attn_drop(weights).to(v.dtype) @ v)
    if partial:
        mixed = mixed + (1 - used) * v
    return project(attention, x, mixed.transpose(1, 2).flatten(2))


class DecisionLayer(BlockedLinear):
    """A layer whose decisions all start on, whatever the input.

    For so few outputs the call of oneDNN's product takes longer than the product; up to some rows torch's is faster.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[:-1].numel() > MANY:
            return linear(input, self.weight, self.bias)
        return super().forward(input)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, START)


def _stacked(records: list[Record]) -> Tensor:
    """The values of all blocks, ``(L, …)``."""
    return torch.stack([record.value for record in records]) if records else torch.empty(0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
