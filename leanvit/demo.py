"""The whole of leanvit on handwritten digits: train, slim with every method, distil, deploy, measure."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from timm.models.vision_transformer import VisionTransformer

from . import methods
from .bench import bench
from .data import open_data
from .measure import Comparison, compare, environment
from .methods import Method
from .model import slim
from .report.gather import machine, page_of
from .report.page import Source, write
from .report.plots import pareto
from .report.tables import Row, Table
from .train import TrainConfig, distill, train
from .warmstart import warm_start

DATA = "digits"
COMBINATIONS = ("dgssa+glad",)
"""Recipes beside those of one method each."""

# Muon, because with AdamW a Vision Transformer that starts from nothing needs three times the epochs.
DENSE_TRAINING = TrainConfig(
    epochs=12, batch_size=32, lr=3e-3, opt="muon", warmup_epochs=2, smoothing=0.0, device="cpu"
)
LEAN_TRAINING = replace(DENSE_TRAINING, epochs=4, lr=1e-3, warmup_epochs=1)
# Decisions start far on the safe side: in so few steps they move only at a rate of their own.
DECIDING_TRAINING = replace(LEAN_TRAINING, lr=1e-2, inherited_lr_scale=0.1)

SPEED_MODEL = "deit_tiny_patch16_224"


def run(output: Path, json: Path | None = None) -> None:
    """Run the demo and write ``results.json``, ``results.csv``, ``pareto.png`` and ``report.html``.

    Args:
        output: The folder for them; made when missing.
        json: Another place for the same JSON.
    """
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    console = Console(stderr=True, highlight=False)
    recipes = default_recipes()

    console.rule(f"a dense ViT learns {DATA}", align="left")
    dense = small_vit()
    with one_thread():
        train(dense, open_data(DATA, dense, training=True), config=DENSE_TRAINING)
    console.rule(f"{len(recipes)} lean models: slim, warm start, distil", align="left")
    lean = lean_vits(dense, recipes, console)
    console.rule("deploying and measuring", align="left")
    comparison = on_digits(dense, lean)
    digits = [{**row, "data": DATA, "trained": True} for row in comparison.rows]
    speed = on_random_images(recipes)

    table = Table([*digits, *speed])
    table.to_csv(output / "results.csv")
    about: dict[str, Any] = {
        "command": "demo",
        "environment": environment(),
        "seconds": round(time.monotonic() - start),
    }
    for path in filter(None, (output / "results.json", json)):
        table.to_json(path, **about)
    pareto(digits, output / "pareto.png", title="Handwritten digits: accuracy against measured throughput")
    source = Source(
        "handwritten digits, and random images where it says so",
        "leanvit demo",
        seed=DENSE_TRAINING.seed,
        settings={"dense training": DENSE_TRAINING, "distillation": LEAN_TRAINING, "of decisions": DECIDING_TRAINING},
        environment=machine(about["environment"]),
    )
    page = page_of(dense, lean, comparison, source)
    rows = [{**row, "source": 0} for row in table.rows]
    report = write(replace(page, rows=rows), output / "report.html", overwrite=True)
    show = Console(highlight=False)
    show.print(f"\n{DATA}: held-out images, a ViT of {digits[0]['param_count']:.2f} M parameters")
    show.print(figures(digits))
    show.print(f"\n{SPEED_MODEL}: the same recipes with random weights, speed only")
    show.print(figures(speed))
    show.print(f"results.json, results.csv and pareto.png are in {output}/", markup=False)
    show.print(f"The report, to open in a browser: {report.absolute()}", markup=False, soft_wrap=True)


def default_recipes() -> dict[str, tuple[Method, ...]]:
    """Every registered method with its default parameters, and the combinations, by name."""
    single = {name: (method(),) for name, method in methods.available().items()}
    return single | {text: methods.parse(text) for text in COMBINATIONS}


def adapts(recipe: tuple[Method, ...]) -> bool:
    """Whether what is computed depends on the image."""
    return any(method.data_dependent for method in recipe)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: at this size a second gains little, and costs much where its core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_vit() -> VisionTransformer:
    """A Vision Transformer for the digits: 24 px, 36 patches, 8 blocks, 0.4 M parameters, random weights."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=24,
        patch_size=4,
        embed_dim=64,
        depth=8,
        num_heads=4,
        in_chans=1,
        num_classes=10,
    )
    # At timm's scale the first epochs go by until attention can tell places apart.
    model.get_parameter("pos_embed").data.mul_(5)
    return cast(VisionTransformer, model)


