"""Random histories of one stream: `Sender` and `Receiver` over two bags of messages, with either end dying at any time.

Beside them runs a model of a few numbers: the bytes that were stored, what the sender was told, and what must become of
a chunk. Messages of a link keep their order; here they do not, so that nothing rests on it.
"""

from __future__ import annotations

import random
import sys
import zlib
from typing import Any, NamedTuple

import pytest
from fedloom.serialization.stream import RESEND_BACKOFF, ChunkPlan, Outcome, Receiver, Sender
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from lengths import long, short

SOURCE = random.Random(3).randbytes(4096)
RESEND_S = 2.0
#: Who asks (the sender with Put, or the receiver with Get) repeats it after this.
ASK_S = 5.0
#: A fair network ends a stream from any state in this time: the longest resend, a question, a few grants of silence.
FAIR_S = RESEND_S * RESEND_BACKOFF + ASK_S + 5.0


class Put(NamedTuple):
    """The sender asks for a grant at the watermark."""


class Chunk(NamedTuple):
    index: int
    data: bytes
    crc32: int


class Unknown(NamedTuple):
    """The sender does not know the stream (any more): the receiver has to ask anew."""


class Get(NamedTuple):
    """The receiver asks, from its watermark on."""

    next: int
    limit: int


class Grant(NamedTuple):
    epoch: int
    next: int
    limit: int


