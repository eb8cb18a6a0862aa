"""Scripts that import nvflare, run as they are: `fedloom sim --compat nvflare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.process


def run(children: Any, repo: Path, workspace: Path, folder: str, *args: str | Path) -> tuple[str, Path]:
    """Standard output, and the result folder."""
    job = repo / "examples" / "from_nvflare" / folder / "job.py"
    options = ["--compat", "nvflare", job, "-w", workspace, *args]
    code, out, err = children.fedloom_output("sim", *options, timeout_s=180, cwd=workspace)
    assert code == 0, f"{out}\n{err}"
    assert "Job Status is: FINISHED:COMPLETED" in out
    children.gone()
    return out, Path(out.rpartition("Result can be found in: ")[2].strip())


def rounds_of(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]


def no_line_names_fedloom(folder: Path) -> None:
    for script in folder.glob("*.py"):
        lines = [line for line in script.read_text().splitlines() if "import" in line.split()[:3]]
        assert not [line for line in lines if "fedloom" in line], f"{script} is not what it shows"


@pytest.mark.parametrize(
    ("update_type", "more"), [("full", ()), ("diff", ("--launch_external_process",))], ids=["in process", "command"]
)
def test_numpy(children: Any, repo: Path, workspace: Path, update_type: str, more: tuple[str, ...]) -> None:
    """In a process of the executor's, and as a command that takes the difference itself: the line y = 2x - 1."""
    no_line_names_fedloom(repo / "examples/from_nvflare/numpy")
    _, result = run(children, repo, workspace, "numpy", "--", "--update_type", update_type, *more)
    line = load_file(result / "model.safetensors")["numpy_key"]
    np.testing.assert_allclose(line, [2, -1], atol=0.01)
    assert rounds_of(result)[-1]["metrics"]["accuracy"] > 0.999
    assert "round=19" in (result / "logs" / "site-2.log").read_text()


def test_torch_with_cross_site_evaluation(children: Any, repo: Path, workspace: Path) -> None:
    no_line_names_fedloom(repo / "examples/from_nvflare/torch")
    _, result = run(children, repo, workspace, "torch", "--", "--num_rounds", "3", "--cross_site_eval")
    model = load_file(result / "model.safetensors")
    assert set(model) == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    scores = [record["metrics"]["accuracy"] for record in rounds_of(result) if record["metrics"]]
    assert scores[2] > max(0.75, scores[0])
    matrix = json.loads((result / "cross_site_val" / "cross_val_results.json").read_text())
    assert set(matrix) == {"site-1", "site-2"}
    for of_site in matrix.values():
        assert {"site-1", "site-2"} < set(of_site)
        assert any(owner.startswith("SRV_") for owner in of_site)


def test_at_a_broker_with_an_aggregator_of_its_own(children: Any, repo: Path, workspace: Path, endpoint: str) -> None:
    """The same switch where the job's processes are: at the executor, and at the controller for the aggregator."""
    _, simulated = run(children, repo, workspace, "numpy", "--", "--num_rounds", "2", "--median")
    assert "the median of 2 results" in (simulated / "logs" / "_job.log").read_text()

    sites = ["--site", "site-1", "--site", "site-2", "--workspace", workspace / "executor"]
    children.fedloom("broker", "--bind", endpoint, "--store", workspace / "store")
    children.fedloom("controller", "--broker", endpoint, "--compat", "nvflare")
    children.fedloom("executor", *sites, env={"FEDLOOM_BROKER": endpoint, "FEDLOOM_COMPAT": "nvflare"})
    options = ["--broker", endpoint, "--json"]
    code, out, err = children.fedloom_output("job", "submit", simulated / "job", "--wait", *options, timeout_s=120)
    assert code == 0, f"{out}\n{err}"
    job_id = json.loads(out)["job_id"]
    code, _, err = children.fedloom_output("job", "download", job_id, "-o", workspace / "result", *options)
    assert code == 0, err
    model = (workspace / "result" / "model.safetensors").read_bytes()
    assert model == (simulated / "model.safetensors").read_bytes()


def test_without_the_switch_the_error_names_it(children: Any, repo: Path, workspace: Path) -> None:
    job = repo / "examples/from_nvflare/numpy/job.py"
    code, _, err = children.fedloom_output("sim", job, "-w", workspace, cwd=workspace)
    assert code == 1
    assert "No module named 'nvflare" in err
    assert "fedloom sim --compat nvflare" in err
