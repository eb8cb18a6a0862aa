"""A payload's way as a program of operations, drawn from the bytes: a link's troubles, restarts, a hostile peer."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable

from fedloom.serialization.stream import ChunkPlan, GrantFields, Outcome, Receiver, Sender

from .target import Target

#: After an honest program, so many turns of a link that works must bring the rest over.
MAX_TURNS = 1000
MAX_QUEUE = 64


class World:
    """A sender, a receiver and the link between them; every step ends with the invariants."""

    def __init__(self, size: int, chunk_bytes: int, window: int) -> None:
        self.plan = ChunkPlan(size, chunk_bytes)
        self.payload = bytes(i * 7 % 251 for i in range(size))
        self.sender = Sender(self.plan, resend_s=2.0)
        self.receiver = Receiver(self.plan, window, epoch=0, now=0.0)
        self.got = bytearray()
        self.chunks: deque[tuple[int, bytes, int]] = deque(maxlen=MAX_QUEUE)
        self.grants: deque[GrantFields] = deque(maxlen=MAX_QUEUE)
        self.now = 0.0
        self.hostile = False
        self._limit = 0
        self._strikes = 0
        self.grants.append(self.receiver.grant(0.0))
        self._granted(self.grants[-1])

    # --- steps -------------------------------------------------------------------------------------

    def send(self) -> None:
        """The sender puts its next chunk on the link."""
        index = self.sender.next_chunk(self.now)
        if index is None:
            return
        assert 0 <= index < self.plan.count and index < self.sender.limit, (index, self.sender.limit)
        start, stop = self.plan.span(index)
        data = self.payload[start:stop]
        self.chunks.append((index, data, zlib.crc32(data)))

    def deliver(self, *, keep: bool = False, flip: int | None = None) -> None:
        """The link hands over its oldest chunk: perhaps twice, perhaps with a bit flipped."""
        if not self.chunks:
            return
        index, data, crc32 = self.chunks[0] if keep else self.chunks.popleft()
        if flip is not None and data:
            at = flip % len(data)
            data = data[:at] + bytes([data[at] ^ (1 << flip % 8)]) + data[at + 1 :]
        self.arrive(index, data, crc32)

    def arrive(self, index: int, data: bytes, crc32: int) -> None:
        """A chunk at the receiver, whoever sent it."""
        before = self.receiver.next
        arrival = self.receiver.on_chunk(index, data, crc32, self.now)
        assert (arrival.outcome is Outcome.ACCEPTED) == (self.receiver.next == before + 1)
        if arrival.accepted:
            assert index == before < self._limit, "a chunk was taken that no grant covers"
            assert (arrival.start, arrival.start + len(data)) == self.plan.span(index)
            assert arrival.start == len(self.got)
            assert self.hostile or data == self.payload[arrival.start : arrival.start + len(data)]
            self.got += data
        else:
            assert self.receiver.next == before
            assert arrival.grant, "what is not taken is answered, or the sender would wait"
        if arrival.grant:
            self.grant()

    def grant(self) -> None:
        """The receiver sends a grant."""
        self.grants.append(self._granted(self.receiver.grant(self.now)))

    def take_grant(self, *, keep: bool = False) -> None:
        """The link hands over its oldest grant: perhaps it comes again later."""
        if self.grants:
            grant = self.grants[0] if keep else self.grants.popleft()
            self.sender.on_grant(*grant, self.now)

    def restart(self) -> None:
        """The receiver answers a repeated Put: a newer epoch from its watermark. What was on the link is gone."""
        self.chunks.clear()
        self.grants.clear()
        self.grants.append(self._granted(self.receiver.resume(self.receiver.epoch + 1, self.now)))

    def wait(self, seconds: float) -> None:
        """Time passes; a silent receiver repeats its grant."""
        self.now += seconds
        if self.receiver.due(self.now):
            assert not self.receiver.complete
            self.grant()
        self.receiver.stalled(self.now)

    def _granted(self, grant: GrantFields) -> GrantFields:
        assert grant.limit >= self._limit, "a grant was taken back"
        assert grant.next == self.receiver.next
        assert grant.next <= grant.limit <= min(grant.next + self.receiver.window, self.plan.count)
        self._limit = grant.limit
        return grant

    def check(self) -> None:
        """What holds at all times."""
        assert 0 <= self.sender.acked <= self.sender.cursor <= self.plan.count
        assert self.sender.limit <= self.plan.count
        assert self.receiver.strikes >= self._strikes
        self._strikes = self.receiver.strikes
        assert 0 <= self.receiver.next <= self.plan.count
        assert self.receiver.complete == (self.receiver.next == self.plan.count)
        assert len(self.got) == min(self.receiver.next * self.plan.chunk_bytes, self.plan.size)
        if not self.hostile:
            assert self.sender.acked <= self.receiver.next, "the sender believes more than has arrived"
            assert not self.receiver.strikes

    def drain(self) -> None:
        """From wherever the program left it, a link that works brings everything over."""
        for _ in range(MAX_TURNS):
            if self.sender.done:
                break
            self.send()
            self.deliver()
            self.take_grant()
            self.wait(0.25)
            self.check()
        assert self.sender.done and self.receiver.complete, "the stream came to a stop"
        assert self.got == self.payload


def stream(data: bytes) -> None:
    """Three bytes of sizes, then an operation a byte, with its arguments behind it."""
    if len(data) < 3:
        return
    world = World(size=data[0], chunk_bytes=data[1] % 61 + 1, window=data[2] % 9 + 1)
    world.sender.start(0, 0, 0.0)
    at = 3

    def word(size: int) -> int:
        nonlocal at
        value = int.from_bytes(data[at : at + size], "little")
        at += size
        return value

    while at < len(data):
        match word(1) % 16:
            case 0 | 1:
                world.send()
            case 2 | 3:
                world.deliver()
            case 4 | 5:
                world.take_grant()
            case 6 if world.chunks:
                world.chunks.popleft()
            case 7 if world.grants:
                world.grants.popleft()
            case 8:
                world.deliver(keep=True)
            case 9:
                world.take_grant(keep=True)
            case 10:
                world.deliver(flip=word(2))
            case 11:
                world.wait(word(1) / 16)
            case 12:
                world.restart()
            case 13:
                # a reconnect of the sender's side: `Get` starts it where the receiver stands
                world.chunks.clear()
                world.grants.clear()
                world.sender.start(*world._granted(world.receiver.grant(world.now))[1:], world.now)
            case 14:
                world.hostile = True
                index, size = word(8) if word(1) % 2 else world.receiver.next + word(1) - 2, word(1)
                body = data[at : at + size]
                at += size
                world.arrive(max(0, index), body, zlib.crc32(body) ^ (word(1) % 2))
            case 15:
                world.hostile = True
                sizes = [8 if word(1) % 2 else 1 for _ in range(2)]
                world.sender.on_grant(word(4), word(sizes[0]), word(sizes[1]), world.now)
            case _:
                pass
        world.check()
    if not world.hostile:
        world.drain()


def stream_seeds() -> Iterable[bytes]:
    """A transfer that goes well, and one with each trouble."""
    good = bytes([40, 10, 3]) + bytes([4, 0, 2] * 30)
    return [
        good,
        bytes([40, 10, 3]) + bytes([4, 0, 0, 6, 2, 8, 2, 9, 4] * 6),
        bytes([255, 60, 8]) + bytes([4, 0, 0, 0, 10, 3, 1, 2, 11, 20, 7, 12, 4, 0, 2] * 6),
        bytes([40, 10, 3]) + bytes([4, 0, 2, 13, 0, 2, 11, 255, 0, 2] * 4),
        bytes([40, 10, 3, 4, 0, 2, 14, 0, 2, 10]) + bytes(10) + b"\0" + bytes([14, 1]) + b"\xff" * 8 + bytes([0, 1]),
        bytes([40, 10, 3, 15]) + b"\xff" * 4 + b"\1" + b"\xff" * 8 + b"\1" + b"\xff" * 8 + bytes([0, 0, 2, 2]),
        bytes([0, 0, 0, 0, 2, 4, 11, 99]),
    ]


STREAM = Target("stream", stream, (), stream_seeds, max_len=256)
