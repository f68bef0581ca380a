"""What a lean model does with one photo: its predictions and cost beside the dense model's, block by block."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn

from .bench import take_turns
from .count import count, deployed_form
from .data import IMAGE_MODES, data_config, known_classes, read_class_names
from .errors import ConfigError, RestoreError
from .model import Grid, LeanModel, Tokens, data_dependent, restore, with_blocks
from .photos import in_mode, read_photo
from .record import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Photo = str | os.PathLike[str] | Image.Image

MAPS = {
    "static_attention": "static attention, the same for every photo",
    "dynamic_attention": "this photo's dynamic attention",
    "linear_attention": "linear-angular attention",
    "softmax_attention": "softmax attention",
    "connections": "connections: the patches it attends to",
}
"""Recorded kinds ``(H, N, N)``: how much each query attends to each key. How they are called, in drawing order."""

PATCH_USAGE, HEAD_USAGE, SUBLAYER_USAGE = "patch_usage", "head_usage", "sublayer_usage"
KINDS = (*MAPS, PATCH_USAGE, HEAD_USAGE, SUBLAYER_USAGE)

SUBLAYERS = ("attention", "MLP")

LITTLE = 0.1
"""A patch whose part in the tokens is less than this share of the average patch's counts as absent."""

SHOWN_SIDE = 448
"""The photo is shown at least so large, in pixels, however small the model sees it."""


