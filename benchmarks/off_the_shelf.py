"""What accuracy is left without a label and without training, after minutes of warm start.

DeiT-T with 1000 classes is slimmed, warm-started on unlabelled photos of ten classes and measured on photos of 500.

    python benchmarks/off_the_shelf.py DATA_DIR

DATA_DIR holds ``deit_tiny_patch16_224.safetensors``, ``imagenette-train.tar`` and ``imagenet-500.tar``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

import leanvit
from leanvit.measure import environment
from leanvit.methods import parse
from leanvit.report.tables import Table
from leanvit.store import resolve_model

METHODS = [
    "dgssa:layers=1,2,3",
    "dgssa:layers=0,1,2,3,4,5",
    "glad:at=10",
    "glad:at=6,8,10",
    "dgssa:layers=1,2,3+glad:at=6,8,10",
    "castling",
    "sparsifiner:keep=0.25",
    "adavit:patches=0.7,heads=1,blocks=1",
    "pruning:keep=0.9",
    "pruning:keep=0.7",
    "merging:r=8",
    "merging:r=16",
]
"""Growing budgets of the methods that a start may be enough for, and the others to see how far it goes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/off_the_shelf"))
    parser.add_argument("--method", nargs="*", default=METHODS)
    args = parser.parse_args()
    vit = resolve_model("deit_tiny_patch16_224", checkpoint=args.data_dir / "deit_tiny_patch16_224.safetensors")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"method": "dense", **figures(vit, vit, args.data_dir)}]
    for text in args.method:
        rows.append(off_the_shelf(vit, text, args.data_dir))
        print(rows[-1], flush=True)
        table = Table(rows)
        table.to_csv(args.output.with_suffix(".csv"))
        table.to_json(args.output.with_suffix(".json"), environment=environment())


def off_the_shelf(vit: VisionTransformer, text: str, data_dir: Path) -> dict[str, Any]:
    """One row: the closed-form start alone, then the whole warm start."""
    photos = str(data_dir / "imagenette-train.tar")
    lean = leanvit.slim(vit, *parse(text))
    leanvit.warm_start(lean, vit, photos, steps=0, progress=False)
    closed_form = figures(vit, leanvit.deploy(lean), data_dir)["top1"]
    start = time.perf_counter()
    leanvit.warm_start(lean, vit, photos)
    seconds = round(time.perf_counter() - start)
    row = figures(vit, leanvit.deploy(lean), data_dir)
    return {"method": text, **row, "top1_closed_form": closed_form, "warm_start_seconds": seconds}


def figures(vit: VisionTransformer, model: VisionTransformer, data_dir: Path) -> dict[str, Any]:
    """Accuracy on the 500 photos, agreement with the dense model, and cost."""
    result = leanvit.evaluate(model, str(data_dir / "imagenet-500.tar"), teacher=vit, progress=False)
    macs = leanvit.count(model).macs if result.macs is None else float(result.macs.mean())
    return {
        "top1": result.top1,
        "top1_err": result.top1_err,
        "top5": result.top5,
        "agreement": result.agreement,
        "gmacs_mean": macs / 1e9,
        "macs_ratio": leanvit.count(vit).macs / macs,
        "trained": False,
    }


if __name__ == "__main__":
    main()
