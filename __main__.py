"""``python -m fedloom`` and the ``fedloom`` command."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.argv[1:2] == ["sim"] and any(arg.endswith(".py") or Path(arg).is_dir() for arg in sys.argv[2:]):
        from .sim.preload import start_early

        start_early()  # a process of its own, which loads everything while this one has yet to read its options

    from .recipe.cli.main import app

    app(prog_name="fedloom")


if __name__ == "__main__":
    sys.exit(main())
