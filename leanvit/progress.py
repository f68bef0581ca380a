"""What a person sees while a model trains: one bar over the whole run, and a line for each epoch."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .runs import Row


class TrainingBar:
    """Progress over the whole run on standard error, and a line for each epoch that is done."""

    def __init__(self, updates: int, epochs: int, shown: bool) -> None:
        self.shown, self.epochs = shown, epochs
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not shown,
        )
        self.task = self.progress.add_task("", total=updates, epoch=1, loss=math.nan, speed=0.0)

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, epoch: int, updates: int, loss: float, speed: float) -> None:
        self.progress.update(self.task, completed=updates, epoch=epoch, loss=loss, speed=speed)

    def epoch_done(self, row: Row) -> None:
        parts = ", ".join(
            f"{name.removeprefix('train_')} {value:.3f}"
            for name, value in row.items()
            if name.startswith("train_") and name != "train_loss" and "." not in name
        )
        top1 = f"  top-1 {row['val_top1']:.2f} %" if "val_top1" in row else ""
        speed = f"{row['images_per_second']:.0f} images/s"
        self.say(f"epoch {row['epoch']}/{self.epochs}  loss {row['train_loss']:.4f} ({parts}){top1}  {speed}")

    def say(self, line: str) -> None:
        if self.shown and line:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
