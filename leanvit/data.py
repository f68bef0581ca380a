"""Images by their path: read by timm's readers, prepared as the model asks, the damaged skipped and named."""

from __future__ import annotations

import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config, resolve_model_data_config
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from .errors import ConfigError, DataError, LeanVitWarning
from .photos import in_mode
from .readers import DigitsReader, ImageReader, ShardReader

DAMAGE_LIMIT = 0.01
"""Share of a data set that may be damaged before it is refused."""

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("val", "validation", "valid", "eval", "evaluation", "test")

SCHEMES = ("wds", "hfds", "hfids", "tfds")
"""What a path starts with, before a slash, where another reader than that of folders and tars finds the images."""

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DIGITS_CONFIG: dict[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bicubic",
}
# Leaves a digit what it is: mirrored, it is another one or none.
DIGITS_AUGMENT: dict[str, Any] = {"hflip": 0.0, "color_jitter": 0.0, "scale": (0.7, 1.0), "ratio": (0.9, 1.1)}

ImageSource = str | os.PathLike[str] | Dataset[Any] | DataLoader[Any] | Tensor
"""Whatever unlabelled images can be had from: a path, a data set, a loader or a tensor ``(B, C, H, W)``."""

Transform = Callable[[Image.Image], Any]
ClassMap = str | dict[str, int]


class ReadError(DataError):
    """What goes wrong while images are read, in this process or in a loader's worker."""

    def __init__(self, message: str) -> None:
        # torch raises a worker's error again with its traceback for a message; ours is the last line.
        super().__init__(message.strip().rpartition("\n")[2].rpartition(f"{type(self).__name__}: ")[2])


