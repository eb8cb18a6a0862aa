"""``python -m fedloom`` and the ``fedloom`` command."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.argv[1:2] == ["sim"] and _names_a_job(sys.argv[2:]):
        gc.disable()  # nothing of what is imported here goes away; on again before the job is read
        from .sim.preload import start_early

        start_early()  # a process of its own, which loads everything while this one has yet to read its options

        from .recipe.cli.quick import read_sim

        if (options := read_sim(sys.argv[2:])) is not None:
            from .recipe.cli.leave import leave
            from .recipe.cli.sim import run

            leave(run(options))

    from .recipe.cli.main import app

    app(prog_name="fedloom")


def _names_a_job(args: list[str]) -> bool:
    """Whether a simulation is about to start, in an environment that is known already: --compat changes its path."""
    if os.environ.get("FEDLOOM_COMPAT") or any(arg.startswith("--compat") for arg in args):
        return False
    return any(arg.endswith(".py") or Path(arg).is_dir() for arg in args)


if __name__ == "__main__":
    sys.exit(main())
