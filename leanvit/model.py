"""How tokens flow: a timm Vision Transformer whose blocks pass `Tokens`, and the way into that form and out of it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attended, attend
from .errors import ConfigError, DeployError, InputSizeError, MethodError, RestoreError, UnsupportedModelError
from .ops.tokens import take
from .record import recompute_like_now

if TYPE_CHECKING:
    from .data import ImageSource
    from .methods.base import LeanModule, Method

Grid = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """What travels from block to block.

    Args:
        x: The tokens, ``(B, P + M, C)``: P prefix tokens (class, registers), then M patch tokens.
        prefix: P.
        grid: Height and width of the patch grid the images came with.
        reduced: Whether tokens were removed or merged: the M tokens are no longer all ``h·w`` patches in order.
        size: ``(B, P + M)``, in fp32: how many patches each token stands for in attention, which merging keeps; None
            where each stands for one.
        positions: ``(B, M)``: the patch of the grid, counted row by row, at whose place each token stands, once some
            were removed. None while all are there in order (`reduced` is false), after they were merged or aggregated,
            when they have no place, and for images that are not of the grid's size.
        source: ``(B, M, h·w)``, the share of each patch of the grid in each token; rows sum to one. Kept only on
            request (`track`) and once tokens were reduced: inference has no use for it.
        removed: ``(B, h·w, C)``: what every patch was when tokens were last removed, for those that are in no token
            any more. Kept only on request (`track`).
        track: Whether methods that reduce tokens shall keep `source` and `removed`.
    """

    x: Tensor
    prefix: int
    grid: Grid
    reduced: bool = False
    size: Tensor | None = None
    positions: Tensor | None = None
    source: Tensor | None = None
    removed: Tensor | None = None
    track: bool = False

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other values."""
        return replace(self, x=x)

    @property
    def patches(self) -> Tensor:
        """The patch tokens, ``(B, M, C)``."""
        return self.x[:, self.prefix :]

    def keep(self, index: Tensor, fused: Tensor | None = None) -> Tokens:
        """Keep some patch tokens and remove the others; prefix tokens pass through.

        Args:
            index: Which to keep, ``(B, K)``, counted from the first patch token.
            fused: Weights ``(B, M)`` of one more token, a mean of patch tokens; they sum to one. It stands at the place
                of the token that weighs most in it.
        """
        first = torch.arange(self.prefix, device=index.device).expand(index.shape[0], -1)
        kept = torch.cat([first, self.prefix + index], dim=1)  # (B, P + K)

        def pick(values: Tensor) -> Tensor:  # (B, P + M, D) → (B, P + K, D), and one more with a fused token
            picked = take(values, kept)
            if fused is None:
                return picked
            mean = fused.to(values.dtype).unsqueeze(1) @ values[:, self.prefix :]
            return torch.cat([picked, mean], dim=1)

        positions = self._positions()
        if positions is not None:
            places = index if fused is None else torch.cat([index, fused.argmax(dim=1, keepdim=True)], dim=1)
            positions = positions.gather(1, places)
        size = None if self.size is None else pick(self.size.unsqueeze(-1)).squeeze(-1)
        removed = self.expand()[:, self.prefix :] if self.track else None
        return self._reduced(pick, size=size, positions=positions, removed=removed)

    def merge(self, merge: Callable[[Tensor], Tensor], size: Tensor) -> Tokens:
        """Merge patch tokens.

        Args:
            merge: Takes values of all tokens, ``(B, P + M, D)``, and gives those of the merged ones,
                ``(B, P + M', D)``: the prefix as it was, then means of patch tokens.
            size: How many patches each token stands for then, ``(B, P + M')``, in fp32.
        """
        return self._reduced(merge, size=size)

    def aggregate(self, pooled: Tensor, weights: Tensor) -> Tokens:
        """The tokens after a linear reduction of the patch tokens; prefix tokens pass through.

        Each new token counts for one in attention, whatever the old ones stood for.

        Args:
            pooled: The new patch tokens, ``(B, M', C)``.
            weights: The map that made them, ``(B, M', M)``, rows summing to one.
        """
        x = torch.cat([self.x[:, : self.prefix], pooled], dim=1)
        source = None
        if self.track:
            source = weights if self.source is None else weights @ self.source
        return replace(self, x=x, reduced=True, size=None, positions=None, source=source)

    def reduce(self, dense: Tensor) -> Tensor:
        """Reduce the tokens of the dense model the way these were: ``(B, P + h·w, C)`` → ``(B, P + M, C)``."""
        if not self.reduced:
            return dense
        patches = self._tracked().to(dense.dtype) @ dense[:, self.prefix :]
        return torch.cat([dense[:, : self.prefix], patches], dim=1)

    def expand(self) -> Tensor:
        """Put the tokens back on the full grid: ``(B, P + M, C)`` → ``(B, P + h·w, C)``.

        Each patch becomes the mean of the tokens it went into, weighted by its share in them (Yu et al., 2023, arXiv
        2310.07664). A patch that went into none has the value it had when it was removed.
        """
        if not self.reduced:
            return self.x
        share = self._tracked().transpose(1, 2)  # (B, h·w, M)
        total = share.sum(dim=-1, keepdim=True)
        patches = (share / total.clamp_min(1e-6)).to(self.x.dtype) @ self.patches
        if self.removed is not None:
            patches = torch.where(total > 0, patches, self.removed)
        return torch.cat([self.x[:, : self.prefix], patches], dim=1)

    def _reduced(self, reduce: Callable[[Tensor], Tensor], **changes: Any) -> Tokens:
        """The tokens after a linear map of the patch tokens, ``(B, P + M, D)`` → ``(B, P + M', D)``."""
        source = None
        if self.track:
            source = reduce(F.pad(self._sources(), (0, 0, self.prefix, 0)))[:, self.prefix :]
        return replace(self, **{"x": reduce(self.x), "reduced": True, "source": source, "positions": None, **changes})

    def _sources(self) -> Tensor:
        if self.source is not None:
            return self.source
        batch, patches, _ = self.patches.shape
        return torch.eye(patches, device=self.x.device).expand(batch, -1, -1)

    def _positions(self) -> Tensor | None:
        if self.reduced:
            return self.positions
        batch, patches, _ = self.patches.shape
        if patches != self.grid[0] * self.grid[1]:  # of a model that takes any size: their grid is not known
            return None
        return torch.arange(patches, device=self.x.device).expand(batch, -1)

    def _tracked(self) -> Tensor:
        if self.source is None:
            raise MethodError("these tokens were reduced without keeping where they came from; ask for track=True")
        return self.source


