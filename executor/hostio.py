"""A host process's own surroundings: its folder, its module path, where its output goes, its end."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from .channel import Map


def enter(start: Map, script_folder: Path | None = None) -> None:
    """Go to the folder that the agent names, and have the job's modules found."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what was printed is in the log, however the process ends
    cwd, custom = start.get("cwd"), start.get("custom")
    if cwd:
        os.chdir(cwd)
    wanted = [str(path) for path in (custom, script_folder) if path]
    sys.path[:0] = [path for path in dict.fromkeys(wanted) if path not in sys.path]


def flush_output() -> None:
    """What was printed is written."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - behind every task, and suppress() takes as long as the flush
            stream.flush()
        except (OSError, ValueError):
            pass


def end_group() -> NoReturn:
    """Kill this process and whatever it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(3)
