"""`leanvit slim` and `leanvit train`: a lean model from a dense one, and a dense one for a user's classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import app
from .options import (
    Config,
    DataDir,
    MethodText,
    ModelChoice,
    Output,
    Teaching,
    Training,
    best_device,
    takes_groups,
)
from .printing import say

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from ..data import ImageData
    from ..methods import Method
    from ..report.tables import Row, Table

Folder = Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder; else one in runs/.")]
Experiment = Annotated[str, typer.Option(metavar="NAME", help="Folder in it, for several runs.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]


@app.command("slim")
@takes_groups
def slim_model(
    ctx: typer.Context,
    choice: ModelChoice,
    method: MethodText,
    data_dir: DataDir,
    epochs: Annotated[int, typer.Option(min=0, metavar="N", help="Of distillation; 0 needs no labels.")] = 0,
    warm_start_steps: Annotated[int, typer.Option(min=0, metavar="N", help="Label-free steps a block.")] = 60,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="Whom to learn from; else MODEL.")] = None,
    output: Folder = None,
    budget: Annotated[
        str, typer.Option(metavar="X,X", help="Shares of MODEL's MACs for adavit to aim at; a run each.")
    ] = "",
    experiment: Experiment = "",
    resume: Resume = False,
    config: Config = None,
    *,
    training: Training,
    teaching: Teaching,
    files: Output,
) -> None:
    """Swap methods into MODEL, train, deploy, measure, save.

    Warm-starts from unlabelled images, and distils from MODEL if --epochs. The run's folder holds the lean
    model (best/ and last/), its deployed form (deployed/), the figures (results.csv, results.json) and the
    course of the training (curves.png). With --budget there is such a folder for each, with thresholds set in
    best/ and deployed/ so that its mean cost is met, and beside them the figures of all and the curve through
    them (budgets.png).
    """
    from ..budget import set_budget
    from ..count import forms
    from ..data import class_names
    from ..methods import parse
    from ..model import deploy, slim
    from ..objective import Teacher
    from ..report.plots import pareto
    from ..store import resolve_model, save
    from ..train import distill
    from ..warmstart import warm_start

    methods = parse(method)
    settings = training.config(max(epochs, 1), **vars(teaching))
    device = best_device(training.device)
    folder = run_folder(output, experiment, [choice.model, *(applied.name for applied in methods)])
    dense = choice.load()
    images = unlabelled(data_dir, training, dense)
    runs: dict[Path, tuple[tuple[Method, ...], float | None]] = {folder: (methods, None)}
    if budget:
        aimed = aimed_at(shares(budget), methods, dense, images)
        runs = {folder / f"budget-{share:g}": (own, share) for share, own in aimed.items()}
    resuming = {own: check_folder(own, resume) for own in (folder, *runs)}
    if not epochs and any(resuming.values()):
        raise ConfigError(f"{folder} holds a run that was trained; give the --epochs it had, or another --output")
    tutor = resolve_model(teacher, pretrained=True) if teacher else dense
    # Opened before the work starts: data that does not fit the model is to be known now, not in an hour.
    test_images = held_out(data_dir, training, dense)
    names = class_names(labelled(data_dir, training, dense, settings.augmentation()), dense) if epochs else None

    def run(folder: Path, methods: tuple[Method, ...], share: float | None) -> Table | None:
        lean = slim(dense.to(device), *methods, images=images)
        if epochs:
            Teacher(tutor, lean, tokens=teaching.token_weight > 0)
        if not resuming[folder]:  # else the checkpoint holds what the warm start led to
            say(f"{choice.model} with {lean.lean}")
            warm_start(lean, dense, images, steps=warm_start_steps, seed=training.seed, progress=is_main_process())
        if epochs:
            trained = distill(lean, tutor, data_dir, output=folder, resume=resume, config=settings)
        if not is_main_process():
            return None
        if share is not None:
            set_budget(lean, share, images)
            if epochs:
                save(lean, folder / "best", overwrite=True, class_names=names, extra=trained.best)
        if epochs:
            draw_curves(folder)
        else:
            save(lean, folder / "last", overwrite=resume)
        fast = deploy(lean)
        save(fast, folder / "deployed", overwrite=True, class_names=names)
        for form in forms(fast):
            say(form)
        return lean_beside_dense(dense, fast, test_images, device)

    tables = {share: run(own, own_methods, share) for own, (own_methods, share) in runs.items()}
    measured = {share: table for share, table in tables.items() if table is not None}
    if measured:
        table = measured[None] if not budget else side_by_side(measured)
        files.write(ctx, table, folder)
        for line in slowdowns(table.rows):
            say(line)
        if budget and test_images is not None:
            pareto(table.rows, folder / "budgets.png", title=method)


@app.command("train")
@takes_groups
def train_model(
    ctx: typer.Context,
    choice: ModelChoice,
    data_dir: DataDir,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the training data.")] = 10,
    output: Folder = None,
    experiment: Experiment = "",
    resume: Resume = False,
    config: Config = None,
    *,
    training: Training,
    files: Output,
) -> None:
    """Fine-tune a dense MODEL on labelled images.

    The head gets as many classes as the data has. The run's folder holds the model (best/ and last/), the
    figures (results.csv, results.json) and the course of the training (curves.png).
    """
    from ..train import train

    settings = training.config(epochs)
    folder = run_folder(output, experiment, [choice.model])
    check_folder(folder, resume)
    classes = len(labelled(data_dir, training).classes)
    model = choice.load(num_classes=classes or None)
    test_images = held_out(data_dir, training, model)
    train(model, data_dir, output=folder, resume=resume, config=settings)
    if is_main_process():
        draw_curves(folder)
        files.write(ctx, accuracy(choice.model, model, test_images, best_device(training.device)), folder)


def shares(text: str) -> list[float]:
    """The budgets of ``--budget 0.3,0.5``."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--budget {text!r} is not a list of shares such as 0.3,0.5,0.7") from None
    if len(set(found)) < len(found):
        raise ConfigError(f"--budget {text!r} names a share twice")
    return found


