"""The folder of a training run: settings, epoch rows and checkpoints, each written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from safetensors import SafetensorError

from .errors import CheckpointError, ConfigError
from .files import written_whole

Row = dict[str, Any]
"""What is known of one epoch: its number, train loss and terms, val top-1, lr and images/s."""

KEPT_CHECKPOINTS = 2
PUBLISHED = ("last", "best")
"""The models of a run, of its newest epoch and of its best one."""
RESULT_NEUTRAL = frozenset({"track"})
"""Settings that a run may be resumed with another value of: they change no result."""


class RunFolder:
    """``args.yaml``, ``metrics.csv``, ``summary.csv`` and ``checkpoint-N/`` of a run, N the epochs done.

    Args:
        path: The folder; made when first written to.
        settings: Everything that decides the result, as plain YAML values.
        resume: Whether to go on from what is there.

    Raises:
        ConfigError: There is a run already and `resume` is not asked for, or it was made with other settings, or
            there are models of a run without its checkpoints.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], resume: bool) -> None:
        self.path = Path(path).expanduser()
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as they do in YAML
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give a folder for the run")
        if self.latest() is None:
            self._check_no_model()
            return
        if not resume:
            raise ConfigError(
                f"{self.path} holds a run already; resume it (resume=True, --resume) or give another folder"
            )
        self._check_settings()

    def latest(self) -> Path | None:
        """The newest checkpoint, None before the first epoch's end."""
        checkpoints = self._checkpoints()
        return checkpoints[-1] if checkpoints else None

    def start(self) -> None:
        """Write the settings and clear away what a killed run left half-written."""
        drafts = (f".{name}.*.{kind}" for name in PUBLISHED for kind in ("draft", "old"))  # of `leanvit.save`
        for pattern in (".checkpoint-*.tmp", *drafts):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover)
        with _writing_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path / "args.yaml") as part:
                part.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def partial(self, epochs: int) -> Path:
        """Where the checkpoint after so many epochs is put together before it gets its name."""
        return self.path / f".checkpoint-{epochs}.tmp"

    def commit(self, epochs: int) -> None:
        """Give a finished checkpoint its name, and remove those that are older than the last two."""
        final = self.path / f"checkpoint-{epochs}"
        with _writing_errors(final):
            self.partial(epochs).replace(final)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    @contextmanager
    def writing(self, epochs: int) -> Iterator[Path]:
        """The folder to write a checkpoint's files into; what cannot be written leaves nothing behind.

        Raises:
            CheckpointError: The disk is full or the folder read-only.
        """
        partial = self.partial(epochs)
        with _writing_errors(partial):
            try:
                partial.mkdir(parents=True, exist_ok=True)
                yield partial
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Write ``metrics.csv`` with everything, and ``summary.csv`` as timm's training script has it."""
        timm_names = {"epoch": "epoch", "train_loss": "train_loss", "val_top1": "eval_top1", "lr": "lr"}
        summary = [{name: row[ours] for ours, name in timm_names.items() if ours in row} for row in rows]
        with _writing_errors(self.path):
            for file, table in (("metrics.csv", rows), ("summary.csv", summary)):
                with written_whole(self.path / file) as part, part.open("w", newline="") as text:
                    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in table for name in row)))
                    writer.writeheader()
                    writer.writerows(table)

    def _check_no_model(self) -> None:
        """Refuse to train over models of which there is no checkpoint to go on from."""
        for name in PUBLISHED:
            if (self.path / name / "config.json").is_file():
                raise ConfigError(f"{self.path} holds a model in {name}/ and no checkpoint; give another folder")

    def _checkpoints(self) -> list[Path]:
        numbered = {
            int(match[1]): path
            for path in self.path.glob("checkpoint-*")
            if (match := _CHECKPOINT.fullmatch(path.name))
        }
        return [numbered[epochs] for epochs in sorted(numbered)]

    def _check_settings(self) -> None:
        file = self.path / "args.yaml"
        try:
            saved = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}".replace("\n", " ")) from error
        if not isinstance(saved, dict):
            raise CheckpointError(f"{file} holds no settings")
        differing = [
            f"{name} was {value!r}, now {self.settings.get(name)!r}"
            for name, value in saved.items()  # what an earlier version did not write cannot be compared
            if name not in RESULT_NEUTRAL and value != self.settings.get(name)
        ]
        if differing:
            raise ConfigError(f"{self.path} cannot be resumed with other settings: {'; '.join(differing)}")


def unfinished(path: str | os.PathLike[str]) -> str:
    """Why a folder holds no finished run and no saved model; empty where it holds one.

    A run is finished when it has as many epochs as its settings ask for; a saved model has no epochs to lack.
    """
    path = Path(path)
    if not path.is_dir():
        return "there is no such folder"
    if not any((folder / "config.json").is_file() for folder in (path, *(path / name for name in PUBLISHED))):
        return "it holds no model"
    if not (path / "args.yaml").is_file():
        return ""
    try:
        epochs = yaml.safe_load((path / "args.yaml").read_text())["epochs"]
        with (path / "metrics.csv").open(newline="") as file:
            done = sum(1 for _ in csv.DictReader(file))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        return f"its args.yaml or metrics.csv cannot be read ({type(error).__name__})"
    return f"{done} of {epochs} epochs are done" if done < epochs else ""


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged or foreign checkpoint into one line that names it.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit the model.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be resumed from, remove it to use the one before: {reason}") from error


@contextmanager
def _writing_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError for a full disk
        raise CheckpointError(f"{path} cannot be written: {' '.join(str(error).split())[:300]}") from error
