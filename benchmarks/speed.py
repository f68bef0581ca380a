"""How fast the deployed forms are, in every engine, against the dense DeiT-T in the same engine and run, turn by turn.

    python benchmarks/speed.py                         the whole grid, a quarter of an hour
    python benchmarks/speed.py --engine onnxruntime    one engine

Random weights and images: the cost of these methods depends on neither. AdaViT, whose cost does, is in `skipping.py`.
``dense, deployed`` is the dense model with no method but with the deployed form's kernels (`leanvit/fast.py`): what a
method itself saves is the ratio to that row. ``dense, 160 px`` and the like are what a user would do without leanvit:
the same model on smaller images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import nn

import leanvit
from leanvit.engines import ENGINES
from leanvit.measure import environment
from leanvit.methods import available, parse
from leanvit.report.tables import Row, Table

MODEL = "deit_tiny_patch16_224"
METHODS = (
    "dgssa:layers=0-5+glad:at=6,8,10",
    "dgssa:layers=1,2,3+glad:at=6,8,10",
    "dgssa:layers=1,2,3+glad:at=5,7,9",
    "dgssa:layers=0-5",
    "glad:at=6,8,10",
    "castling",
    "sparsifiner:keep=0.1",
    "pruning:keep=0.7",
    "merging:r=12",
)
COARSE = "dgssa:layers=0-5,grid=14+glad:at=6,8,10"
"""Static matrices as learned at 224 px, on larger images."""
FEW = ("dense", "dgssa:layers=0-5+glad:at=6,8,10", "castling")
"""Rows where making ready takes half a minute a model, or that show one thing only."""
POINTS = {224: (1, 32), 512: (1, 4)}
SMALLER = {224: (192, 160), 512: (384,)}
GRID = {
    "torch": (("fp32", "bf16"), None, tuple(POINTS)),
    "onnxruntime": (("fp32",), None, tuple(POINTS)),
    "openvino": (("fp32", "bf16"), FEW, (224,)),
    "onnxruntime, int8": (("int8",), FEW, (224,)),
    "compile": (("fp32", "bf16"), FEW[:2], (224,)),
}
"""What is timed: the engine and, behind a comma, what is special; precisions, rows (all when None), image sizes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed"))
    parser.add_argument("--img-size", type=int, nargs="*", default=list(POINTS))
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16", "int8"])
    parser.add_argument("--engine", nargs="*", default=["torch", "compile", "onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [row for part, what in GRID.items() for row in timed(part.partition(",")[0], *what, args)]
    table = Table(rows, title="DeiT-T, deployed forms against dense")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())


def timed(
    engine: str,
    precisions: tuple[str, ...],
    rows: tuple[str, ...] | None,
    sizes: tuple[int, ...],
    args: argparse.Namespace,
) -> list[Row]:
    """Part of the grid: one engine, every model at each size that is asked for."""
    wanted = [precision for precision in precisions if precision in args.precision]
    if engine not in args.engine or not wanted:
        return []
    found: list[Row] = []
    for size in sizes:
        if size in args.img_size:
            models = {
                name: model
                for name, model in at_size(size).items()
                if (rows is None or name in rows) and ENGINES[engine].takes(model)
            }
            options = {"precisions": wanted, "threads": args.threads, "device": args.device}
            found += leanvit.bench(models, engines=(engine,), batch_sizes=POINTS[size], **options)
    return [{**row, "trained": False} for row in found]


def at_size(size: int) -> dict[str, nn.Module]:
    """Every model at one input size, the dense one first."""
    torch.manual_seed(0)
    vit = timm.create_model(MODEL, img_size=size).eval()
    models: dict[str, nn.Module] = {"dense": vit, "dense, deployed": leanvit.slim(vit)}
    models |= {f"dense, {smaller} px": timm.create_model(MODEL, img_size=smaller).eval() for smaller in SMALLER[size]}
    methods = METHODS if size <= 224 else (*METHODS, COARSE)
    known = [text for text in methods if text.partition(":")[0] in available()]
    return models | {text: leanvit.slim(vit, *parse(text)) for text in known}


if __name__ == "__main__":
    main()
