"""Training on accelerate: a lean model under its dense teacher (`distill`), or any on labels (`train`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, patch_environment, set_seed
from timm.data.mixup import Mixup
from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    muon,
)
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .count import check_images
from .data import check_labels, class_names, labelled, loader, open_data, open_held_out, report_damage
from .errors import ConfigError, DataError, TrainingDiverged, UnsupportedModelError
from .methods.base import LeanModule
from .model import LeanModel, digests
from .objective import Objective, Teacher
from .ops.processor import has_bf16, warn_of_emulation
from .progress import TrainingBar
from .runs import PUBLISHED, Row, RunFolder, reading
from .store import save
from .train_config import TrainConfig

LabelledImages = str | os.PathLike[str] | Dataset[Any]
"""A path as `open_data` takes it, or a data set of (image ``(3, H, W)``, label)."""

__all__ = ["TrainConfig", "TrainResult", "distill", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Args:
        model: The model that was passed in, in eval mode, with the weights of the best epoch; of the last
            where nothing was held out.
        history: One row an epoch, as in ``metrics.csv``.
        best: The row of the epoch whose weights those are.
    """

    model: nn.Module
    history: list[Row]
    best: Row


def distill(
    lean: nn.Module,
    teacher: nn.Module,
    data: LabelledImages,
    val_data: LabelledImages | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    config: TrainConfig | None = None,
    **options: Any,
) -> TrainResult:
    """Train a lean model end to end, with its dense model as teacher (the loss: docs/training.md).

    Top-1 after each epoch, and the weights kept, are those of the model as it would be deployed: whatever a
    method anneals is taken as finished for it.

    Args:
        lean: From `slim`; trained in place, left with its best weights on the device it was trained on.
        teacher: The dense model; its weights are not changed.
        data: A path as `open_data` takes it, or a data set of (image ``(3, H, W)``, label).
        val_data: The same, for top-1 after each epoch; left out, the held-out split of a path that has one.
        output: Folder for checkpoints, ``metrics.csv``, ``last/`` and ``best/``; without, nothing is written.
        resume: Go on from the last checkpoint in `output`, if there is one; the losses are as in one go.
        progress: Show a progress bar and a line an epoch.
        config: How to train; its fields can be given as `options` too (``epochs=30``).

    Raises:
        ConfigError: A setting, or a combination of model, teacher, data and settings, that cannot work.
        DataError: The data is missing, damaged or of other classes.
        InputSizeError: The images have another size than the model takes.
        UnsupportedModelError: The model has no classifier.
        TrainingDiverged: A loss is not finite; the last checkpoint is kept.
        CheckpointError: A checkpoint cannot be written or read.
    """
    settings = TrainConfig.of(config, options)
    return _Training(lean, teacher, data, val_data, settings, output, resume, progress).run()


def train(
    model: nn.Module,
    data: LabelledImages,
    val_data: LabelledImages | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    config: TrainConfig | None = None,
    **options: Any,
) -> TrainResult:
    """Train a model on labels alone, such as the teacher on a user's classes; the rest is as in `distill`."""
    settings = TrainConfig.of(config, options)
    return _Training(model, None, data, val_data, settings, output, resume, progress).run()


