"""The control loop over sockets in a thread: bugs in handlers, and how long a round trip takes."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.broker.control import ControlConfig, ControlLoop
from fedloom.broker.sockets import connect, make_context, make_socket
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import StorageError
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Bye,
    Fault,
    Hello,
    Message,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Stored,
    SubmitJob,
    Welcome,
    decode,
    encode,
)

M = TypeVar("M")
TIMEOUT_S = 20.0
ARCHIVE = b"archive"


class Wire:
    """A client's control link, by hand."""

    def __init__(self, endpoint: str, node: str) -> None:
        self.context = make_context()
        self.socket = make_socket(self.context, "control-dealer")
        connect(self.socket, endpoint)
        self.socket.set(zmq.SNDTIMEO, 10_000)
        self.node = node
        self.hello()

    def hello(self) -> None:
        self.send(Hello(self.node, "client", "boot"))
        self.expect(Welcome)

    def send(self, message: Message, tail: bytes = b"") -> None:
        self.socket.send_multipart(encode(message, tail))

    def expect(self, kind: type[M]) -> M:
        assert self.socket.poll(int(TIMEOUT_S * 1000)), f"no {kind.__name__} came"
        message = decode(self.socket.recv_multipart(), 1 << 20).message
        assert isinstance(message, kind), message
        return message

    def jobs(self) -> list[Any]:
        self.send(Ask(99, "jobs"))
        return self.expect(Answer).data["jobs"]

    def submit(self, ref: int) -> None:
        digest = digest_buffers([ARCHIVE])
        archive = PayloadRef(PayloadId(f"b3-{digest}"), len(ARCHIVE), digest)
        self.send(Put(archive, ref=1), ARCHIVE)
        self.expect(Stored)
        self.send(SubmitJob(ref, "token", "demo", archive))


@pytest.fixture(name="dial")
def dial_fixture(loop: ControlLoop) -> Iterator[Callable[[str], Wire]]:
    made: list[Wire] = []

    def dial(node: str) -> Wire:
        made.append(Wire(loop.endpoint, node))
        return made[-1]

    yield dial
    for wire in made:
        wire.context.destroy(linger=0)


@pytest.fixture(name="loop")
def loop_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlLoop]:
    root: Path = tmp_path_factory.mktemp("c")
    config = ControlConfig(
        store=root / "store",
        bind="tcp://127.0.0.1:*",
        data_bind="tcp://127.0.0.1:1",
        internal=f"ipc://{root}/i",
        durability="process",
    )
    loop = ControlLoop(config)
    stop = threading.Event()

    def run() -> None:
        with contextlib.suppress(StorageError):  # of a disk that fails
            loop.run(stop)

    thread = threading.Thread(target=run, name="test-control")
    thread.start()
    yield loop
    stop.set()
    loop.wake()
    thread.join(10)
    loop.close()


def test_a_bug_in_a_handler_is_answered_and_half_of_its_change_is_forgotten(
    loop: ControlLoop, dial: Callable[[str], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = dial("client/one"), dial("client/other")
    jobs = loop.core.state.jobs
    submit = jobs.submit

    def half(*args: Any) -> Any:
        submit(*args)
        raise RuntimeError("a bug behind the first half")

    monkeypatch.setattr(jobs, "submit", half)
    epoch = loop.core.state.epoch
    one.submit(7)
    fault = one.expect(Fault)
    assert (fault.code, fault.ref, fault.fatal) == ("internal", 7, False) and "a bug" in fault.text
    for wire in (one, other):  # everybody begins anew, as after a crash of the broker
        assert wire.expect(Fault).code == "session"
        wire.hello()
        assert wire.jobs() == []
    assert loop.core.state.epoch != epoch
    one.submit(8)
    assert one.expect(Answer).data["job_id"]
    assert len(other.jobs()) == 1


def test_a_bug_in_a_question_disturbs_nobody(
    loop: ControlLoop, dial: Callable[[str], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.broker import core

    one, other = dial("client/one"), dial("client/other")

    def bug(*args: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(core, "answer", bug)
        one.send(Ask(5, "jobs"))
        fault = one.expect(Fault)
        assert (fault.code, fault.ref) == ("internal", 5)
    for wire in (one, other):
        wire.send(Ping())
        wire.expect(Pong)


def test_a_bug_in_a_turn_is_survived(
    loop: ControlLoop, dial: Callable[[str], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dial("client/one")
    pump = loop.core.tasks.pump
    calls: list[float] = []

    def bug(now: float) -> None:
        pump(now)
        calls.append(now)
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop.core.tasks, "pump", bug)
    loop.wake()
    assert one.expect(Fault).code == "session"
    one.hello()
    assert one.jobs() == [] and len(calls) == 1


def test_a_broker_that_cannot_go_on_says_goodbye(
    loop: ControlLoop, dial: Callable[[str], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers look for it at once, rather than after half a minute of silence."""
    wires = dial("client/one"), dial("client/other")

    def full() -> None:
        raise StorageError("no space left on the device")

    monkeypatch.setattr(loop.core, "commit", full)
    loop.wake()
    for wire in wires:
        wire.expect(Bye)


def test_a_question_is_answered_at_once(dial: Callable[[str], Wire]) -> None:
    """Nothing waits for the end of a poll: a bound far above what it takes, far below any timer of the loop."""
    wire = dial("client/one")
    took: list[float] = []
    for ref in range(100):
        started = time.perf_counter()
        wire.send(Ask(ref, "sites"))
        wire.expect(Answer)
        took.append(time.perf_counter() - started)
    assert statistics.median(took) < 0.02
