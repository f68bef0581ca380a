"""What bf16 costs in accuracy: deployed forms in bf16 against the same forms in fp32.

    python benchmarks/precision.py DATA_DIR [--runs DIR]

DATA_DIR holds ``deit_tiny_patch16_224.safetensors``, ``imagenette-train.tar``, ``imagenet-500.tar`` and, for runs,
``imagenette-val.tar``. Each method is warm-started for a moment on unlabelled photos and measured on the photos of 500
classes; trained students of ten classes, from the folders of ``--runs`` that are finished, on the held-out photos.
Weights and images are cast, nothing is autocast: norms and softmax run in bf16 too where torch has them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import leanvit
from leanvit.count import deployed_form
from leanvit.data import open_data
from leanvit.measure import environment
from leanvit.methods import available, parse
from leanvit.report.tables import Row, Table
from leanvit.runs import unfinished
from leanvit.store import resolve_model

METHODS = (
    "",
    "dgssa:layers=1,2,3",
    "glad:at=6,8,10",
    "dgssa:layers=1,2,3+glad:at=6,8,10",
    "castling",
    "sparsifiner:keep=0.25",
    "pruning:keep=0.7",
    "merging:r=12",
)
WARM_START: dict[str, Any] = {"steps": 10, "limit": 128, "batch_size": 16, "progress": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--runs", type=Path, help="Folder of trained students.")
    parser.add_argument("--method", nargs="*", default=list(METHODS), help="Off the shelf.")
    parser.add_argument("--output", type=Path, default=Path("docs/results/precision"))
    args = parser.parse_args()
    vit = resolve_model("deit_tiny_patch16_224", checkpoint=args.data_dir / "deit_tiny_patch16_224.safetensors")
    rows: list[Row] = []
    for text in args.method:
        if not text or all(name.partition(":")[0] in available() for name in text.split("+")):
            model = off_the_shelf(vit, text, args.data_dir / "imagenette-train.tar")
            rows += in_both(text or "dense, deployed", model, args.data_dir / "imagenet-500.tar", trained=False)
    for run in sorted(args.runs.iterdir()) if args.runs else ():
        if not unfinished(run):
            rows += in_both(run.name, resolve_model(str(run)), args.data_dir / "imagenette-val.tar", trained=True)
    table = Table(rows, title="bf16 against fp32, deployed")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())


def off_the_shelf(vit: VisionTransformer, text: str, photos: Path) -> nn.Module:
    """The dense model with a method, warm-started for a moment so that accuracy means something."""
    torch.manual_seed(0)
    lean = leanvit.slim(vit, *(parse(text) if text else ()))
    if text:
        leanvit.warm_start(lean, vit, str(photos), **WARM_START)
    return lean


def in_both(name: str, model: nn.Module, photos: Path, trained: bool) -> list[Row]:
    """Accuracy in fp32 and in bf16, and how often the two agree."""
    fast = copy.deepcopy(deployed_form(model))  # which is cast below
    data = open_data(str(photos), fast)
    full = leanvit.evaluate(fast, data, progress=False)
    half = leanvit.evaluate(fast.bfloat16(), data, progress=False)
    same = 100 * float((full.predictions == half.predictions).float().mean())
    about = {"model": name, "data": photos.stem, "trained": trained}
    rows = [
        {**about, **full.row(), "precision": "fp32"},
        {**about, **half.row(), "top1_diff": half.top1 - full.top1, "agreement": same, "precision": "bf16"},
    ]
    print(f"{name}: {full.top1:.1f} % in fp32, {half.top1 - full.top1:+.1f} in bf16, {same:.1f} % agree", flush=True)
    return rows


if __name__ == "__main__":
    main()
