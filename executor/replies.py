"""A worker's answers on their way to its agent: those of quick tasks go together.

Of results that the worker has folded many are told of in one message, ``results``: for each its task, its attempt, its
seconds, whether it wrote a state, and its plain side as msgpack.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from ..serialization.codec import pack
from ..serialization.errors import LinkError
from .channel import Channel, Map, pack_frame

#: An answer waits at most so long for others.
_WAIT_S = 0.02
#: And for so many bytes of them.
_MAX_BYTES = 128 * 1024
#: Of one in a message of many, beside its plain side.
_ITEM_BYTES = 160


class Replies:
    """Sends answers in order, several at a time where they come fast. Thread-safe."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._folded: list[list[Any]] = []
        self._folded_bytes = 0
        self._sent_at = 0.0
        self._some = threading.Event()
        threading.Thread(target=self._hurry, name="fedloom-answers", daemon=True).start()

    def add(self, answer: Map, *, urgent: bool = False) -> None:
        """Send an answer: at once where it is urgent or the last one was a while ago, else soon.

        Raises:
            LinkError: the agent is gone. CodecError: the answer is too large or not plain.
        """
        folded = bool(answer.get("folded"))
        frame = pack(answer["meta"]) if folded else pack_frame(answer)
        with self._lock:
            if folded:
                told = [answer["task"], answer["attempt"], answer["run_s"], answer["wrote_state"], frame]
                self._folded.append(told)
                self._folded_bytes += len(frame) + _ITEM_BYTES
            else:
                self._close_folded()
                self._waiting += frame
            waiting = len(self._waiting) + self._folded_bytes
            if urgent or waiting > _MAX_BYTES or time.monotonic() - self._sent_at > _WAIT_S:
                self._send()
            elif not self._some.is_set():
                self._some.set()

    def flush(self) -> None:
        """Send what waits.

        Raises:
            LinkError: the agent is gone.
        """
        with self._lock:
            self._send()

    def _close_folded(self) -> None:
        """What was folded is told of before whatever comes behind it."""
        if self._folded:
            self._waiting += pack_frame({"op": "results", "items": self._folded})
            self._folded, self._folded_bytes = [], 0

    def _send(self) -> None:
        self._close_folded()
        waiting, self._waiting = self._waiting, bytearray()
        self._sent_at = time.monotonic()
        self._some.clear()
        if waiting:
            self._channel.send_frames(waiting)

    def _hurry(self) -> None:
        """See to it that no answer waits for a task that takes long."""
        pause = threading.Event()
        with contextlib.suppress(LinkError):  # whoever answers next finds out too
            while self._some.wait():
                pause.wait(_WAIT_S)
                self.flush()
