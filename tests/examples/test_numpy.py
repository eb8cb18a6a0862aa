"""The documents' case: a 3x3 matrix, sites that add one, FULL and DIFF, exact values."""

from __future__ import annotations

import hashlib
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


def test_exported_and_run_again_for_two_and_for_sixty(children: Any, repo: Path, workspace: Path) -> None:
    """A job folder gives the bits of the script's own run, and runs as it is with 60 clients on 60 threads."""
    job = repo / "examples/numpy/job.py"
    for args in (("--workspace", workspace / "script"), ("--export", workspace / "add-one")):
        code, out, err = children.output([sys.executable, job, *args], timeout_s=120, cwd=workspace)
        assert code == 0, f"{out}\n{err}"

    digests = [hashlib.sha256((workspace / "script/hello-numpy-full/model.safetensors").read_bytes()).hexdigest()]
    for where, sites, more in (("two", 2, ()), ("sixty", 60, ("-n", "60", "-t", "60"))):
        code, out, err = children.fedloom_output(
            "sim", "add-one", "-w", workspace / where, *more, "--json", timeout_s=180, cwd=workspace
        )
        assert code == 0, f"{out}\n{err}"
        told = json.loads(out)
        assert told["status"] == "FINISHED:COMPLETED"
        result = Path(told["path"])
        assert result == workspace / where / "hello-numpy-full"
        rounds = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
        assert [record["results"] for record in rounds] == [sites] * 3
        assert {site["name"] for site in rounds[-1]["sites"]} == {f"site-{n + 1}" for n in range(sites)}
        assert len(list((result / "logs").glob("site-*.log"))) == sites
        digests.append(hashlib.sha256((result / "model.safetensors").read_bytes()).hexdigest())
    # every site adds one to the same matrix: their mean has the same bits, whether of two or of sixty
    assert len(set(digests)) == 1
    children.gone()
