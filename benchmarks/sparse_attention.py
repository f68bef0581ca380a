"""How fast sparse attention is, prediction and selection included, against dense attention, turn by turn in one run.

Queries, keys and values are those of one block of DeiT-T on photos, at three input sizes; the predictor is the
closed-form start of Sparsifiner on other photos. Dense is `scaled_dot_product_attention`.

    python benchmarks/sparse_attention.py DATA_DIR

DATA_DIR holds ``deit_tiny_patch16_224.safetensors`` and ``imagenette-train.tar``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import leanvit
from leanvit.bench import take_turns
from leanvit.data import image_batches
from leanvit.engines import PRECISIONS
from leanvit.measure import environment
from leanvit.methods.sparsifiner import queries_keys_values
from leanvit.ops.sparse import connections, pack, sparse_attention
from leanvit.report.tables import Row, Table
from leanvit.store import resolve_model

POINTS = {224: (1, 32), 512: (1, 4), 1024: (1,)}
"""Batch sizes by input size: 197, 1025 and 4097 tokens."""
PHOTOS = {224: 64, 512: 16, 1024: 4}
"""Photos for the predictor."""
ROUNDS = {224: 100, 512: 40, 1024: 12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/sparse_attention"))
    parser.add_argument("--img-size", type=int, nargs="*", default=list(POINTS))
    parser.add_argument("--keep", type=float, nargs="*", default=[0.1, 0.25, 0.5])
    parser.add_argument("--precision", nargs="*", default=["fp32"])
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rows = [row for size in args.img_size for row in at_size(size, args)]
    table = Table(rows, title=f"Attention of block {args.block} of DeiT-T, {args.threads} threads")
    print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output.with_suffix(".csv"))
    table.to_json(args.output.with_suffix(".json"), environment=environment())


def at_size(size: int, args: argparse.Namespace) -> list[Row]:
    """Every share of the keys at one input size."""
    weights = args.data_dir / "deit_tiny_patch16_224.safetensors"
    vit = resolve_model("deit_tiny_patch16_224", checkpoint=weights, img_size=size).eval()
    largest = max(POINTS[size])
    photos = torch.cat(list(image_batches(str(args.data_dir / "imagenette-train.tar"), vit, 4, PHOTOS[size] + largest)))
    dense = vit.blocks[args.block]
    x = inputs(vit, photos, args.block)
    lean = leanvit.slim(vit, leanvit.Sparsifiner(layers=args.block))
    attention = lean.blocks[args.block].attn
    attention.start(dense, x[largest:].split(4))
    qkv = queries_keys_values(dense.attn, dense.norm1(x[:largest]))
    return [
        point(qkv, attention, keep, batch, precision, size, args.threads)
        for precision in args.precision
        for batch in POINTS[size]
        for keep in args.keep
    ]


def inputs(vit: VisionTransformer, photos: Tensor, block: int) -> Tensor:
    """What a block of the dense model is given, ``(B, N, C)``, a few photos at a time."""
    parts = []
    for some in photos.split(2):
        x = vit._pos_embed(vit.patch_embed(some))
        for earlier in vit.blocks[:block]:
            x = earlier(x)
        parts.append(x)
    return torch.cat(parts)


def point(
    qkv: tuple[Tensor, ...], attention: Any, keep: float, batch: int, precision: str, size: int, threads: int
) -> Row:
    """One row."""
    q, k, v = (x[:batch].to(PRECISIONS[precision]) for x in qkv)
    tokens = q.shape[2]
    attention.config = leanvit.Sparsifiner(keep=keep)
    predictor, budget = attention.predictor(), attention.config.budget(tokens, 1)
    packed = pack(predictor)
    runs = (
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: sparse_attention(q, k, v, predictor, packed, None, budget),
    )
    dense_s, sparse_s = (float(torch.tensor(times).median()) for times in take_turns(runs, iterations=ROUNDS[size]))
    return {
        "tokens": tokens,
        "keep": keep,
        "batch": batch,
        "precision": precision,
        "dense_ms": 1e3 * dense_s,
        "sparse_ms": 1e3 * sparse_s,
        "speedup": dense_s / sparse_s,
        "density": float(connections(q, k, predictor, None, budget).float().mean()),
        "basis_density": float((predictor.basis != 0).float().mean()),
        "img_size": size,
        "threads": threads,
    }


if __name__ == "__main__":
    main()
