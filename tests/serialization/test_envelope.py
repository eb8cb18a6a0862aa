from __future__ import annotations

import zlib

import pytest
from fedloom.serialization.envelope import (
    ENVELOPE_BYTES,
    MAGIC,
    MAJOR,
    MAX_BODY_BYTES,
    MAX_TAIL_BYTES,
    Envelope,
    check_frames,
    pack_envelope,
    unpack_envelope,
)
from fedloom.serialization.errors import EnvelopeError
from hypothesis import given
from hypothesis import strategies as st


def test_the_layout_never_changes() -> None:
    crc32 = zlib.crc32(b"bodytail" + bytes.fromhex("46444c4d0121000001020304"))
    assert pack_envelope(33, 0x01020304, b"body", b"tail").hex() == f"46444c4d0121000001020304{crc32:08x}"
    assert (MAGIC, MAJOR, ENVELOPE_BYTES) == (b"FDLM", 1, 16)


@given(st.integers(0, 255), st.integers(0, 2**40), st.binary(max_size=50))
def test_there_and_back(kind: int, sequence: int, body: bytes) -> None:
    envelope = pack_envelope(kind, sequence, body)
    assert unpack_envelope(envelope, body) == Envelope(
        kind, sequence % 2**32, zlib.crc32(envelope[:12], zlib.crc32(body))
    )
    assert unpack_envelope(memoryview(envelope), bytearray(body)).kind == kind


@pytest.mark.parametrize("size", [0, 12, 15, 17, 100])
def test_size(size: int) -> None:
    with pytest.raises(EnvelopeError, match=f"envelope of {size} bytes"):
        unpack_envelope(bytes(size), b"")


@pytest.mark.parametrize(
    ("at", "match"),
    [(0, "magic"), (3, "magic"), (4, "major"), (5, "checksum"), (6, "flags"), (7, "flags")]
    + [(at, "checksum") for at in range(8, 16)],
)
def test_a_changed_byte(at: int, match: str) -> None:
    envelope = bytearray(pack_envelope(1, 2, b"body"))
    envelope[at] ^= 0x40
    with pytest.raises(EnvelopeError, match=match):
        unpack_envelope(envelope, b"body")


def test_another_body() -> None:
    with pytest.raises(EnvelopeError, match="checksum"):
        unpack_envelope(pack_envelope(1, 2, b"body"), b"Body")
    with pytest.raises(EnvelopeError, match="checksum"):
        unpack_envelope(pack_envelope(1, 2, b"body", b"tail"), b"body", b"tale")


@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_two_or_three_frames(count: int) -> None:
    with pytest.raises(EnvelopeError, match=f"{count} frames"):
        check_frames([b""] * count)
    check_frames([b""] * 2)
    check_frames([b""] * 3)


def test_limits() -> None:
    check_frames([b"", bytes(MAX_BODY_BYTES), bytes(MAX_TAIL_BYTES)])
    with pytest.raises(EnvelopeError, match="body of 65537 bytes"):
        check_frames([b"", bytes(MAX_BODY_BYTES + 1)])
    with pytest.raises(EnvelopeError, match="tail of 1048577 bytes"):
        check_frames([b"", b"", bytes(MAX_TAIL_BYTES + 1)])
    with pytest.raises(EnvelopeError, match="at most 10 on"):
        check_frames([b"", b"", bytes(11)], max_tail_bytes=10)


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_noise_raises_nothing_else(frame: bytes, body: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unpack_envelope(frame, body)
