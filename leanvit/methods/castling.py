"""Castling-ViT: linear-angular attention, with masked softmax attention beside it only while training.

Source: You et al., CVPR 2023, arXiv 2211.10526. The gain per head, the convolution on the patch grid and the start from
the dense model's statistics are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..analysis import attention_map
from ..attention import Attended, project
from ..errors import ConfigError, InputSizeError, MethodError
from ..model import Tokens
from ..ops.angular import angular_attention, angular_map, linear_angular, takes_kernel
from ..ops.depthwise import add_convolved, convolve_tokens
from ..record import Recorder, offer
from . import register
from .base import LeanModule, Method, Plan, block_indices, claim_attention, index_range

if TYPE_CHECKING:
    from ..model import Grid, LeanVisionTransformer

KERNELS = {"grid": 5, "tokens": 9}
"""The forms of the convolution, and the taps of each along an axis when nothing else is asked for."""
RIDGE = 1e-4
"""Of the start by least squares: what is added to the squares, as a share of them."""


@register
@dataclass(frozen=True)
class Castling(Method):
    """Replace the attention of chosen layers by linear-angular attention, which costs as much for every token.

    Args:
        layers: Blocks to replace: ``"all"``, a range such as ``"4-11"``, or indices.
        conv: Where the depthwise convolution of the values runs: on the patch ``"grid"``, or along the ``"tokens"``.
        kernel: Its taps along an axis, odd; 0 takes 5 on the grid, or as many as fit, and 9 along the tokens.
        auxiliary: Share of training over which the softmax attention beside it vanishes; 0 trains without.
        threshold: Entries of the softmax attention at or below it are masked at the start; from there it grows to 1
            evenly on a log scale.
        sparsity_weight: Weight of a loss on what survives of the softmax attention, which makes it vanish sooner.

    Raises:
        ConfigError: A value out of range.
    """

    name: ClassVar[str] = "castling"
    loss_kinds: ClassVar[tuple[str, ...]] = ("density", "auxiliary")

    layers: tuple[int, ...] | str = "all"
    conv: str = "grid"
    kernel: int = 0
    auxiliary: float = 0.7
    threshold: float = 0.02
    sparsity_weight: float = 0.0

    @property
    def positional(self) -> bool:  # type: ignore[override]
        """Whether neighbours on the patch grid are looked up."""
        return self.conv == "grid"

    def __post_init__(self) -> None:
        if self.layers != "all":
            text = self.layers if isinstance(self.layers, str) else ""
            first, dash, last = text.partition("-")
            layers = index_range(text) if dash and first.isdigit() and last.isdigit() else self.layers
            if isinstance(layers, str):
                raise ConfigError(f"castling: layers={layers!r} is not 'all', a range such as '4-11' or block indices")
            object.__setattr__(self, "layers", block_indices(self.name, "layers", layers))
        if not self.layers:
            raise ConfigError("castling: layers is empty; name blocks to replace, or 'all'")
        if self.conv not in KERNELS:
            raise ConfigError(f"castling: conv={self.conv!r} is not one of {', '.join(KERNELS)}")
        if not isinstance(self.kernel, int) or self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise ConfigError(f"castling: kernel={self.kernel!r} is not an odd number of taps, or 0 for what fits")
        for name in ("auxiliary", "threshold", "sparsity_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"castling: {name}={value!r} is not a number")
        if not 0 <= self.auxiliary <= 1:
            raise ConfigError(f"castling: auxiliary={self.auxiliary} is not in [0, 1]")
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"castling: threshold={self.threshold} is not in (0, 1]")
        if self.sparsity_weight < 0:
            raise ConfigError(f"castling: sparsity_weight={self.sparsity_weight} is negative")

    def resolve(self, plan: Plan) -> Self:
        plan.check_blocks(self.name, self.blocks(plan.depth))
        grid = plan.model.patch_embed.grid_size
        kernel = self.kernel or KERNELS[self.conv]
        if self.conv == "grid":
            kernel = self.kernel or min(kernel, (min(grid) - 1) // 2 * 2 + 1)
            check_kernel(kernel, grid)
        return replace(self, kernel=kernel)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks to replace in a model of `depth`."""
        return tuple(range(depth)) if isinstance(self.layers, str) else self.layers

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for index in self.blocks(len(lean.blocks)):
            attention = claim_attention(self.name, index, lean.blocks[index])
            CastlingAttention.adopt(attention, index, lean.num_prefix_tokens, lean.blocks.grid, self)

    def losses(self, found: Recorder) -> dict[str, Tensor]:
        terms = [record.value for record in found["auxiliary"]]
        return {"auxiliary": self.sparsity_weight * torch.stack(terms).mean()} if terms and self.sparsity_weight else {}

    def metrics(self, found: Recorder) -> dict[str, Tensor]:
        by_layer = {f"density.{record.layer}": record.value for record in found["density"]}
        return {"density": torch.stack(list(by_layer.values())).mean(), **by_layer} if by_layer else {}

    def threshold_at(self, progress: float) -> float:
        """The threshold that far into training; from 1 on nothing survives."""
        return 1.0 if progress >= self.auxiliary else self.threshold ** (1 - progress / self.auxiliary)