class LeanBlock(Block):
    """A timm block with two more places, where tokens change: in front of it, and between its attention and its MLP.

    What sits in front (`stages`) takes and gives `Tokens`. What sits between (`reducers`) takes `Tokens` and what came
    of the attention, queries and keys included, and gives `Tokens`.
    """

    stages: nn.ModuleDict
    reducers: nn.ModuleDict

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        for stage in self.stages.values():
            tokens = stage(tokens)
        attended = self.mix(tokens)
        tokens = tokens.with_x(attended.x)
        for reducer in self.reducers.values():
            tokens = reducer(tokens, attended)
        return tokens.with_x(self.feed(tokens.x))

    def mix(self, tokens: Tokens) -> Attended:
        """The block's attention, the residual added."""
        attended = attend(self.attn, self.norm1(tokens.x), tokens, tell=bool(self.reducers))
        return attended._replace(x=tokens.x + self.drop_path1(self.ls1(attended.x)))

    def feed(self, x: Tensor) -> Tensor:
        """The block's MLP, the residual added."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def lean_modules(self) -> list[LeanModule]:
        """The modules in this block that a method put there, in the order in which tokens meet them."""
        from .methods.base import LeanModule

        modules = (*self.stages.values(), self.attn, *self.reducers.values(), self.mlp)
        return [module for module in modules if isinstance(module, LeanModule)]

    def deployed(self) -> None:
        """Turn the parts that a method put here into their inference forms, in place."""
        for place in (self.stages, self.reducers):
            for name, module in place.items():
                place[name] = module.deployed()  # type: ignore[operator]
        for name in ("attn", "mlp"):
            module = getattr(self, name)
            if hasattr(module, "deployed"):
                setattr(self, name, module.deployed())  # type: ignore[operator]

    def original(self) -> None:
        """Turn back into the timm block it was made of, in place."""
        for module in (self.attn, self.mlp):
            if hasattr(module, "original"):
                module.original()  # type: ignore[operator]
        del self.stages, self.reducers
        self.__class__ = Block  # type: ignore[assignment]

    def __repr__(self) -> str:
        attention = "dense" if type(self.attn) is Attention else repr(self.attn)
        return ", ".join([*map(repr, self.stages.values()), attention, *map(repr, self.reducers.values())])


class LeanBlocks(nn.Sequential):
    """The blocks of a lean model: takes and gives the plain tensor timm expects, and passes `Tokens` inside."""

    prefix: int
    grid: Grid
    grad_checkpointing: bool = False

    def __getitem__(self, index: int | slice) -> Any:
        part = super().__getitem__(index)
        if isinstance(part, LeanBlocks):
            part.prefix, part.grid, part.grad_checkpointing = self.prefix, self.grid, self.grad_checkpointing
        return part

    def tokens(self, x: Tensor, track: bool = False) -> Tokens:
        """The embedded images ``(B, P + h·w, C)`` as `Tokens`, all in order."""
        return Tokens(x, self.prefix, self.grid, track=track)

    def run(self, tokens: Tokens) -> Tokens:
        """Pass tokens through every block."""
        for block in self:
            tokens = self.step(block, tokens)
        return tokens

    def step(self, block: nn.Module, tokens: Tokens) -> Tokens:
        """Pass tokens through one block, its activations recomputed in the backward pass if so asked."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False, context_fn=recompute_like_now)
        return block(tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.tokens(x)).x

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """One callable per block, for a caller that walks the blocks by itself and wants every map on the full grid.

        timm's `forward_intermediates` does. What is passed between the blocks stays `Tokens`, held by this walk and
        not by the modules, so two walks at a time do not meet.
        """
        state: list[Tokens] = []

        def step_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
            def step(x: Tensor) -> Tensor:
                tokens = state.pop() if state else self.tokens(x, track=True)
                state.append(self.step(block, tokens))
                return state[-1].expand()

            return step

        return [step_of(block) for block in self]

    def resize(self, grid: Grid) -> None:
        """Make every module that depends on positions fit a new patch grid."""
        from .methods.base import grid_positions

        positions = grid_positions(grid)
        blocks: list[Any] = list(self)
        for block in blocks:
            for module in block.lean_modules():
                positions = module.resize(self.grid, grid, positions)
        self.grid = grid

    def __repr__(self) -> str:
        lines = [f"  ({name}): {block!r}" for name, block in self.named_children()]
        return "LeanBlocks(\n" + "\n".join(lines) + "\n)"


