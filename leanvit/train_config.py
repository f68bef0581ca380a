"""How to train: every setting by the name timm has for it, checked when given."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from timm.optim import list_optimizers  # type: ignore[attr-defined]

from .errors import ConfigError

SCHEDULES = ("cosine", "tanh", "poly", "wsd", "rsqrt", "constant")
"""timm's learning rate schedules that are told the length of the run and nothing else."""


AT_LEAST_ONE = ("epochs", "batch_size", "grad_accum_steps")
NOT_NEGATIVE = (
    *("inherited_lr_scale", "weight_decay", "warmup_epochs", "mixup", "cutmix"),
    *("kd_weight", "token_weight", "seed", "workers"),
)

ALSO: dict[type, tuple[type, ...]] = {float: (float, int), tuple: (tuple, list)}
"""What is taken for a type beside itself."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; names are timm's where timm has one.

    Args:
        epochs: Passes over the training data.
        batch_size: Images a step and process.
        lr: Peak learning rate.
        inherited_lr_scale: What `lr` is multiplied by for weights taken over from the dense model.
        weight_decay: For weights; biases, norms and what the model exempts have none.
        opt: One of timm's optimisers.
        sched: One of `SCHEDULES`, stepped at every update.
        warmup_epochs: Linear rise of the learning rate, in epochs or parts of one.
        amp: Mixed precision, ``"bf16"`` or ``"fp16"``; empty is what `accelerate launch` says, else fp32.
        grad_accum_steps: Batches to an update.
        clip_grad: Limit of the gradient's norm; 0 and None are no limit.
        mixup, cutmix: Their alpha; 0 is off.
        smoothing: Label smoothing.
        hflip, scale, color_jitter, aa, reprob: Augmentation as timm's training script has it, for data given
            by path; None is timm's default, or what suits the data.
        model_ema: Validate and keep the moving average of the weights.
        model_ema_decay: Its decay, reached after a warm-up.
        kd_weight, token_weight: Weights of the loss terms that need a teacher.
        kd_temperature: Of the class distributions that are compared.
        train_split, val_split: Splits of data given by path.
        class_map: Text file of its class names in order.
        seed: Of everything random.
        workers: Loader processes.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …; empty is the best there is.
        track: Trackers that accelerate knows (``"tensorboard"``, ``"wandb"``, …).

    Raises:
        ConfigError: A value is of another type or out of range.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 3e-4
    inherited_lr_scale: float = 1.0
    weight_decay: float = 0.05
    opt: str = "adamw"
    sched: str = "cosine"
    warmup_epochs: float = 0.5
    amp: str = ""
    grad_accum_steps: int = 1
    clip_grad: float | None = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    hflip: float | None = None
    scale: tuple[float, float] | None = None
    color_jitter: float | None = None
    aa: str | None = None
    reprob: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    kd_weight: float = 0.5
    token_weight: float = 0.5
    kd_temperature: float = 1.0
    train_split: str | None = None
    val_split: str | None = None
    class_map: str = ""
    seed: int = 0
    workers: int = 0
    device: str = ""
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainConfig).items():
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
            accepted = tuple(other for kind in kinds for other in ALSO.get(kind, (kind,)))
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            self._check(name, isinstance(getattr(self, name), accepted), wanted)
        for name in AT_LEAST_ONE:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in NOT_NEGATIVE:
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "kd_temperature"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("clip_grad", self.clip_grad is None or self.clip_grad >= 0, "at least 0, or None")
        self._check("warmup_epochs", self.warmup_epochs <= self.epochs, f"at most epochs={self.epochs}")
        self._check("smoothing", 0 <= self.smoothing < 1, "at least 0 and below 1")
        self._check("model_ema_decay", 0 < self.model_ema_decay < 1, "between 0 and 1")
        for name in ("hflip", "reprob"):
            self._check(name, 0 <= (getattr(self, name) or 0) <= 1, "between 0 and 1")
        self._check("color_jitter", (self.color_jitter or 0) >= 0, "at least 0")
        shares = [0, *(self.scale or (1, 1)), 1]
        ordered = len(shares) == 4 and shares[1] > 0 and shares == sorted(shares)
        self._check("scale", ordered, "two shares of the image, above 0, at most 1, the smaller first")
        self._check("amp", self.amp in ("", "bf16", "fp16"), "'bf16', 'fp16' or empty")
        self._check("sched", self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        known = [str(name) for name in list_optimizers()]
        self._check("opt", self.opt in known, f"an optimiser of timm, the nearest {_nearest(self.opt, known)}")
        mixes = self.mixup > 0 or self.cutmix > 0
        self._check(
            "batch_size",
            not mixes or self.batch_size % 2 == 0,
            "even for mixup and cutmix, which pair images",
        )

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, config: TrainConfig | None, options: dict[str, Any]) -> TrainConfig:
        """`config`, or the defaults, with some fields replaced; an option that is none is refused by name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options.keys() - set(names):
            raise ConfigError(f"there is no training option {name!r}; the nearest: {_nearest(name, names)}")
        return dataclasses.replace(config or cls(), **options)

    def augmentation(self) -> dict[str, Any]:
        """What was asked for, as `timm.data.create_transform` calls it."""
        asked = {
            "hflip": self.hflip,
            "scale": self.scale,
            "color_jitter": self.color_jitter,
            "auto_augment": self.aa,
            "re_prob": self.reprob,
        }
        return {name: value for name, value in asked.items() if value is not None}


def _nearest(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.0))
