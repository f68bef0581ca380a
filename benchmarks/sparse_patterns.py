"""What a learned pattern is worth: Sparsifiner against random keys and near keys, as many of them, without training.

DeiT-T with 1000 classes gets each pattern as it is, then with a warm start under it from unlabelled photos of ten
classes, and is measured on photos of 500. Random keys are drawn anew for each query, head and image; near keys are the
nearest on the patch grid. Every pattern has the class token, and the class token attends to all. Before the warm start
the learned pattern is that of its closed form.

    python benchmarks/sparse_patterns.py DATA_DIR

DATA_DIR holds ``deit_tiny_patch16_224.safetensors``, ``imagenette-train.tar`` and ``imagenet-500.tar``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import leanvit
from leanvit.measure import environment
from leanvit.methods import sparsifiner
from leanvit.methods.base import grid_positions
from leanvit.report.tables import Table
from leanvit.store import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/sparse_patterns"))
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5, 0.25, 0.1])
    parser.add_argument("--steps", type=int, default=60, help="of the warm start, a block")
    parser.add_argument("--limit", type=int, default=1024, help="photos of the warm start")
    args = parser.parse_args()
    vit = resolve_model("deit_tiny_patch16_224", checkpoint=args.data_dir / "deit_tiny_patch16_224.safetensors")
    rows: list[dict[str, Any]] = [{"pattern": "dense", "keep": 1.0, **figures(vit, vit, args.data_dir)}]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for keep in args.keep:
        for pattern in PATTERNS:
            rows += with_pattern(vit, pattern, keep, args)
            table = Table(rows)
            table.to_csv(args.output.with_suffix(".csv"))
            table.to_json(args.output.with_suffix(".json"), environment=environment())


def with_pattern(
    vit: VisionTransformer, pattern: str, keep: float, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Two rows: the pattern in the dense model's own weights, and after the warm start under it."""
    photos = str(args.data_dir / "imagenette-train.tar")
    for steps in (0, args.steps):
        lean = leanvit.slim(vit, leanvit.Sparsifiner(keep=keep))
        with patch.object(sparsifiner, "connections", PATTERNS[pattern]):  # the lean model asks this for its mask
            start = time.perf_counter()
            leanvit.warm_start(lean, vit, photos, steps=steps, limit=args.limit, progress=False)
            seconds = round(time.perf_counter() - start)
            row = {"pattern": pattern, "keep": keep, "warm_start_steps": steps, **figures(vit, lean, args.data_dir)}
        print(row, flush=True)
        yield row | {"warm_start_seconds": seconds}


def random_keys(q: Tensor, k: Tensor, predictor: Any, places: Any, budget: int, threshold: float) -> Tensor:
    """As many keys as `connections` would choose, drawn at random."""
    images, heads, tokens, _ = q.shape
    return chosen(torch.rand(images, heads, tokens - 1, tokens - 1), budget)


def near_keys(q: Tensor, k: Tensor, predictor: Any, places: Any, budget: int, threshold: float) -> Tensor:
    """As many keys as `connections` would choose, the nearest."""
    images, heads, tokens, _ = q.shape
    side = round((tokens - 1) ** 0.5)
    positions = grid_positions((side, side))
    return chosen(-torch.cdist(positions, positions).expand(images, heads, -1, -1), budget)


def chosen(scores: Tensor, budget: int) -> Tensor:
    best = scores.topk(budget - 1, dim=-1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    return F.pad(mask, (1, 0, 1, 0), value=True)


PATTERNS = {"learned": sparsifiner.connections, "near": near_keys, "random": random_keys}


def figures(vit: Any, model: Any, data_dir: Path) -> dict[str, Any]:
    """Accuracy on the 500 photos, agreement with the dense model, and cost."""
    result = leanvit.evaluate(model, str(data_dir / "imagenet-500.tar"), teacher=vit, progress=False)
    cost = leanvit.count(model)
    return {
        "top1": result.top1,
        "agreement": result.agreement,
        "gmacs_mean": cost.macs / 1e9,
        "density": sum(float(heads.mean()) for heads in result.density.values()) / max(len(result.density), 1) or 1.0,
        "trained": False,
    }


if __name__ == "__main__":
    main()
