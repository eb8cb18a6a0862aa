"""Messages on their way from the link's thread to the workflow's."""

from __future__ import annotations

import queue
import threading

from ..serialization.envelope import Buffer
from ..serialization.messages import Done, Message

#: Results that wait for the workflow hold at most so many bytes; more are asked for again when these are folded.
INBOX_BYTES = 64 * 1024 * 1024
_MESSAGE_BYTES = 1024


class Inbox:
    """Takes everything, but results only as far as there is room: those are sent again when they are asked for."""

    def __init__(self, max_bytes: int = INBOX_BYTES) -> None:
        self._queue: queue.SimpleQueue[tuple[Message, Buffer]] = queue.SimpleQueue()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._dropped = False

    def put(self, message: Message, tail: Buffer) -> None:
        """Called in the link's thread."""
        with self._lock:
            if isinstance(message, Done) and self._bytes > self._max_bytes:
                self._dropped = True
                return
            self._bytes += len(tail) + _MESSAGE_BYTES
        self._queue.put((message, bytes(tail)))

    def get(self, timeout_s: float) -> tuple[Message, Buffer] | None:
        """The next message, or None when none came in time."""
        try:
            message, tail = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        with self._lock:
            self._bytes -= len(tail) + _MESSAGE_BYTES
        return message, tail

    def missed(self) -> bool:
        """Whether everything is read and results were left out, which are then to be asked for again. Says so once."""
        with self._lock:
            missed = self._dropped and self._bytes == 0
            self._dropped = self._dropped and not missed
            return missed
