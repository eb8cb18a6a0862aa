"""The other way round: a broker that lies to its peers, and strangers at the door of an executor's own channel.

A link that reads nonsense connects anew, and after eight messages of it gives up with words: it never crashes, and what
waits for an answer is told.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from fedloom.broker.link import Link
from fedloom.executor import Executor
from fedloom.executor.channel import MAX_FRAME_BYTES, Channel, ChannelServer, pack_frame
from fedloom.serialization.codec import pack
from fedloom.serialization.envelope import pack_envelope
from fedloom.serialization.errors import FaultError, LinkError, LinkTimeout, PayloadError
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Fault,
    Hello,
    PayloadId,
    PayloadRef,
    Pong,
    Stored,
    Welcome,
    decode,
    encode,
)

pytestmark = pytest.mark.process

#: What a broker answers to a message: frames, one list a message.
Script = Callable[[Any, int], list[list[bytes]]]


class Liar:
    """A broker's socket that answers as a script says; ``said`` counts the messages by kind."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.said: list[str] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liar", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(20):
                continue
            peer, *frames = self._socket.recv_multipart()
            message = decode(frames).message
            name = type(message).__name__
            self.said.append(name)
            for answer in self.script(message, self.said.count(name)):
                self._socket.send_multipart([peer, *answer])

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._context.destroy(linger=0)


@pytest.fixture
def liar() -> Iterator[Callable[[Script], Liar]]:
    made: list[Liar] = []

    def make(script: Script) -> Liar:
        made.append(Liar(script))
        return made[-1]

    yield make
    for one in made:
        one.close()


def link_to(liar: Liar, **options: Any) -> Link:
    return Link(liar.endpoint, Hello("client/x", "client", "b"), **options)


def body(kind: int, data: bytes, tail: bytes = b"") -> list[bytes]:
    return [pack_envelope(kind, 0, data, tail), data, *([tail] if tail else [])]


