"""Two readers that timm does not have: the embedded digits, and WebDataset shards by index."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader

from .errors import DataError


class ImageReader(Protocol):
    """What timm's readers have in common: an open file and a label for each index, and the file's name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[IO[bytes], Any]: ...

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str: ...


class DigitsReader(Reader):
    """The 1797 handwritten digits (8×8, grey) inside scikit-learn, one fifth of each digit held out.

    Args:
        train: The four fifths to train on, else the held-out fifth; the division is the same everywhere.
    """

    def __init__(self, *, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        super().__init__()
        digits = load_digits()
        everything = range(len(digits.target))
        kept, held_out = train_test_split(everything, test_size=0.2, random_state=0, stratify=digits.target)
        self.indices = sorted(kept if train else held_out)
        self.pixels = (digits.images * (255 / 16)).round().astype("uint8")  # (1797, 8, 8), from 0..16
        self.labels = digits.target
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        encoded = io.BytesIO()
        Image.fromarray(self.pixels[self.indices[index]]).save(encoded, format="PPM")
        encoded.seek(0)
        return encoded, int(self.labels[self.indices[index]])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"digit-{self.indices[index]}"


class ShardReader(Reader):
    """Local WebDataset shards: `KEY.jpg` beside `KEY.cls` in tar files, read by index.

    timm's own WebDataset reader is a stream: it drops damaged images uncounted and has no length of its own,
    so neither an evenly spread sample nor a resumable epoch can be had from it.

    Args:
        root: The folder of the shards, or a pattern for them: ``DIR/train-{0000..0009}.tar``.
        split: A pattern below `root`, a split of its `_info.json`, or a part of the shards' names.

    Raises:
        DataError: A shard is missing or no tar file, or an image has no label.
    """

    def __init__(self, root: str, split: str | None = None) -> None:
        super().__init__()
        self.samples: list[tuple[Path, tarfile.TarInfo, int]] = []
        for shard in _find_shards(root, split):
            self.samples += _index_shard(shard)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        shard, member, label = self.samples[index]
        with shard.open("rb") as file:
            file.seek(member.offset_data)
            return io.BytesIO(file.read(member.size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        shard, member, _ = self.samples[index]
        return f"{shard.name}/{member.name}"


def _find_shards(root: str, split: str | None) -> list[Path]:
    pattern = Path(root).expanduser()
    if split and ".tar" in split:
        pattern /= split.partition("|")[0]  # timm writes the number of samples behind a bar
    elif pattern.is_dir():
        pattern /= f"*{split}*.tar" if split else "*.tar"
    folder = pattern.parent
    listed = _listed_shards(folder, split)
    names = listed or [found for name in _expand_braces(pattern.name) for found in _expand_star(folder, name)]
    if not names:
        example = "DIR/train-{0000..0009}.tar"
        raise DataError(f"no WebDataset shards at {pattern}; give a folder of .tar files or {example}")
    return [folder / name for name in names]


def _listed_shards(folder: Path, split: str | None) -> list[str]:
    """The shards that the folder's `_info.json` (as timm writes it) lists for a split."""
    for name in ("_info.json", "info.json"):
        if split and (folder / name).is_file():
            try:
                splits = json.loads((folder / name).read_text(encoding="utf-8")).get("splits", {})
                return list(splits[split]["filenames"]) if split in splits else []
            except (ValueError, TypeError, LookupError, AttributeError) as reason:
                raise DataError(f"{folder / name} does not list shards by split: {reason!r}") from reason
    return []


def _expand_star(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.glob(name)) if "*" in name else [name]


def _expand_braces(name: str) -> list[str]:
    """`a-{08..10}.tar` as the three names it stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        return [name]
    first, last = found.groups()
    before, after = name[: found.start()], _expand_braces(name[found.end() :])
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [before + number + rest for number in numbers for rest in after]


def _index_shard(shard: Path) -> list[tuple[Path, tarfile.TarInfo, int]]:
    extensions = get_img_extensions(as_set=True)
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if f".{extension.lower()}" in extensions:
                    images[key] = member
                elif extension == "cls" and (file := tar.extractfile(member)):
                    labels[key] = int(file.read())
    except FileNotFoundError:
        raise DataError(f"no such shard: {shard}") from None
    except (tarfile.TarError, ValueError, OSError) as reason:
        raise DataError(f"{shard} cannot be read as a WebDataset shard: {reason}") from reason
    for key, member in images.items():
        if key not in labels:
            raise DataError(f"{member.name} in {shard} has no label: {key.lstrip('/')}.cls is missing")
    return [(shard, member, labels[key]) for key, member in images.items()]
