"""How deep msgpack is nested, told before anything is decoded.

msgpack reserves a list's memory when it reads the list's length, and goes more than a thousand levels deep: three
kilobytes of nested list heads would take tens of megabytes before the last of them turns out to be empty. Bytes with
few long list and map heads cannot do that and are not looked at any closer; all ordinary messages are of that kind.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, cast

import msgpack

from .errors import CodecError

Buffer = bytes | bytearray | memoryview

#: The first bytes of lists and maps whose length is a number of two or four bytes.
_LONG_HEAD = re.compile(rb"[\xdc-\xdf]")
#: How many bytes follow a first byte of 0xc0 to 0xdb: those of the value, or those of its length (marked by a minus).
_REST = (
    *(0, 0, 0, 0),  # nil, never used, false, true
    *(-1, -2, -4),  # bin
    *(-1, -2, -4),  # ext
    *(4, 8),  # float
    *(1, 2, 4, 8),  # unsigned
    *(1, 2, 4, 8),  # signed
    *(2, 3, 5, 9, 17),  # fixext
    *(-1, -2, -4),  # text
)


def few_heads(data: Buffer, most: int) -> bool:
    """Whether there are no more than ``most`` bytes that may be a long list's or map's first."""
    return sum(1 for _ in islice(_LONG_HEAD.finditer(data), most + 1)) <= most


def is_whole(data: Buffer) -> bool:
    """Whether all of a value is there: then no list of it promises more items than there are bytes.

    msgpack passes over the bytes and makes nothing of them, which takes a hundredth of `check_nesting`'s time. How deep
    the value is nested shows when it is decoded.
    """
    size = max(1, len(data))
    unpacker = cast("Any", msgpack.Unpacker(read_size=size, max_buffer_size=size))  # pyright: ignore[reportUnknownMemberType] - no stubs
    unpacker.feed(data)
    try:
        unpacker.skip()
    except (ValueError, msgpack.UnpackException):
        return False
    return True


def check_nesting(data: Buffer, depth: int) -> None:
    """Refuse lists and maps that are open more than ``depth`` deep, or promise more items than there are bytes left.

    Raises:
        CodecError: either of them. What else may be wrong with the bytes is for the decoder to say.
    """
    if few_heads(data, depth):
        return
    stop = len(data)
    at = 0
    waited: list[int] = []  # how many values each open list or map still waits for
    while at < stop:
        head = data[at]
        at += 1
        items = 0
        if 0x80 <= head < 0xA0:
            items = (head & 0x0F) << (head < 0x90)
        elif 0xA0 <= head < 0xC0:
            at += head & 0x1F
        elif 0xC0 <= head < 0xDC:
            rest = _REST[head - 0xC0]
            if rest < 0:
                ext = 0xC7 <= head <= 0xC9  # one byte of type behind the length
                rest = -rest + int.from_bytes(data[at : at - rest], "big") + ext
            at += rest
        elif 0xDC <= head < 0xE0:
            size = 2 if head in (0xDC, 0xDE) else 4
            items = int.from_bytes(data[at : at + size], "big") << (head >= 0xDE)
            at += size
        if items:
            if items > stop - at:
                raise CodecError(f"malformed msgpack: {items} items promised with {max(0, stop - at)} bytes left")
            waited.append(items)
            if len(waited) > depth:
                raise CodecError(f"data nested more than {depth} deep")
            continue
        while waited:
            waited[-1] -= 1
            if waited[-1]:
                break
            waited.pop()
        else:
            return  # the one value is whole
