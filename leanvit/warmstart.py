"""Warm start: bring a lean model close to its dense one, block by block, without labels, in minutes.

Each block is first set in closed form (means, pooling) and then regressed: given the lean model's own input, all of it
trains towards the dense block's output on the same images. Known from post-training quantisation as block-wise
reconstruction (Li et al., BRECQ, arXiv 2102.05426).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .errors import ConfigError, UnsupportedModelError
from .model import LeanBlock, LeanModel, Tokens, with_blocks
from .ops.processor import has_bf16

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from .data import ImageSource
    from .methods.base import LeanModule
    from .model import LeanVisionTransformer

Batch = TypeVar("Batch")

HELD_OUT = 8
"""One batch in so many is kept from the regression and judges it."""
RATES = (1.0, 0.1)
"""A block that does not improve is tried once more with smaller steps: where tokens were only merged or removed, little
is to be gained and much to be lost."""
EXACT = 1e-9
"""A block with less error than this does what the dense one does: there is nothing to regress."""


@dataclass(frozen=True)
class BlockFit:
    """How one block came out.

    Args:
        block: Its index.
        before, after: Squared error of its output on held-out images, over the variance of the dense block's. One
            batch in eight is held out; where there is only one batch, it both fits and judges.
        kept: Whether the regression was kept; a block that did not improve has its closed-form start.
    """

    block: int
    before: float
    after: float
    kept: bool


def warm_start(
    lean: LeanVisionTransformer,
    vit: VisionTransformer,
    images: ImageSource,
    *,
    steps: int = 60,
    batch_size: int = 32,
    limit: int = 1024,
    lr: float = 1e-3,
    prefix_weight: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> list[BlockFit]:
    """Warm-start a lean model in place, from unlabelled images.

    Args:
        lean: The lean model, as `slim` made it.
        vit: The dense model it was made of.
        images: A path, a data set, a loader or a tensor ``(B, 3, H, W)``.
        steps: Regression steps a block; 0 leaves the closed-form start.
        batch_size: Images a step.
        limit: Use at most this many images. Memory holds the dense and the lean tokens of one block for all of them,
            ``4·N·C`` bytes each an image, and where tokens were aggregated the map that did it, ``4·M·N`` bytes.
        lr: Peak learning rate of the regression.
        prefix_weight: Share of the prefix tokens (class, registers) in the error; the patch tokens have the rest.
        seed: Order of the batches.
        progress: Show a bar with each block's error before and after.

    Returns:
        How each block came out; blocks in front of the first change are left out.

    Raises:
        ConfigError: The models do not belong together or compute in float16, there are too few images, or an error is
            not finite.
    """
    check_pair(lean, vit)
    if vit.patch_embed.proj.weight.dtype is torch.float16:
        raise ConfigError("the warm start in float16: small gradients would vanish; use float() or bfloat16()")
    if steps < 0 or batch_size < 1 or lr <= 0 or not 0 <= prefix_weight <= 1:
        raise ConfigError(
            "warm start needs steps >= 0, batch_size >= 1, lr > 0 and prefix_weight in [0, 1]; got "
            f"steps={steps}, batch_size={batch_size}, lr={lr}, prefix_weight={prefix_weight}"
        )
    was_training = lean.training, vit.training
    lean.eval(), vit.eval()
    try:
        features = _embed(lean, vit, images, batch_size, limit)
        regression = _Regression(steps, lr, prefix_weight, torch.Generator().manual_seed(seed))
        return _fit_blocks(lean, vit, features, regression, progress)
    finally:
        lean.train(was_training[0]), vit.train(was_training[1])


def _fit_blocks(
    lean: LeanVisionTransformer, vit: VisionTransformer, features: _Features, regression: _Regression, progress: bool
) -> list[BlockFit]:
    fits = []
    for method in lean.lean.methods:
        method.start(lean, vit, features.lean, regression.generator)
    pairs: Iterator[tuple[Any, Any]] = zip(lean.blocks, vit.blocks, strict=True)
    with _progress_bar(not progress) as bar:
        task = bar.add_task("warm start", total=len(lean.blocks), note="")
        for index, (block, dense) in enumerate(pairs):
            for module in block.lean_modules():
                module.start(dense, features.dense_inputs())
                regression.learn(module, dense, list(features.dense_inputs()))
            if not features.changed and not block.lean_modules():
                features.advance_unchanged(dense)
            else:
                features.advance_dense(dense)
                fit = regression.fit(index, block, features)
                features.advance_lean(block)
                fits.append(fit)
                note = f"block {index}: error {fit.before:.4f} → {fit.after:.4f}"
                bar.update(task, note=note)
                if progress:
                    bar.console.print(note if fit.kept else f"{note} (not better, start kept)", highlight=False)
            bar.advance(task)
    return fits


class _Features:
    """The dense and the lean tokens in front of one block, in batches, and the dense ones behind it.

    Args:
        inputs: The embedded images, batch by batch; both models share the embedding.
    """

    def __init__(self, inputs: Sequence[Tokens]) -> None:
        self.lean: list[Tokens] = list(inputs)
        self.dense: list[Tensor] = [tokens.x for tokens in inputs]
        self.changed = False
        """Whether the lean tokens differ from the dense ones."""

    def dense_inputs(self) -> Iterator[Tensor]:
        return iter(self.dense)

    # Batch by batch in place: one block's features are held, not two.
    @torch.no_grad()
    def advance_dense(self, dense: nn.Module) -> None:
        for index, x in enumerate(self.dense):
            self.dense[index] = dense(x)

    @torch.no_grad()
    def advance_lean(self, block: LeanBlock) -> None:
        for index, tokens in enumerate(self.lean):
            self.lean[index] = block(tokens)
        self.changed = True

    def advance_unchanged(self, dense: nn.Module) -> None:
        self.advance_dense(dense)
        self.lean = [tokens.with_x(x) for tokens, x in zip(self.lean, self.dense, strict=True)]

    def pairs(self) -> tuple[list[tuple[Tokens, Tensor]], list[tuple[Tokens, Tensor]]]:
        """Lean input and dense output by batch: those to fit and those held out (the same where there is one)."""
        pairs = list(zip(self.lean, self.dense, strict=True))
        held_out = pairs[HELD_OUT - 1 :: HELD_OUT] or pairs[-1:]
        fit = [pair for index, pair in enumerate(pairs) if index % HELD_OUT != HELD_OUT - 1]
        return (fit[:-1] if len(pairs) < HELD_OUT and len(pairs) > 1 else fit), held_out


@torch.no_grad()
def _embed(
    lean: LeanVisionTransformer, vit: VisionTransformer, images: ImageSource, batch_size: int, limit: int
) -> _Features:
    from .data import image_batches

    batches: list[Tokens] = []

    def capture(x: Tensor) -> Tensor:
        batches.append(lean.blocks.tokens(x, track=True))
        return x

    embed = with_blocks(vit, capture)
    embed._modules["norm"] = nn.Identity()
    embed.grad_checkpointing = False  # timm would look for blocks to checkpoint
    for batch in image_batches(images, vit, batch_size, limit):
        embed.forward_features(batch.to(vit.patch_embed.proj.weight))
    if sum(len(tokens.x) for tokens in batches) < 2:
        raise ConfigError("the warm start needs at least 2 images, better a few hundred")
    if len(batches) > 1 and len(batches[-1].x) == 1:  # it may be held out, and one image is no measure
        last = torch.cat([tokens.x for tokens in batches[-2:]])
        batches[-2:] = [lean.blocks.tokens(last, track=True)]
    return _Features(batches)


@dataclass(frozen=True)
class _Regression:
    """How a block is fitted; arguments as those of `warm_start`."""

    steps: int
    lr: float
    prefix_weight: float
    generator: torch.Generator

    def fit(self, index: int, block: LeanBlock, features: _Features) -> BlockFit:
        """Fit one block; put it back where the held-out error does not fall."""
        fit, held_out = features.pairs()
        error = _Error([*fit, *held_out], self.prefix_weight)
        before = error.mean(block, held_out)
        if not math.isfinite(before):
            raise ConfigError(f"the warm start of block {index}: its error is {before} before anything is fitted")
        if before < EXACT:
            return BlockFit(index, before, before, False)
        start = copy.deepcopy(block.state_dict())
        for rate in RATES:
            self._descend(block, fit, lambda pair: _block_loss(block, error, *pair), self.lr * rate)
            after = error.mean(block, held_out)
            if after < before:
                return BlockFit(index, before, after, True)
            block.load_state_dict(start)
        return BlockFit(index, before, before, False)

    def learn(self, module: LeanModule, dense: Any, inputs: Sequence[Tensor]) -> None:
        """Let a module minimise a loss of its own, where it has one."""
        with torch.no_grad():
            if module.start_loss(dense, inputs[0][:1]) is None:
                return
        self._descend(module, inputs, lambda x: cast(Tensor, module.start_loss(dense, x)), self.lr)

    def _descend(self, module: nn.Module, batches: Sequence[Batch], loss: Callable[[Batch], Tensor], lr: float) -> None:
        """Train what a loss of the batches depends on in a module; what is frozen stays as it is."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            return
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rise_and_fall((step + 1) / (self.steps + 1))
        )
        order: list[int] = []
        for _ in range(self.steps):
            order = order or torch.randperm(len(batches), generator=self.generator).tolist()
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                value = loss(batches[order.pop()])
            if not value.requires_grad:
                break  # nothing that can be trained has a part in it
            value.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _block_loss(block: LeanBlock, error: _Error, tokens: Tokens, dense: Tensor) -> Tensor:
    kind = dense.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=has_bf16(kind)):
        output = block(tokens)
    return error(output, dense)


