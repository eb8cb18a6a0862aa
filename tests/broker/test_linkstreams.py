"""A link's payload streams against the broker's data and control cores: no sockets, no clock, every fault by hand."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fedloom.broker.linksource import Source
from fedloom.broker.linkstreams import Download, Streams, Upload
from fedloom.broker.spool import Spool
from fedloom.broker.transfers import CONTROL, Limits, Transfers
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError, FencedError, PayloadError
from fedloom.serialization.messages import (
    Abort,
    Chunk,
    Finish,
    Get,
    Grant,
    Hello,
    Packet,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    Welcome,
    decode,
    encode,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KIB = 1024
CHUNK = 4 * KIB
BODY = random.Random(3).randbytes(10 * CHUNK + 77)
LIMITS = Limits(chunk_bytes=CHUNK, window=4, trust_local=True)
STREAM = "a" * 32


def ref_of(data: bytes) -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob")


class Line:
    """One peer's data link: what is on its way in both directions, and who is at its ends."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.now = 100.0
        self.epoch = 0
        self.boots = 0
        self.route = b""
        self.streams = Streams()
        self.up: deque[Packet] = deque()
        self.down: deque[Packet] = deque()
        self.welcome = Welcome("s", "e", chunk_bytes=CHUNK, window=LIMITS.window)
        self.transfers: Transfers
        self.boot()

    def boot(self) -> None:
        """A new data process: what was in its memory and on the line is gone."""
        self.boots += 1
        spool = Spool(self.world.store, "process")
        self.transfers = Transfers(spool, LIMITS, boot=f"{self.boots:016x}", next_epoch=self.next_epoch)
        self.transfers.on_control(Packet(Welcome("s", "control")), self.now)
        self.connect()

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def connect(self) -> None:
        """A new connection; whatever was on the old one is lost."""
        self.up.clear()
        self.down.clear()
        self.transfers.lost(self.route)
        self.route = random.randbytes(5)
        self.transfers.on_peer(self.route, Packet(Hello("n", "client", "b", session="s")), self.now)
        self.collect()
        assert isinstance(self.down.popleft().message, Welcome)
        self.streams.connected()

    # ------------------------------------------------------------ a step

    def send(self) -> None:
        """The link's turn."""
        for frames in self.streams.outgoing(self.now, self.welcome):
            self.up.append(decode(list(frames), CHUNK))

    def arrive(self, packet: Packet) -> None:
        """Something reaches the broker."""
        self.transfers.on_peer(self.route, packet, self.now)
        self.collect()

    def deliver(self, packet: Packet) -> None:
        """Something reaches the link."""
        self.streams.on_message(packet.message, packet.tail, self.now)

    def collect(self) -> None:
        """The data process's turns until it rests, with the real control core behind it."""
        spool = Spool(self.world.store, "process")
        busy = True
        while busy:
            self.transfers.work((), self.now, max_bytes=1 << 20, chunks=100)
            landings = self.transfers.landings()
            gone = spool.finish_all([landing for _, landing in landings])
            for key, landing in landings:
                self.transfers.landed(key, self.now, gone=landing in gone)
            outgoing = self.transfers.outgoing()
            busy = bool(landings or outgoing)
            for out in outgoing:
                if out.route == CONTROL:
                    for answer in self.world.data(out.message):
                        self.transfers.on_control(Packet(answer), self.now)
                elif out.route == self.route:
                    self.down.append(decode(encode(out.message, bytes(out.tail)), CHUNK))

    def run(self, stream: Upload | Download, steps: int = 400) -> None:
        """Until the stream is done."""
        for _ in range(steps):
            if stream.done.is_set():
                return
            self.send()
            moved = bool(self.up or self.down)
            while self.up:
                self.arrive(self.up.popleft())
            self.collect()
            while self.down:
                self.deliver(self.down.popleft())
            if not moved:
                self.now += max(0.01, min(self.streams.wait_s(self.now), 1.0))
                self.transfers.tick(self.now)
        raise AssertionError("the stream does not end")

    def stored(self, ref: PayloadRef) -> bytes:
        """What the broker has of it, and that it has a row."""
        assert self.world.core.state.payloads.has(ref)
        return (self.world.store / "payloads" / ref.id[:2] / ref.id).read_bytes()


