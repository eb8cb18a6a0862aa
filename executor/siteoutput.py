"""What a worker's tasks print, on its way to the logs of their sites.

A task of a millisecond that prints nothing should not open a log for it. So standard output and error go into one file
of the worker's, which is looked at behind each task: what is in it is moved to the site's log. A task that takes
longer gets its site's log itself, so that whoever follows it sees each line as it comes. Of a worker that has died,
the agent moves what is left (`salvage`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from .hostio import flush_output

#: From when on a task writes into its site's log itself.
_QUICK_S = 0.05
_SUFFIX = ".out"
_READ_BYTES = 256 * 1024


class SiteOutput:
    """This process's standard output and error, from here until `close`; `end` behind each `begin`.

    Args:
        place: a path of the worker's own; the file's name is this with a suffix.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, place: str) -> None:
        flush_output()
        self._own = (os.dup(1), os.dup(2))
        self._held = os.open(place + _SUFFIX, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._log = ""  # of the task at work
        self._began = 0.0
        self._open = False  # that log is standard output itself
        self._busy = threading.Event()
        self._point_to(self._held)
        threading.Thread(target=self._watch, name="fedloom-output", daemon=True).start()

    def begin(self, log: str) -> None:
        """A task begins, whose site has this log."""
        with self._lock:
            self._log, self._began = log, time.monotonic()
        if not self._busy.is_set():
            self._busy.set()

    def end(self) -> None:
        """The task is over: what it has printed is in the site's log."""
        flush_output()
        with self._lock:
            if self._open:
                self._open = False
                self._point_to(self._held)
            self._move()
            self._log = ""

    def rest(self) -> None:
        """No task follows for now."""
        self._busy.clear()

    def close(self) -> None:
        """Standard output and error are what they were before."""
        self.end()
        for number, own in zip((1, 2), self._own, strict=True):
            os.dup2(own, number)

    @staticmethod
    def _point_to(descriptor: int) -> None:
        for number in (1, 2):
            os.dup2(descriptor, number)

    def _move(self) -> None:
        if self._log and os.lseek(self._held, 0, os.SEEK_END):
            with contextlib.suppress(OSError):  # a full disk: it is lost
                _append(self._held, self._log)
            os.ftruncate(self._held, 0)

    def _watch(self) -> None:
        pause = threading.Event()
        while self._busy.wait():
            pause.wait(_QUICK_S)
            with self._lock:
                if self._log and time.monotonic() - self._began >= _QUICK_S:
                    self._move()  # also what a process that it has started writes there
                    if not self._open:
                        self._give_log()

    def _give_log(self) -> None:
        with contextlib.suppress(OSError):
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._point_to(log)
            os.close(log)
            self._open = True


def salvage(place: str, log: str) -> None:
    """Move what a worker that has ended left behind to a log."""
    held = Path(place + _SUFFIX)
    with contextlib.suppress(OSError):
        descriptor = os.open(held, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.lseek(descriptor, 0, os.SEEK_END):
                _append(descriptor, log)
        finally:
            os.close(descriptor)
    held.unlink(missing_ok=True)


def _append(source: int, log: str) -> None:
    with Path(log).open("ab", buffering=0) as file:
        at = 0
        while data := os.pread(source, _READ_BYTES, at):
            file.write(data)
            at += len(data)
