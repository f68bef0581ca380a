"""DGSSA: early layers attend the same way in every image, so a learned static matrix replaces query by key.

Source: Yu et al., 2023, arXiv 2310.07664. Choosing layers by measured variance, starting from the mean attention and
parametrising by logits are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..analysis import attention_map
from ..attention import project
from ..errors import ConfigError, InputSizeError, MethodError
from ..ops.static import (
    coarse_scale,
    coarse_static_attention,
    interpolation,
    pool_static,
    resize_static,
    static_attention,
)
from ..record import Recorder, offer
from . import register
from .base import LeanModule, Method, Plan, auto_count, block_indices, claim_attention

if TYPE_CHECKING:
    from ..model import Grid, LeanVisionTransformer


@register
@dataclass(frozen=True)
class DGSSA(Method):
    """Replace the attention of chosen layers by dynamic-guided static self-attention.

    Args:
        layers: Blocks to replace; ``"auto:K"`` takes the K whose attention varies least between images, among those
            before any token reduction, ``"auto"`` a third of the depth. Both need images.
        guidance: Share of training over which the dynamic attention hands over to the static one; 0 starts static.
        guidance_weight: Weight of the loss ``KL(E_batch[A_dynamic] ‖ S)`` while both are there.
        max_mb: Largest static matrix of a layer, in MB of fp32.
        grid: Height and width (or one number for both) of the patch grid on which the matrices lie; the input's when
            not given. On a coarser one, values are pooled and what comes out is interpolated. A model that is resized
            keeps the grid it had.

    Raises:
        ConfigError: A value out of range.
    """

    name: ClassVar[str] = "dgssa"
    positional: ClassVar[bool] = True
    loss_kinds: ClassVar[tuple[str, ...]] = ("guidance",)

    layers: tuple[int, ...] | str = "auto"
    guidance: float = 0.5
    guidance_weight: float = 1.0
    max_mb: float = 256.0
    grid: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", block_indices(self.name, "layers", self.layers))
        if not self.layers:
            raise ConfigError("dgssa: layers is empty; name blocks to replace, or 'auto'")
        for name in ("guidance", "guidance_weight", "max_mb"):
            if not isinstance(getattr(self, name), (int, float)) or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"dgssa: {name}={getattr(self, name)!r} is not a number")
        if not 0 <= self.guidance <= 1:
            raise ConfigError(f"dgssa: guidance={self.guidance} is not in [0, 1]")
        if self.guidance_weight < 0:
            raise ConfigError(f"dgssa: guidance_weight={self.guidance_weight} is negative")
        if self.max_mb <= 0:
            raise ConfigError(f"dgssa: max_mb={self.max_mb} is not positive")
        if self.grid is not None:
            object.__setattr__(self, "grid", check_sides(self.grid))

    def resolve(self, plan: Plan) -> Self:
        layers = self.layers
        if isinstance(layers, str):
            count = auto_count(layers, default=max(1, plan.depth // 3))
            if count > plan.first_reduction:
                which = "come before tokens are reduced" if plan.first_reduction < plan.depth else "there are"
                raise MethodError(
                    f"dgssa: layers={layers!r} asks for {count} layers and only {plan.first_reduction} {which}"
                )
            variance = {layer.index: layer.relative_variance for layer in plan.statistics[: plan.first_reduction]}
            layers = tuple(sorted(sorted(variance, key=lambda index: variance[index])[:count]))
        plan.check_blocks(self.name, layers)
        return replace(self, layers=layers)

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for index in cast(tuple[int, ...], self.layers):
            attention = claim_attention(self.name, index, lean.blocks[index])
            StaticAttention.adopt(attention, index, lean.num_prefix_tokens, lean.blocks.grid, self)

    def resized(self, old: Grid, new: Grid) -> Self:
        return self if self.grid else replace(self, grid=old)

    def losses(self, found: Recorder) -> dict[str, Tensor]:
        terms = [record.value for record in found["guidance"]]
        return {"guidance": self.guidance_weight * torch.stack(terms).mean()} if terms and self.guidance_weight else {}


class StaticAttention(LeanModule, Attention):
    """timm's attention with, per head, a static matrix beside query and key.

    While it trains with guidance it mixes ``(1 − α)·A_dynamic + α·S``; at α = 1, where it stands outside training,
    query and key are not computed. A softmax over the rows of `logits` gives S, ``(H, P + h·w, P + h·w)``, on a grid
    that may be coarser than the tokens'.
    """

    method: ClassVar[str] = DGSSA.name
    needs_all_tokens: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("logits",)

    layer: int
    prefix: int
    config: DGSSA
    alpha: Tensor
    logits: nn.Parameter
    grid: Grid
    """Of the tokens."""
    rows: Tensor
    columns: Tensor

    @classmethod
    def adopt(cls, attention: Any, layer: int, prefix: int, grid: Grid, config: DGSSA) -> None:
        """Turn a timm attention into a static one in place; uniform over all tokens until it is warm-started."""
        weight = attention.qkv.weight
        height, width = cast("Grid", config.grid or grid)
        tokens = prefix + height * width
        check_memory(attention.num_heads, tokens, config.max_mb)
        attention.__class__ = cls
        attention.layer, attention.prefix, attention.config = layer, prefix, config
        attention.register_buffer("alpha", torch.ones((), device=weight.device))
        attention.logits = nn.Parameter(weight.new_zeros(attention.num_heads, tokens, tokens))
        attention._lay_out((height, width), grid)

    def _lay_out(self, coarse: Grid, fine: Grid) -> None:
        self.grid = fine
        for name, old, new in zip(("rows", "columns"), coarse, fine, strict=True):
            self.register_buffer(name, interpolation(old, new).to(self.logits), persistent=False)

    def original(self) -> None:
        del self.logits, self.alpha, self.layer, self.prefix, self.config, self.grid, self.rows, self.columns
        self.__class__ = Attention  # type: ignore[assignment]

    @property
    def coarse(self) -> Grid:
        """The grid of S."""
        return self.rows.shape[1], self.columns.shape[1]

    @property
    def learned(self) -> Tensor:
        """S: the attention of each query over the keys, ``(H, P + h·w, P + h·w)``, rows summing to one."""
        return self.logits.softmax(dim=-1)

    @property
    def static(self) -> Tensor:
        """S between the tokens, ``(H, N, N)``, rows summing to one."""
        if self.coarse == self.grid:
            return self.learned
        return resize_static(self.learned, self.prefix, self.coarse, self.grid)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        tokens = self.prefix + self.grid[0] * self.grid[1]
        if x.shape[1] != tokens:
            raise InputSizeError(
                f"dgssa: block {self.layer} gets {x.shape[1]} tokens and was made for {tokens}; "
                "call set_input_size() for another image size"
            )
        alpha = float(self.alpha)
        if alpha < 1:
            mixed = self._guided(x, alpha)
        else:
            offer("static_attention", self.layer, lambda: self.static)
            offer("dynamic_attention", self.layer, lambda: attention_map(self, x))
            mixed = self._mix(self._values(x))
        return project(self, x, mixed)

    def _mix(self, v: Tensor) -> Tensor:
        static = self.attn_drop(self.learned)
        if self.coarse == self.grid:
            return static_attention(static, v)
        return coarse_static_attention(static, v, self.rows.to(static), self.columns.to(static))

    def _guided(self, x: Tensor, alpha: float) -> Tensor:
        dynamic = attention_map(self, x)  # (B, H, N, N)
        static = self.static
        offer("guidance", self.layer, lambda: guidance_loss(dynamic, static))
        offer("static_attention", self.layer, lambda: static)
        offer("dynamic_attention", self.layer, lambda: dynamic)
        attention = torch.lerp(dynamic, static.to(dynamic.dtype).expand_as(dynamic), alpha)
        v = self._values(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
        return (self.attn_drop(attention).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def _values(self, x: Tensor) -> Tensor:
        weight, bias = value_projection(self)
        return nn.functional.linear(x, weight, bias)

    @torch.no_grad()
    def start(self, dense: Any, inputs: Iterable[Tensor]) -> None:
        """S starts as the mean of the dense layer's attention over the images."""
        total, images = torch.zeros((), device=self.logits.device), 0
        for x in inputs:
            total = total + attention_map(dense.attn, dense.norm1(x)).float().sum(dim=0)
            images += len(x)
        mean = total / images
        if self.coarse != self.grid:
            mean = pool_static(mean, self.prefix, self.rows, self.columns)
        self.logits.copy_(mean.clamp_min(1e-8).log())

    def set_progress(self, progress: float) -> None:
        share = self.config.guidance
        self.alpha.fill_(1.0 if progress >= share else progress / share)

    def not_ready(self) -> str:
        alpha = float(self.alpha)
        return f"guidance is not over, {1 - alpha:.0%} of the attention is still dynamic" if alpha < 1 else ""

    def deployed(self) -> nn.Module:
        return DeployedStaticAttention(self)

    def resize(self, old: Grid, new: Grid, positions: Tensor) -> Tensor:
        self._lay_out(self.coarse, new)
        return positions

    def __repr__(self) -> str:
        heads, tokens, _ = self.logits.shape
        return f"static attention, {heads} heads of {tokens}×{tokens}"


