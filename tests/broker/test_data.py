"""The data process over real sockets; this test plays the control process and the peers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.broker.data import DataConfig, DataLoop, main
from fedloom.broker.datasync import Epochs, Syncer
from fedloom.broker.sockets import connect, free_endpoint, make_context, make_socket
from fedloom.broker.spool import Landing, Spool
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.errors import FaultError, LinkError, StorageError
from fedloom.serialization.messages import (
    Abort,
    Bye,
    Chunk,
    Fault,
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

M = TypeVar("M")
KIB = 1024
S1, S2 = "1" * 32, "2" * 32
TIMEOUT_S = 20.0


def ref(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


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
                case other:
                    raise AssertionError(other)
        context.destroy(linger=0)


class Peer:
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


class World:
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

    def peer(self, session: str = "s1", *, greet: bool = True) -> Peer:
        peer = Peer(self.config.bind, session, self.config.chunk_bytes, greet=greet)
        self.closing.append(peer)
        return peer

    def close(self) -> None:
        for one in reversed(self.closing):
            one.close()
        self.control.stopping.set()
        self.control.join(10)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("d"))
    yield world
    world.close()


BODY = random.Random(3).randbytes(3 * 1024 * KIB + 5)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_up_and_down(world: World, durability: str) -> None:
    world.data(durability=durability)
    assert world.control.hello is not None
    assert world.control.hello.features == (world.config.bind,)
    peer = world.peer()
    payload = ref(BODY)
    answer, sent = peer.upload(BODY, Put(payload, S1, task="t", attempt=1))  # type: ignore[arg-type]
    assert answer == Stored(stream=S1, payload=payload)
    assert sent == ChunkPlan(len(BODY), 64 * KIB).count
    assert [q.local for q in world.control.questions] == ["", "landed"]
    assert {(q.task, q.attempt) for q in world.control.questions} == {("t", 1)}
    assert Spool(world.store).path(payload.id).read_bytes() == BODY
    assert peer.download(payload) == BODY
    assert peer.download(payload, S2, have=BODY[: 10 * 64 * KIB]) == BODY
    other = world.peer("s2")
    assert other.upload(BODY, Put(payload, S1)) == (Stored(stream=S1, payload=payload), 0)  # control has it


def test_many_peers_at_once(world: World) -> None:
    world.data()
    bodies = {s: random.Random(s).randbytes(700 * KIB) for s in ("s1", "s2", "s3")}
    peers = {s: world.peer(s) for s in bodies}
    results: dict[str, Any] = {}

    def go(session: str) -> None:
        data = bodies[session]
        answer, _ = peers[session].upload(data, Put(ref(data), S1))
        results[session] = (answer, peers[session].download(ref(data)))

    threads = [threading.Thread(target=go, args=(s,)) for s in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert results == {s: (Stored(stream=S1, payload=ref(d)), d) for s, d in bodies.items()}


def test_resume_after_the_data_loop_was_restarted(world: World) -> None:
    body = random.Random(4).randbytes(3 * BLOCK_BYTES)
    payload = ref(body, "r-t.1")
    first = world.data()
    peer = world.peer()
    grant, _ = peer.upload(body, Put(payload, S1), until=150)
    assert isinstance(grant, Grant)
    first.close()
    world.control.ready.clear()
    world.data()
    again = world.peer("s2")  # another process of the executor, with another stream
    answer, sent = again.upload(body, Put(payload, S2))
    assert answer == Stored(stream=S2, payload=payload)
    assert sent == 64  # one block of the three: two were there
    assert Spool(world.store).path(payload.id).read_bytes() == body


def test_the_same_link_goes_on_after_a_restart(world: World) -> None:
    """The socket reconnects by itself; its first chunk is answered with Fault "session", then Hello and Put again."""
    body = random.Random(5).randbytes(2 * BLOCK_BYTES)
    payload = ref(body)
    first = world.data()
    peer = world.peer()
    before, _ = peer.upload(body, Put(payload, S1), until=100)
    assert isinstance(before, Grant)
    first.close()
    world.control.ready.clear()
    world.data()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert time.monotonic() < deadline
        peer.chunk(S1, body, 0)  # IMMEDIATE: blocks until the connection stands again
        if peer.socket.poll(200) and isinstance(fault := peer.receive().message, Fault):
            assert fault.code == "session"
            break
    peer.send(Hello("node", "executor", "boot", session="s1"))
    while not isinstance(message := peer.receive().message, Welcome):
        assert isinstance(message, Fault | Grant)
    answer, sent = peer.upload(body, Put(payload, S1))
    assert answer == Stored(stream=S1, payload=payload)
    assert sent == 64


def test_a_bad_digest_is_aborted(world: World) -> None:
    world.data()
    peer = world.peer()
    answer, _ = peer.upload(BODY[:-1] + b"?", Put(ref(BODY), S1))
    assert isinstance(answer, Abort)
    assert (answer.stream, answer.code) == (S1, "corrupt")
    assert list(Spool(world.store).incoming.iterdir()) == []
    assert peer.upload(BODY, Put(ref(BODY), S2))[0] == Stored(stream=S2, payload=ref(BODY))


def test_oversize_payloads_and_frames(world: World) -> None:
    world.data(max_payload_bytes=1000)
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    assert peer.expect(Abort).code == "size"
    small = b"x" * 900
    peer.send(Put(ref(small), S2))
    assert peer.expect(Grant).limit == 1
    big = b"y" * (64 * KIB + 1)  # over the link's tail, under the socket's last line
    peer.send(Chunk(S2, 0, len(big), zlib.crc32(big)), big)
    assert peer.expect(Fault).code == "malformed"
    peer.chunk(S2, small, 0)
    peer.send(Finish(S2))
    assert peer.expect(Stored).payload == ref(small)


def test_gaps_are_answered_with_the_watermark(world: World) -> None:
    world.data()
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    grant = peer.expect(Grant)
    for index in (3, 1, 7):
        peer.chunk(S1, BODY, index)
        assert peer.expect(Grant) == grant
    answer, sent = peer.upload(BODY, Put(ref(BODY), S1))
    assert answer == Stored(stream=S1, payload=ref(BODY))
    assert sent == ChunkPlan(len(BODY), 64 * KIB).count


def test_a_stalled_stream_is_aborted(world: World) -> None:
    world.data(stall_s=1.2)
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    peer.expect(Grant)
    peer.chunk(S1, BODY, 0)
    started = time.monotonic()
    abort = peer.expect(Abort)
    assert abort.code == "stall" and abort.retry_after_s > 0
    assert 0.9 < time.monotonic() - started < 10


def test_local_files_are_taken_by_name(world: World) -> None:
    world.data()
    spool = Spool(world.store)
    peer = world.peer()
    spool.incoming_path("x.up").write_bytes(BODY)
    peer.send(Put(ref(BODY), S1, local="x.up"))
    assert peer.expect(Stored) == Stored(stream=S1, payload=ref(BODY))
    assert spool.path(ref(BODY).id).read_bytes() == BODY
    assert not spool.incoming_path("x.up").exists()


def test_garbage_does_not_stop_the_loop(world: World) -> None:
    world.data()
    peer = world.peer()
    garbage: list[list[bytes]] = [[b"x"], [b"x"] * 5, [b"", b""], [os.urandom(16), b"{}"], [b"\0" * 16, b"", b"tail"]]
    for frames in garbage:
        peer.socket.send_multipart(frames)
        assert peer.expect(Fault).code == "malformed"
    stranger = world.peer(greet=False)
    stranger.send(Put(ref(BODY), S1))
    assert stranger.expect(Fault).code == "session"
    stranger.send(Hello("n", "client", "b", session="nobody"))
    assert stranger.expect(Fault).code == "session"
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))


def test_a_bug_in_handling_a_message_is_counted_and_survived(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world.data()
    peer = world.peer()

    def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(data.loop.transfers.downloads, "on_get", bug)
        peer.send(Get(S1, ref(BODY).id, 0, 1))
        peer.send(Put(ref(BODY), S1))
        peer.expect(Grant)
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))


def test_an_ended_session_is_told(world: World) -> None:
    world.data()
    peer = world.peer()
    world.control.orders.append(Bye("s1"))
    assert peer.expect(Fault).code == "session"


def test_control_that_is_slow_to_answer_is_asked_again(world: World) -> None:
    world.data()
    world.control.answer = lambda put: None if len(world.control.questions) == 1 else world.control.admit(put)
    peer = world.peer()
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))
    assert world.control.questions[0] == world.control.questions[1]


def test_a_slow_reader_is_not_sent_more_than_it_granted(world: World) -> None:
    world.data()
    peer = world.peer()
    peer.upload(BODY, Put(ref(BODY), S1))
    peer.send(Get(S2, ref(BODY).id, 0, 3))
    got = [peer.expect(Chunk).index for _ in range(3)]
    assert got == [0, 1, 2]
    assert not peer.socket.poll(300)


def test_binds_that_are_not_allowed_or_not_free(tmp_path: Path) -> None:
    config = DataConfig(store=tmp_path / "s", bind="tcp://0.0.0.0:0", internal=f"ipc://{tmp_path}/i")
    with pytest.raises(FaultError, match="insecure"):
        DataLoop(config)
    endpoint = free_endpoint("tcp://127.0.0.1:*")
    first = DataLoop(replace(config, bind=endpoint))
    try:
        with pytest.raises(LinkError, match="in use"):
            DataLoop(replace(config, bind=endpoint))
    finally:
        first.close()


def test_config_travels_as_json(tmp_path: Path) -> None:
    config = DataConfig(tmp_path, "tcp://127.0.0.1:1", "ipc:///i", integrity="size", window=3, parent=7)
    assert DataConfig.from_json(config.to_json()) == config
    assert main([]) == 2


def test_epochs_rise_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    seen = [0]
    for _ in range(3):
        epochs = Epochs(path)
        epochs.RANGE = 4
        seen += [epochs.next() for _ in range(10)]
    assert seen == sorted(set(seen))
    path.write_text("garbage")
    assert Epochs(path).next() > 0


def test_syncer_stops_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, "power")
    reader, writer = os.pipe()
    syncer = Syncer(spool, writer)
    spool.incoming_path("a").write_bytes(b"1")
    syncer.submit([("k1", Landing("a", "p-1")), ("k2", Landing("b", "p-2"))])
    done: list[tuple[str, bool]] = []
    while len(done) < 2:
        assert os.read(reader, 1)
        done += syncer.done()
    assert done == [("k1", False), ("k2", True)]

    def fail(fd: int) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    spool.incoming_path("a").write_bytes(b"1")
    syncer.submit([("k3", Landing("a", "p-3"))])
    assert os.read(reader, 1)
    with pytest.raises(StorageError, match="durable"):
        syncer.done()
    syncer.close()
    os.close(reader)
    os.close(writer)


def start_process(config: DataConfig, **env: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "fedloom.broker.data", config.to_json()]
    return subprocess.Popen(argv, env=os.environ | env, cwd="/", stderr=subprocess.DEVNULL)


@pytest.mark.process
@pytest.mark.parametrize("point", ["data.mid_upload:150", "data.after_file_before_row:1"])
def test_killed_at_a_point_and_resumed(world: World, tmp_path: Path, point: str) -> None:
    body = random.Random(6).randbytes(3 * BLOCK_BYTES)
    payload = ref(body, "r-t.1")
    config = replace(world.config, stall_s=10.0, hello_wait_s=5.0)
    process = start_process(config, FEDLOOM_FAULT=point, FEDLOOM_FAULT_LOG=str(tmp_path / "log"))
    try:
        peer = world.peer()
        peer.broken = lambda: process.poll() is not None
        peer.socket.set(zmq.SNDTIMEO, 1000)
        with pytest.raises((AssertionError, zmq.Again)):
            peer.upload(body, Put(payload, S1))
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text().split() == [point.split(":")[0]]
    process = start_process(config)
    try:
        again = world.peer("s2")
        answer, sent = again.upload(body, Put(payload, S2))
        assert answer == Stored(stream=S2, payload=payload)
        assert sent == (64 if "mid_upload" in point else 0)
        assert world.control.rows == {payload.id: payload}
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_dies_with_its_parent(tmp_path: Path) -> None:
    config = DataConfig(tmp_path / "s", free_endpoint("tcp://127.0.0.1:*"), f"ipc://{tmp_path}/i")
    code = (
        "import subprocess, sys, os, time, zmq\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'fedloom.broker.data', {config.to_json()!r}])\n"
        "context = zmq.Context(); router = context.socket(zmq.ROUTER)\n"
        f"router.bind({config.internal!r}); router.recv_multipart()\n"
        "print(child.pid, flush=True); os._exit(0)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], cwd="/", stdout=subprocess.PIPE, timeout=60, check=True)
    pid = int(parent.stdout)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        threading.Event().wait(0.02)
    raise AssertionError("the data process outlived its parent")
