"""No request stays without an answer: handlers that break, answers too large, answers lost or unreadable."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker import linksession
from fedloom.broker.control import ControlConfig, ControlLoop
from fedloom.broker.link import Link
from fedloom.broker.sockets import free_endpoint
from fedloom.serialization.errors import FaultError
from fedloom.serialization.messages import Answer, Ask, Hello, Message, Packet, Ping
from structlog.testing import capture_logs


class Running:
    """A control loop in a thread of this process, and a link to it."""

    def __init__(self, folder: Path) -> None:
        config = ControlConfig(
            folder, free_endpoint("tcp://127.0.0.1:*"), f"ipc://{folder}/internal", durability="process", ping_s=0.2
        )
        self.loop = ControlLoop(config)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop.run, args=(self.stop,), name="test-control")
        self.thread.start()
        self.got: list[Message] = []
        boot = secrets.token_hex(8)
        self.link = Link(
            self.loop.endpoint, Hello("client/c", "client", boot), on_message=lambda m, t: self.got.append(m)
        )
        self.link.start()

    def ask(self, what: str = "jobs") -> Message:
        return self.link.request(Ask(self.link.next_ref(), what), timeout_s=10)[0]

    def close(self) -> None:
        self.link.close()
        self.stop.set()
        self.loop.wake()
        self.thread.join(5)
        self.loop.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


def test_a_handler_that_breaks_is_a_fault(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    core = running.loop.core
    handle = core.handle

    def breaking(peer: bytes, packet: Packet, now: float) -> None:
        if isinstance(packet.message, Ask) and packet.message.what == "sites":
            raise KeyError("a bug")
        handle(peer, packet, now)

    monkeypatch.setattr(core, "handle", breaking)
    with pytest.raises(FaultError, match="a bug") as caught:
        running.ask("sites")
    assert caught.value.code == "internal"
    assert isinstance(running.ask(), Answer)


def test_an_answer_too_large_is_a_fault(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the body, or in the tail, where the peer's socket would cut the connection and ask again for ever."""
    core = running.loop.core
    large: Any = {"body": (lambda ref: Answer(ref, {"x": "x" * 70_000}), b""), "tail": (Answer, bytes(2 << 20))}
    handle = core.handle

    def answering(peer: bytes, packet: Packet, now: float) -> None:
        message = packet.message
        if isinstance(message, Ask) and message.what in large:
            make, tail = large[message.what]
            core.state.reply(core.state.sessions.of(peer) or peer, make(message.ref), tail)
        else:
            handle(peer, packet, now)

    monkeypatch.setattr(core, "handle", answering)
    for what in large:
        with pytest.raises(FaultError) as caught:
            running.ask(what)
        assert caught.value.code == "too_large"
    assert isinstance(running.ask(), Answer)


def test_a_lost_answer_is_asked_for_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linksession, "_REPEAT_S", 0.3)
    core = running.loop.core
    handle = core.handle
    asked: list[int] = []

    def losing(peer: bytes, packet: Packet, now: float) -> None:
        if isinstance(packet.message, Ask):
            asked.append(packet.message.ref)
            if len(asked) == 1:
                return
        handle(peer, packet, now)

    monkeypatch.setattr(core, "handle", losing)
    with capture_logs() as logs:
        assert isinstance(running.ask(), Answer)
    assert len(set(asked)) == 1
    assert len(asked) >= 2
    assert "messages_lost" in [entry["event"] for entry in logs]


def test_a_question_that_was_taken_and_not_answered_is_asked_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linksession, "_REPEAT_S", 0.3)
    core = running.loop.core
    handle = core.handle
    asked: list[int] = []

    def forgetting(peer: bytes, packet: Packet, now: float) -> None:
        if isinstance(packet.message, Ask):
            asked.append(packet.message.ref)
            if len(asked) == 1:
                packet = replace(packet, message=Ping())
        handle(peer, packet, now)

    monkeypatch.setattr(core, "handle", forgetting)
    with capture_logs() as logs:
        assert isinstance(running.ask(), Answer)
    assert len(set(asked)) == 1
    assert "request_repeated" in [entry["event"] for entry in logs]


def test_an_unreadable_answer_is_an_error_and_not_a_circle(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = linksession.decode

    def refusing(frames: Any, *args: Any) -> Packet:
        packet = decode(frames, *args)
        if isinstance(packet.message, Answer):
            raise linksession.CodecError("a field of another kind")
        return packet

    monkeypatch.setattr(linksession, "decode", refusing)
    with pytest.raises(FaultError, match="cannot be read") as caught:
        running.ask()
    assert caught.value.code == "malformed"
    monkeypatch.setattr(linksession, "decode", decode)
    assert isinstance(running.ask(), Answer)
    assert running.link.state == "up"


def test_answers_altered_on_the_way_are_asked_for_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a wrong protocol version says anything about the answer: behind a wrong checksum all is noise."""
    decode, altered = linksession.decode, 0

    def altering(frames: Any, *args: Any) -> Packet:
        nonlocal altered
        packet = decode(frames, *args)
        if isinstance(packet.message, Answer) and altered < 5:
            altered += 1
            frames = [bytes([*frames[0][:4], frames[0][4] ^ 2, *frames[0][5:]]), *frames[1:]]
        return decode(frames, *args)

    monkeypatch.setattr(linksession, "decode", altering)
    assert isinstance(running.ask(), Answer)
    assert altered == 5
    assert running.link.state == "up"