class ImageData(Dataset[tuple[Tensor, int] | None]):
    """Labelled images behind a reader; a damaged image comes out as `None` and is remembered by name.

    Args:
        reader: One of timm's readers by index.
        path: Where the images come from, for people.
        transform: Makes a tensor ``(C, H, W)`` of an image.
        classes: The name of each label; empty where labels have no names.
        relabel: The model's label for each label of the reader, where they differ.
        num_classes: Labels are below this, if it is known.
        mode: How images are decoded: ``"RGB"``, ``"L"`` (grey) or ``"RGBA"``.
        crop_pct: Share of an image that the transform keeps, where it is the model's own.
    """

    def __init__(
        self,
        reader: ImageReader,
        path: str,
        transform: Transform,
        *,
        classes: Sequence[str] = (),
        relabel: Mapping[int, int] | None = None,
        num_classes: int | None = None,
        mode: str = "RGB",
        crop_pct: float | None = None,
    ) -> None:
        self.reader = reader
        self.path = path
        self.transform = transform
        self.classes = list(classes)
        self.relabel = relabel
        self.num_classes = num_classes
        self.mode = mode
        self.crop_pct = crop_pct
        # In shared memory: loader workers find the damage, their parent reports it.
        self._is_damaged = torch.zeros(len(reader), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            pixels, label = self._read(index)
        except Exception as reason:  # a decoder that is given damaged bytes raises anything
            self._mark_damaged(index, reason)
            return None
        return self.transform(pixels), self._model_label(label, index)

    @property
    def damaged(self) -> list[str]:
        """The names of the damaged images met so far, each once, whichever process met them."""
        return [self.reader.filename(index) for index in self._is_damaged.nonzero().flatten().tolist()]

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """The image itself, without the transform, and its label."""
        pixels, label = self._read(index)
        return pixels, self._model_label(label, index)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            return in_mode(image, self.mode), int(label)  # decodes it all, so what was cut short fails here

    def is_damaged(self, index: int) -> bool:
        """Whether this image was met and could not be read."""
        return bool(self._is_damaged[index])

    def _mark_damaged(self, index: int, reason: Exception) -> None:
        self._is_damaged[index] = True
        count = int(self._is_damaged.sum())
        # A single damaged image says nothing about the others, however small the data set.
        if count > max(1, DAMAGE_LIMIT * len(self)):
            last = f"{self.reader.filename(index)}: {type(reason).__name__}: {reason}".replace("\n", " ")
            raise ReadError(
                f"{count} of the {len(self)} images in {self.path} are damaged, "
                f"over {DAMAGE_LIMIT:.0%}; the last is {last}"
            )

    def _model_label(self, label: int, index: int) -> int:
        if self.relabel is not None:
            return self.relabel[label]
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            name = self.reader.filename(index)
            raise ReadError(f"{name} in {self.path} has label {label}, none of the model's {self.num_classes} classes")
        return label


class NoSplitError(DataError):
    """A folder does not hold the split asked for."""


def open_data(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    split: str | None = None,
    training: bool = False,
    class_map: ClassMap = "",
    transform: Transform | None = None,
    augment: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> ImageData:
    """Open labelled images, prepared for a model.

    A label is the place of the image's class folder in natural order, with three exceptions: what `class_map`
    says; folders named as the model's own classes (`label_names` of its `pretrained_cfg`) get these; folders
    named by ImageNet synset get their ImageNet-1k class where the model has 1000.

    Args:
        path: A folder, a ``.tar``, ``wds/SHARDS`` (local WebDataset shards), ``hfds/NAME`` (a Hugging Face
            data set), or ``digits`` (1797 handwritten digits inside scikit-learn, a fifth held out).
        model: Gives input size, normalisation, crop and classes.
        split: A folder or tar below `path`, or a split that the reader knows. Left out, a folder that holds
            nothing but splits (``train``, ``val``, …) gives the one that `training` asks for.
        training: Augment the images.
        class_map: A text file of class names in order, or a dictionary from name to label.
        transform: In place of the model's own.
        augment: Arguments of `timm.data.create_transform` for training: ``hflip``, ``auto_augment``, …
        num_classes: In place of the model's.

    Raises:
        DataError: Nothing is there, there are no images, or their classes do not fit the model.
        ConfigError: An augmentation that timm does not know, or a class map where none can be used.
    """
    path = os.fspath(path)
    if num_classes is None:
        num_classes = getattr(model, "num_classes", None)
    reader = _open_reader(path, split, training, class_map)
    classes, relabel = _match_classes(path, _found_classes(reader), known_classes(model), num_classes, bool(class_map))
    return _prepare(
        reader,
        path,
        model,
        training,
        transform,
        augment,
        classes=classes,
        relabel=relabel,
        num_classes=num_classes,
    )


def open_held_out(
    path: str,
    model: nn.Module | None = None,
    *,
    train_split: str | None = None,
    val_split: str | None = None,
    class_map: ClassMap = "",
) -> ImageData | None:
    """The labelled images to measure on: the split asked for, else the evaluation half of a path that is divided.

    Args:
        path, model, class_map: As for `open_data`.
        train_split: What is trained on, if it was named: then nothing is held out unless `val_split` says so.
        val_split: The split to measure on.

    Returns:
        None where nothing is held out.
    """
    if val_split is None:
        if train_split is not None or path.startswith(("wds/", "hfds/")):
            return None
        try:
            halves = [open_data(path, training=training, class_map=class_map) for training in (True, False)]
        except NoSplitError:
            return None
        if len({half.reader.filename(0, absolute=True) for half in halves}) == 1:
            return None
    return open_data(path, model, split=val_split, class_map=class_map)


def class_names(dataset: Dataset[Any], model: nn.Module) -> list[str] | None:
    """The names of a model's classes where the data has one for each."""
    names = getattr(dataset, "classes", [])
    return names if len(names) == getattr(model, "num_classes", None) else None


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preprocessing a model asks for: its `pretrained_cfg`, with the input size and channels it has now.

    Returns:
        ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``, as
        `timm.data.create_transform` takes them.
    """
    channels, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    patch_embed: Any = getattr(model, "patch_embed", None)
    if patch_embed is not None:
        channels, size = patch_embed.proj.in_channels, patch_embed.img_size or size
    config: dict[str, Any] = resolve_model_data_config(model, args={"input_size": (channels, *size)})
    for key in ("mean", "std"):
        config[key] = tuple(config[key])
        if len(config[key]) != channels:  # of colours, for a model that takes grey images: their average
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    refill: bool = False,
) -> DataLoader[Any]:
    """A loader that leaves damaged images out of their batch, and gives the same order for the same seed.

    A batch can be smaller for it; where all of it was damaged, it is empty: ``len(images) == 0``. With `refill` it
    holds the first image of the data set that can be read.
    """
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        collate_fn=partial(collate, spare=dataset) if refill else collate,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )


def collate(samples: Sequence[Any], spare: Dataset[Any] | None = None) -> Any:
    """Stack the samples that could be read; where none could, the first that can of the data set `spare`."""
    read = [sample for sample in samples if sample is not None]
    if not read and spare is not None:
        others = map(spare.__getitem__, range(len(spare)))  # type: ignore[arg-type]
        read = list(islice((sample for sample in others if sample is not None), 1))
    try:
        return default_collate(read) if read else (torch.empty(0), torch.empty(0, dtype=torch.long))
    except (TypeError, RuntimeError) as reason:  # not tensors, or not of one size
        raise ReadError(f"images cannot be put into a batch: {' '.join(str(reason).split())}") from reason


def image_batches(source: ImageSource, model: nn.Module, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
    """Batches of images ``(b, C, H, W)`` for a model; labels are not looked at.

    Damaged images of a path are named in a warning at the end; those of a data set are its owner's to report.

    Args:
        source: A path as `open_data` takes it (class folders are not needed; of several splits, the one for
            training), a data set, a loader, or a tensor.
        model: Gives the preprocessing of a path.
        batch_size: Images a batch; a loader keeps its own.
        limit: At most so many images, spread evenly over the source; of a loader, the first.

    Raises:
        DataError: Nothing is there, or no images.
        InputSizeError: The model does not take images of their size or number of channels.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} is not positive")
    from .count import check_images  # which takes the models' settings from here

    by_path = isinstance(source, str | os.PathLike)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        source = _prepare(_open_reader(path, None, True), path, model)
    for images in _image_batches(source, batch_size, limit):
        check_images(model, images)
        yield images
    if by_path and isinstance(source, Dataset) and (damage := report_damage(source)):
        warnings.warn(damage, LeanVitWarning, stacklevel=2)


def labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """The images and the class indices ``(B,)``, int64, of a batch from anyone's data set.

    Raises:
        DataError: It is no such pair.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor)):
        raise DataError(f"a batch of labelled images is a pair (images, labels) of tensors, not {_kind(batch)}")
    images, labels = batch
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"labels are class indices, one integer an image, not {_kind(labels)}")
    return images, labels.long()


def _kind(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}, {thing.dtype}"
    if isinstance(thing, list | tuple) and len(thing) < 5:
        return f"a {type(thing).__name__} of ({', '.join(type(part).__name__ for part in thing)})"
    return f"a {type(thing).__name__}"


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels ``(B,)`` that a model with so many classes has no output for."""
    lowest, highest = map(int, labels.aminmax())
    if lowest < 0 or highest >= classes:
        raise DataError(f"labels go from {lowest} to {highest}, the model has {classes} classes")


def report_damage(dataset: Dataset[Any]) -> str:
    """One line that counts and names the damaged images met so far; empty when there are none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not isinstance(dataset, ImageData) or not dataset.damaged:
        return ""
    names = dataset.damaged
    share = f"{len(names)} of the {len(dataset)} images in {dataset.path}"
    return f"{share} are damaged and were skipped: {_some(names, 20)}"


def _image_batches(
    source: Dataset[Any] | DataLoader[Any] | Tensor, batch_size: int, limit: int | None
) -> Iterator[Tensor]:
    seen = 0
    for images in _first_items(source, batch_size, limit):
        if limit is not None:
            images = images[: limit - seen]
        if len(images):
            yield images.float() if images.dtype is torch.float64 else images
        seen += len(images)
        if seen == limit:
            break
    if not seen:
        raise DataError("there are no images to work with")


def _first_items(source: Any, batch_size: int, limit: int | None) -> Iterator[Tensor]:
    """The first item of each batch, which holds the images."""
    if isinstance(source, Tensor):
        yield from source[_spread(len(source), limit)].split(batch_size)
        return
    if isinstance(source, Dataset):
        if isinstance(source, Sized):
            source = Subset(source, _spread(len(source), limit))
        source = loader(source, batch_size)
    if not isinstance(source, DataLoader):
        raise DataError(f"images are given as a path, a data set, a loader or a tensor, not a {type(source).__name__}")
    for batch in source:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(images, Tensor):
            raise DataError(f"a batch is images, or starts with them, as a tensor; this one is {_kind(batch)}")
        yield images


def _spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, evenly spaced."""
    limit = count if limit is None else min(limit, count)
    return [index * count // limit for index in range(limit)]


def _prepare(
    reader: ImageReader,
    path: str,
    model: nn.Module | None,
    training: bool = False,
    transform: Transform | None = None,
    augment: Mapping[str, Any] | None = None,
    **labelling: Any,
) -> ImageData:
    """The images of a reader with the preprocessing of a model; without one, ImageNet's."""
    is_digits = isinstance(reader, DigitsReader)
    default = DIGITS_CONFIG if is_digits else resolve_data_config({"input_size": (3, 224, 224)})
    config = dict(default) if model is None else data_config(model)
    if is_digits:
        config["crop_pct"] = 1.0  # digits fill their 8×8 to the edge
    channels = config["input_size"][0]
    if channels not in IMAGE_MODES:
        raise ConfigError(f"the model takes {channels} channels; images have 1, 3 or 4")
    if transform is None:
        options = {**(DIGITS_AUGMENT if is_digits else {}), **(augment or {})} if training else {}
        try:
            transform = create_transform(**config, is_training=training, **options)
        except (TypeError, ValueError, AssertionError) as reason:
            raise ConfigError(f"timm does not know this augmentation: {reason}") from None
    return ImageData(reader, path, transform, mode=IMAGE_MODES[channels], crop_pct=config.get("crop_pct"), **labelling)


def check_there(path: str) -> None:
    """Refuse a path of images that names no file or folder; whether a scheme's name means any, its reader knows.

    Raises:
        DataError: Nothing is there.
    """
    if path != "digits" and path.partition("/")[0] not in SCHEMES and not Path(path).expanduser().exists():
        raise DataError(f"no such file or folder: {path}")


def _open_reader(path: str, split: str | None, training: bool, class_map: ClassMap = "") -> ImageReader:
    check_there(path)
    scheme, _, rest = path.partition("/")
    if class_map and scheme in ("digits", "wds"):
        raise ConfigError(f"{path}: a class map is for named classes, and these come with their labels")
    reader: ImageReader
    if path == "digits":
        reader = DigitsReader(train=_is_train_split(split, training))
    elif scheme == "wds":
        reader = ShardReader(rest, split)
    elif scheme == "hfds":
        reader = _open_hugging_face(path, split or ("train" if training else "validation"), class_map)
    elif scheme in ("hfids", "tfds"):
        raise DataError(f"{path} is a stream, whose images have no fixed places; use a folder, a .tar, wds/ or hfds/")
    else:
        reader = _open_local(_find_split(Path(path).expanduser(), split, training), class_map)
    if not len(reader):
        raise DataError(f"no images in {path}")
    return reader


def _is_train_split(split: str | None, training: bool) -> bool:
    if split is not None and split not in TRAIN_SPLITS + VAL_SPLITS:
        raise DataError(f"digits has no split {split!r}; it has train and val")
    return split in TRAIN_SPLITS if split else training


def _find_split(root: Path, split: str | None, training: bool) -> Path:
    """The folder or file that holds a split; `root` itself where it is not divided."""
    inside = sorted(entry.name for entry in root.glob("[!.]*")) if root.is_dir() else []
    if split is None:
        folders = [name for name in inside if (root / name).is_dir()]
        others = [name for name in folders if name not in TRAIN_SPLITS + VAL_SPLITS]
        if others and not {*folders}.isdisjoint(TRAIN_SPLITS) and not {*folders}.isdisjoint(VAL_SPLITS):
            raise DataError(
                f"{root} holds splits and other folders ({_some(others)}); name the split, or move these away"
            )
        # Divided only if there are none but splits: among other classes, `train` is one that runs on rails.
        if others or not folders:
            return root
        wanted = TRAIN_SPLITS if training else VAL_SPLITS
    else:
        wanted = (split, *next((names for names in (TRAIN_SPLITS, VAL_SPLITS) if split in names), ()))
    for name in wanted:
        if (root / name).exists():
            return root / name
    raise NoSplitError(f"{root} has no split {wanted[0]!r}; it holds {_some(inside) or 'none'}")


def _open_local(path: Path, class_map: ClassMap) -> ImageReader:
    if path.is_file() and path.suffix != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar")
    labels = _labels_of(class_map, path)
    try:
        reader = create_reader("", root=str(path), class_map=labels)
    except tarfile.TarError as reason:
        raise DataError(f"{path} cannot be read as a tar file: {reason}") from reason
    except (RuntimeError, ValueError) as reason:  # how timm's folder and tar readers fail on nothing
        mapped = " of the classes in the class map" if class_map else ""
        raise DataError(f"no images{mapped} in {path}") from reason
    # Forked workers would share an open tar, and one position in it; opening it anew costs 0.1 ms an image.
    reader.cache_tarfiles = False
    return reader


def _labels_of(class_map: ClassMap, folder: Path | None = None) -> dict[str, int] | None:
    """The label of each class; a file's name may be relative to the folder of the images."""
    if not class_map or isinstance(class_map, dict):
        return class_map or None
    file = Path(class_map).expanduser()
    if not file.exists() and folder is not None:
        file = folder / class_map
    if not file.exists():
        raise DataError(f"no such class map: {class_map}")
    names = read_class_names(file)
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None or not names:
        problem = "is empty" if twice is None else f"names {twice!r} twice"
        raise DataError(f"the class map {class_map} {problem}")
    return {name: label for label, name in enumerate(names)}


def read_class_names(file: str | os.PathLike[str]) -> list[str]:
    """The class names in a text file: one a line, in order; lines without a name do not count."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"the class names in {file} cannot be read: {reason}") from reason
    return [line.strip() for line in text.splitlines() if line.strip()]


def _open_hugging_face(path: str, split: str, class_map: ClassMap) -> ImageReader:
    try:
        return create_reader(path, split=split, class_map=_labels_of(class_map))
    except ImportError as reason:
        raise DataError(f"{path} needs the package datasets: pip install 'leanvit[datasets]'") from reason
    except (
        OSError,
        ValueError,
        KeyError,
    ) as reason:  # what datasets raises for a name, split or column it cannot find
        raise DataError(f"{path}, split {split!r}: {' '.join(str(reason).split())}") from reason


def _found_classes(reader: ImageReader) -> dict[str, int]:
    """The reader's label of each class name, if it has names; timm's tar reader calls them otherwise."""
    return getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}


def known_classes(model: nn.Module | None) -> list[str]:
    """The names a model has for its classes (`label_names` of its `pretrained_cfg`); empty where it has none."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or []
    return list(names.values()) if isinstance(names, Mapping) else list(names)


def _match_classes(
    path: str, found: Mapping[str, int], known: Sequence[str], num_classes: int | None, mapped: bool
) -> tuple[list[str], dict[int, int] | None]:
    """The name of each label, and the model's label for each of the reader's where they differ."""
    names = sorted(found, key=found.__getitem__)
    if mapped:
        if num_classes is not None and max(found.values()) >= num_classes:
            highest = max(found.values())
            raise DataError(f"the class map goes up to label {highest}, the model has {num_classes} classes")
        return names if sorted(found.values()) == list(range(len(names))) else [], None
    if not found or num_classes is None:
        return names, None
    if names == [""]:
        raise DataError(f"the images of {path} have no labels: they lie in no folders named by class; use a class map")
    if num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        known = ImageNetInfo("imagenet-1k").label_names()
    if len(known) == num_classes:
        label = {name: index for index, name in enumerate(known)}
        for name in names:
            if name not in label:
                theirs = f"the model's {num_classes} classes ({_some(known)})"
                raise DataError(f"{path}: {name!r} is none of {theirs}; use a class map")
        return list(known), {found[name]: label[name] for name in names}
    if len(found) != num_classes:
        classes = f"{len(found)} classes ({_some(names)})"
        raise DataError(f"{path} has {classes}, the model has {num_classes}; use a class map")
    return names, None


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
