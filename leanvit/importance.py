"""How much the output depends on each patch, head and sub-layer, and decisions that predict it; without labels.

Importance is the Fisher information of a gate that all of a part's contribution passes through: the expected squared
gradient of the output's features in it. Pruning ranks weights and channels by it (Theis et al., 2018, arXiv 1801.05787;
Molchanov et al., CVPR 2019, arXiv 1906.10771); here it ranks what AdaViT decides about (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .methods.adavit import DecisionLayer, Decisions

if TYPE_CHECKING:
    from .model import LeanVisionTransformer, Tokens

DRAWS = 2
"""Random directions of the features whose gradients are squared."""
FLOOR = 1e-4
"""Added before the logarithm, as a share of the mean: a gradient that happens to vanish measures nothing."""
AT_A_TIME = 8
"""Images whose activations are held, for all blocks, until their gradients are taken."""


class GatedDecisions(Decisions):
    """Decisions that leave everything on, through gates whose gradients are asked for."""

    gates: tuple[Tensor, Tensor, Tensor]
    """Of patches ``(B, M)``, heads ``(B, H)`` and sub-layers ``(B, 2)``."""
    seen: tuple[Tensor, Tensor, Tensor]
    """What each of them is decided by: ``(B, M, C)``, ``(B, C)`` and ``(B, C)``."""

    def draw(self, x: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        patches, heads, sublayers = (
            x.new_ones(batch, count).requires_grad_() for count in (tokens - prefix, self.heads, 2)
        )
        image = self.image_token(x, prefix).detach()
        self.gates, self.seen = (patches, heads, sublayers), (x[:, prefix:].detach(), image, image)
        return self.gates


@torch.enable_grad()
def fit_decisions(model: LeanVisionTransformer, inputs: Sequence[Tokens], generator: torch.Generator) -> None:
    """Fit the decisions of a model to the importance of what they decide about, at the shares their targets ask for.

    Each logit becomes the predicted logarithm of the importance, shifted for each kind so that over all blocks the
    targeted share is on: which blocks use less follows from the same measure.

    Args:
        model: A model with AdaViT, its blocks dense otherwise; only its decisions change.
        inputs: Embedded images, batch by batch.
        generator: Where the random directions come from.
    """
    deciding: list[Any] = [block.decide for block in model.blocks if hasattr(block, "decide")]
    fits = [[_Fit(*part) if part else None for part in decide.parts()] for decide in deciding]
    for decide in deciding:
        decide.__class__ = GatedDecisions
    for x in chain.from_iterable(tokens.x.split(AT_A_TIME) for tokens in inputs):
        importance = _importance(model, deciding, x, generator)
        for decide, own, values in zip(deciding, fits, importance, strict=True):
            for fit, seen, worth in zip(own, decide.seen, values, strict=True):
                if fit:
                    fit.add(seen, worth)
    for target, of_kind in zip(deciding[0].config.targets, zip(*fits, strict=True), strict=True):
        _write([fit for fit in of_kind if fit], target)
    for decide in deciding:
        decide.__class__ = Decisions
        decide.begin.copy_(decide.begin.new_tensor(decide.config.targets))


def _importance(
    model: LeanVisionTransformer, deciding: list[Any], x: Tensor, generator: torch.Generator
) -> list[list[Tensor]]:
    """By block, the importance of patches ``(B, M)``, heads ``(B, H)`` and sub-layers ``(B, 2)``."""
    features = model.forward_head(model.norm(model.blocks(x)), pre_logits=True)
    gates = [gate for decide in deciding for gate in decide.gates]
    sums = [torch.zeros_like(gate) for gate in gates]
    for draw in range(DRAWS):
        direction = torch.randn(features.shape, generator=generator).to(features)
        gradients = torch.autograd.grad((features * direction).sum(), gates, retain_graph=draw < DRAWS - 1)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.square()
    return [sums[first : first + 3] for first in range(0, len(sums), 3)]


class _Fit:
    """Least squares from what some decisions of a block see to the logarithm of the importance.

    Args:
        layer: The layer that gives their logits.
        rows: Which of its outputs they are.
    """

    def __init__(self, layer: DecisionLayer, rows: slice) -> None:
        self.layer, self.rows = layer, rows
        outputs, inputs = layer.weight[rows].shape
        self.count = 0
        self.squares = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.products = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, seen: Tensor, importance: Tensor) -> None:
        """Take in what a batch sees, ``(…, C)``, and the importance, one row for each of its rows."""
        x = seen.flatten(0, -2).double().cpu()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        y = (importance + FLOOR * importance.mean()).log().double().cpu().view(len(x), -1)
        self.count += len(x)
        self.squares += x.T @ x
        self.products += x.T @ y

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight ``(C, K)``, and mean and standard deviation ``(K,)`` of the logits that it gives.

        Ridge regression, its strength by how few rows there are: images are fewer than channels at times.
        """
        mean = self.squares[-1, :-1] / self.count
        covariance = self.squares[:-1, :-1] / self.count - mean.outer(mean)
        together = self.products[:-1] / self.count - mean.unsqueeze(1) * self.products[-1] / self.count
        ridge = len(mean) / self.count * covariance.diagonal().mean()
        ridge = ridge.clamp_min(1e-6)  # in front of block 0 the class token is the same in every image
        weight = torch.linalg.solve(covariance + ridge * torch.eye(len(mean)), together)
        variance = (weight * (covariance @ weight)).sum(dim=0)
        return weight, self.products[-1] / self.count, variance.clamp_min(0).sqrt()


def _write(fits: list[_Fit], target: float) -> None:
    """Set the layers of all blocks, so that a share of the decisions has a logit above 0."""
    solved = [fit.solve() for fit in fits]
    if not solved:
        return
    level = _level(torch.cat([mean for _, mean, _ in solved]), torch.cat([std for *_, std in solved]), target)
    for fit, (weight, mean, _) in zip(fits, solved, strict=True):
        seen = fit.squares[-1, :-1] / fit.count
        with torch.no_grad():
            fit.layer.weight[fit.rows] = weight.T.to(fit.layer.weight)
            fit.layer.bias[fit.rows] = (mean - level - seen @ weight).to(fit.layer.bias)


def _level(mean: Tensor, std: Tensor, share: float) -> Tensor:
    """What a share of normally distributed values lies above, of as many each of such a mean and deviation."""
    low, high = (mean - 10 * std - 1).min(), (mean + 10 * std + 1).max()
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.special.ndtr((mean - middle) / std.clamp_min(1e-9)).mean()
        low, high = (middle, high) if above > share else (low, middle)
    return low
