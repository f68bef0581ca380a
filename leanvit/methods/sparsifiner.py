"""Sparsifiner: each query attends to the few keys that a cheap predictor ranks highest, image by image.

Source: Wei et al., CVPR 2023, arXiv 2303.13755. The closed-form start of the predictor, keeping enough of each row of
the basis, and prefix tokens that are always attended to are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from ..attention import Attended, dense_attention, project
from ..errors import ConfigError, InputSizeError, MethodError
from ..ops.aggregate import partition
from ..ops.sparse import Packed, Predictor, coefficients, connections, pack, sparse_attention, takes_kernel
from ..record import Recorder, offer
from . import register
from .base import LeanModule, Method, Plan, block_indices, claim_attention, grid_positions

if TYPE_CHECKING:
    from ..model import Grid, LeanVisionTransformer, Tokens

START_IMAGES = 8
"""Images of a batch that a step of the warm start's reconstruction looks at: each has thousands of rows."""
FACTOR_STEPS = 50
"""Multiplicative updates that fit the basis to the attention in the closed-form start."""


@register
@dataclass(frozen=True)
class Sparsifiner(Method):
    """Let each query attend to the keys that a connectivity predictor chooses, and to no others.

    Args:
        keep: Share of the tokens that a query attends to: the ``⌈keep·N⌉`` best-scored ones.
        rho: The predictor's ρ: the L patches are pooled to ``n = ⌊L/ρ⌋``.
        layers: Blocks to change; ``"all"`` for all.
        threshold: Leave out keys whose predicted attention is less than this, too.
        reconstruction: Share of training in which the predictor alone learns to reconstruct the dense attention.

    Raises:
        ConfigError: A value out of range.
    """

    name: ClassVar[str] = "sparsifiner"
    positional: ClassVar[bool] = True
    no_graph: ClassVar[str] = "engines have no attention to chosen keys: it would be dense attention behind a mask"
    loss_kinds: ClassVar[tuple[str, ...]] = ("reconstruction",)

    keep: float = 0.25
    rho: float = 6.0
    layers: tuple[int, ...] | str = "all"
    threshold: float | None = None
    reconstruction: float = 0.1

    def __post_init__(self) -> None:
        if self.layers != "all":
            object.__setattr__(self, "layers", block_indices(self.name, "layers", self.layers))
        if isinstance(self.layers, str) and self.layers != "all":
            raise ConfigError(f"sparsifiner: layers={self.layers!r} is not 'all' or block indices")
        if not self.layers:
            raise ConfigError("sparsifiner: layers is empty; name blocks to change, or 'all'")
        if not _is_number(self.keep) or not 0 < self.keep <= 1:
            raise ConfigError(f"sparsifiner: keep={self.keep!r} is not in (0, 1]; it is the share of keys attended to")
        if not _is_number(self.rho) or not 1 <= self.rho < math.inf:
            raise ConfigError(f"sparsifiner: rho={self.rho!r} is not a number from 1 on")
        if self.threshold is not None and (not _is_number(self.threshold) or not 0 < self.threshold < 1):
            raise ConfigError(f"sparsifiner: threshold={self.threshold!r} is not in (0, 1); leave it out for none")
        if not _is_number(self.reconstruction) or not 0 <= self.reconstruction < 1:
            raise ConfigError(f"sparsifiner: reconstruction={self.reconstruction!r} is not in [0, 1)")

    @property
    def data_dependent(self) -> bool:  # type: ignore[override]
        """Whether the number of keys depends on the image: with a threshold."""
        return self.threshold is not None

    def resolve(self, plan: Plan) -> Self:
        layers = tuple(range(plan.depth)) if isinstance(self.layers, str) else self.layers
        plan.check_blocks(self.name, layers)
        return replace(self, layers=layers)

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        for index in cast(tuple[int, ...], self.layers):
            attention = claim_attention(self.name, index, lean.blocks[index])
            SparseAttention.adopt(attention, index, lean.blocks.grid, lean.num_prefix_tokens, self)

    def resized(self, old: Grid, new: Grid) -> Self:
        return replace(self, rho=new[0] * new[1] / self.patterns(old[0] * old[1]))

    def patterns(self, patches: int) -> int:
        """How many rows the basis has for so many patches."""
        return int(patches / self.rho + 1e-9)

    def losses(self, found: Recorder) -> dict[str, Tensor]:
        terms = [record.value for record in found["reconstruction"]]
        return {"reconstruction": torch.stack(terms).mean()} if terms else {}

    def set_progress(self, lean: LeanVisionTransformer, progress: float) -> None:
        super().set_progress(lean, progress)
        _freeze_inherited(lean, progress < self.reconstruction)

    def budget(self, tokens: int, prefix: int) -> int:
        """How many of so many tokens a patch attends to, prefix tokens included.

        Raises:
            MethodError: None of them would be a patch.
        """
        budget = math.ceil(self.keep * tokens - 1e-9)
        if budget <= prefix:
            raise MethodError(
                f"sparsifiner: keep={self.keep} of {tokens} tokens is {budget} of them, and prefix tokens take "
                f"{prefix}: no patch is left to attend to; use keep above {prefix / tokens:.3g}"
            )
        return budget