@dataclass(frozen=True)
class LeanInfo:
    """What was done to a model: the methods with every parameter decided, and whether it is in its deployed form.

    Args:
        methods: The methods, in the order given.
        deployed: Whether only what inference needs is left.
        digests: A digest of every tensor of the dense model, by state-dict key; `restore` checks against them.
    """

    methods: tuple[Method, ...] = ()
    deployed: bool = False
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def data_dependent(self) -> bool:
        """Whether what the deployed form computes, and so its cost, depends on the image."""
        return any(method.data_dependent for method in self.methods)

    def __str__(self) -> str:
        return "+".join(map(str, self.methods)) or "no method"


class LeanModel:
    """What a lean model does differently from the timm model it is made of; everything else is timm's own code."""

    lean: LeanInfo
    blocks: Any
    stopped: frozenset[str] = frozenset()
    """Names of inherited parameters that a method keeps from training for now."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The tokens that are left after the last block, normalised: ``(B, P + M, C)``."""
        _refuse_mask(attn_mask, is_causal)
        self._check_grid(x)
        return super().forward_features(x)  # type: ignore[misc, no-any-return]

    def forward_tokens(self, x: Tensor, track: bool = False) -> Tokens:
        """`forward_features` with what became of each patch: `forward_head(tokens.x)` gives the logits.

        Args:
            x: Images ``(B, 3, H, W)``.
            track: Keep which patches each token stands for (`Tokens.source`).
        """
        last: list[Tokens] = []
        self._check_grid(x)

        def blocks(embedded: Tensor) -> Tensor:
            last.append(self.blocks.run(self.blocks.tokens(embedded, track)))
            return last[0].x

        normed = super(LeanModel, with_blocks(self, blocks)).forward_features(x)  # type: ignore[misc]
        removed = last[0].removed
        return replace(last[0], x=normed, removed=None if removed is None else self.norm(removed))  # type: ignore[attr-defined]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's own, with maps on the full grid: removed or aggregated tokens put back in their places."""
        _refuse_mask(kwargs.get("attn_mask"), kwargs.get("is_causal", False))
        self._check_grid(x)
        walk = with_blocks(self, self.blocks.steps())
        return super(LeanModel, walk).forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]

    def _check_grid(self, x: Tensor) -> None:
        """Refuse images of as many patches as the methods know, but otherwise arranged; other numbers show later."""
        if not self.dynamic_img_size or not any(method.positional for method in self.lean.methods):  # type: ignore[attr-defined]
            return
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])  # type: ignore[attr-defined]
        if grid != self.blocks.grid and math.prod(grid) == math.prod(self.blocks.grid):
            (rows, columns), (known_rows, known_columns) = grid, self.blocks.grid
            raise InputSizeError(
                f"images of {rows}×{columns} patches, and {self.lean} knows a grid of {known_rows}×{known_columns}; "
                "call set_input_size() for another image size"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, block by block."""
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        self.grad_checkpointing = False  # timm would walk the blocks itself, with plain tensors
        self.blocks.grad_checkpointing = enable

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Make the model fit another input or patch size, positional parameters of the methods included."""
        if self.lean.deployed and self.lean.methods:
            raise DeployError("a deployed model has no way to another input size; resize the lean model, then deploy")
        grid = self._grid_of(img_size, patch_size)
        for block in self.blocks:
            for module in block.lean_modules():
                module.check_grid(grid)
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]
        methods = tuple(method.resized(self.blocks.grid, grid) for method in self.lean.methods)
        self.lean = replace(self.lean, methods=methods)
        self.blocks.resize(grid)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's own. The new head is none of the dense model's weights: it is trained as what is new is."""
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]
        left = self.state_dict()  # type: ignore[attr-defined]
        inherited = {
            key: digest
            for key, digest in self.lean.digests.items()
            if key.startswith("blocks.") or (key in left and not key.startswith(HEADS))
        }
        self.lean = replace(self.lean, digests=inherited)
        if not global_pool:  # the same as before, or none, which timm asks for to take features out
            return
        for block in self.blocks:
            for module in block.lean_modules():
                module.set_pooling(classifies_by_class_token(self))

    def _grid_of(self, img_size: Any, patch_size: Any) -> Grid:
        patches = self.patch_embed  # type: ignore[attr-defined]
        size = to_2tuple(patches.img_size if img_size is None else img_size)
        patch = to_2tuple(patches.patch_size if patch_size is None else patch_size)
        if any(pixels % side for pixels, side in zip(size, patch, strict=True)):
            raise InputSizeError(
                f"an image of {size[0]}×{size[1]} does not divide into patches of {patch[0]}×{patch[1]}; "
                "use a multiple of the patch size"
            )
        return size[0] // patch[0], size[1] // patch[1]

    def no_weight_decay(self) -> set[str]:
        """timm's names of parameters without weight decay, and those of the methods."""
        names = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()  # type: ignore[attr-defined]
            for name in getattr(module, "no_decay", ())
        }
        return names | super().no_weight_decay()  # type: ignore[misc]

    def new_parameter_names(self) -> set[str]:
        """Names of the parameters that the methods added; all others are inherited."""
        return {name for name, _ in self.named_parameters() if name not in self.lean.digests}  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"method={self.lean}, deployed={self.lean.deployed}"


