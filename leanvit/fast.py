"""A timm block for inference: the parts that no method touched, in forms that cost less; same weights, same names."""

from __future__ import annotations

from typing import Any, Self

import torch
from timm.layers import Attention, DropPath, Format, LayerScale, Mlp, PatchEmbed
from torch import Tensor, nn

from .attention import Attended, attend, dense_attention
from .model import LeanBlock, Tokens
from .ops.linear import column_major, forget_blocks, infers_on_cpu, linear


class BlockedLinear(nn.Linear):
    """A linear layer of which blocks may be kept: they go when its type or device changes."""

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        forget_blocks(self.weight)
        return super()._apply(*args, **kwargs)


class FastLinear(BlockedLinear):
    """A linear layer for inference, with the GELU behind it if it took that over."""

    gelu: str = ""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weight = nn.Parameter(self.lay_out(self.weight.detach()), self.weight.requires_grad)

    def lay_out(self, weight: Tensor) -> Tensor:
        """The weight as it lies in memory, whose products are fastest."""
        return column_major(weight)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, gelu=self.gelu, residual=residual)


class FastAttention(Attention):
    """timm's dense attention for inference, the residual added in its last product."""

    def attend(self, x: Tensor, tokens: Tokens, *residual: Tensor) -> Attended:
        return dense_attention(self, x, tokens.size, *residual)

    def __repr__(self) -> str:
        return "dense"


class FastMlp(Mlp):
    """timm's MLP for inference, with GELU and residual in its products."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.fc2(self.norm(self.fc1(x)), residual)


class FastPatchEmbed(PatchEmbed):
    """timm's patch embedding for inference: patches do not overlap, so the convolution is a linear layer on each."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = self.patch_size
        divides = height % rows == 0 and width % columns == 0
        if not divides or self.img_size != (height, width) or not infers_on_cpu(x, self.proj.weight):
            return super().forward(x)  # cropped, padded or refused there
        down, across = height // rows, width // columns
        patches = x.reshape(batch, channels, down, rows, across, columns).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, down * across, channels * rows * columns)  # (B, h·w, 3·p·p)
        return self.norm(linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class FastBlock(LeanBlock):
    """A block for inference whose attention and MLP add the residual themselves."""

    def mix(self, tokens: Tokens) -> Attended:
        return attend(self.attn, self.norm1(tokens.x), tokens, tokens.x, tell=bool(self.reducers))

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x), x)


def speed_up(model: Any) -> None:
    """Give the parts of a model their inference forms, in place; a part of a kind that is not known stays as it is."""
    embed = model.patch_embed
    if type(embed) is PatchEmbed and embed.flatten and embed.output_fmt == Format.NCHW:
        embed.__class__ = FastPatchEmbed
    for block in model.blocks:
        speed_up_block(block)
    for head in (model.head, getattr(model, "head_dist", None)):
        if type(head) is nn.Linear:
            speed_up_linear(head)


def speed_up_block(block: Any) -> None:
    """Give the parts of a block their inference forms, in place; a part of a kind that is not known stays as it is."""
    fold_layer_scale(block)
    linear_parts = all(type(getattr(block.mlp, name, None)) is nn.Linear for name in ("fc1", "fc2"))
    plain_mlp = type(block.mlp) is Mlp and type(block.mlp.act) is nn.GELU and linear_parts
    knows_residual = type(block.attn) is Attention or getattr(block.attn, "adds_residual", False)
    nothing_between = all(
        isinstance(getattr(block, name), nn.Identity) for name in ("ls1", "ls2", "drop_path1", "drop_path2")
    )
    for module in block.modules():
        if type(module) is nn.Linear:
            speed_up_linear(module)
    if plain_mlp:
        block.mlp.__class__ = FastMlp
        block.mlp.fc1.gelu = block.mlp.act.approximate
    if not (plain_mlp and knows_residual and nothing_between):
        return
    block.__class__ = FastBlock
    if type(block.attn) is Attention:
        block.attn.__class__ = FastAttention


def speed_up_linear(module: Any) -> None:
    """Give a linear layer its inference form, in place."""
    module.__class__ = FastLinear
    module.weight = nn.Parameter(module.lay_out(module.weight.detach()))


@torch.no_grad()
def fold_layer_scale(block: Any) -> None:
    """Multiply layer scale into the product in front of it, where there is one, and drop what only training uses."""
    for name, last in (("ls1", getattr(block.attn, "proj", None)), ("ls2", getattr(block.mlp, "fc2", None))):
        scale = getattr(block, name)
        if type(scale) is LayerScale and type(last) is nn.Linear:
            last.weight = nn.Parameter(last.weight * scale.gamma[:, None])
            if last.bias is not None:
                last.bias = nn.Parameter(last.bias * scale.gamma)
            setattr(block, name, nn.Identity())
    for name in ("drop_path1", "drop_path2"):
        if type(getattr(block, name)) is DropPath:
            setattr(block, name, nn.Identity())
