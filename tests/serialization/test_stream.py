from __future__ import annotations

import random
import zlib

import pytest
from fedloom.serialization.stream import RESEND_BACKOFF, SILENCE_S, ChunkPlan, Outcome, Receiver, Sender
from hypothesis import given, settings
from hypothesis import strategies as st


def chunk(plan: ChunkPlan, index: int) -> bytes:
    start, stop = plan.span(index)
    return bytes((index + i) % 251 for i in range(stop - start))


def deliver(receiver: Receiver, index: int, now: float = 0.0):
    data = chunk(receiver.plan, index)
    return receiver.on_chunk(index, data, zlib.crc32(data), now)


class TestChunkPlan:
    @pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (9, 1), (10, 1), (11, 2), (100, 10), (101, 11)])
    def test_spans_tile_the_payload(self, size: int, count: int) -> None:
        plan = ChunkPlan(size, 10)
        spans = [plan.span(i) for i in range(plan.count)]
        assert plan.count == count
        assert [start for start, _ in spans] == [10 * i for i in range(count)]
        assert sum(stop - start for start, stop in spans) == size
        assert not spans or spans[-1][1] == size

    def test_there_is_no_chunk_outside(self) -> None:
        for index in (-1, 2):
            with pytest.raises(IndexError):
                ChunkPlan(11, 10).span(index)

    def test_whole_chunks(self) -> None:
        plan = ChunkPlan(25, 10)
        assert [plan.whole_chunks(n) for n in (0, 9, 10, 24, 25, 99)] == [0, 0, 1, 2, 3, 3]

    @pytest.mark.parametrize("bad", [(-1, 10), (10, 0)])
    def test_refuses_nonsense(self, bad: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="sizes"):
            ChunkPlan(*bad)


class TestReceiver:
    def test_grants_every_half_window_and_at_the_end(self) -> None:
        receiver = Receiver(ChunkPlan(70, 10), window=4, epoch=3)
        assert receiver.grant() == (3, 0, 4)
        told = []
        for index in range(7):
            arrival = deliver(receiver, index)
            assert arrival.accepted
            assert arrival.start == 10 * index
            if arrival.grant:
                told.append(receiver.grant())
        assert told == [(3, 2, 6), (3, 4, 7), (3, 6, 7), (3, 7, 7)]
        assert receiver.complete

    def test_duplicate_gap_and_corrupt_ask_for_a_grant_and_move_nothing(self) -> None:
        receiver = Receiver(ChunkPlan(100, 10), window=4, epoch=1)
        deliver(receiver, 0)
        assert deliver(receiver, 0).outcome is Outcome.DUPLICATE
        assert deliver(receiver, 2).outcome is Outcome.GAP
        bad = receiver.on_chunk(1, chunk(receiver.plan, 1), 12345, 0.0)
        assert bad.outcome is Outcome.CORRUPT
        assert bad.grant
        assert (receiver.next, receiver.corrupt, receiver.strikes) == (1, 1, 0)
        assert deliver(receiver, 1).accepted
        assert receiver.corrupt == 0

    def test_a_chunk_beyond_the_grant_or_of_the_wrong_length_is_a_strike(self) -> None:
        receiver = Receiver(ChunkPlan(100, 10), window=2, epoch=1)
        for index in (2, 9, 10, 10**15):
            before = receiver.strikes
            assert receiver.on_chunk(index, b"x" * 10, zlib.crc32(b"x" * 10), 0.0).outcome is Outcome.GAP
            assert receiver.strikes == before + 1
        assert receiver.on_chunk(0, b"short", zlib.crc32(b"short"), 0.0).outcome is Outcome.CORRUPT
        assert receiver.strikes == 5
        assert receiver.next == 0

    def test_silence_asks_for_a_grant_once_a_second(self) -> None:
        receiver = Receiver(ChunkPlan(100, 10), window=2, epoch=1, now=10.0)
        assert receiver.deadline == 10.0 + SILENCE_S
        assert not receiver.due(10.5)
        assert receiver.due(11.0)
        assert not receiver.due(11.5)
        deliver(receiver, 0, now=11.8)
        assert not receiver.due(12.5)
        assert receiver.due(12.8)

    def test_timers_begin_when_first_asked(self) -> None:
        receiver = Receiver(ChunkPlan(100, 10), window=2, epoch=1, stall_s=5.0)
        assert not receiver.due(1e6)
        assert not receiver.stalled(1e6)
        assert receiver.due(1e6 + 1)
        assert receiver.stalled(1e6 + 5)

    def test_stalls_only_without_new_chunks(self) -> None:
        receiver = Receiver(ChunkPlan(30, 10), window=2, epoch=1, stall_s=5.0, now=0.0)
        deliver(receiver, 0, now=4.0)
        assert not receiver.stalled(8.0)
        deliver(receiver, 0, now=8.0)  # a duplicate is no progress
        assert receiver.stalled(9.0)
        receiver.resume(2, now=9.0)
        assert not receiver.stalled(13.0)
        deliver(receiver, 1, now=13.0)
        deliver(receiver, 2, now=13.0)
        assert not receiver.stalled(1e9)
        assert receiver.deadline is None
        assert not receiver.due(1e9)

    def test_starts_at_its_watermark(self) -> None:
        receiver = Receiver(ChunkPlan(30, 10), window=8, epoch=5, start=2)
        assert receiver.grant() == (5, 2, 3)
        assert deliver(receiver, 2).start == 20
        assert Receiver(ChunkPlan(0, 10), window=1, epoch=0).complete

    @pytest.mark.parametrize("bad", [{"window": 0, "epoch": 0}, {"window": 1, "epoch": 0, "start": 4}])
    def test_refuses_nonsense(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="window"):
            Receiver(ChunkPlan(30, 10), **bad)


