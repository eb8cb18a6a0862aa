from __future__ import annotations

import zlib

import pytest
from fedloom.serialization.checksum import crc32


@pytest.mark.parametrize("size", [0, 1, 15, 16, 4097, 2**20 + 3])
def test_it_is_zlibs_crc32(size: int) -> None:
    data = bytes(i * i % 251 for i in range(size))
    for start in (0, 1, 2**32 - 1):
        assert crc32(data, start) == crc32(memoryview(bytearray(data)), start) == zlib.crc32(data, start)
    # in two parts, as an envelope's is made
    assert crc32(data[size // 3 :], crc32(data[: size // 3])) == zlib.crc32(data)