class _Training:
    """One run, from its start or its last checkpoint to its end."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        data: LabelledImages,
        val_data: LabelledImages | None,
        config: TrainConfig,
        output: str | os.PathLike[str] | None,
        resume: bool,
        progress: bool,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("the model has no weights to train; of a deployed model, train the lean one it came from")
        if model.num_classes == 0:
            raise UnsupportedModelError("the model has no classifier (num_classes=0); reset_classifier() gives it one")
        self.model, self.config = model, config
        self.train_data, self.val_data = _open_both(data, val_data, model, config)
        self.accelerator = _accelerator(config, output, lean=isinstance(model, LeanModel))
        self.folder = None
        if output is not None:
            settings = _settings(model, teacher, data, val_data, config, self.accelerator.num_processes)
            self.folder = RunFolder(output, settings, resume)
        self.mix = None
        if config.mixup or config.cutmix:
            self.mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=model.num_classes)
        self.teacher = None
        objective = Objective(model, smoothing=config.smoothing)
        if teacher is not None:
            self.teacher = Teacher(teacher.to(self.accelerator.device), model, tokens=config.token_weight > 0)
            objective = Objective(model, **{name: getattr(config, name) for name in Objective.settings})
        self.updates_per_epoch = math.ceil(len(self._train_loader(0)) / config.grad_accum_steps)
        self.total_updates = config.epochs * self.updates_per_epoch
        if not has_bf16(self.accelerator.device.type):
            _muon_in_fp32()
        _set_progress(model, 1.0)  # what a method keeps from training at first is for the optimiser, too
        try:
            optimizer = _optimizer(model, config)
            self.schedule = _schedule(optimizer, config, self.updates_per_epoch)
        except (ValueError, RuntimeError, AssertionError, ImportError) as reason:
            given = ", ".join(f"{name}={getattr(config, name)}" for name in ("opt", "sched", "epochs", "warmup_epochs"))
            raise ConfigError(f"timm cannot train with {given}: {' '.join(str(reason).split())}") from reason
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.ema = ModelEmaV3(model, config.model_ema_decay, use_warmup=True) if config.model_ema else None
        self.updates = 0
        self.history: list[Row] = []
        self.best_weights: dict[str, Tensor] = {}
        shown = progress and self.accelerator.is_main_process
        self.bar = TrainingBar(self.total_updates, config.epochs, shown)

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and kept: the moving average of the weights where there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def best(self) -> Row:
        """The row with the highest top-1, the later of equals; the last where nothing was held out.

        Epochs in which the model was not yet asked to save what it shall save do not count, once there are others.
        """
        modules = [module for module in self.model.modules() if isinstance(module, LeanModule)]
        rows = [row for row in self.history if all(own.settled(row["epoch"] / self.config.epochs) for own in modules)]
        return max(rows or self.history[-1:], key=lambda row: (row.get("val_top1", 0.0), row["epoch"]))

    def run(self) -> TrainResult:
        """Train what is left to train, and leave the model with its best weights."""
        if self.folder:
            self._resume(self.folder)
        if self.config.track:
            self.accelerator.init_trackers("leanvit", config=_plain(self.config))
        with self.bar:
            for epoch in range(len(self.history), self.config.epochs):
                self._one_epoch(epoch)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for dataset in filter(None, (self.train_data, self.val_data)):
            self.bar.say(report_damage(dataset))
        self.model.load_state_dict(self.best_weights)
        _set_progress(self.model, 1.0)
        return TrainResult(self.model.eval(), self.history, self.best)

    def _one_epoch(self, epoch: int) -> None:
        """Train, validate, write: an epoch counts once its checkpoint is there."""
        row = {"epoch": epoch + 1, **self._train_epoch(epoch)}
        _set_progress(self.kept, 1.0)  # validated and kept as it would be deployed
        if self.val_data is not None:
            row["val_top1"] = self._top1(self.val_data)
        self.history.append(row)
        if self.folder:
            self._checkpoint(self.folder)
        self._remember_best()
        self.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=epoch + 1)
        self.bar.epoch_done(row)

    def _train_epoch(self, epoch: int) -> Row:
        """One pass over the training data; gives the means of the loss and its terms."""
        # Everything random in an epoch follows from its number: a resumed run needs no generator's state.
        set_seed(_seed(self.config.seed, epoch, 1 + self.accelerator.process_index))
        self.objective.train()
        sums: defaultdict[str, float] = defaultdict(float)
        seen, steps, lr, start = 0, 0, 0.0, time.perf_counter()
        batches, to_update = self._train_loader(epoch), self.config.grad_accum_steps
        for index, batch in enumerate(batches):
            images, targets = labelled(batch)
            # accelerate divides each loss by the batches to an update, but an epoch's last update can have fewer.
            scale = to_update / min(to_update, len(batches) - index // to_update * to_update)
            with self.accelerator.accumulate(self.objective):
                terms = self._step(images, targets, scale)
            seen, steps = seen + len(images) * self.accelerator.num_processes, steps + 1
            for name, value in terms.items():
                sums[name] += value
            if self.accelerator.sync_gradients:
                lr = max(group["lr"] for group in self.optimizer.param_groups)
                self._after_update()
                self.bar.update(epoch + 1, self.updates, terms["loss"], seen / (time.perf_counter() - start))
        means = {f"train_{name}": value / steps for name, value in sums.items()}
        return {**means, "lr": lr, "images_per_second": seen / (time.perf_counter() - start)}

    def _step(self, images: Tensor, targets: Tensor, scale: float) -> dict[str, float]:
        """Forward, backward with the loss times `scale` and, once enough batches are in, an update.

        Returns:
            The loss and its terms, mean over all processes.
        """
        _set_progress(self.model, min(self.updates / self.total_updates, 1.0))
        check_images(self.model, images)
        images = images.float()
        check_labels(targets, self.model.num_classes)  # type: ignore[arg-type]
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2  # a damaged image can leave an odd number
            images, targets = self.mix(images[:even], targets[:even])
        taught: tuple[Tensor | None, ...] = ()
        if self.teacher is not None:
            with self.accelerator.autocast():
                taught = self.teacher(images)
        terms = self.objective(images, targets, *taught)
        means = self.accelerator.reduce(torch.stack([term.detach() for term in terms.values()]), "mean")
        measured = dict(zip(terms, means.tolist(), strict=True))
        if not all(map(math.isfinite, measured.values())):
            self._diverged(", ".join(f"{name} {value:g}" for name, value in measured.items()))
        self.accelerator.backward(terms["loss"] * scale)
        if self.config.clip_grad and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return measured

    def _after_update(self) -> None:
        """Move on what follows the weights: the learning rate and the moving average."""
        self.updates += 1
        self.schedule.step_update(self.updates)
        if self.ema:
            self.ema.update(self.model, step=self.updates)

    def _diverged(self, what: str) -> NoReturn:
        checkpoint = self.folder and self.folder.latest()
        raise TrainingDiverged(
            f"not finite at step {self.updates + 1} of {self.total_updates}: {what}; "
            f"try a lower lr than {self.config.lr:g}"
            + (f"; the last good checkpoint is {checkpoint}" if checkpoint else "")
        )

    @torch.no_grad()
    def _top1(self, dataset: Dataset[Any]) -> float:
        """Percent of the images whose most probable class is right, over all processes."""
        self.kept.eval()
        batches = loader(dataset, self.config.batch_size, workers=self.config.workers)
        counts = torch.zeros(2, device=self.accelerator.device)
        for batch in self._share(batches, even=False):
            images, labels = labelled(batch)
            if len(images):
                with self.accelerator.autocast():
                    right = self.kept(images).argmax(dim=-1) == labels
                counts += torch.stack([right.sum(), right.new_tensor(len(labels), dtype=torch.long)])
        correct, seen = self.accelerator.reduce(counts, "sum").tolist()
        return 100 * correct / max(seen, 1)

    def _train_loader(self, epoch: int) -> DataLoader[Any]:
        """This process's batches of an epoch, in an order that its number decides."""
        batch_size, images = self.config.batch_size, len(self.train_data)  # type: ignore[arg-type]
        batches = loader(
            self.train_data,
            batch_size,
            shuffle=True,
            workers=self.config.workers,
            seed=_seed(self.config.seed, epoch),
            drop_last=images >= batch_size * self.accelerator.num_processes,
            refill=True,  # a process without a batch would leave the others waiting for it
        )
        return self._share(batches, even=True)

    def _share(self, batches: DataLoader[Any], even: bool) -> DataLoader[Any]:
        """This process's part of the batches, on its device; `even` repeats some so that all have as many."""
        return prepare_data_loader(
            batches, self.accelerator.device, put_on_device=True, dispatch_batches=False, even_batches=even
        )

    def _checkpoint(self, folder: RunFolder) -> None:
        """Write what continuing needs, then what people read."""
        epochs = len(self.history)
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            self._diverged("the weights before it")
        with folder.writing(epochs) as path:
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process:
                if self.ema:
                    safetensors.torch.save_file(self.ema.module.state_dict(), path / "ema.safetensors")
                (path / "history.json").write_text(json.dumps(self.history))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder.commit(epochs)
            self._publish(folder)
        self.accelerator.wait_for_everyone()

    def _publish(self, folder: RunFolder) -> None:
        """Write the rows and the last model, and the best if it is the last."""
        folder.write_rows(self.history)
        newest = self.history[-1]
        names = class_names(self.train_data, self.kept)
        for name in PUBLISHED if self.best is newest else ("last",):
            save(self.kept, folder.path / name, overwrite=True, class_names=names, extra=newest)  # type: ignore[arg-type]

    def _remember_best(self) -> None:
        if self.best is self.history[-1]:
            self.best_weights = {key: value.detach().cpu().clone() for key, value in self.kept.state_dict().items()}

    def _resume(self, folder: RunFolder) -> None:
        """Load the newest checkpoint, if any, and publish it, which a killed run may not have come to."""
        checkpoint = folder.latest()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder.start()
        if checkpoint is None:
            return
        with reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
            if self.ema:
                self.ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
            self.history = json.loads((checkpoint / "history.json").read_text())
        self.updates = len(self.history) * self.updates_per_epoch
        self.schedule.step_update(self.updates)
        self.bar.update(len(self.history), self.updates, self.history[-1]["train_loss"], 0.0)
        _set_progress(self.kept, 1.0)
        if self.accelerator.is_main_process:
            self._publish(folder)
        self.accelerator.wait_for_everyone()
        self._remember_best()
        if not self.best_weights:
            with reading(folder.path / "best"):
                self.best_weights = safetensors.torch.load_file(folder.path / "best" / "model.safetensors")