def lean_vits(
    dense: VisionTransformer, recipes: Mapping[str, tuple[Method, ...]], console: Console
) -> dict[str, VisionTransformer]:
    """A lean model of each recipe, as many at a time as there are threads (and at most four, for memory)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    processes = min(torch.get_num_threads(), 4)
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task(f"{processes} at a time", total=len(recipes))
        learning = {pool.submit(lean_vit, dense, recipe): name for name, recipe in recipes.items()}
        lean = {}
        for done in as_completed(learning):
            name = learning[done]
            lean[name] = done.result()
            console.print(f"{name} has learned")
            bar.advance(task)
    return {name: lean[name] for name in recipes}


def lean_vit(dense: VisionTransformer, recipe: tuple[Method, ...]) -> VisionTransformer:
    """A model slimmed by a recipe, warm-started and distilled on the digits.

    The held-out digits take no part, not even in choosing the best epoch: they are for the table.
    """
    images = open_data(DATA, dense, split="train")
    decides = any(method.has_budget for method in recipe)
    config = DECIDING_TRAINING if decides else LEAN_TRAINING
    with one_thread():
        lean = slim(dense, *recipe, images=images)
        warm_start(lean, dense, images, progress=False)
        distill(lean, dense, open_data(DATA, dense, training=True), config=config, progress=False)
    return lean


def on_digits(dense: VisionTransformer, lean: Mapping[str, VisionTransformer]) -> Comparison:
    """Accuracy on the held-out digits, cost and speed of the deployed forms."""
    images = open_data(DATA, dense, split="val")
    return compare(dense, lean, images, images=images, batch_sizes=(128,))


def on_random_images(recipes: Mapping[str, tuple[Method, ...]]) -> list[Row]:
    """What the recipes do to the speed of a model of ordinary size; those that decide by the image are left out.

    With random weights such a decision says nothing.
    """
    dense = timm.create_model(SPEED_MODEL).eval()
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    models = {
        "dense": dense,
        **{name: slim(dense, *recipe, images=images) for name, recipe in recipes.items() if not adapts(recipe)},
    }
    rows = bench(models, images=images, batch_sizes=(1, 16), precisions=("fp32",))
    return [{**row, "data": "random", "trained": False} for row in rows]


def figures(rows: list[Row]) -> RichTable:
    """The rows as a table: each model's figures, and their ratios to the dense model's."""
    accurate = "top1" in rows[0]
    table = RichTable()
    table.add_column("model")
    for heading in (
        *(("top-1 %", "agreement %") if accurate else ("batch",)),
        "MMACs",
        "images/s",
        "fewer MACs",
        "faster",
    ):
        table.add_column(heading, justify="right")
    dense_macs = rows[0]["infer_gmacs"]
    for row in rows:
        own = (
            (f"{row['top1']:.1f}", f"{row.get('agreement', 100):.1f}") if accurate else (str(row["infer_batch_size"]),)
        )
        macs = row["infer_gmacs"]
        table.add_row(
            row["model"],
            *own,
            f"{1e3 * macs:.1f}",
            f"{row['infer_samples_per_sec']:.0f}",
            f"{dense_macs / macs:.2f}x",
            f"{row['speedup']:.2f}x",
        )
    return table
