"""The TensorBoard example: its event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.process


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve by its tag: steps and values."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_step_of_every_site_is_there(children: Any, repo: Path, workspace: Path) -> None:
    code, out, err = children.output(
        [sys.executable, repo / "examples/tensorboard/job.py", "--workspace", workspace], timeout_s=120, cwd=workspace
    )
    assert code == 0, f"{out}\n{err}"
    result = workspace / "tensorboard"
    assert sorted(path.name for path in (result / "tb_events").iterdir()) == ["server", "site-1", "site-2"]
    for site in ("site-1", "site-2"):
        found = curves(result / "tb_events" / site)
        loss = found["train/loss"]
        assert [step for step, _ in loss] == list(range(60))
        assert loss[-1][1] < 0.05 < loss[0][1]
        assert [step for step, _ in found["weights/slope"]] == [0, 1, 2]
        assert abs(found["weights/slope"][-1][1] - 3) < 0.3
    rounds = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    server = curves(result / "tb_events" / "server")["loss"]
    assert [(step, round(value, 5)) for step, value in server] == [
        (record["round"], round(record["metrics"]["loss"], 5)) for record in rounds
    ]
    assert json.loads((result / "summary.json").read_text())["tracking"] == {"points": 132, "lost": 0}
    assert len((result / "tracking.jsonl").read_text().splitlines()) == 132
    children.gone()
