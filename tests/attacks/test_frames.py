"""Frames that are no message: refused with words, counted, and after eight a minute the sender is cut off."""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from fedloom.serialization.codec import pack
from fedloom.serialization.messages import Answer, Ask, Fault, Ping, Pong, Welcome, encode

pytestmark = pytest.mark.process


def envelope(
    body: bytes = b"\x80", *, magic: bytes = b"FDLM", major: int = 1, kind: int = 3, flags: int = 0, tail: bytes = b""
) -> bytes:
    """An envelope whose checksum is right, whatever else is not."""
    head = struct.pack(">4sBBHI", magic, major, kind, flags, 0)
    return head + struct.pack(">I", zlib.crc32(head, zlib.crc32(tail, zlib.crc32(body))))


PING = envelope()
MALFORMED: dict[str, tuple[list[bytes], str]] = {
    "one frame": ([PING], r"1 frames; a message has 2 or 3"),
    "four frames": ([PING, b"\x80", b"", b""], r"4 frames; a message has 2 or 3"),
    "a thousand frames": ([PING] * 1000, r"1000 frames; a message has 2 or 3"),
    "empty frames": ([b"", b""], r"envelope of 0 bytes; it has exactly 16"),
    "short envelope": ([PING[:15], b"\x80"], r"envelope of 15 bytes; it has exactly 16"),
    "long envelope": ([PING + b"\0", b"\x80"], r"envelope of 17 bytes"),
    "HTTP": ([b"GET / HTTP/1.1\r\n", b"Host: x"], r"magic b'GET '; fedloom's is b'FDLM': .*another protocol"),
    "other magic": ([envelope(magic=b"FLW\0"), b"\x80"], r"magic b'FLW\\x00'"),
    "older major": ([envelope(major=0), b"\x80"], r"protocol major 0; this side speaks 1: upgrade the older side"),
    "newer major": ([envelope(major=2), b"\x80"], r"protocol major 2; this side speaks 1: upgrade the older side"),
    "reserved flags": ([envelope(flags=0x8000), b"\x80"], r"flags 0x8000; all are reserved and must be 0"),
    "altered body": ([PING, b"\x81"], r"checksum does not match: it was altered"),
    "altered kind": ([PING[:5] + b"\x05" + PING[6:], b"\x80"], r"checksum does not match"),
    "altered tail": ([envelope(tail=b"ab"), b"\x80", b"ax"], r"checksum does not match"),
    "unknown kind": ([envelope(kind=200), b"\x80"], r"message kind 200 is unknown to protocol 1"),
    "retired kind": ([envelope(kind=0), b"\x80"], r"message kind 0 is unknown"),
    "body over 64 KiB": ([envelope(bytes(65537)), bytes(65537)], r"body of 65537 bytes; at most 65536: .*payload"),
    "tail over 1 MiB": (
        [envelope(tail=bytes(2**20 + 1)), b"\x80", bytes(2**20 + 1)],
        r"tail of 1048577 bytes; at most 1048576 on this link",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_control_link(ground: Any, wire: Callable[..., Any], name: str) -> None:
    """With a session and without one; a session survives a single one."""
    frames, words = MALFORMED[name]
    counted = ground.count("fault.malformed")
    stranger, known = wire(join=False), wire("executor", f"s-{secrets.token_hex(4)}")
    for peer in (stranger, known):
        peer.frames(*frames)
        fault = peer.refused("malformed", words)
        assert not fault.fatal
    assert ground.count("fault.malformed") == counted + 2
    known.send(Ping())
    known.take(Pong)


@pytest.mark.parametrize("name", ["one frame", "other magic", "newer major", "altered body", "unknown kind"])
def test_data_link(ground: Any, wire: Callable[..., Any], name: str) -> None:
    frames, words = MALFORMED[name]
    peer = wire().open_data()
    peer.data.send_multipart(frames)
    peer.refused("malformed", words, data=True)
    peer.put(Ping())
    peer.take_data(Pong)


def test_no_body_at_all_and_frames_of_nothing(ground: Any, wire: Callable[..., Any]) -> None:
    """What libzmq passes on: an empty first frame, which some peers (REQ) send by themselves."""
    peer = wire(join=False)
    peer.frames(b"", *encode(Ping()))
    peer.refused("malformed", "envelope of 0 bytes")


# ---------------------------------------------------------------- strikes


def test_eight_strikes_end_a_session_and_its_name_waits(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire("executor", "s-strikes")
    for _ in range(7):
        peer.frames(b"x", b"y")
        assert not peer.refused("malformed").fatal
    peer.frames(b"x", b"y")
    fault = peer.refused("malformed", r"8 such messages: nothing more is taken from it for 60 s")
    assert fault.fatal
    assert "s-strikes" not in [site["name"] for site in ground.ask("sites")["sites"] if site["live"]]
    again = wire("executor", "s-strikes", join=False, node=peer.hello.node)
    again.send(again.hello, pack({"sites": ["s-strikes"]}))
    fault = again.refused("penalty", rf"{peer.hello.node} .* it may say Hello again in \d+ s")
    assert fault.fatal
    peer.welcome = None
    other = wire("executor", "s-strikes")  # the site itself is not to blame
    assert other.welcome is not None


def test_a_stranger_who_goes_on_gets_no_more_answers(ground: Any, wire: Callable[..., Any]) -> None:
    """No log line, no answer and no session for the rest of the minute, however much comes."""
    boxed = ground.count("boxed")
    peer = wire(join=False)
    for _ in range(2000):
        peer.frames(b"x", b"y")
    peer.send(peer.hello)  # good, but too late
    faults = [peer.take(Fault) for _ in range(8)]
    assert [f.fatal for f in faults] == [False] * 7 + [True]
    fresh = wire()  # the broker reads a peer's messages in order, and has read what came before this Hello
    fresh.send(Ask(1, "jobs"))
    fresh.take(Answer)
    assert ground.count("boxed") >= boxed + 1
    with pytest.raises(AssertionError, match="no Welcome"):
        peer.take(Welcome, 0.1)


def test_a_data_link_that_sends_garbage_is_cut_off_and_heals_with_a_new_one(
    ground: Any, wire: Callable[..., Any]
) -> None:
    peer = wire().open_data()
    for _ in range(100):
        peer.data.send_multipart([b"x", b"y"])
    for _ in range(7):
        peer.refused("malformed", data=True)
    peer.refused("session", "8 such messages: .* say Hello anew", data=True)
    peer.put(Ping())
    peer.silent(Pong, data=True)
    peer.data.close(linger=0)
    peer._data = None
    peer.open_data()
