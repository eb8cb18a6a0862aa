"""A TCP proxy between the peers and the broker that cuts, stalls, slows down, and flips bits in ZeroMQ's frames.

It runs in a thread of the driver's. What it does to the bytes is decided by `Weather`, which may be changed while it
runs; what it did is counted in `Counts`. Frames are found by ZMTP 3's framing (RFC 23, without encryption): after the
greeting of 64 bytes each frame has a byte of flags (1: more, 2: long, 4: command) and a length of 1 or 8 bytes.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_GREETING = 64
_LONG, _COMMAND = 2, 4
_READ = 256 * 1024
#: More waits on a slow link than the messages about streams take.
_PART_OF_A_STREAM = 64 * 1024
_MOST_BUFFERED = 4 * 1024 * 1024


@dataclass(slots=True)
class Weather:
    """What happens to what passes."""

    flip: float = 0.0  # the share of message frames in which one bit is flipped
    least: int = 0  # bytes of a frame that is flipped: chunks are large, control messages are not
    most: int = -1  # frames that are still to be flipped; -1: no end
    bytes_per_s: float = 0.0  # of each connection and direction; 0: as fast as it goes


@dataclass(slots=True)
class Counts:
    """What it did so far."""

    frames: int = 0  # message frames that could have been flipped
    flipped: int = 0
    cut: int = 0  # connections that were closed on which bytes had passed
    stalled: int = 0
    up: int = 0  # bytes towards the broker
    down: int = 0


@dataclass(slots=True)
class _Frames:
    """Where the frames of one direction begin and end."""

    skip: int = _GREETING  # bytes until the next frame's head
    target: int = -1  # of them, the one to alter; -1: none
    head: bytearray = field(default_factory=bytearray)

    def flip(self, data: bytearray, weather: Weather, chance: random.Random, counts: Counts) -> None:
        """Alter one bit of each frame that is to be altered, when its byte comes by."""
        at = 0
        while at < len(data):
            if self.skip:
                step = min(self.skip, len(data) - at)
                if 0 <= self.target < step:
                    data[at + self.target] ^= 1 << chance.randrange(8)
                    counts.flipped += 1
                self.target = max(-1, self.target - step)
                self.skip -= step
                at += step
                continue
            self.head.append(data[at])
            at += 1
            flags = self.head[0]
            if len(self.head) < (9 if flags & _LONG else 2):
                continue
            self.skip = int.from_bytes(self.head[1:], "big")
            self.head.clear()
            if flags & _COMMAND or self.skip < max(1, weather.least) or not weather.flip:
                continue
            counts.frames += 1
            if weather.most and chance.random() < weather.flip:
                weather.most -= weather.most > 0
                self.target = chance.randrange(self.skip)


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of a connection."""

    source: socket.socket
    sink: socket.socket
    up: bool
    frames: _Frames = field(default_factory=_Frames)
    waiting: bytearray = field(default_factory=bytearray)
    ready_at: float = 0.0  # when the next bytes may pass
    passed: int = 0


class FaultProxy:
    """Listens on ``port`` of loopback, or of another address of this machine's, and passes everything on to ``target``.

    A lost connection is passed on as well: where one side closes, the other is closed.
    """

    def __init__(self, port: int, target: int, seed: int, host: str = "127.0.0.1") -> None:
        self.weather = Weather()
        self.counts = Counts()
        self._target = target
        self._chance = random.Random(seed)
        self._selector = selectors.DefaultSelector()
        self._ways: list[_Way] = []
        self._orders: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, port), backlog=256)
        self._listener.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._open = True
        self._thread = threading.Thread(target=self._run, name=f"proxy-{port}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ orders, from another thread

    def cut(self) -> int:
        """Close every connection; how many of them had passed bytes in the last moments."""
        return self._order(self._cut)

    def stall(self, seconds: float) -> int:
        """Let nothing through on the connection that is busiest towards the broker; 1 if there was an upload."""
        return self._order(lambda: self._stall(seconds))

    def close(self) -> None:
        """End it with all connections."""
        self._order(self._end)
        self._thread.join(5.0)

    def _order(self, do: Callable[[], int]) -> int:
        answer: list[int] = []
        done = threading.Event()

        def order() -> None:
            answer.append(do())
            done.set()

        with self._lock:
            self._orders.append(order)
        self._wake.send(b"!")
        if not done.wait(5.0):
            raise AssertionError("the proxy does not answer")
        return answer[0]

    # ------------------------------------------------------------ its thread

    def _run(self) -> None:
        while self._open:
            now = time.monotonic()
            late = [way.ready_at for way in self._ways if way.waiting and way.ready_at > now]
            for key, events in self._selector.select(min([0.5, *(at - now for at in late)])):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                elif events & selectors.EVENT_READ:
                    self._read(key.data)
            with self._lock:
                orders, self._orders = self._orders, []
            for order in orders:
                order()
            for way in list(self._ways):
                self._pass(way)

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        try:
            broker = socket.create_connection(("127.0.0.1", self._target), 2.0)
        except OSError:  # the broker is away: the peer sees what it would see without a proxy
            peer.close()
            return
        for sock in (peer, broker):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = [_Way(peer, broker, True), _Way(broker, peer, False)]
        self._ways += ways
        for way in ways:
            self._selector.register(way.source, selectors.EVENT_READ, way)

    def _read(self, way: _Way) -> None:
        if way not in self._ways:
            return
        if len(way.waiting) > _MOST_BUFFERED:  # back-pressure: the kernel's buffers fill, and the sender waits
            with contextlib.suppress(KeyError):
                self._selector.unregister(way.source)
            return
        try:
            data = way.source.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(way)
            return
        changed = bytearray(data)
        way.frames.flip(changed, self.weather, self._chance, self.counts)
        way.waiting += changed

    def _pass(self, way: _Way) -> None:
        now = time.monotonic()
        if not way.waiting or way not in self._ways or now < way.ready_at:
            return
        rate = self.weather.bytes_per_s
        piece = way.waiting[: max(1, int(rate * 0.05))] if rate else way.waiting
        try:
            sent = way.sink.send(piece)
        except BlockingIOError:
            way.ready_at = now + 0.005
            return
        except OSError:
            self._drop(way)
            return
        del way.waiting[:sent]
        way.passed += sent
        if way.up:
            self.counts.up += sent
        else:
            self.counts.down += sent
        way.ready_at = now + 0.05 if rate else 0.0
        if len(way.waiting) <= _MOST_BUFFERED:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.register(way.source, selectors.EVENT_READ, way)

    def _drop(self, way: _Way) -> None:
        with contextlib.suppress(OSError):  # what one side said before it closed
            way.sink.send(way.waiting)
        for other in [w for w in self._ways if w.source in (way.source, way.sink)]:
            self._ways.remove(other)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(other.source)
        way.source.close()
        way.sink.close()

    def _cut(self) -> int:
        ways = [way for way in self._ways if way.up]
        busy = sum(way.passed > _GREETING for way in ways)
        for way in ways:
            self._drop(way)
        self.counts.cut += busy
        return busy

    def _stall(self, seconds: float) -> int:
        ways = [way for way in self._ways if way.up and len(way.waiting) >= _PART_OF_A_STREAM]
        if not ways:
            return 0
        max(ways, key=lambda way: len(way.waiting)).ready_at = time.monotonic() + seconds
        self.counts.stalled += 1
        return 1

    def _end(self) -> int:
        self._open = False
        for way in list(self._ways):
            if way in self._ways:
                self._drop(way)
        for sock in (self._listener, self._woken, self._wake):
            sock.close()
        return 0
