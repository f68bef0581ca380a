"""The commands that measure a model: figures printed as a table and written where asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .app import app
from .options import (
    Amp,
    AmpDtype,
    AmpType,
    Device,
    EvalData,
    ModelChoice,
    Output,
    Overwrite,
    ReportFile,
    Timing,
    amp_name,
    best_device,
    check_output,
    data_there,
    new_file,
    takes_groups,
)
from .printing import command_line, say, say_where

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageData
    from ..measure import EvalResult
    from ..report.tables import Row


@app.command("eval")
@takes_groups
def evaluate(
    ctx: typer.Context,
    choice: ModelChoice,
    data: EvalData,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="Count agreement with it.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", help="Images a batch.")] = 50,
    device: Device = "auto",
    amp: Amp = False,
    amp_dtype: AmpType = AmpDtype.bfloat16,
    per_image: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=new_file, help="CSV: each image's MACs and latency.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Measure accuracy on labelled images.

    Top-1, top-5, agreement with a teacher, and what the model costs. A lean model is deployed first.
    """
    from ..count import deployed_form
    from ..data import report_damage
    from ..measure import Table
    from ..measure import evaluate as measure
    from ..store import resolve_model

    model = deployed_form(choice.load())
    images = data.open(model)
    result = measure(
        model,
        images,
        teacher=resolve_model(teacher, pretrained=True) if teacher else None,
        batch_size=batch_size,
        workers=data.workers,
        device=best_device(device),
        amp=amp_name(amp, amp_dtype),
    )
    row = accuracy_row(choice.model, model, result) | ({"teacher": teacher} if teacher else {})
    output.write(ctx, Table([row], title=f"{images.path}, {result.count} images"))
    if result.damaged:
        say(report_damage(images))
    if per_image:
        write_per_image(model, images, per_image, best_device(device))


@app.command()
@takes_groups
def bench(
    ctx: typer.Context,
    choice: ModelChoice,
    method: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Such as dgssa+glad; may be repeated.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="PATH", callback=data_there, help="Real images to run on, else random ones.")
    ] = None,
    num_warm_iter: Annotated[int, typer.Option(metavar="N", help="Rounds before those that count.")] = 3,
    torchcompile: Annotated[bool, typer.Option("--torchcompile", help="The same as --engine compile.")] = False,
    *,
    timing: Timing,
    output: Output,
) -> None:
    """Time models against the dense one.

    They take turns in one run: images/s, latency, MACs, memory. MODEL is timed with random weights unless
    told otherwise, which makes no difference to speed; a lean MODEL beside a dense one of its architecture.
    """
    from ..bench import bench as measure
    from ..count import deployed_form, forms
    from ..measure import Table
    from ..methods import parse
    from ..model import LeanModel, slim
    from ..store import dense_twin

    model = choice.load(pretrained=False)
    if not isinstance(model, LeanModel):
        models: dict[str, nn.Module] = {
            "dense": model,
            **{text: slim(model, *parse(text), images=data_dir) for text in method or ()},
        }
    elif method:
        raise ConfigError(f"{choice.model} is lean already ({model.lean}); --method is for a dense model")
    else:
        models = {"dense": dense_twin(model), choice.model: model}
    models = {name: deployed_form(model) for name, model in models.items()}
    for name, ready in models.items():
        for form in forms(ready):
            say(f"{name}: {form}")
    arguments = timing.arguments() | ({"engines": ["compile"]} if torchcompile else {})
    rows = measure(models, images=data_dir, warmup=num_warm_iter, **arguments)
    output.write(ctx, Table(rows, title=choice.model))


