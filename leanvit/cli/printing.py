"""What commands print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

PIPE_WIDTH = 200
"""Columns of a table that goes to a file or another program, where nothing needs to fit a screen."""


def show(renderable: Any) -> None:
    """Print a table or a line on stdout, in full where stdout is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(renderable)


def say(line: str) -> None:
    """Print a line about the progress on stderr."""
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


def say_where(page: Path) -> None:
    """Tell where a page is."""
    say(f"report: {page} ({page.stat().st_size / 1e6:.2g} MB, opens in any browser)")


def provenance(ctx: typer.Context) -> dict[str, Any]:
    """How figures came about, for a file of them: command, every setting, machine and versions."""
    from ..measure import environment

    return {
        "command": ctx.info_name,
        "command_line": command_line(),
        "settings": ctx.params,
        "environment": environment(),
    }


def command_line() -> str:
    """What was typed, to be kept beside the figures."""
    return shlex.join(["leanvit", *sys.argv[1:]])
