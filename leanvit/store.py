"""Models as folders: weights in safetensors, all else in timm's `config.json`, nothing ever unpickled."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, InputSizeError, LeanVitError, UnsupportedModelError
from .model import HEADS, check_patches

FORMAT_VERSION = 1
"""Of the ``leanvit`` part of ``config.json``; what is newer than the reader is refused."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

PathLike = str | os.PathLike[str]
Shape = tuple[int, ...]


def save(
    model: VisionTransformer,
    folder: PathLike,
    *,
    overwrite: bool = False,
    class_names: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a folder that `load` gives back, and timm too where the model is not lean.

    Everything is written to a hidden folder beside it first: if that fails, the folder is as it was before.

    Args:
        model: A model that `timm.create_model` made, slimmed or not, deployed or not.
        folder: Made with its parents. What is there must be empty, or with `overwrite` a saved model.
        overwrite: Replace the model that is there.
        class_names: The name of each class; left out, those the model came with.
        extra: Anything that JSON can hold, kept as ``leanvit.extra`` in ``config.json``.

    Raises:
        CheckpointError: The folder cannot be written or holds something else, or the model cannot be built
            again from a config.
        ConfigError: There is not one name for each class.
    """
    folder = Path(folder).expanduser().resolve()  # through a link, whose target is replaced and not the link itself
    if folder == Path.cwd():
        raise CheckpointError(f"cannot save to {folder}: it is the current folder, which cannot be replaced")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ConfigError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    _check_replaceable(folder, overwrite)
    _check_describable(model)
    block = {"version": FORMAT_VERSION, **_lean_config(model), **({"extra": dict(extra)} if extra else {})}
    with _replacing(folder) as draft:
        _write_weights(model, draft / WEIGHTS)
        _write_config(model, draft / CONFIG, block, class_names)
        (draft / CARD).write_text(_card(model, folder.name), encoding="utf-8")
    return folder


def load(folder: PathLike) -> VisionTransformer:
    """The model that a folder holds, in evaluation mode; everything is checked before a weight is read.

    Raises:
        CheckpointError: A file is missing, damaged, of a newer format or of another model, or names a method,
            parameter or architecture that is not known.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    shapes = read_shapes(folder / WEIGHTS)
    try:
        model = _build(folder, config.get("leanvit", {}))
    except LeanVitError as reason:
        raise CheckpointError(f"{folder / CONFIG}: {reason}") from reason
    except Exception as reason:  # what a constructor makes of arguments it cannot use is anything
        raise CheckpointError(f"{folder / CONFIG} describes no model that can be built: {reason}") from reason
    _check_keys(model, shapes, folder / WEIGHTS)
    # Assigned to keep their precision; cloned because they lie unaligned in the mapped file, which is slow.
    weights = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    _check_kinds(model, weights, folder / WEIGHTS)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_config(folder: PathLike) -> dict[str, Any]:
    """The ``config.json`` of a saved model, checked: timm's fields, and ``leanvit`` where leanvit wrote it.

    Raises:
        CheckpointError: It is missing, damaged, of a newer format, or of an architecture unknown to timm.
    """
    file = Path(folder).expanduser() / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model: there is no {CONFIG}") from None
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"{file} cannot be read: {reason}") from reason
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise CheckpointError(f"{file} names no architecture")
    names = config.get("label_names") or []
    if not isinstance(names, list | dict) or not all(
        isinstance(name, str) for name in (names.values() if isinstance(names, dict) else names)
    ):
        raise CheckpointError(f"{file}: label_names is not a list of class names")
    if "leanvit" in config:
        _check_lean_config(config["leanvit"], file)
    if not timm.is_model(architecture):
        raise CheckpointError(f"{file}: timm {timm.__version__} has no architecture {architecture!r}")
    return config


def read_shapes(file: PathLike) -> dict[str, Shape]:
    """The shape of each tensor in a safetensors file, from its header.

    Raises:
        CheckpointError: The file is missing, truncated, pickled or of another format.
    """
    file = Path(file).expanduser()
    try:
        with file.open("rb") as opened:
            start = opened.read(2)
        if start in (
            b"PK",
            b"\x80\x02",
            b"\x80\x03",
            b"\x80\x04",
            b"\x80\x05",
        ):  # torch.save, and bare pickles
            raise CheckpointError(f"{file} is a pickled checkpoint, which can run code; convert it to safetensors")
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {file}") from None
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {reason}") from reason


