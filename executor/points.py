"""Points: what user code logs, a value under a key, on their way out of its process, many in one message.

A point is a map: ``key``, ``value``, ``type``, ``at``, and ``round``, ``global_step`` and more where they are known. A
script may log every batch; a message for each would cost it more than the batch, and push a job's other events out.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from ..serialization.codec import check_plain, pack
from ..serialization.errors import CodecError, LinkError
from .channel import Map

#: What a message of points holds at most; with the rest of an event it stays under 32 KiB.
BATCH_BYTES = 24 * 1024
#: One point: a text, a table of parameters. Numbers take some tens.
MAX_POINT_BYTES = 16 * 1024
#: The least time between two messages of one process.
PAUSE_S = 0.2


def make_point(key: str, value: Any, data_type: object, round: int | None, extra: Map) -> Map:
    """A point as it travels.

    Numbers of numpy and torch become Python's; NaN and Inf, which a message must not hold, become the texts ``"nan"``,
    ``"inf"`` and ``"-inf"``: a loss that diverges is worth seeing, and no reason to end.

    Raises:
        CodecError: not plain data, or over 16 KiB.
    """
    given: Map = dict(extra)
    step = given.pop("global_step", None)
    at = given.pop("walltime", None)
    point: Map = {"key": str(key), "value": _plain(value), "type": str(getattr(data_type, "value", data_type))}
    if step is not None:
        point["global_step"] = int(step)
    if round is not None:
        point["round"] = round
    point["at"] = float(at) if at is not None else time.time()
    point |= {name: _plain(item) for name, item in given.items()}
    check_plain(point)
    size = len(pack(point))
    if size > MAX_POINT_BYTES:
        raise CodecError(f"{size} bytes in one value; at most {MAX_POINT_BYTES} are kept: log less, or write a file")
    return point


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in cast("dict[Any, Any]", value).items()}
    if not isinstance(value, (bool, int, float, str)) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError) as error:
            raise CodecError(f"a {type(value).__name__} that is not one number: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf", "-inf"
    return value


class PointSender:
    """Sends the first point at once, those behind it together, a pause later at most. Thread-safe.

    Args:
        send: takes a batch; what it raises is the logging call's, but in the sender's own thread.
    """

    def __init__(self, send: Callable[[list[Map]], None], pause_s: float = PAUSE_S) -> None:
        self._send = send
        self._pause_s = pause_s
        self._points: list[Map] = []
        self._bytes = 0
        self._sent_s = -math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, point: Map) -> None:
        """Send a point with the next batch."""
        size = len(pack(point))
        with self._changed:
            if self._bytes + size > BATCH_BYTES:
                self._flush()
            self._points.append(point)
            self._bytes += size
            if time.monotonic() - self._sent_s >= self._pause_s:
                self._flush()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fedloom-points", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def flush(self) -> None:
        """Send what waits."""
        with self._changed:
            self._flush()

    def close(self) -> None:
        """Send what waits and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._flush()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _flush(self) -> None:
        if self._points:
            points, self._points, self._bytes = self._points, [], 0
            self._sent_s = time.monotonic()
            self._send(points)

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._sent_s + self._pause_s - time.monotonic()
                if not self._points:
                    self._changed.wait(60.0)
                elif left > 0:
                    self._changed.wait(left)
                else:
                    try:
                        self._flush()
                    except LinkError:  # the executor is gone: whoever reads the channel sees to it
                        return
