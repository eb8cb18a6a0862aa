"""Spans on their way to a process's file: off, on, bounded, and on a disk that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedloom.serialization import spans
from fedloom.serialization.spans import Recorder
from fedloom.sim.profile.files import ProcessSpans, Recording, Span, read_folder


@pytest.fixture
def armed(tmp_path: Path) -> Iterator[Path]:
    spans.arm(str(tmp_path), "site-1")
    yield tmp_path
    spans.arm("", "")


def read(folder: Path) -> ProcessSpans:
    [process] = read_folder(folder).processes
    return process


def test_off_it_costs_a_truth_test_and_leaves_nothing(tmp_path: Path) -> None:
    began = spans.start()
    assert began == 0.0
    spans.end("train", began, site="site-1")
    spans.flush()
    assert list(tmp_path.iterdir()) == []


def test_what_was_recorded_is_read_back_as_it_was(armed: Path) -> None:
    began = spans.start()
    spans.end("train", began, round=3, site="site-1", task="t1")
    spans.end("decode", spans.start(), site="site-1", task="t1", lane="slot-2")
    spans.end("never begun", 0.0)
    assert list(armed.iterdir()) == []  # nothing is written before there is a batch, or time has passed
    spans.flush()
    found = read(armed)
    assert (found.name, found.pid, found.dropped) == ("site-1", os.getpid(), 0)
    train, decode = found.spans
    assert (train.name, train.round, train.site, train.task, train.lane) == ("train", 3, "site-1", "t1", "MainThread")
    assert began == train.start <= train.end <= decode.start <= decode.end
    assert (decode.round, decode.lane) == (3, "slot-2")  # the round is known by the task


def test_time_and_number_make_it_write(tmp_path: Path) -> None:
    now = [100.0]
    recorder = Recorder(tmp_path, "agent", clock=lambda: now[0])
    recorder.add(("a", 100.0, 100.1, -1, "", "", "x"))
    assert list(tmp_path.iterdir()) == []
    now[0] = 100.3
    recorder.add(("b", 100.1, 100.3, -1, "", "", "x"))
    assert [span.name for span in read(tmp_path).spans] == ["a", "b"]
    for number in range(600):
        recorder.add((f"c{number}", 100.0, 100.3, -1, "", "", "x"))
    assert len(read(tmp_path).spans) == 514  # what a kill would leave


def test_a_process_that_records_too_much_says_how_much(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "agent", max_spans=2)
    for _ in range(5):
        recorder.add(("a", 1.0, 2.0, -1, "", "", "x"))
    recorder.close()
    assert (len(read(tmp_path).spans), read(tmp_path).dropped) == (2, 3)


def test_a_file_that_ends_within_a_write(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "site-1")
    for _ in range(2):
        recorder.add(("a", 1.0, 2.0, -1, "", "", "x"))
        recorder.flush()
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert read(tmp_path).spans == [Span("a", 1.0, 2.0, lane="x")]
    path.write_bytes(b"\xc1 nothing of ours")
    (tmp_path / "other.spans").write_bytes(whole)
    found = read_folder(tmp_path)
    assert (found.count, found.skipped) == (2, 1)
    assert read_folder(tmp_path, max_bytes=10) == Recording((), 2)


def test_a_disk_that_fails_ends_the_recording_alone(armed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    armed.rmdir()
    for _ in range(600):
        spans.end("train", spans.start())
    assert spans.start() == 0.0
    spans.flush()
    assert capsys.readouterr().out.count("profile_ends_here") == 1
