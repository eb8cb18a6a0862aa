"""The documents' case: a 3x3 matrix, sites that add one, FULL and DIFF, exact values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.process

INITIAL = np.arange(1, 10, dtype=np.float32).reshape(3, 3)


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_matrix_grows_by_one_a_round(children: Any, repo: Path, workspace: Path, transfer: str) -> None:
    code, out, err = children.output(
        [sys.executable, repo / "examples/numpy/job.py", "--transfer", transfer, "--workspace", workspace],
        timeout_s=120,
        cwd=workspace,
    )
    assert code == 0, f"{out}\n{err}"
    assert "FINISHED:COMPLETED" in out
    result = workspace / f"hello-numpy-{transfer.lower()}"
    model = load_file(result / "model.safetensors")
    assert list(model) == ["numpy_key"]
    assert model["numpy_key"].dtype == np.float32
    np.testing.assert_array_equal(model["numpy_key"], INITIAL + 3)

    rounds = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert len(rounds) == 3
    # nobody reports NUM_STEPS_CURRENT_ROUND: the record says that all weigh the same
    assert all(record["equal_weights"] for record in rounds)
    assert all(record["weight_sum"] == 2 for record in rounds)
    children.gone()


def test_sim_command_runs_the_job_script(children: Any, repo: Path, workspace: Path) -> None:
    """`fedloom sim job.py` is the same thing as running the script."""
    code, out, err = children.fedloom_output(
        "sim", repo / "examples/numpy/job.py", "-w", workspace, timeout_s=120, cwd=workspace
    )
    assert code == 0, f"{out}\n{err}"
    found = list(workspace.rglob("model.safetensors"))
    assert len(found) == 1, err
    np.testing.assert_array_equal(load_file(found[0])["numpy_key"], INITIAL + 3)
    children.gone()
