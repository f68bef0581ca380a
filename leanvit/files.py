"""Files that appear under their name only when whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` at the end; folders are made on the way.

    What is no regular file, such as a pipe, is written to as it is.

    Raises:
        ConfigError: The disk is full or the folder read-only; nothing is left behind then.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the ending, which says the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            yield path
            return
        yield part
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