class AngularAttention(Attention):
    """timm's attention with the linear-angular map in place of the softmax: ``proj(gain·normalise(…) + dwconv(V))``.

    This much is deployed. It has no parameters that depend on the number of tokens.
    """

    adds_residual: ClassVar[bool] = True
    tells: ClassVar[tuple[str, ...]] = ("keys",)

    layer: int
    gain: nn.Parameter
    conv: Convolution

    def attend(self, x: Tensor, tokens: Tokens, *residual: Tensor) -> Attended:
        """Attend to the tokens that `x` ``(B, N, C)`` is the normalised form of."""
        batch, count, _ = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        offer("linear_attention", self.layer, lambda: angular_map(q, k))
        beside = self.beside(q, k, v, tokens.size)
        if beside is None and tokens.size is None and takes_kernel(q, k, v, self.gain, self.conv.weight):
            mixed = angular_attention(q, k, v, self.gain, self.conv.filters(), *self.conv.layout(tokens, count))
        else:
            mixed = linear_angular(q, k, v, self.gain, beside=beside, size=tokens.size)
            mixed = self.conv(mixed, qkv[:, :, 2].flatten(2), tokens)
        return Attended(project(self, x, mixed, *residual), k=k)

    def beside(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor | None:
        """What is added to the linear part before it is normalised, ``(B, H, N, d)``."""
        return None

    def __repr__(self) -> str:
        return f"castling, {self.num_heads} heads of linear-angular attention, {self.conv!r}"


class CastlingAttention(LeanModule, AngularAttention):
    """Linear-angular attention, and beside it, while `epsilon` is below 1, the entries of the softmax map above it."""

    method: ClassVar[str] = Castling.name
    no_decay: ClassVar[tuple[str, ...]] = ("gain",)
    tells: ClassVar[tuple[str, ...]] = AngularAttention.tells
    instead: ClassVar[str] = "use blocks before that, or conv=tokens"

    config: Castling
    prefix: int
    grid: Grid
    epsilon: Tensor

    @classmethod
    def adopt(cls, attention: Any, layer: int, prefix: int, grid: Grid, config: Castling) -> None:
        """Turn a timm attention into a linear one in place; of unit gain, without local part, until warm-started."""
        heads, width, weight = attention.num_heads, attention.attn_dim, attention.qkv.weight
        if width % heads:
            raise MethodError(
                f"castling: block {layer} has {heads} heads for a width of {width}, which they do not divide"
            )
        attention.__class__ = cls
        attention.layer, attention.prefix, attention.grid, attention.config = layer, prefix, grid, config
        attention.register_buffer("epsilon", torch.ones((), device=weight.device))
        attention.gain = nn.Parameter(weight.new_ones(heads))
        attention.conv = CONVOLUTIONS[config.conv](heads, config.kernel, layer).to(weight)

    def original(self) -> None:
        del self.gain, self.conv, self.epsilon, self.layer, self.prefix, self.grid, self.config
        self.__class__ = Attention  # type: ignore[assignment]

    @property
    def needs_positions(self) -> bool:  # type: ignore[override]
        return self.conv.needs_positions

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        raise MethodError("castling: this attention needs to see the tokens; run the block, not its attention alone")

    def beside(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor | None:
        def softmax() -> Tensor:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            if size is not None:
                logits = logits + size.log()[:, None, None, :].to(logits.dtype)
            return logits.softmax(dim=-1)  # (B, H, N, N)

        epsilon = float(self.epsilon)
        if epsilon >= 1:
            offer("softmax_attention", self.layer, softmax)
            offer("density", self.layer, lambda: q.new_zeros((), dtype=torch.float32))
            return None
        attention = softmax()
        survives = attention > epsilon
        masked = attention * survives
        offer("softmax_attention", self.layer, lambda: attention)
        offer("density", self.layer, lambda: survives.float().mean())
        if self.config.sparsity_weight:
            offer("auxiliary", self.layer, lambda: masked.sum(dim=-1).mean())
        return self.attn_drop(masked).to(v.dtype) @ v

    @torch.no_grad()
    def start(self, dense: Any, inputs: Iterable[Tensor]) -> None:
        """Gain and filters start as those that come nearest to the dense layer's heads, by least squares.

        A head's output is linear in both: its gain times the normalised output, and each tap times the values shifted.
        """
        taps = self.conv.weight[0].numel()
        gram = self.gain.new_zeros(self.num_heads, 1 + taps, 1 + taps, dtype=torch.float64)
        moment = gram.new_zeros(self.num_heads, 1 + taps, 1)
        for x in inputs:
            normed = dense.norm1(x)
            q, k, v = dense.attn.qkv(normed).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            wanted = (attention_map(dense.attn, normed) @ v).transpose(1, 2)  # (B, N, H, d)
            normalised = linear_angular(self.q_norm(q), self.k_norm(k), v, torch.ones_like(self.gain))
            shifted = self.conv.each_tap(v.transpose(1, 2).flatten(2), Tokens(x, self.prefix, self.grid))
            terms = torch.stack([normalised, *shifted]).unflatten(-1, (self.num_heads, -1))  # (1 + taps, B, N, H, d)
            gram += torch.einsum("sbnhd,tbnhd->hst", terms, terms)
            moment += torch.einsum("sbnhd,bnhd->hs", terms, wanted).unsqueeze(-1)
        gram += RIDGE * torch.diag_embed(gram.diagonal(dim1=1, dim2=2) + 1e-12)
        fitted = torch.linalg.solve(gram, moment).squeeze(-1).to(self.gain)
        self.gain.copy_(fitted[:, 0])
        self.conv.weight.copy_(fitted[:, 1:].view_as(self.conv.weight))

    def set_progress(self, progress: float) -> None:
        self.epsilon.fill_(self.config.threshold_at(progress))

    def not_ready(self) -> str:
        epsilon = float(self.epsilon)
        return f"softmax attention above {epsilon:.3g} is still added" if epsilon < 1 else ""

    def deployed(self) -> nn.Module:
        self.conv.spread(self.head_dim)
        del self.epsilon, self.prefix, self.grid, self.config
        self.__class__ = AngularAttention  # type: ignore[assignment]
        return self

    def check_grid(self, grid: Grid) -> None:
        self.conv.check_grid(grid)

    def resize(self, old: Grid, new: Grid, positions: Tensor) -> Tensor:
        self.grid = new
        return positions


class Convolution(nn.Module):
    """Depthwise convolution of the values, one filter a head; all zero at first."""

    needs_positions: ClassVar[bool] = False

    def __init__(self, heads: int, *kernel: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(torch.zeros(heads, *kernel))

    def check_grid(self, grid: Grid) -> None:
        """Refuse a patch grid that the kernel does not fit."""

    def spread(self, channels: int) -> None:
        """Repeat each head's filter for all its channels, a tap's side by side, as every call would do else."""
        spread = self.weight.detach().repeat_interleave(channels, dim=0)  # (C, …)
        self.weight = nn.Parameter(spread.movedim(0, -1).contiguous().movedim(-1, 0))

    def filters(self) -> Tensor:
        """The filters as those of images, ``(F, rows, columns)``."""
        raise NotImplementedError

    def layout(self, tokens: Tokens, count: int) -> tuple[int, Grid, Tensor | None]:
        """How many tokens have no neighbours, the grid of the others, and where on it these lie unless in order."""
        raise NotImplementedError

    def each_tap(self, v: Tensor, tokens: Tokens) -> Iterator[Tensor]:
        """What the convolution gives where one tap is one and all others are zero, tap by tap."""
        for tap in range(self.weight[0].numel()):
            weight = torch.zeros_like(self.weight)
            weight.flatten(1)[:, tap] = 1
            yield self.add(torch.zeros_like(v), v, weight, tokens)

    def forward(self, mixed: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        return self.add(mixed, v, self.weight, tokens)

    def add(self, mixed: Tensor, v: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        """``mixed + dwconv(V)``, all ``(B, N, C)``; `mixed` may be used up."""
        raise NotImplementedError


class TokenConvolution(Convolution):
    """Along the token axis, prefix tokens included, as in the authors' released form."""

    def __init__(self, heads: int, kernel: int, layer: int) -> None:
        super().__init__(heads, kernel, layer=layer)

    def filters(self) -> Tensor:
        return self.weight.unsqueeze(-1)

    def layout(self, tokens: Tokens, count: int) -> tuple[int, Grid, Tensor | None]:
        return 0, (count, 1), None

    def add(self, mixed: Tensor, v: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        return mixed + convolve_tokens(v, weight)

    def __repr__(self) -> str:
        return f"{self.weight.shape[-1]}×1 convolution along the tokens"


class GridConvolution(Convolution):
    """Over the patch grid; the places of patches that were removed count as zero.

    Prefix tokens have no neighbours: the middle of the kernel alone meets them. Passed through as they are they swamp
    what is beside them, and the warm start ends 10 points of accuracy lower.
    """

    needs_positions: ClassVar[bool] = True

    def __init__(self, heads: int, kernel: int, layer: int) -> None:
        super().__init__(heads, kernel, kernel, layer=layer)

    def check_grid(self, grid: Grid) -> None:
        check_kernel(self.weight.shape[-1], grid)

    def filters(self) -> Tensor:
        return self.weight

    def layout(self, tokens: Tokens, count: int) -> tuple[int, Grid, Tensor | None]:
        patches, (height, width) = count - tokens.prefix, tokens.grid
        if tokens.positions is None and (tokens.reduced or patches != height * width):
            raise InputSizeError(
                f"castling: block {self.layer} gets {patches} patch tokens and knows a grid of {height}×{width}; "
                "call set_input_size() for another image size"
            )
        return tokens.prefix, tokens.grid, tokens.positions

    def add(self, mixed: Tensor, v: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        prefix, (height, width), positions = self.layout(tokens, v.shape[1])
        if positions is None:
            return add_convolved(mixed, v, weight, prefix, tokens.grid)
        order = torch.arange(prefix, device=v.device).expand(v.shape[0], -1)
        places = torch.cat([order, positions + prefix], dim=1).unsqueeze(-1).expand_as(v)  # (B, P + M, C)
        full = v.new_zeros(v.shape[0], prefix + height * width, v.shape[2]).scatter(1, places, v)
        return mixed + add_convolved(torch.zeros_like(full), full, weight, prefix, tokens.grid).gather(1, places)

    def __repr__(self) -> str:
        return f"{self.weight.shape[-1]}×{self.weight.shape[-1]} convolution on the grid"


CONVOLUTIONS: dict[str, type[GridConvolution] | type[TokenConvolution]] = {
    "grid": GridConvolution,
    "tokens": TokenConvolution,
}


def check_kernel(kernel: int, grid: Grid) -> None:
    """Refuse a kernel that is larger than the patch grid."""
    if kernel > min(grid):
        raise MethodError(
            f"castling: kernel={kernel} is larger than the patch grid of {grid[0]}×{grid[1]}; use at most {min(grid)}"
        )
