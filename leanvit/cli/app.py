"""The command itself: sub-commands register here, and every mistake of a user leaves here, as one line."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import LeanVitError, LeanVitWarning
from ..version import __version__

USER_MISTAKE = 2
INTERRUPTED = 130


class CommandGroup(TyperGroup):
    """The sub-commands, with one way to fail: a line on stderr and exit code 2, never a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False  # so that errors come here instead of into boxes of several lines
        warnings.showwarning = _show_warning
        try:
            code = super().main(*args, **kwargs)
        except typer.TyperException as error:  # an unknown option, a value of the wrong kind, ...
            fail(error.format_message())
        except LeanVitError as error:
            fail(str(error))
        except OSError as error:  # a full disk, a folder without permission
            if error.errno == errno.EPIPE:
                raise
            fail(str(error))
        if code == INTERRUPTED:  # typer's own code for Ctrl-C, which it says nothing about
            fail("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, LeanVitWarning):
        typer.echo(f"leanvit: {message}", err=True)
    else:
        _SHOW_AS_USUAL(message, category, *where, **more)


_SHOW_AS_USUAL = warnings.showwarning


def fail(message: str, code: int = USER_MISTAKE) -> NoReturn:
    """End the program with one line on stderr."""
    typer.echo(f"leanvit: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leanvit {__version__}")
        raise typer.Exit


@app.callback()
def leanvit(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end."),
    ] = False,
) -> None:
    """Make Vision Transformers cheaper to run, and prove it."""


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="leanvit")