class LeanVisionTransformer(LeanModel, VisionTransformer):
    """A timm `VisionTransformer` with lean blocks."""


class LeanVisionTransformerDistilled(LeanModel, VisionTransformerDistilled):
    """A timm `VisionTransformerDistilled` with lean blocks."""


_LEAN_CLASSES: dict[type, type] = {
    VisionTransformer: LeanVisionTransformer,
    VisionTransformerDistilled: LeanVisionTransformerDistilled,
}
_DENSE_CLASSES = {lean: dense for dense, lean in _LEAN_CLASSES.items()}


HEADS = ("head.", "head_dist.")
"""What the state-dict keys of the classifier start with."""


def classifies_by_class_token(model: Any) -> bool:
    """Whether the class token alone is what is classified, or would be if there were a head."""
    return model.cls_token is not None and model.global_pool in ("token", "")


def slim(model: nn.Module, *methods: Method, images: ImageSource | None = None) -> LeanVisionTransformer:
    """Swap methods into a copy of a pretrained Vision Transformer; every weight that still has a place is inherited.

    Args:
        model: A timm `VisionTransformer` with plain blocks; it is left as it is.
        methods: What to apply; none gives exactly the dense outputs.
        images: Unlabelled images (a path, a data set, a loader or a tensor ``(B, 3, H, W)``), for parameters that are
            chosen by measurement, such as ``DGSSA(layers="auto:4")``.

    Raises:
        UnsupportedModelError: The model or one of its blocks is of a kind that is not known, by name.
        MethodError: A method does not fit the model or the methods before it.
        ConfigError: A parameter is to be measured and there are no images.
    """
    from .methods.base import Plan

    check_supported(model)
    resolved = Plan(model, images).resolve(methods)
    lean: Any = copy.deepcopy(model)
    lean.__class__ = _LEAN_CLASSES[type(model)]  # keeps all of timm's attributes, also those of releases to come
    lean.lean = LeanInfo(resolved, digests=digests(model.state_dict()))
    lean.blocks = _lean_blocks(lean)
    for method in resolved:
        method.swap_in(lean)
    check_order(lean)
    if lean.grad_checkpointing:
        lean.set_grad_checkpointing(True)
    return lean


