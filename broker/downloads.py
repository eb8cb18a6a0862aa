"""Payloads on their way out: chunks of a peer's `Get`, as its grants allow. No sockets, no clock.

A download has no state worth keeping: after a reconnect the peer repeats its Get from its own watermark. Files are read
with pread and not mapped, since a file cut short by someone else would kill a process that has it mapped.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container
from dataclasses import dataclass

import structlog

from ..serialization.checksum import crc32 as crc32_of
from ..serialization.errors import PayloadError, StorageError
from ..serialization.messages import Abort, Chunk, Finish, Get, Grant
from ..serialization.stream import ChunkPlan, Sender
from .bounds import Bounds
from .spool import Spool
from .transferlimits import Limits, Outgoing

__all__ = ["Downloads"]

log = structlog.get_logger(__name__)

_CONTENT = "b3-"


class _File:
    """An open payload that downloads share, with the checksums of the chunks that were read."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.users = 0
        self._crc32: dict[int, int] = {}

    def read(self, plan: ChunkPlan, index: int) -> tuple[bytes, int]:
        """A chunk and its crc32.

        Raises:
            OSError: it cannot be read, or the file is shorter than it was.
        """
        start, stop = plan.span(index)
        data = os.pread(self.fd, stop - start, start)
        if len(data) != stop - start:
            raise OSError(errno.EIO, "the payload's file became shorter")
        crc32 = self._crc32.get(index)
        if crc32 is None:
            crc32 = self._crc32[index] = crc32_of(data)
        return data, crc32


@dataclass(slots=True, eq=False)
class _Download:
    route: bytes
    stream: str
    payload: str
    file: _File
    sender: Sender
    heard_at: float
    finished: bool = False


class Downloads:
    """All downloads of the data process.

    Args:
        spool: where payloads lie.
        limits: bounds and timers.
        send: takes every `Outgoing`.
    """

    def __init__(
        self, spool: Spool, limits: Limits, *, send: Callable[[Outgoing], None], bounds: Bounds | None = None
    ) -> None:
        self._spool = spool
        self._limits = limits
        self._send = send
        self._bounds = bounds or Bounds()
        self._streams: dict[tuple[bytes, str], _Download] = {}
        self._files: dict[str, _File] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def on_get(self, route: bytes, get: Get, now: float) -> None:
        """A peer's Get, new or repeated: begin (again) at its watermark."""
        known = self._streams.get((route, get.stream))
        if known is not None and known.payload == get.payload:
            known.heard_at = now
            known.finished = False
            known.sender.start(get.next, get.limit, now)
            return
        if known is not None:
            self._close(known)
        limits = self._limits
        mine = sum(download.route == route for download in self._streams.values())
        for bound, count in (("max_streams", len(self)), ("max_streams_per_peer", mine)):
            most = int(getattr(limits, bound))
            if count >= most:
                self._bounds.reached(bound)
                text = f"{count} downloads are open; at most {most} ({bound}): wait for one to end"
                self._abort(route, get.stream, "busy", text, limits.retry_s)
                return
        try:
            file = self._acquire(get.payload)
        except (PayloadError, FileNotFoundError):  # whose text has a path, which is no stranger's business
            self._abort(route, get.stream, "unknown_payload", f"payload {get.payload} is not here")
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._abort(route, get.stream, "busy", "too many open files: wait for a stream to end", limits.retry_s)
                return
            raise StorageError(f"payload {get.payload}: {error}") from error
        sender = Sender(ChunkPlan(file.size, limits.chunk_bytes), limits.resend_s)
        sender.start(get.next, get.limit, now)
        self._streams[route, get.stream] = _Download(route, get.stream, get.payload, file, sender, now)

    def on_grant(self, route: bytes, grant: Grant, now: float) -> bool:
        """A peer's grant; False when there is no such stream."""
        download = self._streams.get((route, grant.stream))
        if download is None:
            return False
        download.heard_at = now
        download.sender.on_grant(grant.epoch, grant.next, grant.limit, now)
        if download.sender.done and download.finished:
            self._close(download)
        return True

    def on_abort(self, route: bytes, stream: str) -> bool:
        """The peer gives it up."""
        download = self._streams.get((route, stream))
        if download is not None:
            self._close(download)
        return download is not None

    def lost(self, route: bytes) -> None:
        """The peer is gone."""
        for download in [d for d in self._streams.values() if d.route == route]:
            self._close(download)

    def pump(self, blocked: Container[bytes], chunks: int, now: float) -> int:
        """Send up to so many chunks, a chunk each stream in turn, none to blocked peers; how many were sent."""
        sent = 0
        moving = [d for d in self._streams.values() if d.route not in blocked]
        while moving and sent < chunks:
            still: list[_Download] = []
            for download in moving:
                if self._send_next(download, now):
                    still.append(download)
                    sent += 1
                if sent >= chunks:
                    break
            moving = still
        if sent:
            self._rotate()
        return sent

    def tick(self, now: float) -> None:
        """End downloads whose peers are done or say nothing more."""
        for download in list(self._streams.values()):
            quiet = now - download.heard_at
            if download.finished and quiet >= self._limits.linger_s:
                self._close(download)
            elif quiet >= self._limits.stall_s:
                self._close(download)
                reason = f"no grant came for {self._limits.stall_s:g} s"
                self._abort(download.route, download.stream, "stall", reason, self._limits.retry_s)

    def _send_next(self, download: _Download, now: float) -> bool:
        """Send a stream's next chunk, or its end; False when it has nothing to send now."""
        sender = download.sender
        # also of one that was sent whole: its peer may miss a chunk, and says so; one that says nothing is closed first
        index = sender.next_chunk(now)
        if index is not None:
            download.finished = False
            try:
                data, crc32 = download.file.read(sender.plan, index)
            except OSError as error:
                log.error("payload_unreadable", payload=download.payload, error=str(error))
                self._close(download)
                self._abort(download.route, download.stream, "unreadable", f"payload {download.payload}: {error}")
                return False
            self._send(Outgoing(download.route, Chunk(download.stream, index, len(data), crc32), data))
        if sender.sent_all and not download.finished:
            download.finished = True
            download.heard_at = now
            digest = download.payload.removeprefix(_CONTENT) if download.payload.startswith(_CONTENT) else ""
            self._send(Outgoing(download.route, Finish(download.stream, digest[:64])))
        return index is not None

    def _rotate(self) -> None:
        """The stream that was first goes last, so that a short turn serves another one next."""
        key = next(iter(self._streams), None)
        if key is not None:
            self._streams[key] = self._streams.pop(key)

    def _acquire(self, payload: str) -> _File:
        file = self._files.get(payload)
        if file is None:
            fd = os.open(self._spool.path(payload), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            file = self._files[payload] = _File(fd, os.fstat(fd).st_size)
        file.users += 1
        return file

    def _close(self, download: _Download) -> None:
        del self._streams[download.route, download.stream]
        download.file.users -= 1
        if download.file.users == 0:
            os.close(download.file.fd)
            del self._files[download.payload]

    def _abort(self, route: bytes, stream: str, code: str, reason: str, retry_after_s: float = 0.0) -> None:
        self._send(Outgoing(route, Abort(stream, code, reason[:1024], retry_after_s)))
