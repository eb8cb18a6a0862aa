"""The commands with real processes behind them: a simulation, and the three services over TCP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

CLIENT = """
import sys
import fedloom.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if "--fail" in sys.argv:
        raise ValueError("the client's own mistake")
    value = model.params["numpy_key"] + 1
    flare.send(flare.FLModel(params={"numpy_key": value}, metrics={"accuracy": float(value.mean())}))
"""
JOB = """
import sys
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv

recipe = NumpyFedAvgRecipe(
    name="add one", model=[[1, 2], [3, 4]], min_clients=2, num_rounds=3,
    train_script="client.py", train_args=" ".join(sys.argv[1:]),
)
run = recipe.execute(SimEnv(num_clients=2))
print("Job Status is:", run.get_status())
print("Result can be found in :", run.get_result())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "a job"
    here.mkdir()
    (here / "client.py").write_text(CLIENT)
    (here / "job.py").write_text(JOB)
    return here


def fedloom(*args: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fedloom", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=cwd
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize(
    ("place", "rounds"), [("    raise ValueError('too late')", 3), ("raise ValueError('too late')", 1)]
)
def test_a_client_that_fails_behind_its_result_is_seen(folder: Path, place: str, rounds: int) -> None:
    """Within the loop it fails in each round, behind the loop once; the job has all results in both cases."""
    (folder / "client.py").write_text(f"{CLIENT}{place}\n")
    done = fedloom("sim", "job.py", "-w", "ws", cwd=folder, code=1)
    assert "Job Status is: FINISHED:COMPLETED" in done.stdout
    assert "the script of site-1 failed after it had sent its result of " in done.stderr
    assert "\nTraceback (most recent call last)" in done.stderr and "\nValueError: too late" in done.stderr
    assert str(folder / "ws" / "add one" / "job") in done.stderr, "the traceback leads to what stays"
    assert "\\n" not in done.stderr
    (summary,) = (folder / "ws").rglob("summary.json")
    assert json.loads(summary.read_text())["failures"] == 2 * rounds


def check_result(folder: Path, sites: int = 2) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    model = load_file(folder / "model.safetensors")["numpy_key"]
    np.testing.assert_array_equal(model, np.array([[4, 5], [6, 7]], np.float32))
    # the best model is the one that was scored: what the sites received in the last round
    np.testing.assert_array_equal(load_file(folder / "best_model.safetensors")["numpy_key"], model - 1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2]
    assert [record["results"] for record in records] == [sites] * 3
    assert records[-1]["metrics"]["accuracy"] == 5.5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "FINISHED:COMPLETED"
    assert summary["round"] == summary["rounds"] == 3
    assert (folder / "job" / "app" / "custom" / "client.py").is_file()
    assert (folder / "logs").is_dir()
    assert (folder / "sites" / "site-1").is_dir()


class TestSim:
    def test_script_then_folder_then_failure(self, folder: Path) -> None:
        done = fedloom("sim", "job.py", "--json", cwd=folder)
        told = json.loads(done.stdout)
        assert told["status"] == "FINISHED:COMPLETED"
        assert "Job Status is: FINISHED:COMPLETED" in done.stderr
        check_result(Path(told["path"]))
        assert Path(told["path"]) == folder / "fedloom-workspace" / "add one"

        exported = Path(told["path"]) / "job"
        meta = json.loads((exported / "meta.json").read_text())
        assert meta.pop("sites") == ["site-1", "site-2"]  # those of the run: without them any will do
        (exported / "meta.json").write_text(json.dumps(meta | {"deploy_map": {"app": ["@ALL"]}}))
        done = fedloom("sim", exported, "-n", "3", "-t", "2", "-w", "my ws", "--json", cwd=folder)
        told = json.loads(done.stdout)
        assert Path(told["path"]) == folder / "my ws" / "add one"
        check_result(Path(told["path"]), sites=3)

        done = fedloom("sim", "job.py", "--", "--fail", cwd=folder, code=1)
        assert "ValueError: the client's own mistake" in done.stderr
        assert 'client.py", line 9' in done.stderr
        assert "recipe/cli" not in done.stderr
        assert done.stderr.count("Traceback (most recent call last)") == 1
        assert done.stderr.count("the client's own mistake") == 2, "the line of code, and what it raised"
        done = fedloom("sim", "job.py", "-n", "1", cwd=folder, code=2)
        assert "min_clients=2 but the simulation has 1 clients" in done.stderr

    def test_ctrl_c_is_130_and_leaves_nothing(self, folder: Path) -> None:
        import psutil

        (folder / "client.py").write_text(CLIENT.replace("if ", "import time; time.sleep(600)\n    if "))
        process = subprocess.Popen(
            [sys.executable, "-m", "fedloom", "sim", "job.py"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            logs = folder / "fedloom-workspace" / "add one" / "sites"
            wait_for(lambda: len(list(logs.glob("*"))) == 2, 60)
            children = psutil.Process(process.pid).children(recursive=True)
            assert children
            os.kill(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        _, alive = psutil.wait_procs(children, timeout=3)
        assert not alive


def wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@pytest.fixture
def services(tmp_path: Path, endpoint: str) -> Iterator[str]:
    """A broker, a controller and two executors, as three commands in four terminals; yields the endpoint."""
    commands = [
        ["broker", "--bind", endpoint, "--store", str(tmp_path / "store")],
        ["controller", "--broker", endpoint],
        *(
            ["executor", "--broker", endpoint, "--site", site, "--workspace", str(tmp_path / f"ex {site}")]
            for site in ("site-1", "site-2")
        ),
    ]
    with ExitStack() as stack:
        started: list[tuple[str, subprocess.Popen[bytes]]] = []
        for number, command in enumerate(commands):
            log = stack.enter_context((tmp_path / f"{number}-{command[0]}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "fedloom", *command, "--log-format", "json"],
                stdout=log,
                stderr=log,
                cwd=tmp_path,
            )
            started.append((command[0], process))
        yield endpoint
        for _, process in reversed(started):
            process.send_signal(signal.SIGTERM)
        codes = {}
        for name, process in started:
            try:
                codes[name] = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = "had to be killed"
        assert codes == {"broker": 0, "controller": 0, "executor": 0}
    for file in tmp_path.glob("*-*.log"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            assert entry["level"] in ("info", "warning") or entry["event"] == "job_failed", line


def test_the_services_and_every_job_command(folder: Path, tmp_path: Path, services: str, capfd: Any) -> None:
    from fedloom.recipe import NumpyFedAvgRecipe

    script = str(folder / "client.py")
    options: dict[str, Any] = {"model": [[1, 2], [3, 4]], "min_clients": 2, "num_rounds": 3, "train_script": script}
    exported = NumpyFedAvgRecipe(name="add one", **options).export(tmp_path / "the job")
    broker = ("--broker", services)

    told = json.loads(fedloom("job", "submit", exported, *broker, "--json", cwd=tmp_path).stdout)
    job_id = told["job_id"]
    assert set(told) == {"job_id"}
    fedloom("job", "wait", job_id, *broker, "--timeout", "100", cwd=tmp_path)
    status = json.loads(fedloom("job", "status", job_id, *broker, "--json", cwd=tmp_path).stdout)
    assert {"job_id": job_id, "status": "FINISHED:COMPLETED", "round": 3, "rounds": 3}.items() <= status.items()
    assert sorted(status["sites"]) == ["site-1", "site-2"]
    assert "accuracy=5.5" in fedloom("job", "status", job_id, *broker, cwd=tmp_path).stdout
    assert job_id in fedloom("job", "list", *broker, cwd=tmp_path).stdout
    fedloom("job", "download", job_id, "-o", "out put", *broker, cwd=tmp_path)
    check_result(tmp_path / "out put")
    assert json.loads(fedloom("job", "logs", job_id, *broker, "--json", cwd=tmp_path).stdout)["job_id"] == job_id
    fedloom("job", "status", "nope", *broker, cwd=tmp_path, code=2)

    failing = NumpyFedAvgRecipe(name="fails", train_args="--fail", **options).export(tmp_path / "failing")
    done = fedloom("job", "submit", failing, "--wait", *broker, cwd=tmp_path, code=1)
    assert "ValueError: the client's own mistake" in done.stderr

    (folder / "client.py").write_text(CLIENT.replace("if ", "import time; time.sleep(600)\n    if "))
    slow = NumpyFedAvgRecipe(name="slow", **options).export(tmp_path / "slow")
    slow_id = json.loads(fedloom("job", "submit", slow, *broker, "--json", cwd=tmp_path).stdout)["job_id"]
    fedloom("job", "wait", slow_id, *broker, "--timeout", "0.5", cwd=tmp_path, code=4)
    fedloom("job", "abort", slow_id, *broker, cwd=tmp_path)
    ended = json.loads(fedloom("job", "wait", slow_id, *broker, "--json", cwd=tmp_path, code=1).stdout)
    assert ended["status"] == "FINISHED:ABORTED"


def test_a_port_in_use_and_a_bind_for_all(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = fedloom("broker", "--bind", endpoint, "--store", tmp_path / "s", cwd=tmp_path, code=3)
        assert endpoint in done.stderr
        assert "Traceback" not in done.stderr
    done = fedloom("broker", "--bind", "tcp://0.0.0.0:0", "--store", tmp_path / "t", cwd=tmp_path, code=3)
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr
