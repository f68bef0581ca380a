"""What a method is: a frozen set of parameters that swaps modules into a model, and what those modules must do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MethodError
from ..record import Recorder

if TYPE_CHECKING:
    from timm.models.vision_transformer import Block

    from ..analysis import LayerStatistics
    from ..data import ImageSource
    from ..model import Grid, LeanBlock, LeanVisionTransformer, Tokens


class LeanModule(nn.Module):
    """A module that a method put into a block. What a method does not need, it leaves as it is here."""

    method: ClassVar[str] = ""
    needs_all_tokens: ClassVar[bool] = False
    """Whether it works only on all tokens of the grid, in order."""
    needs_positions: ClassVar[bool] = False
    """Whether it must know at which patch's place each token stands; some may be gone (`Tokens.positions`)."""
    needs_fixed_tokens: ClassVar[bool] = False
    """Whether the token at each index must come from the same patches in every image."""
    instead: ClassVar[str] = "use blocks before that"
    """What would do where the tokens that reach it do not have what it needs."""
    reduces_tokens: ClassVar[bool] = False
    """Whether fewer tokens leave it than enter it."""
    keeps_positions: ClassVar[bool] = False
    """Of one that reduces: whether each token that leaves it has a place still."""
    keeps_fixed_tokens: ClassVar[bool] = False
    """Of one that reduces: whether it makes the token at each index from the same tokens in every image."""
    tells: ClassVar[tuple[str, ...]] = ()
    """Of an attention with a method `attend`: what it tells, of "queries" and "keys"."""

    def start(self, dense: Block, inputs: Iterable[Tensor]) -> None:
        """Warm start in closed form.

        Args:
            dense: The block of the dense model at the same place.
            inputs: Its inputs on the warm-start images, batch by batch, each ``(B, P + N, C)``.
        """

    def start_loss(self, dense: Block, x: Tensor) -> Tensor | None:
        """What the module's own parameters minimise in the warm start, after `start` and before the block is regressed.

        Args:
            dense: The block of the dense model at the same place.
            x: Its input, a batch ``(B, P + N, C)``.

        Returns:
            A loss; None where there is nothing to minimise.
        """
        return None

    def set_progress(self, progress: float) -> None:
        """Training has come this far, from 0 to 1."""

    def settled(self, progress: float) -> bool:
        """Whether, when training has come this far, the module already does as little as it is asked to at the end."""
        return True

    def not_ready(self) -> str:
        """Why the deployed form would give other outputs than this one; empty when it gives the same."""
        return ""

    def deployed(self) -> nn.Module:
        """The inference form, made from this module, which may be used up."""
        return self

    def original(self) -> None:
        """Turn back into the dense module it was made of, if it was made of one."""

    no_decay: ClassVar[tuple[str, ...]] = ()
    """Its parameters that training leaves without weight decay."""

    def check_block(self, block: LeanBlock) -> None:
        """Refuse what other methods put into the same block."""

    def set_pooling(self, by_class_token: bool) -> None:
        """What is classified now: the class token alone, or something else."""

    def check_grid(self, grid: Grid) -> None:
        """Refuse a patch grid that it cannot be resized to."""

    def resize(self, old: Grid, new: Grid, positions: Tensor) -> Tensor:
        """Fit another patch grid.

        Args:
            old, new: Height and width of the patch grid.
            positions: Where the tokens that enter lie on the new grid, ``(M, 2)`` as `grid_positions`.

        Returns:
            Where the tokens that leave lie.
        """
        return positions


class Reducer(LeanModule):
    """A module between a block's attention and its MLP: ``forward(tokens, attended)`` gives fewer `Tokens`.

    It goes into ``block.reducers``. What came of the attention of the same block is `leanvit.attention.Attended`: the
    queries and keys of the tokens that it is given.
    """

    reduces_tokens: ClassVar[bool] = True
    needs_attention: ClassVar[tuple[str, ...]] = ()
    """What the block's attention must tell, of "queries" and "keys"."""
    purpose: ClassVar[str] = "choose tokens"
    """What it does with that, for the error that says an attention does not tell it."""


@dataclass(frozen=True)
class Method:
    """Base of the methods: a frozen dataclass of parameters, checked when built and written to JSON and back."""

    name: ClassVar[str]
    reduces_tokens: ClassVar[bool] = False
    """Whether fewer tokens leave some block than enter it."""
    positional: ClassVar[bool] = False
    """Whether it learns or looks up where on the patch grid a token lies, so that another grid asks for a resize."""
    data_dependent: ClassVar[bool] = False
    """Whether what the deployed form computes, and so its cost, depends on the image: there is no graph to export."""
    no_graph: ClassVar[str] = ""
    """Of other methods, why an exported graph would not skip what the deployed form skips; empty where it does."""
    has_budget: ClassVar[bool] = False
    """Whether the mean cost of a trained model can be set afterwards (`leanvit.set_budget`)."""
    loss_kinds: ClassVar[tuple[str, ...]] = ()
    """What `losses` and `metrics` read from the recorder; nothing else is collected while training."""

    def reductions(self, depth: int) -> tuple[int, ...]:
        """The blocks in front of or in which tokens are reduced, in a model of `depth`; needs resolved parameters."""
        return ()

    def resolve(self, plan: Plan) -> Self:
        """Decide what is left to measurement or to the model's depth, and check all of it against the model."""
        return self

    def for_budget(self, model: Any, macs: float, beside: Any = None) -> Self:
        """The method with the parameters that aim at a mean cost of so large a share of the dense model's MACs.

        Args:
            model: The dense model.
            macs: The share.
            beside: The model with the other methods that shall run beside this one, if any.

        Raises:
            ConfigError: No parameters reach it, or its cost is not a matter of a budget.
        """
        raise ConfigError(f"{self.name} has no budget to aim at, adavit has")

    def swap_in(self, lean: LeanVisionTransformer) -> None:
        """Replace modules of a model in place. The parameters are resolved."""
        raise NotImplementedError

    def start(
        self, lean: LeanVisionTransformer, vit: Any, inputs: Sequence[Tokens], generator: torch.Generator
    ) -> None:
        """Start of the warm start: what takes more than one block to know.

        Args:
            lean: The model that is warm-started, changed in place.
            vit: The dense model.
            inputs: Embedded images, batch by batch.
            generator: Of whatever is random.
        """

    def resized(self, old: Grid, new: Grid) -> Self:
        """The method once the model's patch grid is no longer the old one but the new one."""
        return self

    def losses(self, found: Recorder) -> dict[str, Tensor]:
        """The method's own loss terms, weighted, from what its modules offered in a forward pass."""
        return {}

    def metrics(self, found: Recorder) -> dict[str, Tensor]:
        """Figures, each one number, that show how training goes; the run's metrics hold their means over an epoch.

        What has a dot in its name, such as ``"density.4"`` for block 4, is for the file and left out of the progress.
        """
        return {}

    def set_progress(self, lean: LeanVisionTransformer, progress: float) -> None:
        """Tell the method's modules how far training has come.

        Args:
            lean: The model in training.
            progress: From 0 to 1.
        """
        for module in lean.modules():
            if isinstance(module, LeanModule) and module.method == self.name:
                module.set_progress(progress)

    def to_config(self) -> dict[str, Any]:
        """The method as JSON: its name and its parameters."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The method as `--method` takes it; parameters at their default are left out."""
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                changed.append(f"{field.name}={text}")
        return self.name + (":" + ",".join(changed) if changed else "")


class Plan:
    """What methods may ask when they decide their parameters.

    Args:
        model: The dense model.
        images: Unlabelled images, for measurements.
    """

    def __init__(self, model: Any, images: ImageSource | None) -> None:
        self.model = model
        self.images = images
        self.depth = len(model.blocks)
        self.first_reduction = self.depth
        """The first block in front of or in which a method reduces tokens; the depth where none does."""

    @cached_property
    def statistics(self) -> list[LayerStatistics]:
        """How each layer of the dense model attends, measured once, when first asked for."""
        from ..analysis import attention_statistics

        if self.images is None:
            raise ConfigError(
                "a parameter is 'auto', which is measured: give images (slim(..., images=...), --data-dir)"
            )
        return attention_statistics(self.model, self.images)

    def resolve(self, methods: Sequence[Method]) -> tuple[Method, ...]:
        """Decide the parameters of all methods, those that reduce tokens first: others depend on where that happens."""
        for method in methods:
            if not isinstance(method, Method):
                raise ConfigError(f"{method!r} is no method; give one such as leanvit.GLAD(), or methods.parse(text)")
        names = [method.name for method in methods]
        for name in names:
            if names.count(name) > 1:
                raise MethodError(f"{name} is given more than once; give it one set of parameters")
        resolved: dict[str, Method] = {}
        for method in sorted(methods, key=lambda method: not method.reduces_tokens):
            resolved[method.name] = method.resolve(self)
            self.first_reduction = min((self.first_reduction, *resolved[method.name].reductions(self.depth)))
        return tuple(resolved[name] for name in names)

    def check_blocks(self, method: str, blocks: Iterable[int]) -> None:
        """Refuse block indices that the model does not have."""
        for index in blocks:
            if not 0 <= index < self.depth:
                raise MethodError(f"{method}: block {index} does not exist; the model has blocks 0 to {self.depth - 1}")


def grid_positions(grid: Grid) -> Tensor:
    """Centres of the patches of a grid, row by row: ``(h·w, 2)`` as (y, x), the longer side being 1."""
    y, x = ((torch.arange(count, dtype=torch.float64) + 0.5) / max(grid) for count in grid)
    return torch.cartesian_prod(y, x)


def claim_attention(method: str, index: int, block: Any) -> Any:
    """The attention of a block, for a method to put its own in its place.

    Raises:
        MethodError: Another method has put its own there.
    """
    if isinstance(block.attn, LeanModule):
        raise MethodError(
            f"{method}: the attention of block {index} is {block.attn.method}'s already; give each block to one of them"
        )
    return block.attn


def index_range(text: str) -> tuple[int, ...]:
    """``"4-11"`` as indices, the last one included.

    Raises:
        ConfigError: The range is empty.
    """
    first, last = map(int, text.split("-"))
    if last < first:
        raise ConfigError(f"{text!r} is an empty range; write the lower block first")
    return tuple(range(first, last + 1))


def block_indices(method: str, parameter: str, value: Any) -> tuple[int, ...] | str:
    """Block indices as a user may write them: one, several, or ``"auto"`` / ``"auto:K"``.

    Raises:
        ConfigError: Anything else, or an index given twice or below zero.
    """
    if isinstance(value, str):
        auto_count(value, default=1)
        return value
    blocks = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if any(not isinstance(index, int) or index < 0 for index in blocks) or len(set(blocks)) < len(blocks):
        raise ConfigError(f"{method}: {parameter}={value} must be block indices from 0 on, each given once")
    return tuple(sorted(blocks))


def auto_count(text: str, default: int) -> int:
    """The K of ``"auto:K"``, the default of ``"auto"``.

    Raises:
        ConfigError: The text is neither.
    """
    name, colon, count = text.partition(":")
    if name != "auto" or (colon and not (count.isdigit() and int(count))):
        raise ConfigError(f"{text!r} is not a list of blocks, 'auto' or 'auto:K' with K at least 1")
    return int(count) if count else default


def check_shares(method: str, parameter: str, value: Any) -> None:
    """Refuse what is not a share of tokens, one or several: above 0 and at most 1.

    Raises:
        ConfigError: With the value.
    """
    for share in value if isinstance(value, (tuple, list)) else (value,):
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"{method}: {parameter}={share!r} is not in (0, 1]")


def one_each(method: str, parameter: str, value: Any, stages: int) -> tuple[Any, ...]:
    """A value for each stage, from one for all or one each.

    Raises:
        MethodError: There are neither one nor as many as stages.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * stages
    if len(values) == 1:
        return values * stages
    if len(values) != stages:
        raise MethodError(
            f"{method}: {parameter} has {len(values)} values for {stages} stages; give one, or one a stage"
        )
    return values
