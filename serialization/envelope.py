"""The 16 bytes in front of every message, and the frames around them.

A message is two or three ZeroMQ frames: envelope, body, and a tail where the message has bytes of its own (a chunk, an
inline payload, a long list). The envelope is big-endian::

    magic 4s | major u8 | kind u8 | flags u16 (0) | sequence u32 | crc32 u32

The checksum is of the body, the tail and the 12 bytes before it, in this order: no flipped bit passes, not in the kind
and not in the sequence number. A Chunk's tail is left out: its body has a checksum of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .checksum import crc32 as crc32_of
from .errors import EnvelopeError

MAGIC = b"FDLM"
MAJOR = 1
MINOR = 0
MAX_BODY_BYTES = 64 * 1024
#: The largest tail on a control link; a data link's is the chunk size.
MAX_TAIL_BYTES = 1024 * 1024

_HEAD = struct.Struct(">4sBBHI")
_CRC = struct.Struct(">I")
ENVELOPE_BYTES = _HEAD.size + _CRC.size
#: Which byte of it is the kind.
KIND_AT = 5

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Envelope:
    """A checked envelope: the kind of the body behind it and the sender's sequence number."""

    kind: int
    sequence: int
    crc32: int


def pack_envelope(kind: int, sequence: int, body: Buffer, tail: Buffer = b"") -> bytes:
    """The envelope for a body of this kind and, but for a Chunk, its tail."""
    head = _HEAD.pack(MAGIC, MAJOR, kind, 0, sequence & 0xFFFFFFFF)
    return head + _CRC.pack(crc32_of(head, crc32_of(tail, crc32_of(body))))


def unpack_envelope(frame: Buffer, body: Buffer, tail: Buffer = b"") -> Envelope:
    """Check an envelope against what follows it.

    Raises:
        EnvelopeError: wrong size, magic, major version, reserved flags or checksum.
    """
    if len(frame) != ENVELOPE_BYTES:
        raise EnvelopeError(f"envelope of {len(frame)} bytes; it has exactly {ENVELOPE_BYTES}")
    head = bytes(frame[: _HEAD.size])
    magic, major, kind, flags, sequence = _HEAD.unpack(head)
    (crc32,) = _CRC.unpack(frame[_HEAD.size :])
    if magic != MAGIC:
        raise EnvelopeError(f"magic {magic!r}; fedloom's is {MAGIC!r}: is the peer speaking another protocol?")
    if major != MAJOR:
        raise EnvelopeError(f"protocol major {major}; this side speaks {MAJOR}: upgrade the older side")
    if flags:
        raise EnvelopeError(f"flags {flags:#06x}; all are reserved and must be 0")
    if crc32_of(head, crc32_of(tail, crc32_of(body))) != crc32:
        raise EnvelopeError("the message's checksum does not match: it was altered on the way")
    return Envelope(kind, sequence, crc32)


def check_frames(frames: Sequence[Buffer], max_tail_bytes: int = MAX_TAIL_BYTES) -> None:
    """Check the count and the sizes of a message's frames.

    Raises:
        EnvelopeError: not two or three frames, or one of them over its limit.
    """
    if len(frames) not in (2, 3):
        raise EnvelopeError(f"{len(frames)} frames; a message has 2 or 3")
    if len(frames[1]) > MAX_BODY_BYTES:
        raise EnvelopeError(f"body of {len(frames[1])} bytes; at most {MAX_BODY_BYTES}: more travels as a payload")
    if len(frames) == 3 and len(frames[2]) > max_tail_bytes:
        raise EnvelopeError(f"tail of {len(frames[2])} bytes; at most {max_tail_bytes} on this link")
