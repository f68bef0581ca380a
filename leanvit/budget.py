"""Budgets: one trained model that decides per image what to compute, made cheaper or dearer by shifting a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .count import constant_macs, count, evaluating, image_macs
from .data import image_batches
from .errors import ConfigError, UnsupportedModelError
from .model import LeanModel, deploy
from .record import record
from .store import dense_twin

if TYPE_CHECKING:
    from .data import ImageSource
    from .model import LeanVisionTransformer

TOLERANCE = 0.02
"""A budget is met where the mean cost is off by at most this share of it."""
PASSES = 24
FARTHEST = 1e4
"""No threshold lies beyond, on either side: an infinite one could not be trained on, nor averaged."""


def set_budget(
    model: LeanVisionTransformer,
    macs: float,
    images: ImageSource,
    *,
    limit: int = 256,
    batch_size: int = 32,
) -> float:
    """Set the thresholds of a model's decisions so that its mean cost is what is wanted; no labels, no training.

    All decisions share one threshold on their logits: raised, less is computed. It is found by bisection, each step a
    pass over the images, and saved with the model.

    Args:
        model: A lean model with AdaViT, deployed or not; only its thresholds change.
        macs: The wanted mean cost of an image, as a share of the dense model's MACs.
        images: Unlabelled images: a path, a data set, a loader or a tensor ``(B, 3, H, W)``.
        limit: Use at most this many images.
        batch_size: Images at a time.

    Returns:
        The share of the dense MACs that the images cost then.

    Raises:
        ConfigError: No threshold gives this cost; the reachable range is named.
        UnsupportedModelError: The model has no thresholds.
    """
    if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not math.isfinite(macs) or macs <= 0:
        raise ConfigError(f"budget macs={macs!r} is not a share of the dense model's MACs, such as 0.5")
    if not isinstance(model, LeanModel) or not list(_thresholds(model)):
        raise UnsupportedModelError(
            f"{getattr(model, 'lean', type(model).__name__)} decides nothing per image; a budget needs AdaViT"
        )
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be at least 1")
    cost = _MeanCost(model, list(image_batches(images, model, batch_size, limit)))
    threshold = _search(cost, float(macs))
    for own in _thresholds(model):
        own.fill_(threshold)
    return cost(threshold)


class _MeanCost:
    """The mean cost of some images as a share of the dense model's, by threshold.

    Args:
        model: What to deploy a copy of.
        batches: Images.
    """

    def __init__(self, model: LeanVisionTransformer, batches: list[Tensor]) -> None:
        self.model = deploy(model)  # a copy
        self.batches = [batch.to(next(model.parameters())) for batch in batches]
        self.constant = constant_macs(self.model)
        self.dense = count(dense_twin(model)).macs
        self.known: dict[float, float] = {}

    @torch.inference_mode()
    def __call__(self, threshold: float) -> float:
        if threshold not in self.known:
            for own in _thresholds(self.model):
                own.fill_(threshold)
            costs = []
            with evaluating(self.model):
                for batch in self.batches:
                    with record("macs") as found:
                        self.model(batch)
                    costs.append(image_macs(found, self.constant))
            self.known[threshold] = float(torch.cat(costs).mean()) / self.dense
        return self.known[threshold]


def _search(cost: _MeanCost, wanted: float) -> float:
    """The threshold that comes closest to the wanted cost.

    Raises:
        ConfigError: None comes close enough.
    """
    least, most = cost(FARTHEST), cost(-FARTHEST)
    if not least * (1 - TOLERANCE) <= wanted <= most * (1 + TOLERANCE):
        raise ConfigError(
            f"no threshold gives a budget of {wanted:g}: they reach {least:.3f} to {most:.3f} of the dense model's MACs"
        )
    low, high = -1.0, 1.0  # dearer and cheaper than wanted, once widened
    while cost(low) < wanted and low > -FARTHEST:
        low *= 2
    while cost(high) > wanted and high < FARTHEST:
        high *= 2
    for _ in range(PASSES):
        middle = (low + high) / 2
        if abs(cost(middle) - wanted) < wanted * TOLERANCE / 10:
            break
        low, high = (middle, high) if cost(middle) > wanted else (low, middle)
    best = min(cost.known, key=lambda threshold: (abs(cost(threshold) - wanted), abs(threshold)))
    if abs(cost(best) - wanted) > wanted * TOLERANCE:
        near = sorted(cost.known.values(), key=lambda share: abs(share - wanted))[:2]
        raise ConfigError(
            f"no threshold gives a budget of {wanted:g}: the nearest give {near[0]:.3f} and {near[1]:.3f}; the images "
            "are decided alike, use more of them or train longer"
        )
    return best


def _thresholds(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(threshold := getattr(module, "threshold", None), Tensor):
            yield threshold