@app.command()
@takes_groups
def count(
    ctx: typer.Context,
    choice: ModelChoice,
    method: Annotated[str, typer.Option(metavar="TEXT", help="Such as dgssa:layers=1,2,3+glad.")] = "",
    data_dir: Annotated[
        str | None, typer.Option(metavar="PATH", callback=data_there, help="Images for what a method measures.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Count MACs and parameters by layer and by kind of operation, of the deployed form."""
    from ..count import Share
    from ..count import count as count_operations
    from ..measure import Table
    from ..methods import parse
    from ..model import slim

    model = choice.load(pretrained=False)
    cost = count_operations(slim(model, *parse(method), images=data_dir) if method else model)
    kinds = {f"all {kind}": share for kind, share in cost.by_kind.items()}
    rows = cost.rows({**cost.by_layer, **kinds, "total": Share(cost.macs, cost.params)})
    output.write(ctx, Table(rows, title=f"{choice.model} {method}".strip()))


@app.command()
@takes_groups
def analyse(
    ctx: typer.Context,
    choice: ModelChoice,
    data_dir: Annotated[str, typer.Option(metavar="PATH", callback=data_there, help="Unlabelled images.")],
    *,
    output: Output,
) -> None:
    """Measure how each layer attends: what "auto" chooses by.

    Relative variance between images (low: static attention will do) and effective rank (low: few tokens will do).
    """
    from ..analysis import attention_statistics
    from ..measure import Table

    layers = attention_statistics(choice.load(), data_dir)
    rows = [
        {"layer": layer.index, "relative_variance": layer.relative_variance, "effective_rank": layer.effective_rank}
        for layer in layers
    ]
    output.write(ctx, Table(rows, title=choice.model))


@app.command()
@takes_groups
def compare(
    ctx: typer.Context,
    choice: ModelChoice,
    lean: Annotated[list[Path], typer.Argument(metavar="LEAN...", help="Saved models or runs to compare with MODEL.")],
    data: EvalData,
    timing: Timing,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    *,
    output: Output,
) -> None:
    """Put lean models beside the dense MODEL.

    One table: accuracy, agreement, MACs, latency, throughput, memory.
    """
    from ..measure import compare as measure
    from ..measure import environment
    from ..report.gather import machine, page_of, short_names
    from ..report.page import Source, check_file, write
    from ..store import resolve_model

    if report:
        check_file(report, overwrite)
    dense = choice.load()
    models = {name: resolve_model(str(path)) for name, path in zip(short_names(lean), lean, strict=True)}
    for model in (dense, *models.values()):
        data.crop(model)
    table = measure(
        dense,
        models,
        data.data_dir,
        split=data.val_split,
        class_map=data.class_map,
        workers=data.workers,
        **timing.arguments(),
    )
    output.write(ctx, table)
    if report:
        title = ", ".join(filter(None, (data.data_dir, data.val_split)))
        source = Source(title, command_line(), settings=ctx.params, environment=machine(environment()))
        say_where(write(page_of(dense, models, table, source), report, overwrite=overwrite))


@app.command()
@takes_groups
def usage(
    ctx: typer.Context,
    choice: ModelChoice,
    data: EvalData,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for usage.json and the pictures.")] = Path(
        "usage"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Show what images use of a model that decides per image.

    By block, by class, the cheapest and the dearest images, and accuracy against random policies of equal usage.
    """
    from ..measure import Table
    from ..usage import write_usage
    from .printing import show

    check_output(output, ["usage.json"], overwrite)
    model = choice.load()
    report = write_usage(model, data.open(model), output)
    show(Table(report["policies"], title=f"{choice.model}, {report['images']} images"))
    say(f"usage.json and pictures are in {output}/")


def write_per_image(model: nn.Module, images: ImageData, file: Path, device: str) -> None:
    """Write what each image costs, and say whether an easy image takes less time."""
    from ..per_image import correlation
    from ..per_image import per_image as measure

    table = measure(model, images, device=device)
    table.to_csv(file)
    found = correlation(table.rows)
    say(
        f"{file}: every image costs the same"
        if found is None
        else f"{file}: over {len(table.rows)} images, MACs and latency at batch 1 have a correlation of {found:.2f}"
    )


def accuracy_row(name: str, model: nn.Module, result: EvalResult | None = None) -> Row:
    """A model's row in the columns of timm's results files, with what it costs."""
    from ..count import count
    from ..data import data_config

    config, cost = data_config(model), count(model.cpu())
    return {
        "model": name,
        "method": str(getattr(model, "lean", "dense")),
        "img_size": config["input_size"][-1],
        **(result.row() if result else {}),
        "param_count": cost.params / 1e6,
        # Where each image has its own cost, the mean over the images.
        "infer_gmacs": result.row()["gmacs_mean"] if result and result.macs is not None else cost.macs / 1e9,
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }
