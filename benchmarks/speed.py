"""How fast the deployed forms are, against the dense DeiT-T in the same run, turn by turn.

    python benchmarks/speed.py

Random weights and images: the cost of these methods depends on neither. ``dense, deployed`` is the dense model with no
method but with the deployed form's kernels (`leanvit/fast.py`): what a method itself saves is the ratio to that row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import leanvit
from leanvit.measure import environment
from leanvit.methods import parse
from leanvit.report.tables import Row, Table

METHODS = (
    "dgssa:layers=0-5+glad:at=6,8,10",
    "dgssa:layers=1,2,3+glad:at=4,6,8",
    "dgssa:layers=1,2,3+glad:at=6,8,10",
    "dgssa:layers=0-5",
    "glad:at=6,8,10",
)
POINTS = {224: (1, 32), 512: (1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed"))
    parser.add_argument("--img-size", type=int, nargs="*", default=list(POINTS))
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [row for size in args.img_size for row in at_size(size, args)]
    table = Table(rows, title="DeiT-T, deployed forms against dense")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())


def at_size(size: int, args: argparse.Namespace) -> list[Row]:
    """Every model at one input size."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=size).eval()
    models = {"dense": vit, "dense, deployed": leanvit.slim(vit)}
    models |= {text: leanvit.slim(vit, *parse(text)) for text in METHODS}
    options = {"precisions": args.precision, "threads": args.threads, "device": args.device}
    rows = leanvit.bench(models, batch_sizes=POINTS.get(size, (1,)), **options)
    return [{**row, "trained": False} for row in rows]


if __name__ == "__main__":
    main()
