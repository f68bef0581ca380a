"""Explained photos as the data of a page: what each photo needs to be walked block by block, in little space."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..explain import MAPS, SHOWN_SIDE, AttentionMap, BlockTrace, Explanation

if TYPE_CHECKING:
    from ..model import Grid

MAP_BYTES = 2_000_000
"""What all attention maps of a page may take together."""
SIDES = (16, 12, 8, 6, 4)
"""Attention over a grid of more patches than this a side is averaged over neighbours; less again if bytes are short."""
LEVELS = 15
"""Brightnesses of an attention map above none: a pixel takes four bits."""
PHOTO_QUALITY = 82

SOURCE = "source"
KIND_TITLES = {**MAPS, SOURCE: "what its token is made of"}


def gallery(explanations: Mapping[str, Sequence[Explanation]]) -> dict[str, Any]:
    """Explained photos as JSON for the page's script.

    Args:
        explanations: By model, of the same photos in the same order.

    Returns:
        ``photos``, shared by the models; ``models``, each with what it did with every photo; and the ``layouts``
        (token of each patch) and ``maps`` (pictures, a row for each query) that they refer to by number.
    """
    for side in SIDES:
        store = _Store(side)
        models = [
            {"name": name, "photos": [_photo(one, store) for one in photos]} for name, photos in explanations.items()
        ]
        if sum(map(len, store.maps.values)) <= MAP_BYTES:
            break
    first = next(iter(explanations.values()))
    return {
        "photos": [{"src": _jpeg(one.photo), "name": one.name, "label": one.label} for one in first],
        "models": models,
        "layouts": store.layouts.values,
        "maps": store.maps.values,
        "titles": KIND_TITLES,
    }


class _Numbered:
    """Values without repetition, by number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        key = tuple(value) if isinstance(value, list) else value
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]


class _Store:
    """What photos and blocks share."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.layouts = _Numbered()
        self.maps = _Numbered()

    def layout(self, owner: Tensor) -> int:
        return self.layouts.number(owner.tolist())

    def map(self, kind: str, weights: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Any]:
        """A map: weights ``(queries, keys)``, and the query and the key that each patch is, -1 for none."""
        return {
            "kind": kind,
            "map": self.maps.number(_png(weights)),
            "rows": self.layout(rows),
            "columns": self.layout(columns),
        }


def _photo(explanation: Explanation, store: _Store) -> dict[str, Any]:
    return {
        "grid": list(explanation.grid),
        "outcomes": [
            {
                "model": outcome.model,
                "gmacs": round(outcome.macs / 1e9, 4),
                "ms": round(1e3 * outcome.seconds, 2),
                "top": [[one.name, round(one.probability, 3)] for one in outcome.top],
            }
            for outcome in explanation.outcomes
        ],
        "blocks": [_block(block, explanation, store) for block in explanation.blocks],
    }


def _block(block: BlockTrace, explanation: Explanation, store: _Store) -> dict[str, Any]:
    maps = [_attention(found, explanation, store) for found in block.maps]
    if block.reduced:
        every_patch = torch.arange(block.source.shape[1])
        owner = block.owner.masked_fill(block.absent, -1)
        maps.append(store.map(SOURCE, block.source, owner, every_patch))
    return {
        "parts": block.description,
        "tokens": block.tokens,
        "layout": store.layout(block.owner),
        "out": "".join("1" if out else "0" for out in block.left_out.tolist()),
        "heads": None if block.heads is None else block.heads.int().tolist(),
        "sublayers": None if block.sublayers is None else block.sublayers.int().tolist(),
        "maps": maps,
    }


def _attention(found: AttentionMap, explanation: Explanation, store: _Store) -> dict[str, Any]:
    """An attention map between patch tokens, mean over heads; over a fine grid, between groups of neighbours."""
    weights = found.values.float().mean(dim=0)[explanation.prefix :, explanation.prefix :]  # (M, M)
    owner = found.owner
    if max(explanation.grid) > store.side and len(weights) == len(owner):
        owner = _coarse(explanation.grid, store.side)
        groups = torch.nn.functional.one_hot(owner).float()  # (h·w, cells)
        groups = groups / groups.sum(dim=0)
        weights = groups.T @ weights @ groups
    owner = owner.masked_fill(found.absent, -1)
    return store.map(found.kind, weights, owner, owner)


def _coarse(grid: Grid, side: int) -> Tensor:
    """The cell of each patch, ``(h·w,)``, in a grid of at most `side` cells a side."""
    rows, columns = (torch.arange(count) * min(side, count) // count for count in grid)
    return (rows[:, None] * min(side, grid[1]) + columns[None, :]).flatten()


def _png(weights: Tensor) -> str:
    """Weights ``(queries, keys)`` as a picture of 16 greys: roots, because attention is mostly small, each row to its
    largest."""
    strongest = weights.amax(dim=1, keepdim=True).clamp_min(1e-9)
    levels = ((weights / strongest).clamp(0, 1).sqrt() * LEVELS).round().byte()
    picture = Image.frombytes("P", (weights.shape[1], weights.shape[0]), levels.numpy().tobytes())
    picture.putpalette([level * 255 // LEVELS for level in range(LEVELS + 1) for _ in "rgb"])
    file = io.BytesIO()
    picture.save(file, format="PNG", bits=4, optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _jpeg(photo: Image.Image) -> str:
    picture = photo.copy()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=PHOTO_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
