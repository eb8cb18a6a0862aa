"""Bytes that libzmq would never send: oversize frames, messages without end, connections that say nothing.

Without keys there is no bound on what one connection may make a broker hold before a message is whole: libzmq counts
whole messages only. What holds is shown here: others are served meanwhile, and with the connection the memory goes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from fedloom.serialization.messages import Answer, Ask, Get, Pong

pytestmark = pytest.mark.process

MIB = 1024 * 1024


@pytest.mark.parametrize("data", [False, True], ids=["control", "data"])
@pytest.mark.parametrize("size", [MIB + 4097, 2**31, 2**63 - 1], ids=["just over", "2 GiB", "2^63"])
def test_a_frame_over_the_limit_cuts_its_connection(
    ground: Any, tcp: Callable[..., Any], data: bool, size: int
) -> None:
    """Told from the frame's header, before a byte of it is taken."""
    peer = tcp(data=data)
    peer.frame(b"", size=size)
    assert peer.cut()


def test_a_frame_of_the_largest_size_is_read_and_refused(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire()
    peer.frames(bytes(MIB + 4096), b"")
    peer.refused("malformed", "envelope of 1052672 bytes; it has exactly 16")


@pytest.mark.parametrize("data", [False, True], ids=["control", "data"])
def test_a_message_without_an_end(
    ground: Any, wire: Callable[..., Any], tcp: Callable[..., Any], memory: Callable[[], int], data: bool
) -> None:
    """64 MiB in frames that always announce one more: nobody else waits, and its end frees what it took."""
    honest = wire()
    peer = tcp(data=data)
    before = memory()
    for number in range(64):
        peer.frame(bytes(MIB), more=True)
        if number % 16 == 0:
            honest.send(Ask(number + 1, "jobs"))
            honest.take(Answer)
    ground.until(lambda: memory() > before + 48 * MIB, "it holds what came (where it does not, say so in the README)")
    ground.honest_round()
    peer.sock.close()
    ground.until(lambda: memory() < before + 24 * MIB, "the connection's memory is free again")


def test_very_many_small_frames_without_an_end(ground: Any, tcp: Callable[..., Any], memory: Callable[[], int]) -> None:
    """Each costs a hundred bytes and more: the same as large ones."""
    peer = tcp()
    before = memory()
    peer.sock.sendall(b"\x01\x01x" * 200_000)  # short frames: flags "more", one byte
    ground.honest_round()
    peer.sock.close()
    ground.until(lambda: memory() < before + 32 * MIB, "the connection's memory is free again")


def test_a_message_of_very_many_frames_is_counted_before_it_is_read(ground: Any, tcp: Callable[..., Any]) -> None:
    """It is dropped as one message that is none."""
    counted = ground.count("fault.malformed")
    peer = tcp()
    peer.sock.sendall(b"\x01\x01x" * 100_000 + b"\x00\x01x")
    ground.until(lambda: ground.count("fault.malformed") == counted + 1, "the message was refused")


@pytest.mark.parametrize(
    "said",
    [b"", b"\xff", b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(48)],
    ids=["nothing", "a byte", "HTTP", "zeros", "PLAIN"],
)
def test_no_handshake(ground: Any, said: bytes) -> None:
    """Whoever cannot greet is cut, at the latest when the time for it is over (10 s); others do not notice."""
    host, _, port = ground.endpoint.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), 20) as sock:
        sock.sendall(said)
        ground.honest_round()
        assert ground.broker.alive


def test_a_command_that_is_too_long(ground: Any, tcp: Callable[..., Any]) -> None:
    """ZMTP's own commands come from strangers too."""
    peer = tcp()
    peer.sock.sendall(struct.pack(">BQ", 6, 2**40))
    assert peer.cut()


def test_two_hundred_silent_connections(ground: Any, tcp: Callable[..., Any]) -> None:
    peers = [tcp(data=bool(number % 2)) for number in range(200)]
    ground.honest_round()
    assert all(peer.sock.fileno() >= 0 for peer in peers)


def test_thousands_of_tiny_messages(ground: Any, wire: Callable[..., Any]) -> None:
    """A turn takes at most 256 messages of a socket: who sends more waits, and others do not."""
    peer = wire()
    body = b"\x80"
    for _ in range(5000):
        peer.body(3, body)
    ground.honest_round()
    for _ in range(5000):
        peer.take(Pong)


def test_answers_that_nobody_reads(ground: Any, wire: Callable[..., Any]) -> None:
    """What waits for one peer is bounded; the session that reaches the bound ends, and the broker waits for nobody."""
    payload = ground.blob(bytes(8192))
    peer = wire("client")
    sessions = ground.ask("broker")["sessions"]
    for number in range(5000):
        peer.send(Get("", payload.id, 0, 0, ref=number + 1))
    ground.until(lambda: ground.ask("broker")["sessions"] < sessions, "the session of who does not read is over")
    peer.welcome = None
