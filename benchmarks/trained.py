"""What accuracy a lean DeiT-T keeps after distillation, and what its parts are worth.

A DeiT-T is fine-tuned on ten classes (the teacher); students are slimmed from it, warm-started and distilled from it.
Writes one file a student; a student whose file is there is not run again, so the command can be stopped and continued.

    python benchmarks/trained.py DATA_DIR --only main

DATA_DIR holds ``deit_tiny_patch16_224.safetensors``, ``imagenette-train.tar`` and ``imagenette-val.tar``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

import leanvit
from leanvit.data import open_data
from leanvit.measure import environment
from leanvit.methods import parse
from leanvit.ops.processor import has_bf16
from leanvit.store import resolve_model
from leanvit.usage import against_random, measure_usage

LEAN = "dgssa:layers=auto:3+glad:at=4,6,8"
GENTLE = {"lr": 5e-4, "inherited_lr_scale": 0.2}
"""Pretrained weights at the rate the teacher was fine-tuned with, new ones faster."""
QUICK = {"lr": 5e-4, "inherited_lr_scale": 0.4}
"""For methods that move the pretrained weights further."""
SPARSE = {"lr": 3e-4, "inherited_lr_scale": 0.1}
"""The predictor learns first, then what was inherited, gently."""
DECISIONS = GENTLE | {"token_weight": 0.0}
"""The teacher's tokens are no aim: a patch that is left out cannot follow them."""
AMP = "bf16" if has_bf16() else ""
TEACHER_EPOCHS = 3
STUDENTS: dict[str, dict[str, Any]] = {
    "later stages": {"method": LEAN.replace("4,6,8", "6,8,10"), "epochs": 6, "options": GENTLE},
    "later stages, seed 1": {"method": LEAN.replace("4,6,8", "6,8,10"), "epochs": 6, "options": GENTLE, "seed": 1},
    "middle stages": {"method": LEAN.replace("4,6,8", "5,7,9"), "epochs": 8, "options": GENTLE},
    "middle stages, seed 1": {"method": LEAN.replace("4,6,8", "5,7,9"), "epochs": 8, "options": GENTLE, "seed": 1},
    "main, gentle": {"method": LEAN, "epochs": 8, "options": GENTLE},
    "main, gentle, seed 1": {"method": LEAN, "epochs": 8, "options": GENTLE, "seed": 1},
    "main": {"method": LEAN, "epochs": 15},
    "main, short": {"method": LEAN, "epochs": 4},
    "no warm start": {"method": LEAN, "epochs": 4, "warm": False},
    "no guidance": {"method": LEAN.replace("auto:3", "auto:3,guidance=0"), "epochs": 4},
    "adavit": {
        "method": "adavit:patches=0.45,heads=1,blocks=1",
        "epochs": 6,
        "options": DECISIONS,
        "budgets": (0.7, 0.6, 0.5, 0.4),
    },
    "sparse half": {"method": "sparsifiner:keep=0.5", "epochs": 1, "options": SPARSE},
    "sparse quarter": {"method": "sparsifiner:keep=0.25", "epochs": 3, "options": SPARSE},
    "sparse, pruned": {"method": "sparsifiner:keep=0.5+pruning:keep=0.77,at=1-11", "epochs": 6, "options": GENTLE},
    "first layers": {"method": LEAN.replace("auto:3", "0,1,2"), "epochs": 4},
    "castling": {"method": "castling", "epochs": 6, "options": QUICK},
    "castling, longer": {"method": "castling", "epochs": 10, "options": QUICK},
    "castling, short": {"method": "castling", "epochs": 3, "options": QUICK},
    "castling, no auxiliary": {"method": "castling:auxiliary=0", "epochs": 3, "options": QUICK},
    "castling, no warm start": {"method": "castling", "epochs": 3, "options": QUICK, "warm": False},
    "castling, along the tokens": {"method": "castling:conv=tokens", "epochs": 3, "options": QUICK},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/trained"), help="folder, one file a student")
    parser.add_argument("--runs", type=Path, default=Path("runs/trained"), help="where checkpoints go")
    parser.add_argument("--only", nargs="*", default=list(STUDENTS), help="names of students")
    parser.add_argument("--img-size", type=int, default=160)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    teacher, top1 = fine_tune(args)
    write("teacher", {"top1": top1, "epochs": TEACHER_EPOCHS}, args)
    for name in args.only:
        if not file_of(name, args).exists():
            write(name, student(name, teacher, args), args)


def file_of(name: str, args: argparse.Namespace) -> Path:
    """Where the row of a student goes."""
    return args.output / f"{slug(name)}-{args.img_size}.json"


def slug(name: str) -> str:
    """A name as part of a file name."""
    return name.replace(",", "").replace(" ", "-")


def write(name: str, figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the row of a student, and print it."""
    row = {"student": name, "img_size": args.img_size} | figures
    file_of(name, args).write_text(json.dumps({"row": row, "environment": environment()}, indent=1) + "\n")
    print(row, flush=True)


def fine_tune(args: argparse.Namespace) -> tuple[VisionTransformer, float]:
    """The teacher, from its run folder if it is there."""
    folder = args.runs / f"teacher-{args.img_size}"
    if not (folder / f"checkpoint-{TEACHER_EPOCHS}").exists():
        weights = args.data_dir / "deit_tiny_patch16_224.safetensors"
        model = resolve_model("deit_tiny_patch16_224", checkpoint=weights, num_classes=10, img_size=args.img_size)
        options = {"epochs": TEACHER_EPOCHS, "lr": 1e-4, "amp": AMP, "workers": args.workers}
        leanvit.train(model, data(args)[0], output=folder, resume=True, **options)
    model = leanvit.load(folder / "last")
    return model, leanvit.evaluate(model, data(args)[1], progress=False).top1


def student(name: str, teacher: VisionTransformer, args: argparse.Namespace) -> dict[str, Any]:
    """One row: before and after training, of the deployed form."""
    recipe = dict(STUDENTS[name])
    methods, warm, seed = parse(str(recipe["method"])), recipe.get("warm", True), int(recipe.get("seed", 0))
    train, val = data(args)
    lean = leanvit.slim(teacher, *methods, images=train)
    row: dict[str, Any] = {"method": str(lean.lean), "seed": seed}
    row["top1_swapped_in"] = leanvit.evaluate(leanvit.deploy(lean), val, progress=False).top1
    start = time.perf_counter()
    if warm:
        leanvit.warm_start(lean, teacher, train, seed=seed)
    row["warm_start_s"] = round(time.perf_counter() - start)
    row["top1_before"] = leanvit.evaluate(leanvit.deploy(lean), val, progress=False).top1
    start = time.perf_counter()
    # No held-out data while training: it would choose the epoch by the photos that give the figure.
    options = {"epochs": recipe["epochs"], "seed": seed, "amp": AMP, "lr": 3e-4, "workers": args.workers}
    options |= recipe.get("options", {})
    folder = args.runs / f"{slug(name)}-{args.img_size}"
    leanvit.distill(lean, teacher, train, output=folder, resume=True, **options)
    fast = leanvit.deploy(lean)
    result = leanvit.evaluate(fast, val, teacher=teacher, progress=False)
    row |= {"epochs": recipe["epochs"], "train_s": round(time.perf_counter() - start)}
    if "budgets" in recipe:
        return row | {"budgets": [at_budget(budget, lean, teacher, args) for budget in recipe["budgets"]]}
    dense_macs, macs = leanvit.count(teacher).macs, leanvit.count(fast).macs
    return row | {
        "top1": result.top1,
        "agreement": result.agreement,
        "gmacs": macs / 1e9,
        "macs_ratio": dense_macs / macs,
    }


def at_budget(budget: float, lean: Any, teacher: torch.nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """The same trained model at another budget: thresholds from training photos without labels; and random policies."""
    train, val = data(args)
    leanvit.set_budget(lean, budget, train)
    fast = leanvit.deploy(lean)
    row = leanvit.evaluate(fast, val, teacher=teacher, progress=False).row()
    photos = open_data(val, fast)
    _, random, by_block = against_random(fast, photos, measure_usage(fast, photos, progress=False), progress=False)
    return {
        "budget": budget,
        **row,
        "macs_ratio": leanvit.count(teacher).macs / 1e9 / row["gmacs_mean"],
        "top1_random": random["top1"],
        "top1_random_by_block": by_block["top1"],
    }


def data(args: argparse.Namespace) -> tuple[str, str]:
    return str(args.data_dir / "imagenette-train.tar"), str(args.data_dir / "imagenette-val.tar")


if __name__ == "__main__":
    main()