def _rise_and_fall(progress: float, rise: float = 0.1) -> float:
    """Share of the peak learning rate: linear up to `rise`, then half a cosine down to nothing."""
    if progress < rise:
        return progress / rise
    return 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise))


class _Error:
    """Squared error of lean tokens against dense ones reduced the same way, over the variance of the dense ones."""

    def __init__(self, pairs: Sequence[tuple[Tokens, Tensor]], prefix_weight: float) -> None:
        prefix = pairs[0][0].prefix
        self.prefix = prefix
        self.scales = (
            _variance([dense[:, :prefix] for _, dense in pairs]) if prefix else 1.0,
            _variance([dense[:, prefix:] for _, dense in pairs]),
        )
        self.weights = (prefix_weight, 1 - prefix_weight) if prefix else (0.0, 1.0)

    def __call__(self, tokens: Tokens, dense: Tensor) -> Tensor:
        difference = (tokens.x.float() - tokens.reduce(dense).float()).square()
        parts = (difference[:, : self.prefix], difference[:, self.prefix :])
        terms = [
            weight * part.mean() / scale
            for part, weight, scale in zip(parts, self.weights, self.scales, strict=True)
            if weight
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def mean(self, block: LeanBlock, pairs: Sequence[tuple[Tokens, Tensor]]) -> float:
        return float(torch.stack([self(block(tokens), dense) for tokens, dense in pairs]).mean())


def _variance(batches: Sequence[Tensor]) -> float:
    """Of tokens ``(B, N, C)`` about their mean, averaged over the channels; without a copy of them all."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.flatten(0, 1).double()
        count, total, squares = (
            count + len(rows),
            total + rows.sum(dim=0).cpu(),
            squares + rows.square().sum(dim=0).cpu(),
        )
    return float(((squares - total.square() / count) / (count - 1)).mean().clamp_min(1e-12))


def check_pair(lean: Any, vit: Any) -> None:
    """Refuse a lean model and a dense one that do not belong together."""
    if not isinstance(lean, LeanModel):
        raise UnsupportedModelError(f"{type(lean).__name__} is not a lean model; slim() makes one")
    if lean.lean.deployed:
        raise ConfigError("a deployed model cannot be warm-started or trained; do it before deploy()")
    mine = (len(lean.blocks), lean.embed_dim, lean.blocks.grid)  # type: ignore[attr-defined]
    theirs = (len(vit.blocks), vit.embed_dim, vit.patch_embed.grid_size)
    if mine != theirs:
        raise ConfigError(f"the lean and the dense model differ in blocks, width or patch grid: {mine} and {theirs}")


def _progress_bar(disable: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, disable=disable, transient=True, console=Console(stderr=True))