class TestSender:
    def test_sends_nothing_ungranted_and_each_chunk_once(self) -> None:
        sender = Sender(ChunkPlan(50, 10), resend_s=2.0)
        assert sender.next_chunk(0.0) is None
        assert sender.deadline is None
        sender.on_grant(1, 0, 2, 0.0)
        assert [sender.next_chunk(0.0) for _ in range(3)] == [0, 1, None]
        sender.on_grant(1, 1, 4, 1.0)
        assert [sender.next_chunk(1.0) for _ in range(3)] == [2, 3, None]
        sender.on_grant(1, 4, 99, 1.5)
        assert [sender.next_chunk(1.5) for _ in range(2)] == [4, None]
        assert sender.sent_all
        assert not sender.done
        sender.on_grant(1, 5, 5, 2.0)
        assert sender.done
        assert sender.resends == 0

    def test_late_and_repeated_grants_change_nothing(self) -> None:
        sender = Sender(ChunkPlan(50, 10))
        sender.on_grant(2, 2, 4, 0.0)
        assert [sender.next_chunk(0.0), sender.next_chunk(0.0)] == [2, 3]
        for stale in ((2, 2, 4), (2, 0, 2), (1, 3, 5), (2, 6, 6), (2, -1, 9)):
            sender.on_grant(*stale, 1.0)
        assert sender.next_chunk(1.0) is None
        assert sender.acked == 2

    def test_goes_back_at_once_on_a_newer_epoch(self) -> None:
        sender = Sender(ChunkPlan(50, 10))
        sender.on_grant(1, 0, 4, 0.0)
        assert [sender.next_chunk(0.0) for _ in range(4)] == [0, 1, 2, 3]
        sender.on_grant(2, 1, 3, 0.1)
        assert [sender.next_chunk(0.1) for _ in range(3)] == [1, 2, None]

    def test_resends_after_a_while_without_progress_and_backs_off(self) -> None:
        sender = Sender(ChunkPlan(50, 10), resend_s=1.0)
        sender.on_grant(1, 0, 2, 0.0)
        assert [sender.next_chunk(0.0) for _ in range(3)] == [0, 1, None]
        assert sender.deadline == 1.0
        sender.on_grant(1, 0, 2, 0.9)  # repeats are not progress
        now, gaps = 0.0, []
        for _ in range(6):
            deadline = sender.deadline
            assert deadline is not None
            assert sender.next_chunk(deadline - 0.01) is None
            assert [sender.next_chunk(deadline) for _ in range(3)] == [0, 1, None]
            gaps.append(deadline - now)
            now = deadline
        assert gaps == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
        assert max(gaps) == RESEND_BACKOFF
        sender.on_grant(1, 1, 3, now)
        assert sender.deadline == now + 1.0

    def test_a_get_starts_it_and_any_epoch_may_follow(self) -> None:
        sender = Sender(ChunkPlan(50, 10))
        sender.start(1, 3, 0.0)
        assert [sender.next_chunk(0.0) for _ in range(3)] == [1, 2, None]
        sender.on_grant(7, 2, 5, 0.0)  # the first epoch: credit, not a restart
        assert [sender.next_chunk(0.0) for _ in range(3)] == [3, 4, None]
        sender.start(3, 5, 0.0)  # a repeated Get
        assert sender.next_chunk(0.0) == 3