WELCOME = Welcome("s", "e", ping_s=0.2, dead_s=5.0)
NONSENSE: dict[str, list[bytes]] = {
    "garbage": [b"x", b"y"],
    "one frame": [b"x"],
    "unknown kind": body(199, b"\x80"),
    "newer major": [b"FDLM\x02" + encode(WELCOME)[0][5:], encode(WELCOME)[1]],
    "no msgpack": body(Welcome.KIND, b"\xc1"),
    "chunks of no bytes": body(Welcome.KIND, pack({"session": "s", "epoch": "e", "chunk_bytes": 0})),
    "pings without a pause": body(Welcome.KIND, pack({"session": "s", "epoch": "e", "ping_s": 0})),
    "dead at once": body(Welcome.KIND, pack({"session": "s", "epoch": "e", "dead_s": 0})),
    "a path of 2,000": body(Welcome.KIND, pack({"session": "s", "epoch": "e", "spool_dir": "/" * 2000})),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_link_survives_nonsense(liar: Callable[[Script], Liar], name: str) -> None:
    """The first answer cannot be read: the link connects anew, and works with the second."""

    def script(message: Any, count: int) -> list[list[bytes]]:
        match message:
            case Hello():
                return [NONSENSE[name]] if count == 1 else [encode(WELCOME)]
            case Ask(ref=ref):
                return [encode(Answer(ref, {"fine": True}))]
            case _:
                return []

    link = link_to(liar(script))
    try:
        assert link.start(20).session == "s"
        answer, _ = link.request(Ask(link.next_ref(), "jobs"), timeout_s=10)
        assert isinstance(answer, Answer) and answer.data == {"fine": True}
    finally:
        link.close()


def test_a_link_gives_up_after_eight(liar: Callable[[Script], Liar]) -> None:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server = liar(lambda message, count: [[b"x", b"y"]])
    link = link_to(server, on_message=lambda message, tail: told.put(message))
    with pytest.raises(FaultError, match="the broker's answer cannot be read: envelope of 1 bytes") as caught:
        link.start(60)
    assert caught.value.code == "malformed"
    fault = told.get(timeout=5)
    assert isinstance(fault, Fault) and fault.fatal
    assert server.said == ["Hello"] * 8


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize(
    "answer",
    [
        lambda ref: body(Answer.KIND, pack({"ref": ref, "data": 7})),
        lambda ref: body(Answer.KIND, pack({"ref": ref, "data": {}}) + b"\0"),
    ],
    ids=["a field", "trailing bytes"],
)
def test_an_answer_that_cannot_be_read(liar: Callable[[Script], Liar], answer: Any, always: bool) -> None:
    """It may have been altered on the way, and is asked for again; if that brings no other, whoever asked is told."""

    def script(message: Any, count: int) -> list[list[bytes]]:
        match message:
            case Hello():
                return [encode(WELCOME)]
            case Ask(ref=ref) if always or count == 1:
                return [answer(ref)]
            case Ask(ref=ref):
                return [encode(Answer(ref, {"fine": True}))]
            case _:
                return []

    link = link_to(liar(script))
    try:
        link.start(20)
        if not always:
            assert link.request(Ask(link.next_ref(), "jobs"), timeout_s=20)[0].data == {"fine": True}
            return
        with pytest.raises(FaultError, match="the broker's answer cannot be read: ") as caught:
            link.request(Ask(link.next_ref(), "jobs"), timeout_s=60)
        assert caught.value.code == "malformed"
    finally:
        link.close()


def test_a_frame_over_the_limit_cuts_the_connection(liar: Callable[[Script], Liar]) -> None:
    """A peer takes no more from its broker than a broker from its peers; the Hello after the cut is answered."""

    def script(message: Any, count: int) -> list[list[bytes]]:
        large = bytes(2 * 1024 * 1024)
        if isinstance(message, Hello):
            return [body(Welcome.KIND, b"\x80", large)] if count == 1 else [encode(WELCOME)]
        return []

    link = link_to(liar(script))
    try:
        assert link.start(30).session == "s"
    finally:
        link.close()


def test_a_broker_that_never_answers(liar: Callable[[Script], Liar]) -> None:
    server = liar(lambda message, count: [])
    with pytest.raises(LinkTimeout, match=f"no broker answered at {server.endpoint} within 0.3 s"):
        link_to(server).start(0.3)


def test_a_broker_that_refuses(liar: Callable[[Script], Liar]) -> None:
    server = liar(lambda message, count: [encode(Fault("penalty", "come back in 60 s", fatal=True))])
    with pytest.raises(FaultError, match="come back in 60 s") as caught:
        link_to(server).start(10)
    assert caught.value.code == "penalty" and server.said == ["Hello"]


@pytest.mark.parametrize(
    ("ref", "data"),
    [
        (PayloadRef(PayloadId("b3-x"), 5, "0" * 64), b"12345"),
        (PayloadRef(PayloadId("b3-x"), 5), b"1234"),
        (PayloadRef(PayloadId("b3-x"), 5), b""),
        (PayloadRef(PayloadId("b3-x"), 5), b"123456"),
    ],
    ids=["other bytes", "fewer", "none", "more"],
)
def test_a_payload_that_is_not_what_was_asked_for(
    liar: Callable[[Script], Liar], ref: PayloadRef, data: bytes, tmp_path: Path
) -> None:
    def script(message: Any, count: int) -> list[list[bytes]]:
        if isinstance(message, Hello):
            return [encode(WELCOME)]
        return [encode(Stored("", message.ref, ref), data)] if hasattr(message, "payload") else [encode(Pong())]

    link = link_to(liar(script))
    try:
        link.start(10)
        for dest in (None, tmp_path / "model"):
            with pytest.raises(PayloadError, match=r"payload b3-x is .* at the broker, and"):
                link.fetch(ref, 10, dest)
        assert not list(tmp_path.iterdir())
    finally:
        link.close()


def test_a_spool_that_is_somewhere_else(liar: Callable[[Script], Liar], tmp_path: Path) -> None:
    """Files are read by path only where the token in the folder is the one that Welcome has."""
    (tmp_path / ".token").write_text("another")
    offers = [replace(WELCOME, spool_dir=str(tmp_path), spool_token="mine"), replace(WELCOME, spool_dir="/etc")]
    for offer in offers:
        link = link_to(liar(lambda message, count, offer=offer: [encode(offer)] if count == 1 else []))
        try:
            link.start(10)
            assert link.local is None
        finally:
            link.close()


def test_an_executor_under_nonsense(liar: Callable[[Script], Liar], tmp_path: Path) -> None:
    """Messages that are no executor's, tasks nobody gave: it goes on pinging; after eight unreadable ones it ends."""
    bad = [encode(Answer(99)), encode(Stored()), encode(Hello("n", "client", "b")), encode(Fault("strange", "thing"))]
    pings = threading.Event()

    def script(message: Any, count: int) -> list[list[bytes]]:
        match message:
            case Hello():
                return [encode(WELCOME), *bad] if count == 1 else [[b"x", b"y"]]
            case _ if count == 3:
                pings.set()
                return [[b"x", b"y"]]
            case _:
                return [encode(Pong())]

    executor = Executor(liar(script).endpoint, site="site-1", workspace=tmp_path / "work")
    executor.task("train")(lambda model: model)
    executor.start()
    try:
        assert pings.wait(20) and executor.running
        with pytest.raises(FaultError, match="the broker's answer cannot be read"):
            executor.wait(60)
    finally:
        executor.stop()


# ---------------------------------------------------------------- the channel of an executor


class Door:
    """An agent's channel and who was let in."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[tuple[int, str, str, Any]] = queue.SimpleQueue()
        self.server = ChannelServer(lambda *said: self.heard.put(said))
        self.server.start()

    def knock(self, data: bytes) -> bytes:
        """Say this, and what comes back until the door closes."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(self.server.path)
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
                return sock.recv(1)
        return b""


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.server.close()


HELLO = {"op": "hello", "host": "h", "role": "host"}
KNOCKS: dict[str, bytes] = {
    "no token": pack_frame(HELLO),
    "another token": pack_frame(HELLO | {"token": "0" * 32}),
    "a token of bytes": pack_frame(HELLO | {"token": b"0" * 32}),
    "an empty token": pack_frame(HELLO | {"token": ""}),
    "work without a hello": pack_frame({"op": "done", "task": "t"}),
    "no op": struct.pack(">I", 1) + b"\x80",
    "no map": struct.pack(">I", 1) + b"\x01",
    "no msgpack": struct.pack(">I", 1) + b"\xc1",
    "over 1 MiB": struct.pack(">I", MAX_FRAME_BYTES + 1),
    "4 GiB": b"\xff\xff\xff\xff",
    "a bomb": struct.pack(">I", 5) + b"\xdd\xff\xff\xff\xff",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", KNOCKS)
def test_a_stranger_at_the_channel(door: Door, name: str) -> None:
    """Cut off, and the agent never hears of it; its own host is served after as before."""
    assert door.knock(KNOCKS[name]) == b""
    host = Channel.connect(door.server.environ("mine"), "host")
    try:
        assert door.heard.get(timeout=10)[1:3] == ("mine", "host"), "the first to be heard"
        assert door.heard.empty()
    finally:
        host.close()


def test_only_the_same_user_reaches_the_channel(door: Door) -> None:
    path = Path(door.server.path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(door.server.token) == 32


def test_a_host_that_turns_bad(door: Door) -> None:
    """It was let in, and then sends nonsense: its connection ends, which the agent takes for the host's death."""
    host = Channel.connect(door.server.environ("mine"), "host")
    door.heard.get(timeout=10)
    host._sock.sendall(b"\xff\xff\xff\xff")
    assert door.heard.get(timeout=10)[1:] == ("mine", "host", None)
    with pytest.raises(LinkError, match=r"closed its channel|is gone"):
        host.receive(5)
    host.close()