@pytest.fixture
def line(world: Any) -> Line:
    return Line(world)


@pytest.fixture
def upload(line: Line) -> Callable[..., Upload]:
    def make(data: bytes = BODY, **fields: Any) -> Upload:
        stream = Upload(
            Put(payload=ref_of(data), stream=STREAM, **fields), Source([data[:5000], data[5000:]], len(data))
        )
        line.streams.add(stream)
        return stream

    return make


@pytest.fixture
def download(line: Line) -> Callable[..., tuple[Download, bytearray]]:
    def make(ref: PayloadRef) -> tuple[Download, bytearray]:
        got = bytearray()

        def sink(offset: int, data: memoryview) -> None:
            assert offset == len(got), "in order, each byte once"
            got.extend(data)

        stream = Download("b" * 32, ref, sink)
        line.streams.add(stream)
        return stream, got

    return make


def test_up_and_down(line: Line, upload: Any, download: Any) -> None:
    up = upload()
    line.run(up)
    assert up.error is None
    assert up.stored == ref_of(BODY)
    assert line.stored(ref_of(BODY)) == BODY
    assert up.chunks_sent == 11
    down, got = download(ref_of(BODY))
    line.run(down)
    assert down.error is None
    assert got == BODY


def test_a_power_cut_that_forgot_the_epochs(line: Line, upload: Any) -> None:
    line.epoch = 70_000
    up = upload()
    for _ in range(2):  # Put; Grant
        line.send()
        while line.up:
            line.arrive(line.up.popleft())
        while line.down:
            line.deliver(line.down.popleft())
    line.epoch = 0
    line.boot()
    line.run(up)
    assert line.stored(ref_of(BODY)) == BODY
    assert line.now < 105.0, "nothing waits for a resend"


def test_what_is_there_is_not_sent_again(line: Line, upload: Any) -> None:
    line.run(upload())
    again = upload()
    line.run(again)
    assert again.stored == ref_of(BODY)
    assert again.chunks_sent == 0


@pytest.mark.parametrize("fault", ["connect", "boot"])
def test_upload_goes_on_at_the_watermark(line: Line, upload: Any, fault: str) -> None:
    """What is behind the last block of 4 MiB is sent again: here all that was, and that once."""
    up = upload()
    for _ in range(3):  # Put; Grant; a window of chunks
        line.send()
        while line.up:
            line.arrive(line.up.popleft())
        while line.down:
            line.deliver(line.down.popleft())
    sent = up.chunks_sent
    assert 4 <= sent < 11
    getattr(line, fault)()
    line.run(up)
    assert up.error is None
    assert line.stored(ref_of(BODY)) == BODY
    assert up.chunks_sent == 11 + sent


def test_finish_is_said_again_until_it_is_answered(line: Line, upload: Any) -> None:
    """A data process that dies after Finish leaves nobody who would speak first."""
    up = upload()
    while not any(isinstance(p.message, Finish) for p in line.up):
        line.send()
        for packet in [p for p in line.up if not isinstance(p.message, Finish)]:
            line.up.remove(packet)
            line.arrive(packet)
        while line.down:
            line.deliver(line.down.popleft())
    line.up.clear()
    line.send()
    assert not line.up
    assert 0 < line.streams.wait_s(line.now) <= 5.0
    line.now += 5.0
    line.send()
    assert [type(p.message) for p in line.up] == [Finish]
    line.run(up)
    assert up.stored