class DeployedStaticAttention(nn.Module):
    """Static attention for inference: ``proj(S·V)``, ``2·N·C² + N²·C`` MACs an image; no query, key or softmax.

    Where S lies on a coarser grid than the tokens, it is used there, and N² is the square of fewer.
    """

    adds_residual: ClassVar[bool] = True
    static: nn.Parameter
    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor | None

    def __init__(self, trained: StaticAttention) -> None:
        super().__init__()
        weight, bias = value_projection(trained)
        self.layer = trained.layer
        self.gate, self.norm, self.proj, self.proj_drop = trained.gate, trained.norm, trained.proj, trained.proj_drop
        # Rows of S sum to one, so a bias of the values comes out as it went in: the projection's bias can carry it.
        if bias is not None and isinstance(self.norm, nn.Identity) and self.gate is None:
            carried = self.proj.weight.detach() @ bias.detach()
            self.proj.bias = nn.Parameter(carried if self.proj.bias is None else self.proj.bias.detach() + carried)
            bias = None
        self.v = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.v.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.v.bias = nn.Parameter(bias.detach().clone())
        coarse = math.prod(trained.coarse) < math.prod(trained.grid)
        self.static = nn.Parameter((trained.learned if coarse else trained.static).detach())
        self.register_buffer("rows", trained.rows if coarse else None, persistent=False)
        self.register_buffer("columns", trained.columns if coarse else None, persistent=False)
        scale = coarse_scale(self.static.detach(), trained.rows, trained.columns) if coarse else None
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        offer("static_attention", self.layer, self._map)
        return project(self, x, self._mix(self.v(x)), *residual)

    def _mix(self, v: Tensor) -> Tensor:
        if self.rows is None or self.columns is None:
            return static_attention(self.static, v)
        rows, columns = self.rows.to(v), self.columns.to(v)  # a loaded model has its weights' type, and these fp32
        return coarse_static_attention(self.static, v, rows, columns, self.scale)

    def _map(self) -> Tensor:
        if self.rows is None or self.columns is None:
            return self.static
        (height, coarse_height), (width, coarse_width) = self.rows.shape, self.columns.shape
        prefix = self.static.shape[-1] - coarse_height * coarse_width
        return resize_static(self.static, prefix, (coarse_height, coarse_width), (height, width))

    def __repr__(self) -> str:
        heads, tokens, _ = self.static.shape
        return f"static attention, {heads} heads of {tokens}×{tokens}, deployed"