class SparseAttention(LeanModule, Attention):
    """timm's attention with a predictor of the keys that each query attends to.

    Parameters, per head: `reduce_q` and `reduce_k` ``(H, d, d/2)``, `pooling` E ``(H, L, n)``, `basis` U ``(H, n, L)``.
    """

    method: ClassVar[str] = Sparsifiner.name
    needs_positions: ClassVar[bool] = True
    tells: ClassVar[tuple[str, ...]] = ("queries", "keys")
    no_decay: ClassVar[tuple[str, ...]] = ("reduce_q", "reduce_k", "pooling", "basis")

    layer: int
    prefix: int
    grid: Grid
    config: Sparsifiner
    predicting: bool
    """Whether the predictor alone is being trained: attention is dense, and what it would choose is not used."""
    reduce_q: nn.Parameter
    reduce_k: nn.Parameter
    pooling: nn.Parameter
    basis: nn.Parameter

    @classmethod
    def adopt(cls, attention: Any, layer: int, grid: Grid, prefix: int, config: Sparsifiner) -> None:
        """Turn a timm attention into a sparse one in place; until its warm start, patches attend near themselves."""
        attention.__class__ = cls
        attention.layer, attention.grid, attention.prefix, attention.config = layer, grid, prefix, config
        attention.predicting = False
        check_size(grid, prefix, config)
        heads, width = attention.num_heads, attention.head_dim
        pooling, basis = local_pooling(grid, config)
        weight = attention.qkv.weight

        def parameter(table: Tensor) -> nn.Parameter:
            return nn.Parameter(table.to(weight).expand(heads, -1, -1).clone())

        half = torch.eye(width, max(1, width // 2))
        attention.reduce_q, attention.reduce_k = parameter(half), parameter(half)
        attention.pooling, attention.basis = parameter(pooling), parameter(basis)

    def original(self) -> None:
        for name in ("reduce_q", "reduce_k", "pooling", "basis", "layer", "prefix", "grid", "config", "predicting"):
            delattr(self, name)
        self.__class__ = Attention  # type: ignore[assignment]

    def predictor(self) -> Predictor:
        """The predictor as inference uses it: small entries of the basis are zero."""
        return Predictor(self.reduce_q, self.reduce_k, self.pooling, sparse_basis(self.basis, self.config.keep))

    def attend(self, x: Tensor, tokens: Tokens, *residual: Tensor) -> Attended:
        check_tokens(self.layer, tokens, self.pooling.shape[1])
        q, k, v = queries_keys_values(self, x)
        if self.predicting:
            offer("reconstruction", self.layer, lambda: self._reconstruction(q.detach(), k.detach(), tokens.positions))
            return dense_attention(self, x, None, *residual)
        budget = self.config.budget(x.shape[1], self.prefix)
        with torch.no_grad():
            mask = connections(q, k, self.predictor(), tokens.positions, budget, self.config.threshold or 0.0)
        offer("connections", self.layer, lambda: mask)
        offer("density", self.layer, lambda: mask.float().mean(dim=(2, 3)))  # (B, H)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return Attended(project(self, x, mixed.transpose(1, 2).flatten(2), *residual), q, k)

    def _reconstruction(self, q: Tensor, k: Tensor, places: Tensor | None) -> Tensor:
        """``‖c·U − A‖² / ‖A‖²`` over the patches: the dense, unthresholded estimate against the attention."""
        attention = (q.float() @ k.float().transpose(-2, -1) * self.scale).softmax(dim=-1)  # (B, H, N, N)
        attention = attention[..., self.prefix :, self.prefix :]
        predictor = Predictor(self.reduce_q, self.reduce_k, self.pooling, self.basis.abs()).in_fp32()
        with torch.autocast(q.device.type, enabled=False):
            c = coefficients(q[:, :, self.prefix :].float(), k[:, :, self.prefix :].float(), predictor, places)
            estimate = c @ predictor.basis_at(places)
        return (estimate - attention).square().sum() / attention.square().sum()

    def start_loss(self, dense: Any, x: Tensor) -> Tensor:
        some = x[:: max(1, x.shape[0] // START_IMAGES)]
        with torch.no_grad():
            q, k, _ = queries_keys_values(dense.attn, dense.norm1(some))
        return self._reconstruction(q, k, None)

    @torch.no_grad()
    def start(self, dense: Any, inputs: Iterable[Tensor]) -> None:
        """The projections keep what matters of q·k, keys are pooled over cells, and the basis is fitted to that."""
        batches = list(inputs)
        moments = torch.zeros(2, self.num_heads, self.head_dim, self.head_dim, device=self.basis.device)
        for x in batches:
            q, k = self._dense(dense, x)
            moments += torch.stack([(side.transpose(-2, -1) @ side).sum(dim=0) for side in (q, k - k.mean(2, True))])
        reduce_q, reduce_k = low_rank(moments[0].double(), moments[1].double(), self.reduce_q.shape[-1])
        self.reduce_q.copy_(reduce_q), self.reduce_k.copy_(reduce_k)
        pooling, _ = local_pooling(self.grid, self.config)
        self.pooling.copy_(pooling.expand_as(self.pooling))
        predictor = Predictor(self.reduce_q, self.reduce_k, self.pooling, self.basis).in_fp32()
        rows = self.basis.shape[1]
        overlap = self.basis.new_zeros(self.num_heads, rows, rows, dtype=torch.float32)
        target = torch.zeros_like(self.basis, dtype=torch.float32)
        for x in batches:
            q, k = self._dense(dense, x)
            attention = _patch_attention(dense.attn, dense.norm1(x), self.prefix)
            c = coefficients(q, k, predictor)
            overlap += (c.transpose(-2, -1) @ c).sum(dim=0)
            target += (c.transpose(-2, -1) @ attention).sum(dim=0)
        self.basis.copy_(nonnegative_factor(overlap, target))

    def _dense(self, dense: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = queries_keys_values(dense.attn, dense.norm1(x))
        return q[:, :, self.prefix :].float(), k[:, :, self.prefix :].float()

    def set_progress(self, progress: float) -> None:
        self.predicting = progress < self.config.reconstruction

    def not_ready(self) -> str:
        return "the predictor alone was trained so far; train to the end" if self.predicting else ""

    def deployed(self) -> nn.Module:
        return DeployedSparseAttention(self)

    def check_grid(self, grid: Grid) -> None:
        patches, patterns = grid[0] * grid[1], self.basis.shape[1]
        if patches < patterns:
            raise MethodError(f"sparsifiner: {patches} patches are fewer than the {patterns} patterns of the basis")
        check_size(grid, self.prefix, self.config.resized(self.grid, grid))

    @torch.no_grad()
    def resize(self, old: Grid, new: Grid, positions: Tensor) -> Tensor:
        pooling, basis = resize_predictor(self.pooling, self.basis, old, new)
        self.pooling = nn.Parameter(pooling, self.pooling.requires_grad)
        self.basis = nn.Parameter(basis, self.basis.requires_grad)
        self.grid, self.config = new, self.config.resized(old, new)
        return positions

    def __repr__(self) -> str:
        return description(self)


class DeployedSparseAttention(nn.Module):
    """Sparse attention for inference: predictor, selection and attention as one operation."""

    adds_residual: ClassVar[bool] = True
    tells: ClassVar[tuple[str, ...]] = ("queries", "keys")

    layer: int
    prefix: int
    config: Sparsifiner

    def __init__(self, trained: SparseAttention) -> None:
        super().__init__()
        for name in ("qkv", "q_norm", "k_norm", "gate", "norm", "proj", "proj_drop"):
            setattr(self, name, getattr(trained, name))
        for name in ("num_heads", "head_dim", "layer", "prefix", "config"):
            setattr(self, name, getattr(trained, name))
        for name, table in trained.predictor()._asdict().items():
            self.register_buffer(name, table.detach().float().clone())
        self._pack()

    def _pack(self) -> None:
        for name, table in pack(self.predictor())._asdict().items():
            self.register_buffer(f"packed_{name}", table, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in self._buffers:  # the predictor stays in fp32: its cost is small, and what it chooses is not
            table = cast(Tensor, self._buffers[name])
            if table.is_floating_point():
                self._buffers[name] = table.float()
        return self

    def predictor(self) -> Predictor:
        """The predictor, in fp32."""
        return Predictor(*(cast(Tensor, self._buffers[name]) for name in Predictor._fields))

    def packed(self) -> Packed:
        """The predictor as the kernel reads it."""
        return Packed(*(cast(Tensor, self._buffers[f"packed_{name}"]) for name in Packed._fields))

    def attend(self, x: Tensor, tokens: Tokens, *residual: Tensor) -> Attended:
        predictor, threshold = self.predictor(), self.config.threshold or 0.0
        check_tokens(self.layer, tokens, predictor.basis.shape[-1])
        q, k, v = queries_keys_values(self, x)
        budget = self.config.budget(x.shape[1], self.prefix)

        def chosen() -> Tensor:
            return connections(q, k, predictor, tokens.positions, budget, threshold)

        offer("connections", self.layer, chosen)
        offer("density", self.layer, lambda: chosen().float().mean(dim=(2, 3)))  # (B, H)
        mixed = sparse_attention(q, k, v, predictor, self.packed(), tokens.positions, budget, threshold)
        return Attended(project(self, x, mixed, *residual), q, k)

    @property
    def runs_as(self) -> str:
        """Which of its two forms runs where the model is."""
        if takes_kernel(self.predictor().q_weight.mT):
            return "sparsifiner runs as one operation"
        return "sparsifiner runs as a mask on scaled_dot_product_attention, which skips nothing"

    def __repr__(self) -> str:
        return f"{description(self)}, deployed: {self.runs_as}"


# ---- parts


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as they meet, and values: each ``(B, H, N, d)``."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v


def _patch_attention(attention: Any, x: Tensor, prefix: int) -> Tensor:
    """The dense attention between patches, ``(B, H, L, L)``; what goes to prefix tokens is missing from the rows."""
    q, k, _ = queries_keys_values(attention, x)
    return (q.float() @ k.float().transpose(-2, -1) * attention.scale).softmax(dim=-1)[..., prefix:, prefix:]


def low_rank(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Projections after which queries and keys meet in `rank` dimensions with the least squared error.

    ``q·W_q·W_kᵀ·kᵀ`` is the best approximation of ``q·kᵀ`` over queries and keys with these second moments, by the
    singular vectors of ``Q^½·K^½``.

    Args:
        queries, keys: Q and K, second moments ``(H, d, d)``; the keys' about their mean, which softmax ignores.
        rank: Dimensions left.

    Returns:
        W_q and W_k, each ``(H, d, rank)``.
    """

    def root(moment: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(moment / moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None])
        values = values.clamp_min(1e-6).sqrt().unsqueeze(-2)
        return vectors * values @ vectors.transpose(-2, -1), vectors / values @ vectors.transpose(-2, -1)

    (q_root, q_inverse), (k_root, k_inverse) = root(queries), root(keys)
    left, singular, right = torch.linalg.svd(q_root @ k_root)
    weight = singular[:, None, :rank].sqrt()
    return q_inverse @ left[..., :rank] * weight, k_inverse @ right.transpose(-2, -1)[..., :rank] * weight


def local_pooling(grid: Grid, config: Sparsifiner) -> tuple[Tensor, Tensor]:
    """E and U before anything is known of the attention: n compact cells of patches, ``(L, n)`` and ``(n, L)``.

    Raises:
        MethodError: ρ leaves no cell.
    """
    positions = grid_positions(grid)
    count = config.patterns(len(positions))
    if count < 1:
        raise MethodError(
            f"sparsifiner: rho={config.rho:g} leaves no basis for {len(positions)} patches; "
            f"use rho up to {len(positions)}"
        )
    cells = F.one_hot(partition(positions, count), count).float()  # (L, n)
    centres = (cells.T.double() @ positions) / cells.sum(dim=0).unsqueeze(1)
    # Around its cell, attention falls off over the cell's size.
    distance = torch.cdist(centres, positions).square() * count
    return cells / cells.sum(dim=0), (-distance / 2).softmax(dim=-1).float()


def nonnegative_factor(overlap: Tensor, target: Tensor) -> Tensor:
    """U ≥ 0 with the least ``‖c·U − A‖²``, by multiplicative updates (Lee and Seung, NIPS 2000, eq. 4).

    Args:
        overlap: ``cᵀ·c``, ``(H, n, n)``.
        target: ``cᵀ·A``, ``(H, n, L)``.
    """
    basis = target / overlap.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    for _ in range(FACTOR_STEPS):
        basis = basis * target / (overlap @ basis).clamp_min(1e-12)
    return basis


def sparse_basis(basis: Tensor, keep: float) -> Tensor:
    """``|U|`` with small entries set to zero, but never so many that a query's eight rows could not fill its budget.

    A row keeps at least a quarter of what a query attends to. On DeiT-T the chosen keys then hold as much of the dense
    attention, to 0.004, as with rows four times as full.

    Small is under 0.02 at DeiT's 196 patches (Wei et al., section 3.2), and that many times the even share of attention
    on other grids.
    """
    size, patches = basis.abs(), basis.shape[-1]
    least = size.topk(math.ceil(keep / 4 * patches), dim=-1).values[..., -1:]
    return size.where(size >= least.clamp_max(0.02 * 196 / patches), 0.0)


def resize_predictor(pooling: Tensor, basis: Tensor, old: Grid, new: Grid) -> tuple[Tensor, Tensor]:
    """E ``(H, L, n)`` and U ``(H, n, L)`` on another patch grid, interpolated over positions; sums stay."""
    share = old[0] * old[1] / (new[0] * new[1])

    def stretch(rows: Tensor) -> Tensor:  # (H, n, h·w) → (H, n, h'·w')
        return F.interpolate(rows.unflatten(-1, old), size=new, mode="bilinear", align_corners=False).flatten(2) * share

    return stretch(pooling.transpose(1, 2)).transpose(1, 2).contiguous(), stretch(basis)


def check_size(grid: Grid, prefix: int, config: Sparsifiner) -> None:
    """Refuse a grid on which there is no basis, or no patch within a query's budget."""
    local_pooling(grid, config)
    config.budget(prefix + grid[0] * grid[1], prefix)


def check_tokens(layer: int, tokens: Tokens, positions: int) -> None:
    """Refuse tokens of another patch grid than the predictor's."""
    patches = tokens.grid[0] * tokens.grid[1] if tokens.reduced else tokens.patches.shape[1]
    if patches != positions:
        raise InputSizeError(
            f"sparsifiner: block {layer} gets {patches} patches and its predictor was made for {positions}; "
            "call set_input_size(), which interpolates E and U, for another image size"
        )


def description(attention: Any) -> str:
    """What `print(model)` shows."""
    heads, rows, positions = attention.basis.shape
    patterns = f"{heads} heads of {rows} patterns over {positions} patches"
    return f"sparsifiner {attention.config.keep:.0%} of the keys, {patterns}"


def _freeze_inherited(lean: LeanVisionTransformer, freeze: bool) -> None:
    """Stop training what was inherited, or go on with what was stopped here; what a user froze stays frozen."""
    new, stopped = lean.new_parameter_names(), set(lean.stopped)
    for name, parameter in lean.named_parameters():
        if freeze and parameter.requires_grad and name not in new:
            parameter.requires_grad_(False)
            stopped.add(name)
        elif not freeze and name in stopped:
            parameter.requires_grad_(True)
    lean.stopped = frozenset(stopped if freeze else ())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
