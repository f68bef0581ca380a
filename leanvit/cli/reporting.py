"""`leanvit explain` and `leanvit report`: what a model does with photos, and the page to show for it."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .app import app
from .options import ClassMap, Device, Overwrite, ValSplit, best_device, check_output, data_there, new_file
from .printing import command_line, provenance, say, say_where, show

if TYPE_CHECKING:
    from ..explain import Explanation

Teacher = Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model to put beside it.")]
EXPLAINED = "explained.json"


@app.command("report")
def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs or folders of saved models.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model, if not among the runs.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="PATH", callback=data_there, help="Labelled images: measure on them now.")
    ] = None,
    val_split: ValSplit = None,
    class_map: ClassMap = "",
    images: Annotated[int, typer.Option("--val-num-samples", min=1, metavar="N", help="At most so many.")] = 1000,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPU threads.")] = 2,
    num_bench_iter: Annotated[int | None, typer.Option(metavar="N", help="Rounds; else ten seconds' worth.")] = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
    overwrite: Overwrite = False,
) -> None:
    """Make a page about runs: one HTML file, no network.

    How much faster at what accuracy, what is left out of photos, cost by layer, training, and where each figure
    comes from. With --data-dir all is measured now; without, figures come from the runs' results.json.
    """
    from ..report.gather import page_of_runs
    from ..report.page import check_file, write

    check_file(new_file(output) or output, overwrite)
    page = page_of_runs(
        runs,
        teacher=teacher,
        data_dir=data_dir,
        split=val_split,
        class_map=class_map,
        images=images,
        threads=threads,
        iterations=num_bench_iter,
        device=best_device(device),
        command=command_line(),
    )
    say_where(write(page, output, overwrite=overwrite))


@app.command("explain")
def explain_photos(
    ctx: typer.Context,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Photos.")],
    model: Annotated[str, typer.Option(metavar="RUN", help="A lean model: a run or the folder of a saved one.")],
    teacher: Teacher = None,
    class_map: ClassMap = "",
    query: Annotated[str, typer.Option(metavar="X,Y", help="Column and row of a patch; else the middle one.")] = "",
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("explained"),
    overwrite: Overwrite = False,
) -> None:
    """Draw what a lean model does with photos.

    For each photo: the predictions of dense and lean, MACs and time; which patches each token stands for, what was
    left out, and what a patch attends to, block by block. Writes PNG files, and explained.json with the figures.
    """
    from ..explain import Explainer
    from ..files import written_whole
    from ..photos import read_photo
    from ..report.figures import as_png
    from ..report.tables import Table
    from ..store import resolve_model

    names = file_names(images)
    check_output(output, [EXPLAINED, *(f"{name}-*.png" for name in names)], overwrite)
    for image in images:  # one that cannot be read is to be known before the work starts
        read_photo(image)
    explainer = Explainer(
        resolve_model(model),
        teacher=resolve_model(teacher, pretrained=True) if teacher else None,
        class_names=class_map or None,
        query=patch_place(query),
    )
    found: list[Explanation] = []
    for image, name in zip(images, names, strict=True):
        found.append(explainer(image))
        for figure_name, figure in found[-1].figures().items():
            with written_whole(output / f"{name}-{figure_name}.png") as part:
                part.write_bytes(as_png(figure))
    Table([]).to_json(output / EXPLAINED, **provenance(ctx), photos=[one.to_json() for one in found])
    show(Table([row for one in found for row in prediction_rows(one)]))
    say(f"pictures and {EXPLAINED} are in {output}/")


def prediction_rows(explanation: Explanation) -> list[dict[str, object]]:
    """A line for each model: what it says about the photo, and what that took."""
    return [
        {
            "photo": explanation.name,
            "model": outcome.model,
            "prediction": f"{outcome.top[0].name} {outcome.top[0].probability:.0%}",
            "infer_gmacs": outcome.macs / 1e9,
            "latency_p50": 1e3 * outcome.seconds,
        }
        for outcome in explanation.outcomes
    ]


def patch_place(text: str) -> tuple[int, int] | None:
    """Column and row from ``X,Y``."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"query {text!r} is not of the form X,Y: a column and a row of the patches, such as 5,9")
    return int(parts[0]), int(parts[1])


def file_names(images: list[Path]) -> list[str]:
    """What the pictures of each photo start with: its name, numbered where another photo has the same."""
    names: list[str] = []
    for image in images:
        numbered = (f"{image.stem}-{number}" for number in count(2))
        names.append(next(name for name in chain([image.stem], numbered) if name not in names))
    return names
