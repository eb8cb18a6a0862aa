"""Where a process's time went: spans with a name, a start and an end, appended to a file of the process's own.

Off unless `arm` was called (by `fedloom sim --profile`, for every process of the run). A place that is measured says::

    began = spans.start()
    ...
    spans.end("decode", began, site=spec.site, task=spec.task)

which is a truth test each while it is off. Times are seconds of a clock that all processes of a machine share.

A file is a stream of msgpack: a map that names the process, then lists of spans, each a list as `Fields` has it, and at
the end a map with what was dropped. A process that is killed loses what was not flushed. A fault of the disk ends the
recording, with one warning, and nothing else.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from .codec import pack
from .errors import CodecError

__all__ = ["ENV_SPANS", "MAX_SPANS", "SUFFIX", "VERSION", "Fields", "Recorder", "arm", "end", "flush", "start"]

log = structlog.get_logger(__name__)

#: The folder of the spans' files, in the environment of the processes that are to record.
ENV_SPANS = "FEDLOOM_SPANS"
SUFFIX = ".spans"
VERSION = 1
#: A process records so many spans, some 35 MiB of them; more are counted.
MAX_SPANS = 400_000
_BATCH = 512
_FLUSH_S = 0.25

#: name, start, end, round (-1: not known), site, task, lane: the thread's name, or what else works one thing at a time.
Fields = tuple[str, float, float, int, str, str, str]


class Recorder:
    """One process's spans on their way to its file, which is made with the first of them. Thread-safe.

    Args:
        folder: where the file goes; it exists.
        process: what the process is called.
        clock: seconds, from any origin that all processes share.
    """

    def __init__(
        self,
        folder: Path,
        process: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_spans: int = MAX_SPANS,
    ) -> None:
        self.clock = clock
        self.dropped = 0
        self._pid = os.getpid()
        self._path = folder / f"{self._pid}{SUFFIX}"
        self._process = process
        self._left = max_spans
        self._pending: list[Fields] = []
        self._flushed_at = clock()
        self._fd = -1
        self._lock = threading.Lock()

    def add(self, span: Fields) -> None:
        """Keep a span; now and then what has come together is written.

        Raises:
            OSError: the disk refused. CodecError: what is no plain data.
        """
        with self._lock:
            if self._left <= 0:
                self.dropped += 1
                return
            self._left -= 1
            self._pending.append(span)
            if len(self._pending) >= _BATCH or span[2] - self._flushed_at >= _FLUSH_S:
                self._write()

    def flush(self) -> None:
        """Write what is pending. Raises as `add`."""
        with self._lock:
            if self._pending:
                self._write()

    def close(self) -> None:
        """Write what is pending, and how much was dropped. Raises as `add`."""
        with self._lock:
            if self._pending or self.dropped:
                self._write({"dropped": self.dropped})
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._left = 0

    def _write(self, last: dict[str, int] | None = None) -> None:
        spans, self._pending = self._pending, []
        if os.getpid() != self._pid:
            self._left = 0  # a fork of user code's: these are its parent's
            return
        data = b""
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            data = pack({"version": VERSION, "process": self._process, "pid": self._pid})
        data += pack(spans) + (pack(last) if last else b"")
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._flushed_at = self.clock()


_recorder: Recorder | None = None


def arm(folder: str, process: str) -> None:
    """Have this process record its spans into a file in this folder; "" ends the recording."""
    global _recorder
    _recorder = None
    if folder:
        _recorder = Recorder(Path(folder), process)
        atexit.register(_close, _recorder)


def start() -> float:
    """The clock, or 0.0 where nothing is recorded."""
    return 0.0 if _recorder is None else _recorder.clock()


def end(name: str, began: float, *, round: int = -1, site: str = "", task: str = "", lane: str = "") -> None:
    """Record what `start` has begun; nothing where it returned 0.0."""
    recorder = _recorder
    if not began or recorder is None:
        return
    try:
        lane = lane or threading.current_thread().name
        recorder.add((name, began, recorder.clock(), round, str(site), str(task), lane))
    except (OSError, CodecError) as error:
        _give_up(error)


def flush() -> None:
    """Write what is pending: before a long wait, in which the process may be killed."""
    if _recorder is not None:
        try:
            _recorder.flush()
        except (OSError, CodecError) as error:
            _give_up(error)


def _close(recorder: Recorder) -> None:
    if recorder is _recorder:
        try:
            recorder.close()
        except (OSError, CodecError) as error:
            _give_up(error)


def _give_up(error: Exception) -> None:
    global _recorder
    _recorder = None
    log.warning("profile_ends_here", reason=str(error))