def deploy(model: nn.Module, *, force: bool = False) -> LeanVisionTransformer:
    """The inference form of a lean model: what is skipped is really skipped, what only training needs is gone.

    Args:
        model: A lean model; it is left as it is.
        force: Deploy although training has not finished what a method must finish first, which changes the outputs.

    Raises:
        DeployError: The model is not lean, or a method is not ready: it says by how much the outputs would change.
        ConfigError: `force` is neither True nor False.
    """
    from .fast import speed_up

    if not isinstance(force, bool):
        raise ConfigError(f"deploy: force={force!r} is neither True nor False")
    info = _lean_info(model, DeployError)
    fast: Any = copy.deepcopy(model).eval()
    if info.deployed:
        return fast
    for index, block in enumerate(fast.blocks):
        for module in block.lean_modules():
            reason = module.not_ready()
            if reason and not force:
                raise DeployError(
                    f"block {index} is not ready to deploy: {reason}; {what_force_changes(model)}; "
                    "train to the end, or deploy it all the same with force=True"
                )
        block.deployed()
    speed_up(fast)
    fast.lean = replace(info, deployed=True)
    return fast.requires_grad_(False)


def data_dependent(model: nn.Module) -> bool:
    """Whether what a model's deployed form computes, and so its cost, depends on the image."""
    return isinstance(model, LeanModel) and model.lean.data_dependent


@torch.no_grad()
def what_force_changes(model: Any) -> str:
    """What deploying a model before its training is over does to its outputs, measured on a few random images."""
    from .count import evaluating, random_images
    from .record import record

    images = random_images(model, batch=8).to(next(model.parameters()))
    with evaluating(model), record(*(kind for method in model.lean.methods for kind in method.loss_kinds)) as found:
        logits = model(images)
    metrics = [
        f"{method.name} {name} {float(value):.2g}"
        for method in model.lean.methods
        for name, value in method.metrics(found).items()
        if "." not in name
    ]
    change = (deploy(model, force=True)(images) - logits).std() / logits.std()
    measured = f"on random images deploying it changes the logits by {float(change):.2g} of their spread"
    return ", ".join([measured, *metrics])


def restore(model: nn.Module) -> VisionTransformer:
    """The dense timm model that a lean model was made of.

    Raises:
        RestoreError: The model is not lean, or some of the dense weights are gone or were changed since.
    """
    info = _lean_info(model, RestoreError)
    if info.deployed:
        raise RestoreError("a deployed model has dropped dense weights; restore the lean model it was deployed from")
    dense: Any = copy.deepcopy(model)
    for block in dense.blocks:
        block.original()
    dense.blocks = nn.Sequential(*dense.blocks.children())
    dense.__class__ = _DENSE_CLASSES[type(model)]
    dense.grad_checkpointing = cast(LeanModel, model).blocks.grad_checkpointing
    del dense.lean
    dense.__dict__.pop("stopped", None)
    now = digests(dense.state_dict())
    for key, digest in info.digests.items():
        if now.get(key) != digest:
            raise RestoreError(f"{key} was {'changed' if key in now else 'removed'} since the model was slimmed")
    return dense


def check_patches(model: VisionTransformer) -> None:
    """Refuse a hybrid, whose patches are those of another network's maps.

    Raises:
        UnsupportedModelError: The model does not cut the image itself into patches.
    """
    if not isinstance(model.patch_embed, PatchEmbed):
        name = type(model.patch_embed).__name__
        raise UnsupportedModelError(f"a patch embedding of kind {name} is not supported; only timm's PatchEmbed is")


