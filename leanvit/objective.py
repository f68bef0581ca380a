"""What training minimises: CE + λ_kd·KL + λ_tok·MSE + the methods' own terms (docs/training.md)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .count import input_size
from .data import data_config
from .errors import ConfigError, InputSizeError
from .model import LeanModel
from .record import Recorder, record


class Teacher:
    """The dense model as the student sees it: in eval mode, without gradients, in its own normalisation.

    Not a module, and not part of the objective: its weights are neither saved nor synchronised.

    Args:
        model: Any classifier; for `tokens`, a timm `VisionTransformer` of the student's width and patch grid.
        student: The model to be trained; images come in its normalisation.
        tokens: Whether its tokens are wanted beside its logits.

    Raises:
        ConfigError: The teacher cannot teach this student.
    """

    def __init__(self, model: nn.Module, student: nn.Module, tokens: bool) -> None:
        _check_size_matches(model, student)
        if tokens:
            _check_tokens_match(model, student)
        classes = getattr(model, "num_classes", None), getattr(student, "num_classes", None)
        if None not in classes and classes[0] != classes[1]:
            raise ConfigError(f"the teacher has {classes[0]} classes, the student {classes[1]}; they must be the same")
        self.model = model.eval()
        self.tokens = tokens
        self.renormalise = _renormalisation(data_config(student), data_config(model))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``(B, classes)`` and, if wanted, normed tokens ``(B, P + N, C)``, from one forward pass."""
        if self.renormalise is not None:
            scale, shift = (values.to(images.device) for values in self.renormalise)
            images = images * scale + shift
        if not self.tokens:
            return self.model(images), None
        tokens = self.model.forward_features(images)  # type: ignore[operator]
        return self.model.forward_head(tokens), tokens  # type: ignore[operator]


class Objective(nn.Module):
    """The student and its loss as one module: all that needs a gradient passes through `DDP.forward`.

    Args:
        student: The model to train, lean or dense.
        smoothing: Label smoothing of the cross-entropy, in [0, 1).
        kd_weight: λ_kd, the weight of the KL divergence from the teacher's class distribution.
        kd_temperature: What both sides' logits are divided by before that.
        token_weight: λ_tok, the weight of the mean squared error against the teacher's tokens, reduced the
            way the student's were.
    """

    settings = ("smoothing", "kd_weight", "kd_temperature", "token_weight")

    def __init__(
        self,
        student: nn.Module,
        *,
        smoothing: float = 0.0,
        kd_weight: float = 0.0,
        kd_temperature: float = 1.0,
        token_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.smoothing = smoothing
        self.kd_weight = kd_weight
        self.kd_temperature = kd_temperature
        self.token_weight = token_weight

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss to minimise under ``"loss"`` and, detached, each weighted term of it and each method's metrics.

        Args:
            images: ``(B, 3, H, W)``.
            targets: Class indices ``(B,)`` or, after mixup, class probabilities ``(B, classes)``.
            teacher_logits: ``(B, classes)``; left out, there is no KL term.
            teacher_tokens: ``(B, P + N, C)``; left out, there is no token term.
        """
        methods = self.student.lean.methods if isinstance(self.student, LeanModel) else ()
        tokens = None
        wanted_kinds = [kind for method in methods for kind in method.loss_kinds]
        with record(*wanted_kinds) if wanted_kinds else nullcontext(Recorder()) as recorded:
            if teacher_tokens is None:
                logits = self.student(images)
            else:  # one pass for both, logits and tokens
                tokens = self.student.forward_tokens(images, track=True)  # type: ignore[operator]
                logits = self.student.forward_head(tokens.x)  # type: ignore[operator]
        terms = {"ce": F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)}
        if teacher_logits is not None:
            terms["kd"] = self.kd_weight * distillation_loss(logits, teacher_logits, self.kd_temperature)
        if tokens is not None:
            wanted = tokens.reduce(teacher_tokens)
            terms["tokens"] = self.token_weight * F.mse_loss(tokens.x.float(), wanted.float())
        for method in methods:
            terms |= {f"{method.name}_{name}": value for name, value in method.losses(recorded).items()}
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        for method in methods:
            terms |= {f"{method.name}_{name}": value for name, value in method.metrics(recorded).items()}
        return {"loss": loss, **{name: term.detach().float() for name, term in terms.items()}}


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(teacher ‖ student), mean over the batch (Hinton et al., 2015, arXiv 1503.02531, section 2).

    Args:
        logits: The student's, ``(B, classes)``.
        teacher_logits: ``(B, classes)``.
        temperature: T.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check_size_matches(teacher: nn.Module, student: nn.Module) -> None:
    size = getattr(getattr(student, "patch_embed", None), "img_size", None)
    if size is None:
        return
    try:
        input_size(teacher, size)
    except InputSizeError as reason:
        own = "×".join(map(str, input_size(teacher)[1:]))
        raise ConfigError(f"the teacher takes {own}, the student {'×'.join(map(str, size))}") from reason


def _check_tokens_match(teacher: nn.Module, student: nn.Module) -> None:
    hint = "; use token_weight=0 to learn from its logits alone"
    if not isinstance(student, LeanModel):
        raise ConfigError("only a lean student gives tokens to compare with the teacher's: slim() makes one" + hint)
    if not isinstance(teacher, VisionTransformer) or isinstance(teacher, LeanModel):
        raise ConfigError(f"the teacher, a {type(teacher).__name__}, has no dense tokens to compare with" + hint)
    for what, of in {
        "width": lambda model: model.embed_dim,
        "patch grid": lambda model: tuple(model.patch_embed.grid_size),
        "number of prefix tokens": lambda model: model.num_prefix_tokens,
    }.items():
        if of(teacher) != of(student):
            raise ConfigError(f"the teacher has {what} {of(teacher)}, the student {of(student)}" + hint)


def _renormalisation(given: dict[str, object], wanted: dict[str, object]) -> tuple[Tensor, Tensor] | None:
    """Scale and shift ``(channels, 1, 1)`` from one mean and std to another; None where they are the same."""
    if (given["mean"], given["std"]) == (wanted["mean"], wanted["std"]):
        return None
    mean, std, new_mean, new_std = (
        torch.tensor(config[key]).view(-1, 1, 1) for config in (given, wanted) for key in ("mean", "std")
    )
    return std / new_std, (mean - new_mean) / new_std
