"""What the data process makes durable: finished payload files, and the numbers of its epochs."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..serialization.errors import StorageError
from .spool import Landing, Spool

__all__ = ["Epochs", "Syncer"]

_BATCH = 256


class Epochs:
    """Numbers that rise with every call and over every restart: ranges are reserved in a file.

    Args:
        path: the file; made when it is not there.
    """

    RANGE = 65536

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._next = int(path.read_text())
        except (FileNotFoundError, ValueError):
            self._next = 1
        self._reserved = self._next
        self.next()

    def next(self) -> int:
        """The next number, below 2^32."""
        if self._next >= self._reserved:
            self._reserved = self._next + self.RANGE
            fresh = self._path.with_name(self._path.name + ".new")
            fresh.write_text(str(self._reserved))
            fresh.replace(self._path)
        self._next += 1
        return self._next & 0xFFFFFFFF


class Syncer:
    """Makes files durable: at once with durability ``"process"``, else in a thread, all that are waiting together."""

    def __init__(self, spool: Spool, wake: int) -> None:
        self._spool = spool
        self._wake = wake
        self._todo: queue.SimpleQueue[tuple[str, Landing] | None] = queue.SimpleQueue()
        self._done: deque[tuple[str, bool]] = deque()
        self._error: StorageError | None = None
        self._thread: threading.Thread | None = None
        if spool.durability == "power":
            self._thread = threading.Thread(target=self._main, name="fedloom-data-sync", daemon=True)
            self._thread.start()

    def submit(self, landings: Sequence[tuple[str, Landing]]) -> None:
        """Take these on."""
        if self._thread is None:
            self._finish(landings)
            return
        for item in landings:
            self._todo.put(item)

    def done(self) -> list[tuple[str, bool]]:
        """The keys that are through, and whether the file was gone.

        Raises:
            StorageError: a sync failed.
        """
        if self._error is not None:
            raise self._error
        out: list[tuple[str, bool]] = []
        while self._done:
            out.append(self._done.popleft())
        return out

    def close(self) -> None:
        """Finish what was taken on, and end the thread."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join(10.0)

    def _main(self) -> None:
        while True:
            items = [self._todo.get()]
            with contextlib.suppress(queue.Empty):
                while items[-1] is not None and len(items) < _BATCH:
                    items.append(self._todo.get_nowait())
            try:
                self._finish([item for item in items if item is not None])
            except StorageError as error:
                self._error = error
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b"s")
            if items[-1] is None or self._error is not None:
                return

    def _finish(self, items: Sequence[tuple[str, Landing]]) -> None:
        gone = self._spool.finish_all([landing for _, landing in items])
        self._done.extend((key, landing in gone) for key, landing in items)
