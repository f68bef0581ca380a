"""The version of leanvit, read by the build and by `leanvit doctor` without importing anything heavy."""

from __future__ import annotations

__version__ = "0.1.0"
