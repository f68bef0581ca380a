"""`leanvit demo`: the whole of it on embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import JsonFile


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("leanvit-demo"),
    json: JsonFile = None,
) -> None:
    """Do all of it on embedded data, in minutes.

    Trains a small ViT on handwritten digits, slims it with every method, distils, deploys and measures.
    Writes results.json, results.csv, pareto.png and report.html, a page about all of it.
    """
    from ..demo import run

    run(output, json=json)
