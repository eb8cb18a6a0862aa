"""A data core with a clock and plain objects for peers (`Bench`), and a data loop over real sockets (`DataWorld`)."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.broker.data import DataConfig, DataLoop
from fedloom.broker.sockets import connect, free_endpoint, make_context, make_socket
from fedloom.broker.spool import Spool
from fedloom.broker.transfers import CONTROL, Limits, Transfers
from fedloom.serialization import faultpoints
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Chunk,
    Event,
    Finish,
    Get,
    Grant,
    Hello,
    Message,
    Packet,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    Welcome,
    decode,
    encode,
)
from fedloom.serialization.stream import ChunkPlan, Receiver, Sender

TIMEOUT_S = 20.0
M = TypeVar("M")
A, B = b"route-a", b"route-b"
S1, S2 = "1" * 32, "2" * 32
KIB = 1024
BODY = random.Random(1).randbytes(300 * KIB + 7)
LIMITS = Limits(chunk_bytes=64 * KIB, window=4, trust_local=True)


def ref(data: bytes = BODY, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


class Bench:
    """A Transfers with its spool, a clock, and a control process that this test plays."""

    def __init__(self, root: Path, limits: Limits = LIMITS, epoch: int = 0) -> None:
        self.spool = Spool(root, "process")
        self.now = 100.0
        self.epoch = epoch
        self.transfers = Transfers(self.spool, limits, boot="ab" * 8, next_epoch=self.next_epoch, endpoint="tcp://d")
        self.out: dict[bytes, list[tuple[Message, bytes]]] = {CONTROL: [], A: [], B: []}
        self.hold_landings = False
        for session, route in (("sa", A), ("sb", B)):
            self.control(Welcome(session, "control-1"))
            self.peer(route, Hello("node", "executor", "boot", session=session))
            (welcome,) = self.take(route, Welcome)
            assert (welcome.session, welcome.chunk_bytes, welcome.window) == (
                session,
                limits.chunk_bytes,
                limits.window,
            )

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def peer(self, route: bytes, message: Message, tail: bytes = b"") -> None:
        self.transfers.on_peer(route, Packet(message, tail), self.now)
        self.collect()

    def control(self, message: Message) -> None:
        self.transfers.on_control(Packet(message), self.now)
        self.collect()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.transfers.tick(self.now)
        self.collect()

    def work(self, blocked: tuple[bytes, ...] = (), max_bytes: int = 1 << 20, chunks: int = 100) -> bool:
        more = self.transfers.work(blocked, self.now, max_bytes=max_bytes, chunks=chunks)
        self.collect()
        return more

    def work_off(self) -> None:
        for _ in range(1000):
            if not self.work():
                return
        raise AssertionError("work without end")

    def collect(self) -> None:
        if not self.hold_landings:
            landings = self.transfers.landings()
            gone = self.spool.finish_all([landing for _, landing in landings])
            for key, landing in landings:
                self.transfers.landed(key, self.now, gone=landing in gone)
        for out in self.transfers.outgoing():
            self.out.setdefault(out.route, []).append((out.message, bytes(out.tail)))

    def take(self, route: bytes, kind: type[M]) -> list[M]:
        """All messages of this kind that were sent to a peer since; they are gone then."""
        found = [m for m, _ in self.out[route] if isinstance(m, kind)]
        self.out[route] = [(m, t) for m, t in self.out[route] if not isinstance(m, kind)]
        return found

    def one(self, route: bytes, kind: type[M]) -> M:
        (message,) = self.take(route, kind)
        return message

    def admit(self, route: bytes, put: Put) -> Put:
        """Put, and let control admit it; the question that control got."""
        self.peer(route, put)
        question = self.one(CONTROL, Put)
        self.control(Grant(question.stream, 0, 0, 0))
        return question

    def chunk(self, route: bytes, stream: str, index: int, data: bytes = BODY) -> None:
        start, stop = ChunkPlan(len(data), self.transfers.limits.chunk_bytes).span(index)
        part = data[start:stop]
        self.peer(route, Chunk(stream, index, len(part), zlib.crc32(part)), part)

    def chunks(self, route: bytes, stream: str, indexes: range, data: bytes = BODY) -> None:
        for index in indexes:
            self.chunk(route, stream, index, data)

    def store(self, route: bytes) -> PayloadRef:
        """Play control: the landed payload gets its row."""
        report = self.one(CONTROL, Put)
        assert report.local == "landed"
        assert self.spool.exists(report.payload.id, report.payload.size)
        self.control(Stored(stream=report.stream, payload=report.payload))
        return report.payload


@pytest.fixture
def make_bench() -> type[Bench]:
    return Bench


@pytest.fixture(name="bench")
def bench_fixture(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def no_faults() -> Iterator[None]:
    yield
    faultpoints.arm("")


class FakeControl(threading.Thread):
    """Admits every Put, journals every landed payload in a dict, announces its sessions to whoever says Hello."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(name="fake-control", daemon=True)
        self.endpoint = endpoint
        self.rows: dict[str, PayloadRef] = {}
        self.questions: list[Put] = []
        self.sessions = ["s1", "s2", "s3"]
        self.hello: Hello | None = None
        self.answer: Callable[[Put], Message | None] = self.admit
        self.ready = threading.Event()
        self.stopping = threading.Event()
        self.orders: list[Message] = []

    def admit(self, put: Put) -> Message | None:
        if put.local == "landed":
            self.rows[put.payload.id] = put.payload
        if put.payload.id in self.rows:
            return Stored(stream=put.stream, payload=self.rows[put.payload.id])
        return Grant(put.stream, 0, 0, 0)

    def run(self) -> None:
        context = make_context()
        router = make_socket(context, "internal-router")
        router.bind(self.endpoint)
        route = b""
        while not self.stopping.is_set():
            while self.orders and route:
                router.send_multipart([route, *encode(self.orders.pop(0))])
            if not router.poll(20):
                continue
            route, *frames = router.recv_multipart()
            match decode(frames).message:
                case Hello() as hello:
                    self.hello = hello
                    for session in self.sessions:
                        router.send_multipart([route, *encode(Welcome(session, "control-1"))])
                    self.ready.set()
                case Put() as put:
                    self.questions.append(put)
                    answer = self.answer(put)
                    if answer is not None:
                        router.send_multipart([route, *encode(answer)])
                case Event(kind="bounds"):
                    pass
                case other:
                    raise AssertionError(other)
        context.destroy(linger=0)