def load_checkpoint(model: VisionTransformer, path: PathLike) -> None:
    """Load the weights of a safetensors file, or of a saved model's folder, into a model of the same shapes.

    A position embedding for another input size is resampled, as in timm.

    Raises:
        CheckpointError: The file cannot be read, or is of another architecture: names the first key that
            differs and both shapes.
    """
    file = _weights_file(path)
    shapes = read_shapes(file)
    resample = _differs_in_grid(model, shapes)
    if resample:
        shapes["pos_embed"] = tuple(model.state_dict()["pos_embed"].shape)
    _check_keys(model, shapes, file)
    state = load_file(file)
    if resample:
        grid, prefix = model.patch_embed.grid_size, _prefix_positions(model)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
    model.load_state_dict(state)


def resolve_model(
    name: str,
    *,
    checkpoint: PathLike | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> VisionTransformer:
    """The model that a name stands for, in evaluation mode.

    Args:
        name: A timm name (``deit_tiny_patch16_224``), a saved model's folder, a run's folder (its ``best/``,
            else ``last/``), ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
        checkpoint: Weights to load; nothing is downloaded then, and a timm model has as many classes as they.
        pretrained: Download the weights of a timm name.
        num_classes: Number of classes; for another one than the weights have, the head starts anew.
        img_size: Input size in pixels, or height and width; the position embedding is resampled.

    Raises:
        ConfigError: There is no such model.
        UnsupportedModelError: It is no Vision Transformer.
        InputSizeError: The patch size does not divide `img_size`.
        CheckpointError: Its weights cannot be read, or do not fit.
    """
    folder = _saved_folder(name)
    if folder is not None:
        model = load(folder)
    elif name.startswith("hf-hub:"):
        model = from_hub(name.removeprefix("hf-hub:"))
    else:
        _check_timm_name(name, img_size)
        classes = _head_classes(checkpoint) if checkpoint is not None else None
        model = _create(name, pretrained and checkpoint is None, num_classes=classes or num_classes, img_size=img_size)
    if img_size is not None:
        _check_img_size(model, img_size)
        size = _both(img_size)
        if tuple(model.patch_embed.img_size or ()) != size:
            model.set_input_size(img_size=size)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model.eval()


def push_to_hub(
    model: VisionTransformer,
    repo_id: str,
    *,
    class_names: Sequence[str] | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Add model",
) -> str:
    """Save a model to a Hugging Face repository, made if need be, and return the address of the commit.

    Raises:
        CheckpointError: The hub cannot be reached or refuses, or what `save` raises.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(model, Path(temporary) / repo_id.rpartition("/")[2], class_names=class_names)
        with _hub_errors(repo_id):
            api = HfApi(token=token, library_name="leanvit")
            full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=full_id, folder_path=folder, commit_message=commit_message))


def from_hub(repo_id: str, *, revision: str | None = None, token: str | None = None) -> VisionTransformer:
    """Load a model from a Hugging Face repository: one that leanvit saved, or a Vision Transformer of timm's.

    Args:
        repo_id: ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` as in timm.
        revision: A branch, tag or commit.
        token: For a private repository; left out, the one that is logged in.

    Raises:
        CheckpointError: There is no such repository or the hub cannot be reached, or what `load` raises.
    """
    repo_id, _, behind = repo_id.partition("@")
    where: dict[str, Any] = {"revision": revision or behind or None, "token": token}
    with _hub_errors(repo_id):
        config = Path(hf_hub_download(repo_id, CONFIG, **where))
        if "leanvit" in json.loads(config.read_text(encoding="utf-8")):
            folder = snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS], **where)
        else:
            at = f"@{where['revision']}" if where["revision"] else ""
            return _plain(timm.create_model(f"hf-hub:{repo_id}{at}", pretrained=True)).eval()
    return load(folder)


def _build(folder: Path, block: Mapping[str, Any]) -> VisionTransformer:
    """The model that a checked config describes, with weights still to come."""
    from .methods import from_config
    from .model import deploy, slim

    methods = tuple(from_config(method) for method in block.get("methods", ()))
    dense = _plain(timm.create_model(f"local-dir:{folder}", pretrained=False))
    if "methods" not in block:
        return dense
    lean = slim(dense, *methods)
    if block["deployed"]:
        lean = deploy(lean, force=True)
    lean.lean = replace(lean.lean, digests=block["digests"])
    return lean


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, or is removed if anything fails."""
    mark = uuid.uuid4().hex[:8]
    draft, old = (folder.with_name(f".{folder.name}.{mark}.{kind}") for kind in ("draft", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        if not folder.exists():
            draft.rename(folder)
            return
        folder.rename(old)  # a folder that is not empty cannot be replaced in one step
        try:
            draft.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as reason:
        detail = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise CheckpointError(f"cannot save to {folder}: {detail}") from reason
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file")
    if not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"cannot save to {folder}: it holds something else than a model")
    if not overwrite:
        raise CheckpointError(f"cannot save to {folder}: it holds a model; overwrite=True replaces it")


def _check_describable(model: VisionTransformer) -> None:
    """Make sure that the arguments to be saved give the dense model again; it is built without memory."""
    architecture = (getattr(_plain(model), "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise CheckpointError("only a model that timm.create_model made can be described by a config and saved")
    with torch.device("meta"):
        again = timm.create_model(architecture, **model_arguments(model)).state_dict()
    own = model.state_dict()
    lean = getattr(model, "lean", None)
    dense_keys = own.keys() if lean is None else lean.digests.keys() | {key for key in own if key.startswith(HEADS)}
    differing = (dense_keys ^ again.keys()) | {
        key for key in own.keys() & again.keys() if own[key].shape != again[key].shape
    }
    if differing:
        raise CheckpointError(
            f"the model cannot be described: timm.create_model({architecture!r}) with what is known of its "
            f"arguments gives another {min(differing)}; from version 1.0.31 on, timm remembers them all"
        )


def model_arguments(model: VisionTransformer) -> dict[str, Any]:
    """The arguments of `timm.create_model` for the dense model: what timm noted and what the model shows."""
    noted = getattr(model, "_model_args", {})
    heads = [block.attn.num_heads for block in model.blocks if hasattr(block.attn, "num_heads")]
    rows, columns = model.patch_embed.patch_size
    return {
        # Drop rates belong to the training, not to the model.
        **{key: value for key, value in noted.items() if not key.endswith(("drop_rate", "drop_path_rate"))},
        **({"num_heads": heads[0]} if heads else {}),
        "img_size": model.patch_embed.img_size,
        "patch_size": rows if rows == columns else (rows, columns),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
    }


def dense_twin(lean: VisionTransformer) -> VisionTransformer:
    """A dense model of a lean one's architecture and size, with random weights.

    Raises:
        UnsupportedModelError: timm did not make the model, so what it is called is not known.
    """
    architecture = (getattr(lean, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise UnsupportedModelError(
            f"{type(lean).__name__} does not say which architecture it is; make the model with timm.create_model()"
        )
    return timm.create_model(architecture, **model_arguments(lean)).eval()  # type: ignore[return-value]


def _lean_config(model: nn.Module) -> dict[str, Any]:
    lean = getattr(model, "lean", None)
    if lean is None:
        return {}
    methods = [method.to_config() for method in lean.methods]
    return {"methods": methods, "deployed": lean.deployed, "digests": lean.digests}


def _check_lean_config(block: Any, file: Path) -> None:
    version = block.get("version") if isinstance(block, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: its leanvit part has no version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{file} has version {version}, this leanvit reads up to {FORMAT_VERSION}; upgrade it")
    expected = {"methods": list, "deployed": bool, "digests": dict} if "methods" in block else {}
    for key, kind in expected.items():
        if not isinstance(block.get(key), kind):
            raise CheckpointError(f"{file}: leanvit.{key} is {block.get(key)!r} and not a {kind.__name__}")
    for method in block.get("methods", ()):
        if not isinstance(method, dict):
            raise CheckpointError(f"{file}: leanvit.methods holds {method!r}, which is no method")


def _write_weights(model: nn.Module, file: Path) -> None:
    # Cloned, because safetensors refuses tensors that share memory, such as two views of one weight.
    state = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    save_file(state, file, metadata={"format": "pt"})


def _write_config(
    model: VisionTransformer, file: Path, block: dict[str, Any], class_names: Sequence[str] | None
) -> None:
    fields: dict[str, Any] = {"leanvit": block}
    if class_names:
        fields["label_names"] = list(class_names)
    try:
        save_config_for_hf(model, file, model_config=fields, model_args=model_arguments(model))  # type: ignore[arg-type]
    except (TypeError, ValueError) as reason:
        raise CheckpointError(f"the model cannot be described in JSON: {reason}") from reason


def _card(model: VisionTransformer, name: str) -> str:
    """The model card: what it is, what it was made of, under which licence, and how to load it."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    lean = getattr(model, "lean", None)
    form = f" with `{lean}`{', deployed' if lean.deployed else ''}" if lean else ""
    height, width = model.patch_embed.img_size or cfg["input_size"][1:]
    header = {
        "library_name": "leanvit",
        "pipeline_tag": "image-classification",
        "tags": "[image-classification, leanvit, timm]",
        "license": cfg.get("license"),
        "base_model": cfg.get("hf_hub_id"),
    }
    lines = "".join(f"{key}: {value}\n" for key, value in header.items() if value)
    return (
        f"---\n{lines}---\n# {name}\n\n"
        f"`{cfg['architecture']}`{form}: {model.num_classes} classes, images of {height}×{width} pixels.\n"
        f"Licence of the weights it started from: {cfg.get('license') or 'unknown'}.\n\n"
        f'```python\nimport leanvit\n\nmodel = leanvit.load("{name}")\n```\n'
    )


def _check_keys(model: nn.Module, shapes: Mapping[str, Shape], file: Path) -> None:
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in (*own, *shapes):
        if own.get(key) != shapes.get(key):
            there, here = shapes.get(key, "missing"), own.get(key, "missing")
            raise CheckpointError(
                f"{file} is of another architecture: {key} is {there} in the file and {here} in the model"
            )


def _check_kinds(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Any precision will do, but not integers for weights."""
    for key, own in model.state_dict().items():
        if weights[key].is_floating_point() != own.is_floating_point():
            raise CheckpointError(f"{file} is damaged: {key} is {weights[key].dtype} and should be like {own.dtype}")


def _differs_in_grid(model: VisionTransformer, shapes: Mapping[str, Shape]) -> bool:
    """Whether a file has the model's position embedding, but for another square of patches."""
    found = shapes.get("pos_embed", ())
    if model.pos_embed is None or len(found) != 3 or found[2] != model.embed_dim:
        return False
    patches = found[1] - _prefix_positions(model)
    return found[1] != model.pos_embed.shape[1] and patches > 0 and round(patches**0.5) ** 2 == patches


def _prefix_positions(model: VisionTransformer) -> int:
    """How many entries of the position embedding belong to prefix tokens."""
    return 0 if model.no_embed_class else int(model.num_prefix_tokens)


def _weights_file(path: PathLike) -> Path:
    path = Path(path).expanduser()
    return path / WEIGHTS if path.is_dir() else path


def _head_classes(checkpoint: PathLike) -> int | None:
    """How many classes the head of a checkpoint tells apart, if it has one."""
    shape = read_shapes(_weights_file(checkpoint)).get("head.weight")
    return shape[0] if shape else None


def _saved_folder(name: str) -> Path | None:
    """The folder of the saved model that a name means, if it means one: its own, or a run's best or last."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / CONFIG).is_file():
            return candidate
    if name.startswith("local-dir:") or (folder.is_dir() and not timm.is_model(name)):
        raise CheckpointError(f"{folder} holds no model: there is no {CONFIG} in it, nor in best/ or last/")
    return None


def _check_timm_name(name: str, img_size: int | tuple[int, int] | None) -> None:
    """Refuse what timm does not have or leanvit cannot use, before anything is downloaded."""
    if "/" in name or not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give a timm name, a folder or hf-hub:OWNER/NAME"
        raise ConfigError(f"there is no model {name!r}; {hint}")
    try:
        with torch.device("meta"):
            model = _plain(timm.create_model(name))
    except RuntimeError as reason:  # the part of the name behind the dot is unknown
        raise ConfigError(f"there is no model {name!r}: {reason}") from reason
    if img_size is not None:
        _check_img_size(model, img_size)


def _create(name: str, pretrained: bool, **options: Any) -> VisionTransformer:
    try:
        return _plain(timm.create_model(name, pretrained=pretrained, **options))
    except (RuntimeError, OSError) as reason:
        raise CheckpointError(f"there are no weights for {name} to be had: {_first_line(reason)}") from reason


def _plain(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"{type(model).__name__} is not supported; timm's VisionTransformer is")
    check_patches(model)
    return model


def _both(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])


def _check_img_size(model: VisionTransformer, img_size: int | tuple[int, int]) -> None:
    for pixels, patch in zip(_both(img_size), model.patch_embed.patch_size, strict=True):
        if pixels < patch or pixels % patch:
            below = max(pixels // patch, 1) * patch
            raise InputSizeError(
                f"image size {pixels} is no multiple of the patch size {patch}; {below} and {below + patch} are"
            )


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError:
        raise
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, KeyError, RuntimeError) as reason:
        raise CheckpointError(f"{repo_id} on the Hugging Face hub: {_first_line(reason)}") from reason


def _first_line(reason: Exception) -> str:
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)