class World:
    """Both ends over a link that may lose, repeat and reorder; either end may be restarted."""

    def __init__(self, count: int, window: int, seed: int) -> None:
        self.plan = ChunkPlan(count * 4 - 1 if count else 0, 4)
        self.window = window
        self.random = random.Random(seed)
        self.now = 0.0
        self.epoch = 1
        self.sent = 0
        self.up: list[tuple[int, bytes, int]] = []
        self.down: list[tuple[int, int, int]] = []
        self.taken: list[int] = []
        self.sender = Sender(self.plan, resend_s=2.0)
        self.receiver = Receiver(self.plan, window, self.epoch, now=0.0)
        self.put()

    def put(self) -> None:
        self.epoch += 1
        self.down.append(self.receiver.resume(self.epoch, self.now))

    def restart_sender(self) -> None:
        self.sender = Sender(self.plan, resend_s=2.0)
        self.put()

    def restart_receiver(self) -> None:
        """What was not yet on disk in whole blocks (of 2 chunks here) is to be sent again."""
        mark = self.receiver.next // 2 * 2
        del self.taken[mark:]
        self.epoch += 1
        self.receiver = Receiver(self.plan, self.window, self.epoch, mark, now=self.now)
        self.put()

    def send(self) -> None:
        index = self.sender.next_chunk(self.now)
        if index is not None:
            assert index < self.sender.limit
            data = chunk(self.plan, index)
            self.sent += 1
            self.up.append((index, data, zlib.crc32(data)))

    def receive(self, at: int, keep: bool) -> None:
        if self.up:
            at %= len(self.up)
            index, data, crc32 = self.up[at] if keep else self.up.pop(at)
            arrival = self.receiver.on_chunk(index, data, crc32, self.now)
            if arrival.accepted:
                assert index == len(self.taken)
                assert arrival.start == 4 * index
                self.taken.append(index)
            if arrival.grant:
                self.down.append(self.receiver.grant())

    def granted(self, at: int, keep: bool) -> None:
        if self.down:
            at %= len(self.down)
            self.sender.on_grant(*(self.down[at] if keep else self.down.pop(at)), self.now)

    def pass_time(self, by: float) -> None:
        self.now += by
        if self.receiver.due(self.now):
            self.down.append(self.receiver.grant())

    def finish_on_a_good_link(self) -> None:
        for _ in range(20 * (self.plan.count + 5)):
            while self.down:
                self.granted(0, keep=False)
            before = self.sent
            self.send()
            while self.up:
                self.receive(0, keep=False)
            if self.sent == before and not self.down:
                if self.sender.done:
                    return
                self.pass_time(0.5)
        raise AssertionError("did not finish")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 4), st.just(False)),
        st.tuples(st.just("receive"), st.integers(0, 5), st.booleans()),
        st.tuples(st.just("granted"), st.integers(0, 5), st.booleans()),
        st.tuples(st.just("drop_up"), st.integers(0, 5), st.just(False)),
        st.tuples(st.just("drop_down"), st.integers(0, 5), st.just(False)),
        st.tuples(st.just("time"), st.integers(1, 30), st.just(False)),
        st.tuples(st.just("cut"), st.just(0), st.just(False)),
        st.tuples(st.just("restart_sender"), st.just(0), st.just(False)),
        st.tuples(st.just("restart_receiver"), st.just(0), st.just(False)),
    ),
    max_size=120,
)


@given(count=st.integers(0, 24), window=st.integers(1, 6), steps=STEPS)
@settings(max_examples=300, deadline=None)
def test_any_schedule_delivers_every_chunk_once_in_order(
    count: int, window: int, steps: list[tuple[str, int, bool]]
) -> None:
    world = World(count, window, seed=0)
    for what, number, keep in steps:
        match what:
            case "send":
                for _ in range(number):
                    world.send()
            case "receive":
                world.receive(number, keep)
            case "granted":
                world.granted(number, keep)
            case "drop_up" if world.up:
                world.up.pop(number % len(world.up))
            case "drop_down" if world.down:
                world.down.pop(number % len(world.down))
            case "time":
                world.pass_time(number / 10)
            case "cut":  # everything on its way is lost, the sender comes back and repeats Put
                world.up.clear()
                world.down.clear()
                world.put()
            case "restart_sender":
                world.restart_sender()
            case "restart_receiver":
                world.restart_receiver()
            case _:
                pass
        assert world.taken == list(range(world.receiver.next))
        assert world.sender.cursor <= max(world.sender.limit, world.sender.acked)
    world.finish_on_a_good_link()
    assert world.taken == list(range(world.plan.count))
    assert world.receiver.complete


def test_resends_are_bounded_on_a_lossy_link() -> None:
    """One message in ten is lost each way: no more than a window is sent again for each loss."""
    world = World(count=400, window=8, seed=7)
    lost = 0
    for _ in range(200_000):
        if world.sender.done:
            break
        sent = world.sent
        world.send()
        if world.sent > sent and world.random.random() < 0.1:
            world.up.pop()
            lost += 1
        while world.up:
            world.receive(0, keep=False)
        if world.down and world.random.random() < 0.1:
            world.down.pop()
        while world.down:
            world.granted(0, keep=False)
        world.pass_time(0.05)
    assert world.sender.done
    assert world.taken == list(range(400))
    assert lost > 20
    assert world.sent - 400 <= lost * world.window
