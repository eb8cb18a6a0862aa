"""How many lines of one kind a process may log a second: what peers can cause must not fill a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

__all__ = ["LINES", "LogLimit"]

#: Kinds whose counts are kept; event names are fixed in the code, so that there are never so many.
_MAX_KINDS = 1024


class LogLimit:
    """A structlog processor that leaves out what is over ``per_s`` lines of one event name within a second.

    The first line after a pause says how many were left out (``left_out``).
    """

    def __init__(self, per_s: int = 200, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self.dropped = 0
        self._clock = clock
        self._second = float("-inf")
        self._lines: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    @property
    def used(self) -> int:
        """The lines of the most frequent kind in this second."""
        return max(self._lines.values(), default=0)

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        """As structlog calls its processors."""
        now = self._clock()
        if now - self._second >= 1.0:
            self._second = now
            self._lines.clear()
        kind = str(event.get("event", ""))
        if kind not in self._lines and len(self._lines) >= _MAX_KINDS:
            kind = ""
        count = self._lines.get(kind, 0)
        if count >= self.per_s:
            self.dropped += 1
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            raise structlog.DropEvent
        self._lines[kind] = count + 1
        left_out = self._left_out.pop(kind, 0)
        return event | {"left_out": left_out} if left_out else event


#: This process's own.
LINES = LogLimit()