def test_busy_broker_is_asked_again_after_its_pause(line: Line, upload: Any) -> None:
    up = upload()
    line.deliver(Packet(Abort(STREAM, "busy", "", retry_after_s=2.0)))
    assert not up.done.is_set()
    line.send()
    assert not line.up
    assert line.streams.wait_s(line.now) == pytest.approx(2.0)
    line.now += 2.0
    line.send()
    assert [type(p.message) for p in line.up] == [Put]
    line.run(up)
    assert up.stored


@pytest.mark.parametrize(("code", "kind"), [("fenced", FencedError), ("digest", FaultError)])
def test_refusals_are_typed(line: Line, upload: Any, code: str, kind: type[FaultError]) -> None:
    up = upload()
    line.deliver(Packet(Abort(STREAM, code, "why")))
    assert up.done.is_set()
    assert type(up.error) is kind
    assert str(up.error) == "why"
    line.streams.remove(up)
    line.send()
    assert [type(p.message) for p in line.up] == [Abort]


def test_real_refusals(line: Line, upload: Any, download: Any) -> None:
    """Of the broker's own: an id that is not its bytes' digest, an unknown payload, an unknown job."""
    wrong = replace(ref_of(BODY), id=PayloadId("b3-" + "0" * 64))
    up = Upload(Put(payload=wrong, stream=STREAM), Source([BODY], len(BODY)))
    line.streams.add(up)
    line.run(up)
    assert isinstance(up.error, FaultError)
    assert up.error.code == "digest"
    job = upload(job="nobody's", claim=1)
    line.run(job)
    assert isinstance(job.error, FaultError)
    assert job.error.code == "unknown_job"
    down, _ = download(ref_of(b"never put" * 9000))
    line.run(down)
    assert isinstance(down.error, FaultError)


def test_sink_that_raises_ends_the_stream_alone(line: Line, upload: Any) -> None:
    line.run(upload())
    calls: list[int] = []

    def sink(offset: int, data: memoryview) -> None:
        calls.append(offset)
        if offset:
            raise ZeroDivisionError("in the sink")

    bad = Download("c" * 32, ref_of(BODY), sink)
    good: list[int] = []
    other = Download("d" * 32, ref_of(BODY), lambda offset, data: good.append(offset))
    line.streams.add(bad)
    line.streams.add(other)
    line.run(bad)
    assert isinstance(bad.error, ZeroDivisionError)
    assert calls == [0, CHUNK]
    line.streams.remove(bad)
    line.run(other)
    assert other.error is None
    assert len(good) == 11
    assert calls == [0, CHUNK]


def test_damaged_payload_is_refused_at_the_end(line: Line, upload: Any, download: Any) -> None:
    line.run(upload())
    down, got = download(replace(ref_of(BODY), digest="f" * 64))
    line.run(down)
    assert isinstance(down.error, PayloadError)
    assert len(got) == len(BODY)


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, len(BODY) + 3 * CHUNK])
def test_payload_of_another_size_is_said(line: Line, upload: Any, download: Any, size: int) -> None:
    line.run(upload())
    down, _ = download(replace(ref_of(BODY), size=size))
    line.run(down)
    assert isinstance(down.error, PayloadError)


def test_other_chunk_size_after_a_restart_is_said(line: Line, upload: Any, download: Any) -> None:
    line.run(upload())
    down, _ = download(ref_of(BODY))
    line.send()
    line.welcome = replace(line.welcome, chunk_bytes=2 * CHUNK)
    line.connect()
    line.send()
    assert isinstance(down.error, PayloadError)


def test_nothing_is_sent_beyond_the_grant_and_nobody_spins(line: Line, upload: Any) -> None:
    up = upload()
    line.send()
    assert line.streams.wait_s(line.now) == pytest.approx(5.0)
    put = line.up.popleft()
    line.arrive(put)
    (grant,) = [p for p in line.down if isinstance(p.message, Grant)]
    line.deliver(grant)
    assert line.streams.wait_s(line.now) == 0.0
    line.send()
    assert up.chunks_sent == LIMITS.window
    assert line.streams.wait_s(line.now) > 0.5


