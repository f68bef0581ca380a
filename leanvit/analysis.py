"""How the layers of a dense model attend: what varies between images, and how many tokens they really need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.functional import softmax

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from .data import ImageSource

RANK_IMAGES = 16
"""Images whose attention is decomposed; the effective rank differs little between images."""


@dataclass(frozen=True)
class LayerStatistics:
    """How one layer attends over a set of images.

    Args:
        index: The block.
        relative_variance: ``Σ Var(A) / Σ E[A]²`` over images: near 0 where every image is attended to alike.
        effective_rank: Smallest number of singular values that hold 95 % of the energy of the patches' attention,
            mean over heads and images: how many tokens would do.
    """

    index: int
    relative_variance: float
    effective_rank: float


def attention_map(attention: Attention, x: Tensor) -> Tensor:
    """Softmax attention of a timm attention module.

    Args:
        attention: The module.
        x: Its input, ``(B, N, C)``.

    Returns:
        ``(B, H, N, N)``, rows summing to one.
    """
    rows = slice(0, 2 * attention.attn_dim)
    bias = attention.qkv.bias
    qk = nn.functional.linear(x, attention.qkv.weight[rows], None if bias is None else bias[rows])
    q, k = qk.unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return softmax((q * attention.scale) @ k.transpose(-2, -1), dim=-1)


@torch.inference_mode()
def attention_statistics(
    model: VisionTransformer, images: ImageSource, *, limit: int = 256, batch_size: int = 32
) -> list[LayerStatistics]:
    """Measure how each layer of a dense model attends.

    Args:
        model: The dense timm model.
        images: Unlabelled images: a path, a data set, a loader or a tensor ``(B, 3, H, W)``.
        limit: Use at most this many images.
        batch_size: Images at a time.

    Raises:
        UnsupportedModelError: The model is lean, or of a kind that is not known.
    """
    from .data import image_batches
    from .model import check_supported

    check_supported(model)

    was_training = model.training
    blocks: Any = model.blocks
    model.eval()
    sums: list[_Moments] = [_Moments() for _ in model.blocks]
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda module, args, moments=moments: moments.add(attention_map(module, args[0]))
        )
        for block, moments in zip(blocks, sums, strict=True)
    ]
    try:
        for batch in image_batches(images, model, batch_size, limit):
            model.forward_features(batch.to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    prefix = model.num_prefix_tokens
    return [
        LayerStatistics(index, moments.relative_variance(), moments.effective_rank(prefix))
        for index, moments in enumerate(sums)
    ]


class _Moments:
    """Running sums of one layer's attention over images, and the first few maps themselves."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Tensor] = []

    def add(self, attention: Tensor) -> None:
        if not self.count:
            self.sum = torch.zeros(attention.shape[1:], dtype=torch.float64)
            self.squares = torch.zeros_like(self.sum)
        self.sum += attention.sum(dim=0).cpu()
        self.squares += attention.square().sum(dim=0).cpu()
        self.first += list(attention[: max(0, RANK_IMAGES - self.count)].cpu())
        self.count += len(attention)

    def relative_variance(self) -> float:
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        return float(variance.sum() / mean.square().sum())

    def effective_rank(self, prefix: int, energy: float = 0.95) -> float:
        maps = torch.stack(self.first)[:, :, prefix:, prefix:].float()  # (images, H, h·w, h·w)
        values = torch.linalg.eigvalsh(maps @ maps.transpose(-2, -1)).flip(-1).clamp_min(0)  # squared singular values
        share = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True)
        return float(((share < energy).sum(dim=-1) + 1).double().mean())