class DataPeer:
    """A peer's data link."""

    def __init__(self, endpoint: str, session: str = "s1", chunk_bytes: int = 64 * KIB, *, greet: bool = True) -> None:
        self.context = make_context()
        self.socket = make_socket(self.context, "data-dealer", chunk_bytes=1 << 20)
        self.socket.set(zmq.SNDTIMEO, 10_000)
        self.chunk_bytes = chunk_bytes
        self.broken: Callable[[], bool] = lambda: False
        connect(self.socket, endpoint)
        if greet:
            self.send(Hello("node", "executor", "boot", session=session))
            welcome = self.expect(Welcome)
            assert (welcome.session, welcome.chunk_bytes) == (session, chunk_bytes)

    def send(self, message: Message, tail: bytes = b"") -> None:
        self.socket.send_multipart(encode(message, tail))

    def receive(self, timeout_s: float = TIMEOUT_S) -> Packet:
        deadline = time.monotonic() + timeout_s
        while not self.socket.poll(50):
            if time.monotonic() >= deadline or self.broken():
                raise AssertionError(f"nothing came in {timeout_s} s")
        return decode(self.socket.recv_multipart(), 1 << 20)

    def expect(self, kind: type[M], timeout_s: float = TIMEOUT_S) -> M:
        """The next message of this kind; grants before it are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive(max(0.01, deadline - time.monotonic())).message
            if isinstance(message, kind):
                return message
            assert isinstance(message, Grant), message

    def chunk(self, stream: str, data: bytes, index: int) -> None:
        start, stop = ChunkPlan(len(data), self.chunk_bytes).span(index)
        part = data[start:stop]
        self.send(Chunk(stream, index, len(part), zlib.crc32(part)), part)

    def upload(self, data: bytes, put: Put, *, until: int | None = None) -> tuple[Message, int]:
        """Send it all, or ``until`` that chunk was accepted; the last message, and how many chunks were sent."""
        sender = Sender(ChunkPlan(len(data), self.chunk_bytes))
        self.send(put)
        sent = 0
        while True:
            message = self.receive().message
            if not isinstance(message, Grant):
                return message, sent
            sender.on_grant(message.epoch, message.next, message.limit, time.monotonic())
            if until is not None and sender.acked >= until:
                return message, sent
            while (index := sender.next_chunk(time.monotonic())) is not None:
                self.chunk(put.stream, data, index)
                sent += 1
            if sender.done:
                self.send(Finish(put.stream, digest_buffers([data])))

    def download(self, payload: PayloadRef, stream: str = S1, have: bytes = b"") -> bytes:
        plan = ChunkPlan(payload.size, self.chunk_bytes)
        receiver = Receiver(plan, 4, 1, len(have) // self.chunk_bytes)
        _, start, limit = receiver.grant()
        self.send(Get(stream, payload.id, start, limit))
        out = bytearray(have[: start * self.chunk_bytes])
        while True:
            packet = self.receive()
            match packet.message:
                case Chunk() as chunk:
                    arrival = receiver.on_chunk(chunk.index, packet.tail, chunk.crc32, time.monotonic())
                    if arrival.accepted:
                        out += packet.tail
                    if arrival.grant:
                        self.send(Grant(stream, *receiver.grant()))
                case Finish() as finish:
                    assert receiver.complete
                    assert finish.digest in ("", payload.digest)
                    return bytes(out)
                case other:
                    raise AssertionError(other)

    def close(self) -> None:
        self.context.destroy(linger=0)


class DataThread:
    """A data loop in a thread."""

    def __init__(self, config: DataConfig) -> None:
        self.loop = DataLoop(config)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop.run, args=(self.stop,), name="test-data")
        self.thread.start()

    def close(self) -> None:
        if self.thread.is_alive() or not self.stop.is_set():
            self.stop.set()
            self.loop.wake()
            self.thread.join(10)
            assert not self.thread.is_alive()
            self.loop.close()


class DataWorld:
    def __init__(self, root: Path) -> None:
        self.store = root / "store"
        self.config = DataConfig(
            store=self.store,
            bind=free_endpoint("tcp://127.0.0.1:*"),
            internal=f"ipc://{root}/i",
            chunk_bytes=64 * KIB,
            window=8,
            trust_local=True,
            hello_wait_s=0.3,
            stall_s=1.0,
        )
        self.control = FakeControl(self.config.internal)
        self.control.start()
        self.closing: list[Any] = []

    def data(self, **changes: Any) -> DataThread:
        self.config = replace(self.config, **changes)
        data = DataThread(self.config)
        self.closing.append(data)
        assert self.control.ready.wait(TIMEOUT_S)
        return data

    def peer(self, session: str = "s1", *, greet: bool = True) -> DataPeer:
        peer = DataPeer(self.config.bind, session, self.config.chunk_bytes, greet=greet)
        self.closing.append(peer)
        return peer

    def close(self) -> None:
        for one in reversed(self.closing):
            one.close()
        self.control.stopping.set()
        self.control.join(10)


@pytest.fixture(name="world")
def world_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataWorld]:
    world = DataWorld(tmp_path_factory.mktemp("d"))
    yield world
    world.close()