@dataclass(frozen=True)
class Prediction:
    """A class and how sure a model is of it, from 0 to 1."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Outcome:
    """What one model says about the photo, and what that took.

    Args:
        model: "dense" or "lean".
        method: What was done to it.
        top: The five likeliest classes, best first.
        macs: Multiply-accumulates for this photo.
        seconds: Median time for this photo alone (batch 1), both models taking turns.
    """

    model: str
    method: str
    top: tuple[Prediction, ...]
    macs: float
    seconds: float


@dataclass(frozen=True)
class AttentionMap:
    """How much each query attends to each key in one block.

    Args:
        kind: One of `MAPS`.
        values: ``(H, P + M, P + M)``, rows summing to one, or 0 and 1 for connections.
        owner: The patch token each patch of the grid belongs to, ``(h·w,)``, counted among the M.
        absent: ``(h·w,)``, patches with hardly any part in the tokens: they attend to nothing, and nothing to them.
    """

    kind: str
    values: Tensor
    owner: Tensor
    absent: Tensor

    def around(self, patch: int, prefix: int) -> Tensor:
        """How much the token of a patch attends to the token of every patch, mean over heads, ``(h·w,)``."""
        row = self.values[:, prefix + int(self.owner[patch]), prefix:].float().mean(dim=0)
        return row[self.owner].masked_fill(self.absent | self.absent[patch], 0.0)


@dataclass(frozen=True)
class BlockTrace:
    """What one block did.

    Args:
        index: The block.
        description: Its parts, as `print` shows them.
        tokens: Patch tokens that leave it.
        source: ``(M, h·w)``, the share of each patch in each token; one row each where all patches are there.
        absent: ``(h·w,)``, patches with hardly any part in the tokens.
        maps: Attention maps that it offered.
        takes_part: ``(h·w,)``, whether each patch takes part in this block; None where all do. None of them does where
            neither attention nor MLP runs.
        heads: ``(H,)``, whether each head was used, none without attention; None where all were.
        sublayers: Whether attention and MLP ran, ``(2,)``; None where both did.
    """

    index: int
    description: str
    tokens: int
    source: Tensor
    absent: Tensor
    maps: tuple[AttentionMap, ...] = ()
    takes_part: Tensor | None = None
    heads: Tensor | None = None
    sublayers: Tensor | None = None

    @property
    def owner(self) -> Tensor:
        """The token in which each patch has its largest share, ``(h·w,)``."""
        return self.source.argmax(dim=0)

    @property
    def left_out(self) -> Tensor:
        """Patches with hardly any part in the tokens, or none in this block, ``(h·w,)``."""
        return self.absent if self.takes_part is None else self.absent | ~self.takes_part

    @property
    def reduced(self) -> bool:
        """Whether patches and tokens are no longer the same."""
        return self.tokens < self.source.shape[1]


@dataclass(frozen=True)
class Explanation:
    """What a lean model did with one photo; in a notebook it shows itself.

    Args:
        name: The photo's file name.
        photo: What the model sees of it, in more pixels.
        grid: Rows and columns of patches.
        prefix: How many tokens are no patches.
        outcomes: The dense model's, where there is one, and the lean one's.
        blocks: What each block did, in order.
        query: The patch that maps are drawn for.
        label: Its true class, where known.
    """

    name: str
    photo: Image.Image = field(repr=False)
    grid: Grid
    prefix: int
    outcomes: tuple[Outcome, ...]
    blocks: tuple[BlockTrace, ...] = field(repr=False)
    query: int
    label: str | None = None

    @property
    def lean(self) -> Outcome:
        """The lean model's outcome."""
        return self.outcomes[-1]

    @property
    def dense(self) -> Outcome | None:
        """The dense model's outcome, if there was one."""
        return self.outcomes[0] if len(self.outcomes) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures and attention maps, as JSON can hold it."""
        return {
            "photo": self.name,
            "label": self.label,
            "grid": list(self.grid),
            "outcomes": [
                {
                    "model": outcome.model,
                    "method": outcome.method,
                    "gmacs": outcome.macs / 1e9,
                    "milliseconds": 1e3 * outcome.seconds,
                    "top5": [vars(prediction) for prediction in outcome.top],
                }
                for outcome in self.outcomes
            ],
            "blocks": [
                {
                    "block": block.index,
                    "parts": block.description,
                    "tokens": block.tokens,
                    "token_of_patch": block.owner.tolist(),
                    "left_out": block.left_out.nonzero().flatten().tolist(),
                    "heads": None if block.heads is None else block.heads.tolist(),
                    "sublayers": None if block.sublayers is None else block.sublayers.tolist(),
                    "maps": [found.kind for found in block.maps],
                }
                for block in self.blocks
            ],
        }

    def figures(self) -> dict[str, Figure]:
        """The explanation as matplotlib figures, by name: only those that there is something to draw in."""
        from .report.figures import draw

        return draw(self)

    def _repr_html_(self) -> str:
        from .report.figures import as_html

        return as_html(self)


def explain(
    model: nn.Module,
    image: Photo,
    *,
    teacher: nn.Module | None = None,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    query: tuple[int, int] | None = None,
) -> Explanation:
    """Show what a lean model does with a photo.

    Predictions, MACs and time are those of the deployed form; what happens in the blocks is recorded from the model as
    given, which before deployment still knows more (the dynamic attention beside a static one).

    Args:
        model: A lean model.
        image: A file of any size and mode, or a Pillow image.
        teacher: The dense model to compare with; left out, the one that `restore` gives back, if it can.
        class_names: A name for each class, or a text file of them, one a line; left out, those that came with the
            model, and ImageNet's for its 1000 classes and its synsets.
        query: Column and row of the patch that maps are drawn for, from the upper left; the middle one if left out.

    Raises:
        ConfigError: The model is not lean, the teacher has other classes, the names are too few or too many, or there
            is no such patch.
        DataError: The photo or the file of names cannot be read.
    """
    return Explainer(model, teacher=teacher, class_names=class_names, query=query)(image)


class Explainer:
    """Explains one photo after another with the same models, deployed once. The arguments are those of `explain`.

    Args:
        crop_pct: Share of the photo that is kept; the model's own if left out.
        rounds: How often each model is timed on a photo.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        class_names: Sequence[str] | str | os.PathLike[str] | None = None,
        query: tuple[int, int] | None = None,
        crop_pct: float | None = None,
        rounds: int = 10,
    ) -> None:
        if not isinstance(model, LeanModel):
            raise ConfigError(
                f"the model to explain is a dense {type(model).__name__}; give a lean one, as leanvit slim makes it"
            )
        self.lean: Any = model
        dense = teacher if teacher is not None else _restored(model)
        self.models = {} if dense is None else {"dense": dense.eval()}
        self.models["lean"] = deployed_form(model).eval()
        classes = {name: made.num_classes for name, made in self.models.items()}
        if len(set(classes.values())) > 1:
            raise ConfigError(f"the teacher has {classes['dense']} classes, the lean model {classes['lean']}")
        self.names = class_descriptions(model, class_names)
        self.grid: Grid = cast(Any, model).patch_embed.grid_size
        self.query = _query(query, self.grid)
        self.crop = {} if crop_pct is None else {"crop_pct": crop_pct}
        self.rounds = rounds
        self.constant_macs: dict[str, float] = {}

    def __call__(self, image: Photo, *, name: str = "", label: int | None = None) -> Explanation:
        """Explain a photo.

        Args:
            image: A file or a Pillow image.
            name: How to call it; the file's name if left out.
            label: Its true class, where known.
        """
        if isinstance(image, Image.Image):
            photo, name = in_mode(image, "RGB"), name or "photo"
        else:
            photo, name = read_photo(image), name or Path(image).name
        was_training = self.lean.training
        try:
            outcomes = self._outcomes(photo)
            blocks = trace(self.lean.eval(), self._input(self.lean, photo))
        finally:
            self.lean.train(was_training)
        return Explanation(
            name=name,
            photo=as_seen(photo, data_config(self.lean) | self.crop),
            grid=self.grid,
            prefix=self.lean.num_prefix_tokens,
            outcomes=outcomes,
            blocks=blocks,
            query=self.query,
            label=None if label is None else self.names[label],
        )

    def _outcomes(self, photo: Image.Image) -> tuple[Outcome, ...]:
        inputs = {name: self._input(model, photo) for name, model in self.models.items()}
        runs = [partial(model, inputs[name]) for name, model in self.models.items()]
        with torch.inference_mode():
            times = take_turns(runs, iterations=self.rounds, warmup=2)
            logits = [run()[0] for run in runs]
        return tuple(
            Outcome(
                model=name,
                method=str(getattr(model, "lean", "dense")),
                top=self._top(scores),
                macs=self._macs(name, model, inputs[name]),
                seconds=statistics.median(seconds),
            )
            for (name, model), scores, seconds in zip(self.models.items(), logits, times, strict=True)
        )

    def _macs(self, name: str, model: nn.Module, image: Tensor) -> float:
        """Counted on each photo only where a method's cost depends on it."""
        if data_dependent(model):
            return count(model, images=image).macs
        if name not in self.constant_macs:
            self.constant_macs[name] = count(model, images=image).macs
        return self.constant_macs[name]

    def _top(self, logits: Tensor) -> tuple[Prediction, ...]:
        probabilities, classes = logits.float().softmax(dim=0).topk(min(5, len(logits)))
        return tuple(
            Prediction(index, self.names[index], probability)
            for index, probability in zip(classes.tolist(), probabilities.tolist(), strict=True)
        )

    def _input(self, model: Any, photo: Image.Image) -> Tensor:
        """The photo as the model takes it, ``(1, C, H, W)``."""
        config = data_config(model) | self.crop
        pixels: Any = create_transform(**config)(photo.convert(IMAGE_MODES[config["input_size"][0]]))
        return pixels[None].to(next(model.parameters()))