def aimed_at(
    budgets: list[float], methods: tuple[Method, ...], dense: VisionTransformer, images: str | ImageData
) -> dict[float, tuple[Method, ...]]:
    """By budget, the methods, those that decide per image with the targets of the budget."""
    from ..model import slim

    if not any(method.has_budget for method in methods):
        names = "+".join(method.name for method in methods)
        raise ConfigError(f"--budget {budgets[0]:g}: {names} has no budget to aim at, adavit has")
    slim(dense, *methods, images=images)  # what does not go together is to be known first
    beside = slim(dense, *(method for method in methods if not method.has_budget), images=images)
    return {
        share: tuple(method.for_budget(dense, share, beside) if method.has_budget else method for method in methods)
        for share in budgets
    }


def side_by_side(tables: Mapping[float | None, Table]) -> Table:
    """The figures of several budgets in one table: the dense model's once, then each lean one's."""
    from ..measure import Table

    rows: list[Row] = []
    for share, table in tables.items():
        for row in table.rows:
            if row["model"] != "dense":
                rows.append({**row, "model": f"budget {share:g}", "budget": share})
            elif share == next(iter(tables)):
                rows.append(row)
    return Table(rows, title=next(iter(tables.values())).title)


def slowdowns(rows: Iterable[Row]) -> list[str]:
    """A line for each point of measurement at which a lean model is slower than the dense one."""
    return [
        f"slower than dense: {row['model']} at batch {row['infer_batch_size']}, {row['precision']}, {row['engine']} "
        f"({row['speedup']:.2f}×); its MACs are {row['infer_gmacs']:.3g} G"
        for row in rows
        if row.get("speedup") is not None and row["speedup"] < 1
    ]


def run_folder(output: Path | None, experiment: str, names: list[str]) -> Path:
    """The folder of a run: as asked for, else named by what is run, under ``runs/``."""
    last_parts = [re.split(r"[/:]", name.rstrip("/"))[-1] for name in names]
    return (output or Path("runs", "-".join(last_parts))).expanduser() / experiment


def check_folder(folder: Path, resume: bool) -> bool:
    """Refuse to mix two runs in a folder; tell whether there is a checkpoint to resume from."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the run")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another --output, or --resume the run in it")
    return resume and any(folder.glob("checkpoint-*"))


def labelled(
    data_dir: str, training: Training, model: VisionTransformer | None = None, augment: dict[str, Any] | None = None
) -> ImageData:
    """Training images as `leanvit.train` opens them."""
    from ..data import open_data

    split, class_map = training.train_split, training.class_map
    return open_data(data_dir, model, split=split, training=True, class_map=class_map, augment=augment)


def unlabelled(data_dir: str, training: Training, model: VisionTransformer) -> str | ImageData:
    """Training images for the warm start and for measured parameters, without augmentation."""
    from ..data import open_data

    split, class_map = training.train_split, training.class_map
    return open_data(data_dir, model, split=split, class_map=class_map) if split else data_dir


def held_out(data_dir: str, training: Training, model: VisionTransformer) -> ImageData | None:
    """The images to measure on; None where there are none."""
    from ..data import open_held_out

    return open_held_out(
        data_dir,
        model,
        train_split=training.train_split,
        val_split=training.val_split,
        class_map=training.class_map,
    )


def lean_beside_dense(
    dense: VisionTransformer, fast: VisionTransformer, images: ImageData | None, device: str
) -> Table:
    """The figures of a run: accuracy where images were held out, and speed."""
    from ..bench import bench
    from ..measure import Table, compare

    if images is None:
        say("no images were held out (--val-split): the table has no accuracy")
        return Table(bench((dense, fast), precisions=("fp32",), device=device), title=str(fast.lean))
    return compare(dense, fast, images, device=device)


def accuracy(name: str, model: VisionTransformer, images: ImageData | None, device: str) -> Table:
    """The figures of a dense model: accuracy where images were held out."""
    from ..measure import Table, evaluate
    from .measuring import accuracy_row

    if images is None:
        say("no images were held out (--val-split): the table has no accuracy")
        return Table([accuracy_row(name, model)])
    result = evaluate(model, images, device=device)
    return Table([accuracy_row(name, model, result)], title=f"{images.path}, {result.count} images")


def draw_curves(folder: Path) -> None:
    """A picture of a run's losses and accuracies by epoch, beside the file they are in."""
    from ..report.plots import training_curves

    training_curves(folder / "metrics.csv", folder / "curves.png")
    say(f"training curves: {folder / 'curves.png'}")


def is_main_process() -> bool:
    """Whether this process writes and prints, where `accelerate launch` started several."""
    return os.environ.get("RANK", "0") == "0"
