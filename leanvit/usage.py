"""What the images of a data set use of a model that decides per image: by block, by class, and against random policies.

The quantities are those of AdaViT's analysis (Meng et al., CVPR 2022, arXiv 2111.15668, section 4).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .count import constant_macs, deployed_form, evaluating, image_macs
from .data import ImageData, loader
from .errors import DataError, UnsupportedModelError
from .files import written_whole
from .measure import decides_per_image
from .methods.adavit import Decisions, RandomDecisions
from .per_image import correlation
from .record import record

KINDS = ("patch_usage", "head_usage", "sublayer_usage")
Rates = tuple[float, float, float | Tensor]


@dataclass(frozen=True)
class Usage:
    """What each of n images used, in each of the L blocks that decide.

    Args:
        layers: The blocks.
        patches: 1 where a patch took part, ``(n, L, M)``.
        heads: 1 where a head was used, ``(n, L, H)``.
        sublayers: 1 where attention and MLP ran, ``(n, L, 2)``.
        macs: MACs of each image, ``(n,)``.
        losses: Cross-entropy of each image, ``(n,)``.
        labels: ``(n,)``.
        right: Whether the label scored highest, ``(n,)``.
        index: The place of each image in the data set.
        grid: Rows and columns of the model's patches; M is less where tokens were merged or removed before.
    """

    layers: list[int]
    patches: Tensor
    heads: Tensor
    sublayers: Tensor
    macs: Tensor
    losses: Tensor
    labels: Tensor
    right: Tensor
    index: list[int]
    grid: tuple[int, int]

    @property
    def top1(self) -> float:
        """Images whose label scored highest, in percent."""
        return 100 * float(self.right.double().mean())

    def shares(self, images: Tensor | slice = slice(None)) -> dict[str, float]:
        """Mean usage of some images over all blocks; of heads, where the attention runs."""
        heads, running = self.heads[images], self.sublayers[images][..., :1]
        return {
            "patches": float(self.patches[images].mean()),
            "heads": float((heads * running).sum() / (running.sum() * heads.shape[-1]).clamp_min(1)),
            "attention": float(self.sublayers[images][..., 0].mean()),
            "mlp": float(self.sublayers[images][..., 1].mean()),
        }

    def blocks(self) -> list[dict[str, Any]]:
        """Mean usage in each block, of the heads one by one."""
        return [
            {
                "block": layer,
                "patches": float(self.patches[:, place].mean()),
                "heads": self.heads[:, place].mean(dim=0).tolist(),
                "attention": float(self.sublayers[:, place, 0].mean()),
                "mlp": float(self.sublayers[:, place, 1].mean()),
            }
            for place, layer in enumerate(self.layers)
        ]

    def classes(self, names: list[str]) -> list[dict[str, Any]]:
        """Usage, cost and accuracy of each class, cheapest first."""
        rows = []
        for label in self.labels.unique().tolist():
            own = self.labels == label
            rows.append(
                {
                    "class": names[label] if label < len(names) else str(label),
                    "images": int(own.sum()),
                    "gmacs": float(self.macs[own].mean()) / 1e9,
                    "top1": 100 * float(self.right[own].double().mean()),
                    **self.shares(own),
                }
            )
        return sorted(rows, key=lambda row: row["gmacs"])


def measure_usage(model: nn.Module, data: ImageData, *, batch_size: int = 50, progress: bool = True) -> Usage:
    """Run a model over labelled images and keep what each of them used.

    Args:
        model: A lean model that decides per image; deployed first.
        data: Labelled images.
        batch_size: Images at a time.
        progress: Show a progress bar.

    Raises:
        UnsupportedModelError: The model decides nothing per image.
        DataError: There are no images that can be read.
    """
    model = deployed_form(model)
    if not decides_per_image(model) or not any(isinstance(module, Decisions) for module in model.modules()):
        raise UnsupportedModelError(
            f"{getattr(model, 'lean', type(model).__name__)} decides nothing per image; usage is for AdaViT"
        )
    constant, weight = constant_macs(model), next(model.parameters())
    parts: list[tuple[Tensor, ...]] = []
    layers: list[int] = []
    batches = loader(data, batch_size)
    with evaluating(model), torch.inference_mode():
        for images, labels in track(
            batches, "usage", console=Console(stderr=True), transient=True, disable=not progress
        ):
            if not len(images):
                continue
            with record(*KINDS, "macs") as found:
                logits = model(images.to(weight)).float().cpu()
            layers = [one.layer for one in found[KINDS[0]]]
            used = [torch.stack([one.value.cpu() for one in found[kind]], dim=1) for kind in KINDS]
            losses = F.cross_entropy(logits, labels, reduction="none")
            parts.append((*used, image_macs(found, constant), losses, labels, logits.argmax(dim=1) == labels))
    if not parts:
        raise DataError("no images to measure; give at least one that can be read")
    index = [place for place in range(len(data)) if not data.is_damaged(place)]
    patches, heads, sublayers, macs, losses, labels, right = (torch.cat(part) for part in zip(*parts, strict=True))
    grid: tuple[int, int] = model.patch_embed.grid_size  # type: ignore[union-attr, assignment]
    return Usage(layers, patches, heads, sublayers, macs, losses, labels, right, index, grid)


def at_random(model: nn.Module, rates: Mapping[int, Rates], seed: int = 0) -> nn.Module:
    """A copy of a deployed model whose decisions are drawn at random.

    Args:
        model: Deployed.
        rates: Shares of patches, heads and sub-layers (one, or attention and MLP apart) by block.
        seed: Of the draws.
    """
    drawn = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for module in drawn.modules():
        if isinstance(module, Decisions):
            RandomDecisions.adopt(module, rates[module.layer], generator)
    return drawn


def against_random(model: nn.Module, data: ImageData, learned: Usage, *, progress: bool = True) -> list[dict[str, Any]]:
    """Accuracy and cost of the learned policies, and of random ones of the same usage.

    The weights are those that were trained with the learned policies. Random policies come in two kinds: with the mean
    usage of the whole model in every block, and with the mean usage of each block, which knows what blocks are worth.
    """
    model = deployed_form(model)
    by_block = {
        row["block"]: (
            row["patches"],
            sum(row["heads"]) / len(row["heads"]),
            torch.tensor([row["attention"], row["mlp"]]),
        )
        for row in learned.blocks()
    }
    patches, heads, sublayers = zip(*by_block.values(), strict=True)
    overall = sum(patches) / len(patches), sum(heads) / len(heads), torch.stack(sublayers).mean(dim=0)
    rows = [{"policies": "learned", "top1": learned.top1, "gmacs_mean": float(learned.macs.mean()) / 1e9}]
    for name, rates in (("random", dict.fromkeys(by_block, overall)), ("random, by block", by_block)):
        found = measure_usage(at_random(model, rates), data, progress=progress)
        rows.append({"policies": name, "top1": found.top1, "gmacs_mean": float(found.macs.mean()) / 1e9})
    return rows


def write_usage(model: nn.Module, data: ImageData, folder: Path, *, progress: bool = True) -> dict[str, Any]:
    """Measure, and write ``usage.json`` and pictures into a folder.

    Pictures: ``blocks.png``, ``classes.png``, ``images.png`` (the cheapest and the dearest images, with the patches
    that took part) and ``random.png``.

    Returns:
        What is in ``usage.json``.
    """
    from .report.usage import draw_usage

    usage = measure_usage(model, data, progress=progress)
    order = usage.macs.argsort().tolist()
    low, high = usage.macs.quantile(torch.tensor([0.05, 0.95], dtype=usage.macs.dtype)).tolist()
    pairs = [{"macs": m, "loss": loss} for m, loss in zip(usage.macs.tolist(), usage.losses.tolist(), strict=True)]
    report = {
        "images": len(order),
        "top1": usage.top1,
        "gmacs_mean": float(usage.macs.mean()) / 1e9,
        "gmacs_p5": low / 1e9,
        "gmacs_p95": high / 1e9,
        "usage": usage.shares(),
        "blocks": usage.blocks(),
        "classes": usage.classes(data.classes),
        "policies": against_random(model, data, usage, progress=progress),
        "correlation_of_macs_and_loss": correlation(pairs, "macs", "loss"),
        "cheapest": [_image(data, usage, place) for place in order[:8]],
        "dearest": [_image(data, usage, place) for place in order[:-9:-1]],
    }
    with written_whole(folder / "usage.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    draw_usage(report, data, usage, folder)
    return report


def _image(data: ImageData, usage: Usage, place: int) -> dict[str, Any]:
    return {
        "image": data.reader.filename(usage.index[place]),
        "gmacs": float(usage.macs[place]) / 1e9,
        "right": bool(usage.right[place]),
        "place": place,
    }
