"""The main job, end to end: simulated, and by separate processes over TCP."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.process


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def simulate(children: Any, repo: Path, workspace: Path, *args: str) -> tuple[str, Path]:
    workspace.mkdir(exist_ok=True)
    code, out, err = children.output(
        [sys.executable, repo / "examples/digits/job.py", "--workspace", workspace, *args],
        timeout_s=240,
        cwd=workspace,
    )
    assert code == 0, f"{out}\n{err}"
    return out, workspace / "digits"


def test_demo_reaches_the_accuracy(children: Any, repo: Path, workspace: Path) -> None:
    """What `make demo` does: 0.94 or better on held-out digits, and one folder with everything in it."""
    out, result = simulate(children, repo, workspace)
    federated = float(re.findall(r"trained by 8 sites: +([\d.]+)", out)[0])
    central = float(re.findall(r"data in one place: +([\d.]+)", out)[0])
    assert federated >= 0.94
    assert central >= 0.96
    assert "FINISHED:COMPLETED" in out

    model = load_file(result / "model.safetensors")
    assert {name: array.shape for name, array in model.items()} == {
        "layers.0.weight": (256, 64),
        "layers.0.bias": (256,),
        "layers.2.weight": (10, 256),
        "layers.2.bias": (10,),
    }
    assert str(result / "model.safetensors") in out
    assert str(result / "metrics.jsonl") in out
    assert (result / "best_model.safetensors").is_file()

    rounds = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == list(range(20))
    scores = [record["metrics"]["accuracy"] for record in rounds]
    assert scores[0] < 0.3  # of the initial model: a metric describes the model that was received
    assert scores[-1] >= 0.93
    for record in rounds:
        assert {site["name"] for site in record["sites"]} == {f"site-{n}" for n in range(1, 9)}
        assert record["failures"] == []
    assert json.loads((result / "summary.json").read_text())["status"] == "FINISHED:COMPLETED"
    log = (result / "logs" / "site-3.log").read_text()
    assert "site-3 round 19" in log
    children.gone()


def test_separate_processes_over_tcp(children: Any, repo: Path, workspace: Path, endpoint: str) -> None:
    """A broker, a controller, two executors of two sites each: the same bits as any simulation's."""
    small = ("--rounds", "3", "--sites", "4")
    _, simulated = simulate(children, repo, workspace, *small)
    _, singly = simulate(children, repo, workspace / "singly", *small, "--threads", "1")
    assert sha256(singly / "model.safetensors") == sha256(simulated / "model.safetensors")

    broker = children.fedloom("broker", "--bind", endpoint, "--store", workspace / "store")
    env = {"FEDLOOM_BROKER": endpoint}
    children.fedloom("controller", "--broker", endpoint)
    for number, names in enumerate((range(1, 3), range(3, 5))):
        sites = [word for n in names for word in ("--site", f"site-{n}")]
        children.fedloom("executor", "--broker", endpoint, *sites, "--workspace", workspace / f"executor {number}")

    folder = workspace / "digits job"
    code, out, err = children.output(
        [sys.executable, repo / "examples/digits/job.py", *small, "--export", folder], cwd=workspace
    )
    assert code == 0, err
    assert (folder / "meta.json").is_file()

    code, out, err = children.fedloom_output("job", "submit", folder, "--json", env=env)
    assert code == 0, err
    job_id = json.loads(out)["job_id"]

    code, out, err = children.fedloom_output("job", "wait", job_id, env=env, timeout_s=180)
    assert code == 0, f"{out}\n{err}\n{broker.text}"
    code, out, err = children.fedloom_output("job", "status", job_id, "--json", env=env)
    assert code == 0, err
    status = json.loads(out)
    assert status["job_id"] == job_id
    assert status["status"] == "FINISHED:COMPLETED"
    assert status["rounds"] == 3
    assert {site if isinstance(site, str) else site["name"] for site in status["sites"]} == {
        f"site-{n}" for n in range(1, 5)
    }

    code, out, err = children.fedloom_output("job", "download", job_id, "-o", workspace / "result", env=env)
    assert code == 0, err
    assert sha256(workspace / "result" / "model.safetensors") == sha256(simulated / "model.safetensors")
    assert len((workspace / "result" / "metrics.jsonl").read_text().splitlines()) == 3

    code, out, err = children.fedloom_output("job", "list", "--json", env=env)
    assert code == 0, err
    assert job_id in out


def test_an_external_process_ends_with_the_same_bits(children: Any, repo: Path, workspace: Path) -> None:
    """`launch_external_process`: each site's script is a command of its own, in a process tree of its own."""
    outside, inside = workspace / "outside", workspace / "inside"
    options = ["--rounds", "1", "--sites", "1", "--external", "--export", outside]
    code, out, err = children.output([sys.executable, repo / "examples/digits/job.py", *options], cwd=workspace)
    assert code == 0, f"{out}\n{err}"
    shutil.copytree(outside, inside)
    config = inside / "app" / "config" / "config_fed_client.json"
    client = json.loads(config.read_text())
    assert client["executors"][0]["executor"]["args"]["launch_external_process"] is True
    client["executors"][0]["executor"]["args"]["launch_external_process"] = False
    config.write_text(json.dumps(client))

    models: set[str] = set()
    for folder in (outside, inside):
        results = workspace / f"{folder.name} results"
        code, out, err = children.fedloom_output("sim", folder, "-n", "1", "-w", results, timeout_s=180, cwd=workspace)
        assert code == 0, f"{out}\n{err}"
        models.add(sha256(results / "digits" / "model.safetensors"))
        assert "site-1 round 0" in (results / "digits" / "logs" / "site-1.log").read_text()
    assert len(models) == 1
    children.gone()
