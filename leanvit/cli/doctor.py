"""`leanvit doctor`: what this machine and this installation have, for bug reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .app import app
from .options import JsonFile
from .printing import show

OPTIONAL = {
    "tensorboard": "leanvit[tensorboard]",
    "wandb": "leanvit[wandb]",
    "datasets": "leanvit[datasets]",
    "onnx": "leanvit[onnx]",
    "onnxscript": "leanvit[onnx]",
    "onnxruntime": "leanvit[onnx]",
    "openvino": "leanvit[openvino]",
}
"""Packages that leanvit works without, and what they come with."""


@app.command()
def doctor(json: JsonFile = None) -> None:
    """Print what is installed, for bug reports.

    Versions, processor, devices, and whether torch has oneDNN.
    """
    from rich.markup import escape
    from rich.table import Table

    from ..engines import ENGINES
    from ..measure import environment
    from ..report.tables import Table as Results

    found = environment()
    packages = {name: _version(name) for name in OPTIONAL}
    table = Table(show_header=False, box=None)
    for name, value in {**found, **found["versions"]}.items():
        if name not in ("versions", "torch_config", *OPTIONAL):
            table.add_row(name, escape(_text(value)))
    engines = [name for name, engine in ENGINES.items() if all(map(_version, engine.packages))]
    table.add_row("engines", ", ".join(engines))
    for name, installed in packages.items():
        table.add_row(name, escape(installed or f"not installed ({OPTIONAL[name]})"))
    show(table)
    if json:
        Results([]).to_json(json, command="doctor", optional=packages, environment=found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
