"""What a simulation shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from fedloom.sim.pipeline import LogTail
from fedloom.sim.progress import (
    LineReporter,
    LiveReporter,
    View,
    clock_text,
    make_reporter,
    metrics_text,
    number_text,
    print_summary,
    progress_text,
    round_line,
)

RECORD: dict[str, Any] = {
    "round": 2,
    "results": 8,
    "metrics": {"loss": 0.25, "accuracy": 0.91234, "z": 1.0, "y": 2.0},
    "bytes": 3_000_000,
    "seconds": 1.5,
    "failures": [],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_rounds_line() -> None:
    assert round_line(RECORD, 10) == "round 3/10: 8 sites, accuracy 0.9123, loss 0.2500, y 2.0000, 2.0 MB/s, 1.50 s"
    assert round_line(RECORD, 10, "loss").startswith("round 3/10: 8 sites, loss 0.2500, accuracy 0.9123")
    assert round_line({"round": 0}, 1) == "round 1/1: 0 sites, 0.00 s"
    assert round_line({**RECORD, "failures": [{"site": "site-1"}]}, 10).endswith(", 1 failed")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5000"), (0.0, "0.0000"), (1e-7, "1e-07"), (123456.0, "1.235e+05"), (3, "3"), (True, "True"), ("a", "a")],
)
def test_numbers(value: Any, text: str) -> None:
    assert number_text(value) == text


def test_small_texts() -> None:
    assert metrics_text({}, "accuracy") == ""
    assert progress_text(View("SUBMITTED")) == "submitted"
    assert progress_text(View("RUNNING", 2, 10, 5, 8)) == "round 3/10  5/8 sites"
    assert progress_text(View("FINISHED:COMPLETED", 10, 10)) == "round 10/10"
    assert [clock_text(seconds) for seconds in (0, 62, 3605)] == ["0:00", "1:02", "1:00:05"]


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    reporter = make_reporter(stream)
    assert isinstance(reporter, LineReporter)
    reporter.show(View("RUNNING", 1, 2))
    reporter.round_done(RECORD, 10)
    reporter.note("[not markup]")
    reporter.close()
    assert stream.getvalue() == round_line(RECORD, 10) + "\n[not markup]\n"
    assert "\x1b" not in stream.getvalue()


def test_a_live_line_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    reporter = make_reporter(stream)
    assert isinstance(reporter, LiveReporter)
    reporter.show(View("RUNNING", 2, 10, 5, 8, {"accuracy": 0.5}, 2e6))
    reporter.round_done(RECORD, 10)
    reporter.note("[not markup]")
    reporter.close()
    reporter.close()
    text = stream.getvalue()
    assert "round 3/10  5/8 sites" in text
    assert "accuracy 0.5000" in text
    assert "[not markup]" in text
    assert round_line(RECORD, 10) in text
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown, "the cursor is shown again at the end"


def test_the_table_and_the_files() -> None:
    stream = io.StringIO()
    records = [{**RECORD, "round": number} for number in range(60)]
    print_summary(stream, records, 60, [Path("/a/b [c]/model.safetensors")])
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "/a/b [c]/model.safetensors"
    assert lines[1].split() == ["round", "sites", "accuracy", "loss", "y", "MB/s", "seconds"]
    assert "1/60" in stream.getvalue()
    assert "60/60" in stream.getvalue()
    assert "30/60" not in stream.getvalue()
    assert len(lines) < 50


def test_logs_are_shown_by_level_with_their_tracebacks(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    path.write_text(
        "12:00:01 [info     ] up\n"
        "12:00:02 [warning  ] weight_missing sites=8\n"
        "12:00:03 [error    ] crashed\n"
        "Traceback (most recent call last):\n"
        "12:00:04 [info     ] on\n"
        "a line of no level, after one that is not shown\n"
    )
    (tmp_path / "broker.log").write_text('{"level": "info", "event": "a"}\n{"level": "error", "event": "b"}\nhalf')
    tail = LogTail(tmp_path, "warning")
    assert tail.lines() == [
        "agent: 12:00:02 [warning  ] weight_missing sites=8",
        "agent: 12:00:03 [error    ] crashed",
        "agent: Traceback (most recent call last):",
        'broker: {"level": "error", "event": "b"}',
    ]
    assert LogTail(tmp_path, "warning", ["weight_missing"]).lines()[0] == "agent: 12:00:03 [error    ] crashed"
    assert tail.lines() == []
    with (tmp_path / "broker.log").open("a") as file:
        file.write(" a line\n")
    assert tail.lines() == ["broker: half a line"]
    with path.open("a") as file:
        file.write("Fatal Python error: Segmentation fault\n")
    assert LogTail(tmp_path, "nonsense").lines()[0].startswith("agent: 12:00:02")