class StreamMachine(RuleBasedStateMachine):
    """One payload on its way; ``pulled``: the receiver asks (a download), else the sender does (an upload)."""

    @initialize(
        size=st.one_of(
            st.integers(0, 90), st.tuples(st.integers(0, 30), st.sampled_from((2, 3, 8))).map(lambda t: t[0] * t[1])
        ),
        chunk_bytes=st.sampled_from((2, 3, 8)),
        window=st.integers(1, 6),
        block_bytes=st.sampled_from((1, 7, 20)),
        pulled=st.sampled_from((False, False, True)),
        head=st.integers(0, 6),
        dead_s=st.sampled_from((0.0, 100.0)),
    )
    def begin(
        self, size: int, chunk_bytes: int, window: int, block_bytes: int, pulled: bool, head: int, dead_s: float
    ) -> None:
        self.source = SOURCE[:size]
        self.block_bytes = block_bytes
        self.pulled = pulled
        self.dead_s = dead_s  # how long before the end nothing arrives
        self.now = 0.0
        self.epoch = 1
        self.up: list[Put | Chunk | Unknown] = []
        self.down: list[Get | Grant] = []
        self.granted: list[Grant] = []
        self.stored = bytearray()
        self.widest = 1
        self.sender: Sender | None = None
        self.new_receiver(chunk_bytes, window, 0)
        self.new_sender()
        self.go_well(head, True, True)

    def teardown(self) -> None:
        if hasattr(self, "source") and sys.exception() is None:
            self.lose_all(self.dead_s)
            self.end_fairly()

    # ------------------------------------------------------------ the two ends

    def new_receiver(self, chunk_bytes: int, window: int, durable: int) -> None:
        """A receiver that finds so many bytes of an earlier life."""
        self.plan = ChunkPlan(len(self.source), chunk_bytes)
        start = self.plan.whole_chunks(durable)
        del self.stored[start * chunk_bytes :]
        self.epoch += 1
        self.widest = max(self.widest, window)
        self.receiver = Receiver(self.plan, window, self.epoch, start, now=self.now)
        self.limit, self.granted_at = min(start + window, self.plan.count), start  # by the receiver's last grant
        self.ask_again()

    def new_sender(self) -> None:
        """The other end begins anew: an upload's with a question, a download's does not know the stream."""
        self.sender = None if self.pulled else Sender(self.plan, RESEND_S)
        self.told = (-1, 0, 0)  # epoch, the highest next, limit: the sender knows no more than this
        self.ask_again()

    def ask_again(self) -> None:
        """Put or Get is due at once."""
        self.answered = False
        self.asked_at = float("-inf")

    def grant(self) -> None:
        epoch, next_, limit = fields = self.receiver.grant()
        assert epoch == self.receiver.epoch
        assert next_ * self.plan.chunk_bytes == len(self.stored) or self.receiver.complete
        assert limit == min(next_ + self.receiver.window, self.plan.count), "a window beyond the watermark, no more"
        self.limit, self.granted_at = limit, next_
        self.down.append(Grant(*fields))
        self.granted.append(Grant(*fields))

    def ask(self) -> bool:
        """Say Put or Get where it is due."""
        if self.answered or self.now < self.asked_at + ASK_S or (self.pulled and self.receiver.complete):
            return False
        self.asked_at = self.now
        if self.pulled:
            _, self.granted_at, self.limit = self.receiver.grant()
            self.down.append(Get(self.granted_at, self.limit))
        else:
            self.up.append(Put())
        return True

    def send_chunk(self) -> bool:
        index = self.sender.next_chunk(self.now) if self.sender is not None else None
        if index is None:
            return False
        _, acked, limit = self.told
        assert acked <= index < limit, "only what was granted, and nothing that has arrived"
        start, stop = self.plan.span(index)
        data = self.source[start:stop]
        assert start == index * self.plan.chunk_bytes and 0 < len(data) <= self.plan.chunk_bytes
        self.up.append(Chunk(index, data, zlib.crc32(data)))
        return True

    # ------------------------------------------------------------ what arrives

    def arrive_up(self, message: Put | Chunk | Unknown) -> None:
        match message:
            case Put():
                self.epoch += 1
                grant = self.receiver.resume(self.epoch, self.now)
                assert grant == (self.epoch, self.receiver.next, max(self.limit, grant.limit))
                self.grant()
            case Unknown():
                self.ask_again()
            case Chunk(index, data, crc32):
                self.answered = self.answered or self.pulled
                self.judge(index, data, crc32)

    def judge(self, index: int, data: bytes, crc32: int) -> None:
        """The receiver's word on a chunk against the model's."""
        next_, strikes = self.receiver.next, self.receiver.strikes
        expected, strike = Outcome.ACCEPTED, False
        if index < next_:
            expected = Outcome.DUPLICATE
        elif index > next_ or index >= self.limit:
            expected, strike = Outcome.GAP, index >= self.limit
        elif len(data) != min(self.plan.chunk_bytes, len(self.source) - len(self.stored)):
            expected, strike = Outcome.CORRUPT, True
        elif zlib.crc32(data) != crc32:
            expected = Outcome.CORRUPT
        arrival = self.receiver.on_chunk(index, data, crc32, self.now)
        assert arrival.outcome is expected
        assert self.receiver.strikes == strikes + strike
        assert self.receiver.next == next_ + arrival.accepted, "the watermark moves by accepted chunks alone"
        if arrival.accepted:
            assert arrival.start == len(self.stored), "in order, and none twice"
            self.stored += data
            assert arrival.grant or self.receiver.next - self.granted_at < max(1, self.receiver.window // 2)
        assert arrival.grant or (arrival.accepted and not self.receiver.complete), "a refusal and the end are answered"
        if arrival.grant:
            self.grant()

    def arrive_down(self, message: Get | Grant) -> None:
        epoch, acked, limit = self.told
        match message:
            case Get():
                if self.sender is None:
                    self.sender = Sender(self.plan, RESEND_S)
                self.told = (-1, message.next, message.limit)
                self.sender.start(message.next, message.limit, self.now)
            case Grant() if self.sender is None:
                self.up.append(Unknown())
            case Grant():
                self.answered = self.answered or not self.pulled
                before = self.sender.acked
                self.sender.on_grant(*message, self.now)
                if message.epoch > epoch >= 0:
                    self.told = message
                elif message.epoch >= epoch:
                    self.told = (message.epoch, max(acked, message.next), max(limit, message.limit))
                    assert self.sender.acked >= before, "within an epoch nothing is taken back"

    # ------------------------------------------------------------ the network

    @rule(count=st.integers(1, 6))
    def send(self, count: int) -> None:
        self.ask()
        for _ in range(count):
            self.send_chunk()

    @rule(up=st.booleans(), at=st.integers(0, 40), count=st.integers(1, 4), keep=st.booleans())
    def deliver(self, up: bool, at: int, count: int, keep: bool) -> None:
        """Some messages, from anywhere in a bag; ``keep``: they will come a second time."""
        bag: list[Any] = self.up if up else self.down
        if not bag:
            self.move(up=not up, down=up)
        for _ in range(min(count, len(bag))):
            index = at % len(bag)
            message = bag[index] if keep else bag.pop(index)
            if up:
                self.arrive_up(message)
            else:
                self.arrive_down(message)

    @rule(turns=st.integers(1, 3), up=st.booleans(), down=st.booleans())
    def go_well(self, turns: int, up: bool, down: bool) -> None:
        """For a while the network does what it should, at least in one direction."""
        for _ in range(turns):
            self.move(up, down)

    @rule(
        what=st.sampled_from(("up is lost", "down is lost", "flip", "flip and arrive", "old grant", "cheat")),
        at=st.integers(0, 40),
        bit=st.integers(0, 63),
    )
    def misfortune(self, what: str, at: int, bit: int) -> None:
        match what:
            case "up is lost" if self.up:
                del self.up[at % len(self.up) :]
            case "down is lost":
                self.down.clear()
            case "old grant" if self.granted:  # one of the last comes once more, of an earlier epoch too
                self.arrive_down(self.granted[-1 - at % min(12, len(self.granted))])
            case "cheat":
                self.cheat(at % 4, bit % 3)
            case "flip" | "flip and arrive":
                self.flip_a_bit(at, bit, what != "flip")
            case _:
                pass

    def flip_a_bit(self, at: int, bit: int, arrives: bool) -> None:
        """In a chunk under way, in the one that is waited for where that can be; it arrives now, or when it may."""
        if not self.chunks():
            self.move(up=False)
        places = self.chunks()
        if not places:
            return
        place = places.get(self.receiver.next, sorted(places.values())[at % len(places)])
        chunk = self.up[place]
        assert isinstance(chunk, Chunk)
        data = bytearray(chunk.data)
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        self.up[place] = chunk._replace(data=bytes(data))
        if arrives:
            self.arrive_up(self.up.pop(place))

    def chunks(self) -> dict[int, int]:
        """Where in the bag the chunks are, by their numbers."""
        return {message.index: place for place, message in enumerate(self.up) if isinstance(message, Chunk)}

    def cheat(self, ahead: int, cut: int) -> None:
        """A chunk that nobody granted, or (``ahead`` 0) the next one with a wrong length."""
        if ahead == 0 and self.receiver.next < self.plan.count:
            start, stop = self.plan.span(self.receiver.next)
            data = SOURCE[start : stop + 1 + cut] if cut != 1 else SOURCE[start : stop - 1]
            self.judge(self.receiver.next, data, zlib.crc32(data))
        else:
            self.judge(self.limit + ahead - 1, b"\0" * self.plan.chunk_bytes, 0)

    @rule(seconds=st.sampled_from((0.3, 1.0, 2.5, 6.0, 40.0)))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.receiver.due(self.now) and (self.answered or not self.pulled):
            self.grant()

    # ------------------------------------------------------------ what dies

    @rule(
        what=st.sampled_from(("link", "sender", "receiver", "receiver")),
        lose=st.sampled_from((False, False, True)),
        blocks=st.integers(0, 5),
        chunk_bytes=st.sampled_from((0, 0, 0, 0, 0, 2, 3, 8)),
        window=st.integers(1, 6),
        again=st.integers(0, 2),
    )
    def something_breaks(self, what: str, lose: bool, blocks: int, chunk_bytes: int, window: int, again: int) -> None:
        """The link, the sender or the receiver. ``lose`` false: what is under way comes all the same."""
        if lose:
            self.up.clear()
            self.down.clear()
        match what:
            case "link":
                self.ask_again()
            case "sender":
                self.new_sender()
            case _:
                self.crash_of_the_receiver(blocks, chunk_bytes or self.plan.chunk_bytes, window)
        self.go_well(again, True, True)

    def crash_of_the_receiver(self, blocks: int, chunk_bytes: int, window: int) -> None:
        """Whole blocks are what it can trust of its file afterwards; a download's user starts with nothing."""
        durable = len(self.stored)
        if durable < len(self.source):
            durable = min(durable // self.block_bytes, blocks) * self.block_bytes
        other = self.pulled or chunk_bytes != self.plan.chunk_bytes
        self.new_receiver(chunk_bytes, window, 0 if self.pulled else durable)
        if other:  # another stream, or chunks with other numbers
            self.granted.clear()
            self.up.clear()
            self.down.clear()
            self.new_sender()

    # ------------------------------------------------------------ what always holds

    @invariant()
    def what_is_stored_is_the_beginning_of_the_source(self) -> None:
        assert self.stored == self.source[: len(self.stored)]
        assert len(self.stored) == min(self.receiver.next * self.plan.chunk_bytes, len(self.source))
        assert self.receiver.complete == (len(self.stored) == len(self.source))

    @invariant()
    def no_more_than_a_window_is_under_way(self) -> None:
        sender = self.sender
        if sender is not None:
            assert 0 <= sender.acked <= sender.cursor <= self.plan.count
            assert sender.cursor <= max(sender.limit, sender.acked)
            assert sender.cursor - sender.acked <= self.widest
            assert (sender.acked, sender.limit) == self.told[1:]

    # ------------------------------------------------------------ the end

    def move(self, up: bool = True, down: bool = True) -> bool:
        """Everything that is under way arrives, in order, and what may be sent is; whether anything moved."""
        moved = self.ask()
        for _ in range(len(self.down) if down else 0):
            self.arrive_down(self.down.pop(0))
            moved = True
        while self.send_chunk():
            moved = True
        for _ in range(len(self.up) if up else 0):
            self.arrive_up(self.up.pop(0))
            moved = True
        return moved

    def over(self) -> bool:
        """A receiver that pulls is content with its bytes; who puts also waits for the last grant."""
        return self.receiver.complete and (self.pulled or (self.sender is not None and self.sender.done))

    def end_fairly(self) -> None:
        """From any state a network that loses nothing any more brings the stream to its end, soon."""
        begun = self.now
        for _ in range(6 * self.plan.count + 100):
            if not self.move():
                if self.over():
                    break
                due = [self.receiver.deadline, self.sender.deadline if self.sender is not None else None]
                due.append(None if self.answered else self.asked_at + ASK_S)
                self.pass_time(max(0.01, min(at for at in due if at is not None) - self.now))
        assert self.over(), "a fair network did not end the stream"
        assert self.now - begun <= FAIR_S
        assert self.stored == self.source
        self.judge(self.plan.count, b"more", 0)

    def lose_all(self, seconds: float) -> None:
        """So long nothing arrives."""
        while seconds > 0:
            self.send(6)
            self.pass_time(5.0)
            seconds -= 5.0
            self.up.clear()
            self.down.clear()


SHORT = short(160, 40, suppress_health_check=[HealthCheck.too_slow])

TestStreamMachine = StreamMachine.TestCase
TestStreamMachine.settings = SHORT


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_many_streams() -> None:
    """The long form."""
    run_state_machine_as_test(StreamMachine, settings=long(3000, 60, SHORT))
