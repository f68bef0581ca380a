"""`leanvit export`: a model as one file for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .app import app
from .options import ModelChoice, Overwrite, data_there, new_file, takes_groups
from .printing import say, show


@app.command()
@takes_groups
def export(
    choice: ModelChoice,
    output: Annotated[
        Path, typer.Option(metavar="FILE", callback=new_file, help="Ends in .onnx or .pt2, which says the format.")
    ],
    format: Annotated[
        str, typer.Option(metavar="NAME", help="onnx, program or aotinductor (.pt2); else by the ending.")
    ] = "",
    data_dir: Annotated[
        str | None, typer.Option(metavar="PATH", callback=data_there, help="Real images to compare outputs on.")
    ] = None,
    opset: Annotated[int | None, typer.Option(metavar="N", help="Version of the ONNX operators.")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--no-dynamic-batch", help="Take any number of images at once.")
    ] = True,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Take images of any size.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", help="The number, if not any.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write a model as one file for another engine.

    ONNX, a torch.export program, or a compiled package. The file is run and compared with torch before it is kept.
    """
    from ..count import deployed_form
    from ..export import export as write
    from ..model import LeanModel

    model = choice.load()
    if isinstance(model, LeanModel) and not model.lean.deployed:
        say(f"{choice.model} is not deployed: its deployed form is exported")
    exported = write(
        deployed_form(model),
        output,
        format=format,
        images=data_dir,
        opset=opset,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    show(escape(str(exported)))