@torch.inference_mode()
def trace(lean: Any, image: Tensor) -> tuple[BlockTrace, ...]:
    """Walk the blocks of a lean model with one image ``(1, C, H, W)`` and note what each does."""
    passed: list[Tokens] = []

    def walk(embedded: Tensor) -> Tensor:
        passed.append(lean.blocks.tokens(embedded, track=True))
        for block in lean.blocks:
            passed.append(block(passed[-1]))
        return passed[-1].x

    with record(*KINDS) as found:
        with_blocks(lean, walk).forward_features(image)
    offered: dict[int, dict[str, Tensor]] = {}
    for kind in KINDS:
        for one in found[kind]:
            value = one.value.detach().float().cpu()
            shared = kind == "static_attention"  # (H, N, N): the same for all images
            offered.setdefault(one.layer, {})[kind] = value if shared else value[0]
    patches = [patches_of(tokens) for tokens in passed]
    return tuple(
        _block_trace(index, repr(block), patches[index], patches[index + 1], offered.get(index, {}), lean.blocks.prefix)
        for index, block in enumerate(lean.blocks)
    )


def _block_trace(
    index: int, description: str, before: Patches, after: Patches, offered: dict[str, Tensor], prefix: int
) -> BlockTrace:
    def owner_and_absent(tokens: int) -> tuple[Tensor, Tensor]:
        # A block may reduce its tokens in front of its attention or behind it; the number says which.
        source, absent = after if len(after[0]) == tokens else before
        return source.argmax(dim=0), absent

    maps = tuple(
        AttentionMap(kind, offered[kind], *owner_and_absent(offered[kind].shape[-1] - prefix))
        for kind in MAPS
        if kind in offered
    )
    usage = offered.get(PATCH_USAGE)
    takes_part = None if usage is None else (usage > 0.5)[owner_and_absent(len(usage))[0]]
    heads, sublayers = _as_bool(offered.get(HEAD_USAGE)), _as_bool(offered.get(SUBLAYER_USAGE))
    if sublayers is not None:  # what is decided for a part that does not run is not used
        takes_part = None if takes_part is None else takes_part & sublayers.any()
        heads = None if heads is None else heads & sublayers[0]
    return BlockTrace(
        index=index,
        description=description,
        tokens=len(after[0]),
        source=after[0],
        absent=after[1],
        maps=maps,
        takes_part=takes_part,
        heads=heads,
        sublayers=sublayers,
    )


Patches = tuple[Tensor, Tensor]
"""What tokens are made of: the share of each patch in each of them, ``(M, h·w)``, and the patches that are absent."""


def patches_of(tokens: Tokens) -> Patches:
    """What tokens are made of, for the first image.

    Returns:
        The share of each patch in each token, ``(M, h·w)``, and the patches with hardly any part in them, ``(h·w,)``.
        A patch's part is the sum of its shares, each token counted as often as attention counts it: patches that were
        merged are all there, however many they are; those that were fused into one token hardly are.
    """
    patches = tokens.grid[0] * tokens.grid[1]
    source = torch.eye(patches) if tokens.source is None else tokens.source[0].float().cpu()
    size = torch.ones(len(source)) if tokens.size is None else tokens.size[0, tokens.prefix :].float().cpu()
    part = size @ source
    return source, part < LITTLE * part.mean()


def _as_bool(usage: Tensor | None) -> Tensor | None:
    return None if usage is None else usage > 0.5


def as_seen(photo: Image.Image, config: Mapping[str, Any]) -> Image.Image:
    """What a model sees of a photo, cropped as it crops, in more pixels: `SHOWN_SIDE` or what the model takes.

    Args:
        photo: The photo.
        config: The model's preprocessing, as `data_config` gives it.
    """
    _, height, width = config["input_size"]
    factor = max(1, -(-SHOWN_SIDE // max(height, width)))
    larger = {**config, "input_size": (3, height * factor, width * factor), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    pixels: Any = create_transform(**larger)(photo.convert("RGB"))
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def class_descriptions(model: nn.Module, names: Sequence[str] | str | os.PathLike[str] | None = None) -> list[str]:
    """A name for people for each class of a model; "class 3" where there is none.

    Args:
        model: Its `pretrained_cfg` may hold names.
        names: A name for each class, or a text file of them, one a line.

    Raises:
        ConfigError: There is not one name for each class.
        DataError: The file cannot be read.
    """
    classes: int = model.num_classes  # type: ignore[assignment]
    given = read_class_names(names) if isinstance(names, str | os.PathLike) else names
    if given is not None and len(given) != classes:
        raise ConfigError(f"{len(given)} class names for a model of {classes} classes")
    if given is None:
        given = known_classes(model)
        if classes == 1000 and len(given) != classes:
            given = _imagenet().label_names()
    if len(given) != classes:
        return [f"class {index}" for index in range(classes)]
    return [_described(name) for name in given]


def _described(name: str) -> str:
    """The first word for an ImageNet synset; any other name as it is."""
    if not re.fullmatch(r"n\d{8}", name):
        return name
    try:
        return _imagenet().label_name_to_description(name).partition(",")[0]
    except KeyError:
        return name


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")


def _restored(model: nn.Module) -> nn.Module | None:
    try:
        return restore(model)
    except RestoreError:
        return None


def _query(query: tuple[int, int] | None, grid: Grid) -> int:
    rows, columns = grid
    column, row = query or (columns // 2, rows // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        raise ConfigError(
            f"query {column},{row} lies outside the patches: columns go from 0 to {columns - 1}, rows to {rows - 1}"
        )
    return row * columns + column
