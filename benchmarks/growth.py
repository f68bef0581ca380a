"""How time and memory grow with the image or the batch, against the dense DeiT-T in the same run, turn by turn.

    python benchmarks/growth.py --method castling
    python benchmarks/growth.py --img-size 224 --batch-size 1 4 16 64 \\
        --output docs/results/growth_batch --plot docs/images/growth-batch.png

Random weights and images. AdaViT, whose cost depends on the image, runs with decisions drawn at random, seven in ten to
go on, new ones in each forward pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch

import leanvit
from leanvit.files import written_whole
from leanvit.measure import environment
from leanvit.methods import parse
from leanvit.report.tables import Row, Table
from leanvit.usage import at_random

METHODS = ("dgssa:layers=0-5+glad:at=6,8,10", "castling", "pruning:keep=0.7", "merging:r=12", "sparsifiner:keep=0.1")
ADAVIT, USAGE = "adavit, random decisions", (0.7, 0.7, 0.65)
"""Its name here, and the shares of patches, heads and sub-layers that go on."""
SIZES = (224, 384, 512, 768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="*", default=list(METHODS), help="as `leanvit slim --method` takes them")
    parser.add_argument("--img-size", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--batch-size", type=int, nargs="*", default=[1], help="several: the plots are over the batch")
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, help="rounds at each point; about ten seconds' worth when not given")
    parser.add_argument("--output", type=Path, default=Path("docs/results/growth"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/growth.png"))
    args = parser.parse_args()
    rows = [row for size in args.img_size for row in at_size(size, args)]
    table = Table(rows, title="DeiT-T, deployed forms against dense")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())
    draw(rows, args.plot)


def at_size(size: int, args: argparse.Namespace) -> list[Row]:
    """Every model at one input size."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=size).eval()
    models = {"dense": vit, "dense, deployed": leanvit.slim(vit)}
    models |= {text: leanvit.slim(vit, *parse(text)) for text in args.method}
    models[ADAVIT] = at_random(leanvit.deploy(leanvit.slim(vit, leanvit.AdaViT())), dict.fromkeys(range(12), USAGE))
    options: dict[str, Any] = {"precisions": args.precision, "threads": args.threads, "iterations": args.iterations}
    rows = leanvit.bench(models, batch_sizes=args.batch_size, **options)
    return [{**row, "trained": False} for row in rows]


def draw(rows: list[Row], path: Path) -> None:
    """Time and peak memory over the side of the image, or over the batch where that varies; both axes logarithmic."""
    over, below = "infer_img_size", "side of the image, px"
    if len({row["infer_batch_size"] for row in rows}) > 1:
        over, below = "infer_batch_size", "images a batch"
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    shape = len(precisions), 2
    figure, axes = plt.subplots(*shape, figsize=(11, 4 * shape[0]), layout="constrained", squeeze=False, sharex=True)
    for pair, precision in zip(axes, precisions, strict=True):
        points = [row for row in rows if row["precision"] == precision]
        draw_panel(pair[0], points, over, "infer_step_time")
        draw_panel(pair[1], points, over, "peak_memory_mb")
        pair[0].set(title=precision, ylabel="time of a batch, ms")
        pair[1].set(title=precision, ylabel="peak memory, MB")
    for axis in axes[-1]:
        axis.set_xlabel(below)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=120)


def draw_panel(axis: Any, rows: list[Row], over: str, key: str) -> None:
    """One line a model."""
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [(row[over], row[key]) for row in rows if row["model"] == name]
        axis.plot(*zip(*points, strict=True), "-o", label=name, markersize=4)
    axis.set(xscale="log", yscale="log")
    steps = sorted({row[over] for row in rows})
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
