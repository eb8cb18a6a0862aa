"""Frames and messages: envelope, codec, and every kind of message behind a good envelope."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedloom.serialization import messages as m
from fedloom.serialization.codec import check_plain, decode_fields, encode_fields, pack, unpack
from fedloom.serialization.envelope import pack_envelope
from fedloom.serialization.errors import CodecError, EnvelopeError
from fedloom.serialization.foldplan import FoldPlan

from .target import MIB, Target

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
KINDS = sorted(m.KINDS)
STRUCTS = (m.Grant, m.Chunk)
#: Encoded again, a body may grow (a whole number in a float's place): below this it cannot reach the limit.
SAFE_BYTES = 6 * 1024


def golden_frames() -> list[list[bytes]]:
    """The frames of one message of each kind."""
    return [[bytes.fromhex(line) for line in path.read_text().splitlines()] for path in sorted(GOLDEN.glob("*.hex"))]


def _again(packet: m.Packet) -> None:
    """What decodes encodes to something that decodes equal."""
    frames = m.encode(packet.message, packet.tail, packet.sequence)
    again = m.decode(frames)
    assert again.message == packet.message, (packet.message, again.message)
    assert bytes(again.tail) == bytes(packet.tail)
    assert again.sequence == packet.sequence
    assert [bytes(f) for f in m.encode(again.message, again.tail, again.sequence)] == [bytes(f) for f in frames]


# ---------------------------------------------------------------- envelope


def split_frames(data: bytes) -> list[bytes]:
    """Frames out of bytes: a count, their sizes (two bytes each), their bytes."""
    if not data:
        return []
    count = data[0] % 5
    sizes = [int.from_bytes(data[1 + 2 * i : 3 + 2 * i], "little") for i in range(count)]
    at = 1 + 2 * count
    frames: list[bytes] = []
    for size in sizes:
        frames.append(data[at : at + size])
        at += size
    return frames


def join_frames(frames: list[bytes]) -> bytes:
    """The reverse of `split_frames`."""
    return bytes([len(frames)]) + b"".join(len(f).to_bytes(2, "little") for f in frames) + b"".join(frames)


def envelope(data: bytes) -> None:
    """Whole messages as they come off the wire, checksums and all."""
    _again(m.decode(split_frames(data)))


def envelope_seeds() -> Iterable[bytes]:
    """Every golden message."""
    return [join_frames(frames) for frames in golden_frames()]


# ---------------------------------------------------------------- codec


def codec(data: bytes) -> None:
    """msgpack of a stranger: plain data, then a message of any kind, then a fold plan."""
    if not data:
        return
    which, body = data[0], data[1:]
    if which < len(KINDS):
        # with a checksum that is right, as a peer who means it would send it
        packet = m.decode([pack_envelope(KINDS[which], 7, body), body])
        if len(body) <= SAFE_BYTES or isinstance(packet.message, STRUCTS):
            _again(packet)
        return
    if which == 0xFE:
        plan = FoldPlan.from_bytes(body)
        again = FoldPlan.from_bytes(plan.to_bytes())
        assert again == plan and again.digest == plan.digest
        plan.folded()
        return
    value = unpack(body)
    check_plain(value)
    packed = pack(value)
    assert unpack(packed, max_bytes=9 * len(body) + 9) == value
    for kind in KINDS:
        cls = m.KINDS[kind]
        if cls not in STRUCTS:
            _fields(cls, value)


def _fields(cls: type[Any], value: Any) -> None:
    try:
        message = decode_fields(cls, value)
    except CodecError:
        return
    assert decode_fields(cls, encode_fields(message)) == message


def codec_seeds() -> Iterable[bytes]:
    """Every golden body under its kind, tails as plain data, and a fold plan."""
    from .tensors import PLAN

    seeds: list[bytes] = []
    for frames in golden_frames():
        kind = m.decode(frames).message.KIND
        seeds.append(bytes([KINDS.index(kind)]) + frames[1])
        seeds.append(b"\xff" + frames[1])
        if len(frames) == 3:
            seeds.append(b"\xff" + frames[2])
    seeds.append(b"\xfe" + PLAN.to_bytes())
    seeds.append(b"\xff" + pack({"a": [1, -1, 2**63, 1.5, None, True, b"x", "é", {"b": [{}]}]}))
    return seeds


def _words() -> tuple[bytes, ...]:
    """The keys of all messages as msgpack, and what msgpack has odd."""
    names = {name for cls in m.KINDS.values() for name in cls.__annotations__ if name not in ("KIND", "STRUCT")}
    odd = (
        b"\xdc\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x00\x00\xff\xff",
        b"\xc4\x00",
        b"\xd4\x05x",
        b"\xc7\x00\x05",
    )
    numbers = (b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf8" + bytes(6), b"\xca\x7f\x80\x00\x00")
    return (*sorted(pack(name) for name in names), *odd, *numbers)


ENVELOPE = Target("envelope", envelope, (EnvelopeError, CodecError), envelope_seeds, words=_words())
#: msgpack reserves room for up to 10,000 items in each of 16 nested lists.
NESTED_BYTES = 16 * 10_000 * 8
CODEC = Target("codec", codec, (EnvelopeError, CodecError), codec_seeds, _words(), constant_bytes=MIB + NESTED_BYTES)
