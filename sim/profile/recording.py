"""A run's profile from its start to its files: what the launcher calls.

Nothing that goes wrong in here hurts the run: it is said once, and there is no profile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from ...serialization.errors import FedloomError
from ...serialization.spans import ENV_SPANS
from .account import account
from .cpu import CpuWatch
from .files import folder_bytes, read_folder
from .table import cpu_of, summary_of, table_text
from .trace import trace_lines, trace_of

if TYPE_CHECKING:
    from ..forkserver.client import WarmClient

__all__ = ["FOLDER", "Profile"]

log = structlog.get_logger(__name__)

#: In the result folder.
FOLDER = "profile"
TRACE_FILE, TABLE_FILE, SUMMARY_FILE = "trace.json", "table.txt", "summary.json"
_SPANS = ".spans"
#: Read of a run that was interrupted: its user waits.
_HASTY_BYTES = 1024 * 1024


class Profile:
    """Made before the run's processes start; `write` once they have ended.

    Args:
        workspace: the result folder.
        warm: what the processes are forked from.
        show: print the tables to standard error at the end.
    """

    def __init__(self, workspace: Path, warm: WarmClient, *, show: bool) -> None:
        self._folder = workspace / FOLDER
        self._spans = self._folder / _SPANS
        self._show = show
        self._watch = CpuWatch(warm.processes)
        self._on = False
        try:
            self._spans.mkdir(parents=True)
            warm.set_env({ENV_SPANS: str(self._spans)})
            self._watch.start()
            self._on = True
        except (OSError, RuntimeError, FedloomError) as error:
            log.warning("no_profile", reason=str(error))

    def write(self, *, whole: bool = True) -> None:
        """Make the files of what was recorded.

        Args:
            whole: whether the run came to its end; else there are files only where that is quick, and nothing is shown.
        """
        self._watch.stop()
        try:
            if self._on and (whole or folder_bytes(self._spans) <= _HASTY_BYTES):
                self._make(show=whole and self._show)
        except Exception as error:  # noqa: BLE001 - the outermost guard: the run's result is there, and stays good
            log.warning("no_profile", reason=repr(error))
        finally:
            shutil.rmtree(self._spans, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # nothing was recorded

    def _make(self, *, show: bool) -> None:
        recording = read_folder(self._spans)
        if not recording.count:
            return
        made = account(recording)
        series = self._watch.series
        trace = trace_of(recording, made.windows, series, launcher=os.getpid())
        summary = summary_of(made, recording, cpu_of(recording, series), trace.left_out)
        _write(self._folder / TRACE_FILE, trace_lines(trace))
        _write(self._folder / SUMMARY_FILE, [json.dumps(summary, indent=1), "\n"])
        _write(self._folder / TABLE_FILE, [table_text(summary, whole=True)])
        if show:
            text = table_text(summary, whole=False)
            print(f"\n{text}\n{self._folder / TABLE_FILE}\n{self._folder / TRACE_FILE}", file=sys.stderr)


def _write(path: Path, parts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(parts)
