"""The `leanvit` command: a thin layer over the library that imports what a sub-command needs when it runs."""

from __future__ import annotations

from . import comparing, demo, doctor, exporting, measuring, reporting, training  # noqa: F401  (each registers its commands)
from .app import app, main

__all__ = ["app", "main"]
