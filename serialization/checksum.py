"""The crc32 of messages and chunks. ISA-L's, where it is installed, takes a quarter of the time of zlib's."""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Final, Protocol


class Crc32(Protocol):
    """As `zlib.crc32`."""

    def __call__(self, data: bytes | bytearray | memoryview, value: int = 0, /) -> int:
        """The checksum of ``data`` behind bytes whose checksum is ``value``."""
        ...


def _fastest() -> Crc32:
    try:
        found: Any = importlib.import_module("isal.isal_zlib")
    except ImportError:  # there is no wheel for every platform; the numbers are the same
        return zlib.crc32
    return found.crc32


crc32: Final = _fastest()