def _accelerator(config: TrainConfig, output: str | os.PathLike[str] | None, lean: bool) -> Accelerator:
    for name in config.track:
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"the tracker {name!r} is not known or not installed: pip install {name}")
    if config.track and output is None:
        raise ConfigError("trackers write into the run's folder: give output")
    # accelerate keeps one state a process and refuses another precision or device in it: start anew.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # From some point on a method may leave weights unused, such as a norm of queries that are no longer made.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    with patch_environment(accelerate_torch_device=config.device) if ":" in config.device else nullcontext():
        accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.amp or None,
            gradient_accumulation_steps=config.grad_accum_steps,
            log_with=list(config.track) or None,
            project_dir=output,
            kwargs_handlers=[unused] if lean else None,
        )
    device = accelerator.device.type
    if config.device and torch.device(config.device).type != device:
        raise ConfigError(f"device {config.device!r} is not there; accelerate found {device!r}")
    if accelerator.mixed_precision == "fp16" and device == "cpu":
        raise ConfigError("fp16 is not for training on a CPU; amp='bf16' is")
    if accelerator.mixed_precision == "bf16":
        warn_of_emulation(device)
    return accelerator


def _open_both(
    data: LabelledImages, val_data: LabelledImages | None, model: nn.Module, config: TrainConfig
) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training and held-out data; what is given by path is prepared as the model asks."""
    augment = config.augmentation()
    training: Dataset[Any]
    held_out: Dataset[Any] | None = None
    for given in (data, data if val_data is None else val_data):
        if not isinstance(given, str | os.PathLike | Dataset):
            raise DataError(f"labelled images are given as a path or a data set, not a {type(given).__name__}")
    if not isinstance(data, Dataset):
        training = open_data(
            data, model, split=config.train_split, training=True, class_map=config.class_map, augment=augment
        )
        if val_data is None:
            held_out = open_held_out(
                os.fspath(data),
                model,
                train_split=config.train_split,
                val_split=config.val_split,
                class_map=config.class_map,
            )
    elif augment:
        raise ConfigError(f"{', '.join(augment)}: a data set brings its own augmentation; leave it out or give a path")
    else:
        training = data
    if val_data is not None:
        held_out = (
            val_data
            if isinstance(val_data, Dataset)
            else open_data(val_data, model, split=config.val_split, class_map=config.class_map)
        )
    for dataset in (training, held_out):
        if dataset is not None and not (hasattr(dataset, "__len__") and len(dataset)):
            raise ConfigError(f"{type(dataset).__name__} is empty or has no length; training must know how long it is")
    return training, held_out


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimiser, parameters grouped by weight decay and by learning rate, new or inherited."""
    lean = isinstance(model, LeanModel)
    new = model.new_parameter_names() if isinstance(model, LeanModel) else set()
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.inherited_lr_scale if lean and name not in new else 1.0
            bare = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            groups[scale, 0.0 if bare else config.weight_decay].append(parameter)
    # timm's schedules multiply a group's learning rate by its lr_scale.
    named = [
        {"params": members, "lr_scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()
    ]
    optimizer = create_optimizer_v2(model, config.opt, lr=config.lr, param_group_fn=lambda _: named)
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"{config.opt} needs second derivatives, and training keeps no graph for them")
    return optimizer


