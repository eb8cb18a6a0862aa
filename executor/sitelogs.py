"""What the sites' scripts print, sent on in bounded pieces for who watches the job from elsewhere; logs kept small.

Belongs to the agent's thread, which reads a little of each log that may have grown, now and then. What leaves is
bounded three ways: so much of a site's log for a job, so many pieces of it, and so many pieces a second of all of them.
Pieces end with a line where they can, and the more of them a log has sent the longer its next one waits for company.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from .hosts import MAX_LOG_BYTES, log_size

log = structlog.get_logger(__name__)

#: The most bytes of a log in one event.
PIECE_BYTES = 8 * 1024
_LOOK_S = 1.0
_SLOWER = 20  # after so many pieces the pause between two has doubled
_QUIET = 3  # a log that does not grow is looked at less and less often, by so many doublings
_MAX_PIECES = 1000
_RATE = 20.0  # pieces a second of all logs together
_BURST = 200.0
_SIZE_LOOK_S = 30.0

#: (job, site, text): whether it could be sent.
Tell = Callable[[str, str, str], bool]


@dataclass(slots=True)
class _Log:
    """One site's log of one job."""

    job: str
    site: str
    path: str
    read: int  # sent up to here
    left: int  # bytes that may still be sent
    next_at: float
    pieces: int = 0
    quiet: int = 0  # looks without anything new
    closed: bool = False  # nobody writes any more: what is left is sent, line or not
    silent: bool = False  # it has sent all that it may


class SiteLogs:
    """The logs of the jobs in hand.

    Args:
        tell: sends a piece on; None: nothing is sent, and logs are only kept small.
        log_bytes: how much of a site's log is sent for a job.
        max_bytes: a log that grows past this is moved to ``.1``, while it is written to as well.
    """

    def __init__(self, tell: Tell | None, log_bytes: int, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._tell = tell
        self._log_bytes = log_bytes
        self._max_bytes = max_bytes
        self._logs: dict[tuple[str, str], _Log] = {}
        self._tokens = _BURST
        self._filled_at = 0.0
        self._look_at = 0.0
        self._sizes_at = 0.0

    def __len__(self) -> int:
        return len(self._logs)

    def watch(self, job: str, site: str, path: str, now: float, size: int | None = None) -> None:
        """This log may grow from now on; what stands in it already (``size`` bytes) was another life's."""
        known = self._logs.get((job, site))
        if known is not None:
            known.closed = False
            known.quiet, known.next_at = 0, min(known.next_at, now + _LOOK_S * (1 + known.pieces / _SLOWER))
            return
        size = log_size(path) if size is None else size
        self._logs[job, site] = _Log(job, site, path, size, self._log_bytes, now + _LOOK_S)

    def watched(self) -> list[tuple[str, str]]:
        """(job, site) of each."""
        return list(self._logs)

    def flush(self, job: str, now: float, *, closed: bool = False) -> None:
        """Send what stands in the logs of this job as soon as may be; ``closed``: and forget them then."""
        for entry in self._logs.values():
            if entry.job == job:
                entry.next_at = now
                entry.closed = entry.closed or closed
                self._look_at = now

    def next_due_s(self, now: float) -> float:
        """How long until `turn` may have something to do."""
        return max(0.0, self._look_at - now) if self._logs else 3600.0

    def turn(self, now: float) -> None:
        """Send what is due."""
        if now < self._look_at or not self._logs:
            return
        self._look_at = now + _LOOK_S
        if now >= self._sizes_at:
            self._sizes_at = now + _SIZE_LOOK_S
            for entry in self._logs.values():
                self._keep_small(entry)
        self._tokens = min(_BURST, self._tokens + (now - self._filled_at) * _RATE)
        self._filled_at = now
        if self._tell is None:
            self._look_at = self._sizes_at
        # those that have waited longest first, so that a loud site does not silence the others
        due = [entry for entry in self._logs.values() if entry.next_at <= now or entry.closed]
        for entry in sorted(due, key=lambda entry: (not entry.closed, entry.next_at)):
            self._send(entry, now)
        for key in [key for key, entry in self._logs.items() if entry.closed and self._is_done(entry)]:
            del self._logs[key]

    def _is_done(self, entry: _Log) -> bool:
        return self._tell is None or entry.silent or entry.read >= log_size(entry.path)

    def _send(self, entry: _Log, now: float) -> None:
        if self._tell is None or entry.silent:
            return
        size = log_size(entry.path)
        if size < entry.read:  # moved aside, and begun anew
            entry.read = 0
        entry.quiet = 0 if size > entry.read else entry.quiet + 1
        while size > entry.read and self._tokens >= 1:
            piece = self._piece(entry, size)
            if not piece:
                break
            room = min(entry.left, len(piece))
            text = piece[:room].decode("utf-8", "replace")
            last = room < len(piece) or entry.pieces + 1 >= _MAX_PIECES
            if last:
                text += f"\n[the rest of this log stays at {entry.site}: it is longer than what is sent of one]\n"
            if not self._tell(entry.job, entry.site, text):
                break  # the link is down: later
            self._tokens -= 1
            entry.read += len(piece)
            entry.left -= room
            entry.pieces += 1
            entry.silent = last
            if last:
                return
        entry.next_at = now + _LOOK_S * (1 + entry.pieces / _SLOWER) * 2 ** min(_QUIET, entry.quiet)

    def _piece(self, entry: _Log, size: int) -> bytes:
        """The next whole lines; part of a line only where it is longer than a piece, or will not be finished."""
        try:
            with Path(entry.path).open("rb") as file:
                file.seek(entry.read)
                data = file.read(PIECE_BYTES)
        except OSError:
            return b""
        end = data.rfind(b"\n") + 1
        if end:
            return data[:end]
        if len(data) < PIECE_BYTES:
            return data if entry.closed else b""
        cut = len(data)
        while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:  # not within a character
            cut -= 1
        return data[: cut - 1] if data[cut - 1] >= 0xC0 else data

    def _keep_small(self, entry: _Log) -> None:
        """Move a log aside that is written to: its end is copied and it is cut, since its writers hold it open."""
        size = log_size(entry.path)
        if size <= self._max_bytes:
            return
        path = Path(entry.path)
        old = path.with_name(path.name + ".1")
        try:
            with path.open("r+b") as file, old.open("wb") as copy:
                file.seek(max(0, size - self._max_bytes))
                shutil.copyfileobj(file, copy, 1024 * 1024)
                os.ftruncate(file.fileno(), 0)
        except OSError as error:
            log.warning("log_not_moved", path=entry.path, error=str(error))
            return
        log.info("log_moved", path=entry.path, to=old.name)
