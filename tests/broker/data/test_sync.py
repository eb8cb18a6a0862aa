"""Epoch numbers and the thread that makes files durable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest
from fedloom.broker.datasync import Epochs, Syncer
from fedloom.broker.spool import Landing, Spool
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import StorageError
from fedloom.serialization.messages import (
    PayloadId,
    PayloadRef,
)

M = TypeVar("M")
KIB = 1024
S1, S2 = "1" * 32, "2" * 32
TIMEOUT_S = 20.0


def ref(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


def test_epochs_rise_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    seen = [0]
    for _ in range(3):
        epochs = Epochs(path)
        epochs.RANGE = 4
        seen += [epochs.next() for _ in range(10)]
    assert seen == sorted(set(seen))
    path.write_text("garbage")
    assert Epochs(path).next() > 0


def test_syncer_stops_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, "power")
    reader, writer = os.pipe()
    syncer = Syncer(spool, writer)
    spool.incoming_path("a").write_bytes(b"1")
    syncer.submit([("k1", Landing("a", "p-1")), ("k2", Landing("b", "p-2"))])
    done: list[tuple[str, bool]] = []
    while len(done) < 2:
        assert os.read(reader, 1)
        done += syncer.done()
    assert done == [("k1", False), ("k2", True)]

    def fail(fd: int) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    spool.incoming_path("a").write_bytes(b"1")
    syncer.submit([("k3", Landing("a", "p-3"))])
    assert os.read(reader, 1)
    with pytest.raises(StorageError, match="durable"):
        syncer.done()
    syncer.close()
    os.close(reader)
    os.close(writer)
