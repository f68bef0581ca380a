"""Token merging and pruning beside a plain implementation of merging, off the shelf.

    python benchmarks/merging.py                how fast: dense, plain merging and leanvit's, turn by turn
    python benchmarks/merging.py DATA_DIR       how accurate: the same without any warm start, on photos of 500 classes

DATA_DIR holds ``deit_tiny_patch16_224.safetensors`` and ``imagenet-500.tar``. The plain implementation is merging as
its paper describes it (Bolya et al., 2023, arXiv 2210.09461), written with usual torch operations on timm's blocks: it
uses `scaled_dot_product_attention`, a sort, gathers and a scatter.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leanvit
from leanvit.data import open_data
from leanvit.engines import PRECISIONS
from leanvit.measure import environment
from leanvit.methods import parse
from leanvit.report.tables import Row, Table
from leanvit.store import resolve_model

RS = (8, 12, 16, 20)
OTHERS = ("pruning:keep=0.9", "pruning:keep=0.7", "pruning:keep=0.5", "pruning:keep=0.7,fuse=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, nargs="*", default=[1, 32])
    args = parser.parse_args()
    rows = speed(args.precision, args.batch_size) if args.data_dir is None else accuracy(args.data_dir, args.precision)
    table = Table(rows, title="DeiT-T, 224 px, off the shelf")
    print(table)
    path = args.output / ("merging_speed" if args.data_dir is None else "merging_accuracy")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"))
    table.to_json(path.with_suffix(".json"), environment=environment())


def speed(precisions: list[str], batch_sizes: list[int]) -> list[Row]:
    """Random weights and images: the cost depends on neither."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224").eval()
    models: dict[str, nn.Module] = {"dense": vit, "dense, deployed": leanvit.slim(vit)}
    for r in RS:
        models |= {
            f"plain merging, r={r}": PlainMerging(vit, r),
            f"merging:r={r}": leanvit.slim(vit, *parse(f"merging:r={r}")),
        }
    models["pruning:keep=0.7"] = leanvit.slim(vit, *parse("pruning:keep=0.7"))
    return leanvit.bench(models, batch_sizes=batch_sizes, precisions=precisions)


def accuracy(data_dir: Path, precisions: list[str]) -> list[Row]:
    """Top-1 on the photos, deployed, and agreement with the dense model."""
    vit = resolve_model("deit_tiny_patch16_224", checkpoint=data_dir / "deit_tiny_patch16_224.safetensors")
    models: dict[str, Any] = {"dense": vit}
    for r in RS:
        models |= {f"plain merging, r={r}": PlainMerging(vit, r), f"merging:r={r}": _deployed(vit, f"merging:r={r}")}
    models |= {text: _deployed(vit, text) for text in OTHERS}
    photos = open_data(str(data_dir / "imagenet-500.tar"), vit)
    rows = []
    for precision in precisions:
        for name, model in models.items():
            cast = copy.deepcopy(model).to(PRECISIONS[precision])
            result = leanvit.evaluate(cast, photos, teacher=vit, progress=False)
            rows.append({"method": name, "precision": precision, "top1": result.top1, "agreement": result.agreement})
            print(rows[-1], flush=True)
    return rows


def _deployed(vit: Any, text: str) -> nn.Module:
    return leanvit.deploy(leanvit.slim(vit, *parse(text)))


class PlainMerging(nn.Module):
    """A timm ViT in which every block merges r tokens between attention and MLP.

    Args:
        vit: The model, with a class token.
        r: Merges a block.
    """

    def __init__(self, vit: Any, r: int) -> None:
        super().__init__()
        self.vit, self.r = copy.deepcopy(vit), r
        self.pretrained_cfg = vit.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        size = torch.ones_like(x[..., :1])
        for block in self.vit.blocks:
            attended, keys = self._attention(block.attn, block.norm1(x), size)
            x, size = self._merge(x + attended, size, keys)
            x = x + block.mlp(block.norm2(x))
        return self.vit.forward_head(self.vit.norm(x))

    def _attention(self, attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None, :, 0])
        return attn.proj(x.transpose(1, 2).reshape(batch, tokens, width)), k.mean(dim=1)

    def _merge(self, x: Tensor, size: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        r = min(self.r, (x.shape[1] - 1) // 2)
        if r == 0:
            return x, size
        keys = keys / keys.norm(dim=-1, keepdim=True)
        scores = keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)
        scores[:, 0] = -torch.inf  # the class token is not merged
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        gone, kept = order[:, :r, None], order[:, r:, None].sort(dim=1).values
        partner = partner[..., None].gather(1, gone)

        def merge(values: Tensor) -> Tensor:
            even, odd, width = values[:, ::2], values[:, 1::2], values.shape[-1]
            moved = even.gather(1, gone.expand(-1, -1, width))
            odd = odd.scatter_reduce(1, partner.expand(-1, -1, width), moved, reduce="sum")
            return torch.cat([even.gather(1, kept.expand(-1, -1, width)), odd], dim=1)

        total = merge(size)
        return merge(x * size) / total, total


if __name__ == "__main__":
    main()
