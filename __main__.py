"""``python -m fedloom`` and the ``fedloom`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from .recipe.cli.main import app

    app(prog_name="fedloom")


if __name__ == "__main__":
    sys.exit(main())
