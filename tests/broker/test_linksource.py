"""What an upload reads from: buffers or a file, as one run of bytes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from fedloom.broker.linksource import Source
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import PayloadError

BODY = random.Random(3).randbytes(40_000)


def test_source_reads_across_buffers_without_copies_inside(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.uint8)
    source = Source([b"", array, b"tail"], 104)
    part = source.read(10, 20)
    assert part is not None
    array[10] = 77
    assert part[0] == 77
    across = source.read(98, 102)
    assert across is not None
    assert bytes(across) == bytes([98, 99]) + b"ta"
    path = tmp_path / "copy"
    source.write_to(path)
    assert path.read_bytes() == array.tobytes() + b"tail"
    assert source.digest() == digest_buffers([path.read_bytes()])
    source.close()
    assert source.read(0, 1) is None
    assert part[0] == 77, "a frame in ZeroMQ's hands outlives its source"


def test_mapped_source_outlives_its_close(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(BODY)
    with Source(path, len(BODY)) as source:
        part = source.read(0, 100)
    path.unlink()
    assert part is not None
    assert bytes(part) == BODY[:100]


@pytest.mark.parametrize("size", [0, 3, 5])
def test_source_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"four")
    for source in (path, [b"fo", b"ur"]):
        with pytest.raises(PayloadError, match="4 bytes"):
            Source(source, size)