def test_full_socket_loses_nothing(line: Line, upload: Any) -> None:
    """Frames that the socket did not take come first the next time, in their order."""
    up = upload()
    taken: list[Packet] = []
    rng = random.Random(5)
    while not up.done.is_set():
        for frames in line.streams.outgoing(line.now, line.welcome):
            if rng.random() < 0.5:
                line.streams.unsend(frames)
                assert line.streams.blocked
                break
            taken.append(decode(list(frames), CHUNK))
            line.arrive(taken[-1])
        line.collect()
        while line.down:
            line.deliver(line.down.popleft())
    assert [p.message.index for p in taken if isinstance(p.message, Chunk)] == list(range(11))
    assert line.stored(ref_of(BODY)) == BODY


def test_streams_take_turns_to_be_first(line: Line) -> None:
    first: set[str] = set()
    for letter in "123":
        line.streams.add(Download(letter * 32, ref_of(BODY), lambda offset, data: None))
    for _ in range(3):
        for stream in (*line.streams._streams.values(),):
            stream.reconnect()
        frames = next(iter(line.streams.outgoing(line.now, line.welcome)))
        message = decode(list(frames)).message
        assert isinstance(message, Get)
        first.add(message.stream)
    assert len(first) == 3


# ---------------------------------------------------------------- sources


def test_given_up_upload_sends_no_chunk_of_memory_that_may_change(line: Line, upload: Any) -> None:
    up = upload()
    line.send()
    line.arrive(line.up.popleft())
    while line.down:
        line.deliver(line.down.popleft())
    assert up.source is not None
    up.source.close()  # the caller timed out, while the link's thread looks at a snapshot that has the stream
    line.send()
    assert not line.up


# ---------------------------------------------------------------- every order of faults

MOVES = st.sampled_from(["send", "up", "up", "down", "down", "dup-up", "dup-down", "flip", "cut", "boot", "wait"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVES, max_size=60), way=st.sampled_from(["up", "down"]), seed=st.integers(0, 1000))
def test_any_faults(tmp_path_factory: Any, tools: Any, moves: list[str], way: str, seed: int) -> None:
    """Chunks lost, doubled, damaged, cut connections, killed data processes: the bytes arrive, each once."""
    world = tools.World(tmp_path_factory.mktemp("w") / "store")
    try:
        line = Line(world)
        data = random.Random(seed).randbytes(6 * CHUNK + seed)
        ref = ref_of(data)
        up = Upload(Put(payload=ref, stream=STREAM), Source([data], len(data)))
        line.streams.add(up)
        stream: Upload | Download = up
        got = bytearray()
        if way == "down":
            line.run(up)
            line.streams.remove(up)

            def sink(offset: int, part: memoryview) -> None:
                assert offset == len(got)
                got.extend(part)

            stream = Download("e" * 32, ref, sink)
            line.streams.add(stream)
        for move in moves:
            act(line, move)
        line.run(stream)
        assert stream.error is None or stream.error.code == "corrupt"  # pyright: ignore[reportAttributeAccessIssue]
        if stream.error is None:
            assert (line.stored(ref) if way == "up" else got) == data
        line.streams.remove(stream)
    finally:
        world.journal.close()


def act(line: Line, move: str) -> None:
    match move:
        case "send":
            line.send()
        case "up" if line.up:
            line.arrive(line.up.popleft())
        case "down" if line.down:
            line.deliver(line.down.popleft())
        case "dup-up" if line.up:
            line.arrive(line.up[0])
        case "dup-down" if line.down and not isinstance(line.down[0].message, Stored):
            line.deliver(line.down[0])
        case "flip" if line.up and isinstance(line.up[0].message, Chunk):
            tail = bytearray(line.up[0].tail)
            tail[0] ^= 1
            line.up[0] = replace(line.up[0], tail=bytes(tail))
        case "cut":
            line.connect()
        case "boot":
            line.boot()
        case "wait":
            line.now += 3.0
            line.transfers.tick(line.now)
            line.collect()
        case _:
            pass
