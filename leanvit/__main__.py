"""`python -m leanvit` is the `leanvit` command."""

from __future__ import annotations

from leanvit.cli import main

if __name__ == "__main__":
    main()
