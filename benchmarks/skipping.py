"""How much of what AdaViT skips on paper is skipped on the clock, whatever its policies are.

    python benchmarks/skipping.py

DeiT-T at 224 px with random weights. Every batch gets new random policies, drawn beforehand with the given shares of
patches, heads and sub-layers, so no two batches have the same shapes. MACs are those of the very policies that were
timed. At batch 1 a turn is eight images, one after another.
``realised_share`` is the time saved over the MACs saved against timm's dense model; ``realised_share_kernels`` the same
against ``dense, deployed``, the dense model with the deployed form's kernels and no method.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import leanvit
from leanvit.bench import peak_memory, realised_share, take_turns
from leanvit.count import constant_macs, image_macs
from leanvit.engines import PRECISIONS, held_by
from leanvit.measure import environment
from leanvit.methods.adavit import Decisions, RandomDecisions
from leanvit.report.tables import Row, Table

USAGES = {"all on": (1.0, 1.0, 1.0), "0.7/0.7/0.65": (0.7, 0.7, 0.65), "0.5/0.5/0.5": (0.5, 0.5, 0.5)}
"""Shares of patches, heads and sub-layers that are used."""
ROUNDS, WARMUP = {1: 30, 32: 20}, {1: 20, 32: 10}
STREAM = {1: 8, 32: 1}
"""Batches one after another in a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/skipping"))
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, nargs="*", default=list(ROUNDS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for precision in args.precision for batch in args.batch_size for row in at(precision, batch)]
    table = Table([{**row, "threads": args.threads, "device": "cpu"} for row in rows], title="AdaViT, random policies")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())


def at(precision: str, batch: int) -> list[Row]:
    """Every model at one precision and batch size, taking turns."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224").eval()
    dtype = PRECISIONS[precision]
    images = torch.randn(batch, 3, 224, 224).to(dtype)
    dense_macs = leanvit.count(vit).macs
    models = {"dense": vit, "dense, deployed": leanvit.deploy(leanvit.slim(vit))}
    models |= {name: random_policies(vit, usage) for name, usage in USAGES.items()}
    rounds, warmup, stream = ROUNDS[batch], WARMUP[batch], STREAM[batch]
    calls = (rounds + warmup) * stream
    runs = {name: Drawn(model.to(dtype).requires_grad_(False), images, calls) for name, model in models.items()}
    streams = [partial(run.stream, stream) for run in runs.values()]
    seconds = take_turns(streams, iterations=rounds, warmup=warmup, settle=0)  # a policy is drawn for one call
    times = {name: trimmed_mean(own) / stream for name, own in zip(runs, seconds, strict=True)}
    constant = constant_macs(leanvit.deploy(leanvit.slim(vit, leanvit.AdaViT())))
    rows: list[Row] = []
    for name, run in runs.items():
        macs = run.macs(range(warmup * stream, (warmup + rounds) * stream), constant) if name in USAGES else dense_macs
        rows.append(
            {
                "model": name,
                "infer_img_size": 224,
                "infer_samples_per_sec": batch / times[name],
                "infer_step_time": 1e3 * times[name],
                "infer_batch_size": batch,
                "gmacs_mean": macs / 1e9,
                "macs_ratio": macs / dense_macs,
                "speedup": times["dense"] / times[name],
                "realised_share": realised_share(times["dense"] / times[name], macs / dense_macs),
                "speedup_kernels": times["dense, deployed"] / times[name],
                "realised_share_kernels": realised_share(times["dense, deployed"] / times[name], macs / dense_macs),
                "peak_memory_mb": run.peak_memory() / 1e6,
                "precision": precision,
            }
        )
    return rows


def random_policies(vit: nn.Module, usage: tuple[float, float, float]) -> nn.Module:
    """A deployed model that decides at random."""
    model = leanvit.deploy(leanvit.slim(vit, leanvit.AdaViT()))
    generator = torch.Generator()
    for module in model.modules():
        if isinstance(module, Decisions):
            DrawnBefore.adopt(module, usage, generator)
    return model


class DrawnBefore(RandomDecisions):
    """Random decisions that were drawn before the clock started; the decision network runs on the clock."""

    def draw_all(self, batch: int, calls: int) -> None:
        """Draw what the next calls will decide."""
        shapes = zip(self.rates, (196, self.heads, 2), strict=True)
        patches, heads, sublayers = (
            rate - torch.rand(calls, batch, count, generator=self.generator) for rate, count in shapes
        )
        self.ready = list(zip(patches, torch.cat([heads, sublayers], dim=2), strict=True))
        self.call = 0

    def logits(self, x: Tensor, prefix: int) -> tuple[Tensor | None, Tensor | None]:
        Decisions.logits(self, x, prefix)
        self.call += 1
        return self.ready[self.call - 1]


def trimmed_mean(seconds: list[float]) -> float:
    """The mean without the tenth at either end: times differ by policy, and some by what else the machine does."""
    ordered = np.sort(seconds)
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())


class Drawn:
    """Runs a model on a batch, with new policies at each call where it draws any.

    Args:
        model: Deployed.
        images: The batch.
        calls: How many calls will come.
    """

    def __init__(self, model: nn.Module, images: Tensor, calls: int) -> None:
        self.model, self.images, self.calls = model, images, calls
        self.drawing = [module for module in model.modules() if isinstance(module, DrawnBefore)]
        for module in self.drawing:
            module.generator.manual_seed(module.layer)
            module.draw_all(len(images), calls)

    @torch.inference_mode()
    def stream(self, batches: int = 1) -> None:
        """Run so many batches, one after another."""
        for _ in range(batches):
            self.model(self.images)

    def macs(self, calls: range, constant: float) -> float:
        """Mean MACs of an image over the policies of some calls."""
        costs = []
        for module in self.drawing:
            module.call = calls.start
        for _ in calls:
            with leanvit.record("macs") as found:
                self.stream()
            costs.append(image_macs(found, constant))
        return float(torch.cat(costs).mean())

    def peak_memory(self) -> int:
        for module in self.drawing:
            module.call = 0
        return sum(tensor.nbytes for tensor in [*held_by(self.model), self.images]) + peak_memory(self.stream)


if __name__ == "__main__":
    main()
