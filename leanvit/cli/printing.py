"""What commands print."""

from __future__ import annotations

from typing import Any

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
    Console(stderr=True, highlight=False).print(line, markup=False)