@cache
def _muon_in_fp32() -> None:
    """Let timm's Muon orthogonalise updates in fp32: it does so in bf16, which makes a step several times as long where
    that is emulated, and has no option for it.
    """
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Any:
    """timm's schedule over the run, counted in updates."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs * updates_per_epoch,
        warmup_epochs=round(config.warmup_epochs * updates_per_epoch),
        warmup_lr=config.lr / 100,
        decay_rate=1.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def _settings(
    model: nn.Module,
    teacher: nn.Module | None,
    data: LabelledImages,
    val_data: LabelledImages | None,
    config: TrainConfig,
    processes: int,
) -> dict[str, Any]:
    """Everything that decides a run's result and can be written down."""
    return {
        "model": _describe(model),
        "method": str(model.lean) if isinstance(model, LeanModel) else None,
        "teacher": _describe(teacher),
        "teacher_weights": None if teacher is None else _digest(teacher),
        "data": _describe(data),
        "val_data": _describe(val_data),
        "processes": processes,
        **dataclasses.asdict(config),
    }


def _describe(thing: Any) -> str | None:
    if isinstance(thing, nn.Module):
        name = (getattr(thing, "pretrained_cfg", None) or {}).get("architecture") or type(thing).__name__
        return f"{name}, {sum(parameter.numel() for parameter in thing.parameters())} parameters"
    if isinstance(thing, Dataset):
        return f"{type(thing).__name__} of {len(thing)}"  # type: ignore[arg-type]
    return None if thing is None else os.fspath(thing)


def _digest(model: nn.Module) -> str:
    """A short digest of all of a model's weights."""
    return hashlib.blake2b(json.dumps(digests(model.state_dict())).encode(), digest_size=8).hexdigest()


def _plain(config: TrainConfig) -> dict[str, int | float | str]:
    """The settings as every tracker takes them."""
    values = dataclasses.asdict(config)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}


def _set_progress(model: nn.Module, progress: float) -> None:
    if isinstance(model, LeanModel):
        for method in model.lean.methods:
            method.set_progress(model, progress)  # type: ignore[arg-type]


def _seed(*parts: int) -> int:
    """One seed from several numbers, such that no two epochs or processes share theirs."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
