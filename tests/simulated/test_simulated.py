"""The short form of the simulated tier: some schedules, every one that ever failed, and a check that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.process


def run(*options: str, timeout_s: float = 280.0) -> subprocess.CompletedProcess[str]:
    """The runner in a process of its own, which it needs: it exchanges the system's modules."""
    command = [sys.executable, str(HERE / "run.py"), "--jobs", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def figures(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What a run without a violation counted."""
    path = tmp_path / "figures.json"
    done = run(*options, "--json", str(path))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text())


def test_no_promise_is_broken(tmp_path: Path) -> None:
    """Other seeds with each hundred commits would be no proof; these are the first of `make proof`."""
    seen = figures(tmp_path, "--schedules", "120")
    assert seen["total"]["schedules"] == 120
    assert seen["broken"] == []
    hit = {kind for kind, count in seen["hits"].items() if count}
    assert hit >= {"crash", "crash_step", "cut", "drop", "duplicate", "flip", "freeze", "host", "point", "unsynced"}


def test_an_evaluation_ends_with_the_undisturbed_matrix(tmp_path: Path) -> None:
    """A job of two workflows; it is not among those that the other test draws."""
    seen = figures(tmp_path, "--variant", "14", "--schedules", "12")
    assert seen["broken"] == []
    assert seen["hits"]


def test_an_operator_retries_what_was_given_up(tmp_path: Path) -> None:
    """A site that fails twice a round, of a pool, and an operator who sees to its dead letters."""
    seen = figures(tmp_path, "--variant", "16", "--schedules", "12")
    assert seen["broken"] == []
    assert seen["hits"]["letters: retry"] > 12 and seen["hits"]["retried and folded"] > 6


def test_what_failed_once_does_not_fail_again(tmp_path: Path) -> None:
    lines = [line for line in (HERE / "regressions.txt").read_text().splitlines() if line.strip()]
    assert figures(tmp_path, "--regressions")["total"]["schedules"] == len(lines) >= 20


@pytest.mark.parametrize("safeguard", ["acknowledge_before_commit", "ignore_the_claim"])
def test_the_room_notices_a_missing_safeguard(safeguard: str) -> None:
    done = run("--mutations", safeguard, "--limit", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOBODY" not in done.stdout


def test_two_runs_of_a_schedule_are_the_same_run() -> None:
    lines = (HERE / "regressions.txt").read_text().splitlines()
    line = next(line for line in lines if "two runs differed" in line).partition("#")[0]
    first, second = (run("--plan", line).stdout for _ in range(2))
    assert '"trace"' in first
    assert first == second