def value_projection(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the values in timm's joint projection, whose rows are query, key, value."""
    rows = slice(2 * attention.attn_dim, None)
    bias = attention.qkv.bias
    return attention.qkv.weight[rows], None if bias is None else bias[rows]


def guidance_loss(dynamic: Tensor, static: Tensor) -> Tensor:
    """``KL(E_batch[A_dynamic] ‖ S)``, mean over heads and queries: S inherits what the dynamic attention knows.

    Args:
        dynamic: ``(B, H, N, N)``.
        static: ``(H, N, N)``.
    """
    mean = dynamic.float().mean(dim=0).clamp_min(1e-8)
    return (mean * (mean.log() - static.float().clamp_min(1e-8).log())).sum(dim=-1).mean()


def check_sides(grid: Any) -> Grid:
    """Height and width of a grid, given as such or as one number."""
    sides = (grid, grid) if isinstance(grid, int) else tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ConfigError(f"dgssa: grid={grid!r} is not a number of patches from 1 on, or two of them")
    return cast("Grid", sides)


def check_memory(heads: int, tokens: int, max_mb: float) -> None:
    """Refuse a static matrix of ``H·N²`` fp32 values above the limit."""
    size = heads * tokens**2 * 4 / 1e6
    if size > max_mb:
        raise MethodError(
            f"dgssa: static attention of {heads} heads over {tokens} tokens takes {size:.3g} MB a layer, "
            f"over max_mb={max_mb:.3g}; "
            "use a smaller input, give a coarser grid or raise max_mb"
        )