def check_supported(model: Any) -> None:
    """Refuse by name a model, block or attention whose forward pass leanvit does not know."""
    if isinstance(model, LeanModel):
        raise UnsupportedModelError("the model is lean already; give slim() all methods at once, on the dense model")
    if type(model) not in _LEAN_CLASSES:
        known = ", ".join(cls.__name__ for cls in _LEAN_CLASSES)
        raise UnsupportedModelError(f"{type(model).__name__} is not supported; timm's {known} are")
    check_patches(model)
    if not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModelError("patch dropout is not supported: methods need every patch; use patch_drop_rate=0")
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise UnsupportedModelError(
                f"block {index} is a {type(block).__name__}; only timm's plain Block is supported"
            )
        if type(block.attn) is not Attention:
            name = type(block.attn).__name__
            raise UnsupportedModelError(f"block {index} uses {name}; only timm's plain Attention is supported")


NEEDS = {
    "needs_all_tokens": "every token at its place",
    "needs_positions": "to know the place of each token",
    "needs_fixed_tokens": "the same tokens in every image",
}
"""What a module may need of the tokens that reach it, by the name under which it says so."""


def check_order(lean: LeanVisionTransformer) -> None:
    """Refuse a module that cannot use the tokens that reach it, or what its block's attention tells."""
    lost: dict[str, str] = {}  # what tokens no longer have, and why
    for index, block in enumerate(lean.blocks):
        for module in block.lean_modules():
            for need, what in NEEDS.items():
                if getattr(module, need) and need in lost:
                    raise MethodError(
                        f"{module.method}: block {index} needs {what}, but {lost[need]}; {module.instead}"
                    )
            if module.reduces_tokens:
                where = "in" if module in block.reducers.values() else "before"
                reason = f"{module.method} reduces the tokens {where} block {index}"
                kept = {"needs_positions": module.keeps_positions, "needs_fixed_tokens": module.keeps_fixed_tokens}
                lost |= {need: reason for need in NEEDS if need not in lost and not kept.get(need)}
            module.check_block(block)
        check_reducers(index, block)


def check_reducers(index: int, block: LeanBlock) -> None:
    """Refuse a reducer that asks its block's attention for what that does not have, and a second one behind it."""
    attention: Any = block.attn
    reducers: Any = list(block.reducers.values())
    if len(reducers) > 1:  # queries and keys are those of the tokens in front of the first
        first, second = (reducer.method for reducer in reducers[:2])
        raise MethodError(f"{second}: block {index} reduces its tokens by {first} already; use other blocks")
    for reducer in reducers:
        for what in reducer.needs_attention:
            if type(attention) is not Attention and what not in getattr(attention, "tells", ()):
                raise MethodError(
                    f"{reducer.method}: block {index} cannot {reducer.purpose}: its attention ({attention!r}) has no "
                    f"{what} to tell; use other blocks"
                )


def digests(state: dict[str, Tensor]) -> dict[str, str]:
    """A digest of every tensor of a state dict: 16 hexadecimal digits of its bytes."""

    def digest(tensor: Tensor) -> str:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(data.data, digest_size=8).hexdigest()

    return {key: digest(tensor) for key, tensor in state.items()}


def _lean_blocks(model: LeanVisionTransformer) -> LeanBlocks:
    blocks = list(model.blocks.children())
    for block in blocks:
        block.__class__ = LeanBlock
        block.stages, block.reducers = nn.ModuleDict(), nn.ModuleDict()
    lean = LeanBlocks(*blocks)
    lean.prefix, lean.grid = model.num_prefix_tokens, model.patch_embed.grid_size
    return lean


def _lean_info(model: nn.Module, error: type[Exception]) -> LeanInfo:
    if not isinstance(model, LeanModel):
        raise error(f"{type(model).__name__} is not a lean model; slim() makes one")
    return model.lean


def with_blocks(model: Any, blocks: Any) -> Any:
    """A shallow copy of the model that calls `blocks` in place of its own; shares every weight."""
    view = copy.copy(model)
    view._modules = {name: module for name, module in model._modules.items() if name != "blocks"}
    view.__dict__["blocks"] = blocks
    return view


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputSizeError(
            "a lean model takes no attention mask: static attention and reduced tokens have no place for one"
        )
