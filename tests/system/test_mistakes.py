"""What users do wrong, and what they are told: one clear message, an exit code that is not 0, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.process

JOB = """\
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv

recipe = NumpyFedAvgRecipe(
    name="mistake", model=[[1.0, 2.0], [3.0, 4.0]], min_clients={min_clients}, num_rounds=2, train_script="client.py"
)
run = recipe.execute(SimEnv(num_clients={clients}, workspace_root="runs"))
print("status:", run.get_status())
"""

CLIENT = """\
import numpy as np
import fedloom.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    site = flare.get_site_name()
    value = np.array(model.params["numpy_key"])
    {body}
    flare.send(flare.FLModel(params={{"numpy_key": value}}))
"""


class Script:
    """A job script and its client in a folder, as a user writes them."""

    def __init__(self, children: Any, folder: Path) -> None:
        self.children = children
        self.folder = folder

    def write(self, body: str = "value = value + 1", clients: int = 2, min_clients: int = 2) -> Path:
        (self.folder / "client.py").write_text(CLIENT.format(body=body))
        path = self.folder / "job.py"
        path.write_text(JOB.format(clients=clients, min_clients=min_clients))
        return path

    def run(self, timeout_s: float = 60) -> tuple[int, str, str]:
        return self.children.output([sys.executable, "job.py"], timeout_s, cwd=self.folder)

    def sim(self, *args: str, timeout_s: float = 60) -> tuple[int, str, str]:
        return self.children.fedloom_output("sim", "job.py", *args, timeout_s=timeout_s, cwd=self.folder)


@pytest.fixture
def script(children: Any, workspace: Path) -> Script:
    return Script(children, workspace)


@pytest.mark.parametrize("by", ["python", "sim"])
def test_script_that_raises(script: Script, by: str) -> None:
    """The site's own traceback reaches the terminal."""
    script.write("if site == 'site-2': raise RuntimeError('no data on this site')")
    code, out, err = script.run() if by == "python" else script.sim()
    assert code == 1, out + err
    assert "RuntimeError: no data on this site" in out + err
    assert "client.py" in out + err
    assert "site-2" in out + err
    script.children.gone()


def test_failing_site_that_the_quorum_can_spare(script: Script) -> None:
    """The round goes on with the others; the failure is still seen."""
    script.write("if site == 'site-2': raise RuntimeError('no data on this site')", clients=3, min_clients=2)
    code, out, err = script.sim()
    assert code == 1, out + err
    assert "RuntimeError: no data on this site" in out + err
    records = [json.loads(line) for line in (script.folder / "runs/mistake/metrics.jsonl").read_text().splitlines()]
    assert [record["results"] for record in records] == [2, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("value = value[:1] if site == 'site-2' else value", ["site-2", "shape"]),
        ("value = value.astype('int32') if site == 'site-2' else value", ["site-2", "I32"]),
        ("value[0, 0] = np.nan if site == 'site-2' else 0", ["site-2", "NaN"]),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_result_that_does_not_fit(script: Script, body: str, words: list[str]) -> None:
    script.write(body)
    code, out, err = script.sim()
    assert code == 1, out + err
    for word in words:
        assert word in out + err


def test_missing_script(script: Script) -> None:
    script.write()
    (script.folder / "client.py").unlink()
    code, out, err = script.sim()
    assert code in (1, 2), out + err
    assert "client.py" in err
    assert "Traceback" not in err


def test_fewer_clients_than_min_clients(script: Script) -> None:
    script.write(clients=2, min_clients=3)
    code, out, err = script.sim()
    assert code in (1, 2), out + err
    assert "min_clients=3" in out + err


def test_client_that_exits_without_sending(script: Script) -> None:
    script.write("raise SystemExit(0)")
    code, out, err = script.sim()
    assert code == 1, out + err
    assert "site-" in out + err


def test_ctrl_c_leaves_nothing(script: Script) -> None:
    """Everything is gone within a second (two, on a busy machine), and the exit code says that it was interrupted."""
    script.write("import time; print('TRAINING', flush=True); time.sleep(600)", clients=4, min_clients=4)
    child = script.children.fedloom("sim", "job.py", cwd=script.folder)
    logs = script.folder / "runs/mistake"
    deadline = time.monotonic() + 40
    while not any("TRAINING" in p.read_text() for p in logs.rglob("*.log")) if logs.exists() else True:
        assert time.monotonic() < deadline, child.text
        time.sleep(0.1)
    started = time.monotonic()
    child.interrupt()
    assert child.wait(10) == 130
    script.children.gone(2)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("by", ["ctrl-c", "agent's death"])
def test_an_early_end_keeps_the_committed_rounds(script: Script, by: str) -> None:
    """The third round never ends; what the first two came to is there, and said to be."""
    child = _third_round(script)
    folder = script.folder / "runs/mistake"
    if by == "ctrl-c":
        started = time.monotonic()
        child.interrupt()
        assert child.wait(10) == 130
        assert time.monotonic() - started < 3
        assert "interrupted\n" in child.text
    else:
        os.kill(_pid_of(script, "agent"), signal.SIGKILL)
        assert child.wait(20) == 1
        assert "agent process" in child.text
    script.children.gone(2)
    assert f"results of the committed rounds: {folder}" in child.text
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1]
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["numpy_key"], [[3.0, 4.0], [5.0, 6.0]])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["round"], summary["rounds"]) == ("RUNNING", 2, 5)
    assert "with --resume" in child.text and (folder / ".sim" / "job.json").exists()
    assert not [path for path in folder.iterdir() if path.suffix in (".copy", ".part")]


def test_ctrl_c_does_not_wait_for_a_broker_that_hangs(script: Script) -> None:
    child = _third_round(script)
    os.kill(_pid_of(script, "broker"), signal.SIGSTOP)
    started = time.monotonic()
    child.interrupt()
    assert child.wait(10) == 130
    assert time.monotonic() - started < 4
    script.children.gone(2)
    assert "interrupted\n  the results of the committed rounds are not kept: " in child.text
    assert "with --resume" in child.text


def _third_round(script: Script) -> Any:
    """A simulation that has committed two rounds and never ends the third."""
    script.write("if value[0, 0] == 3: import time; time.sleep(600)\n    value = value + 1")
    job = script.folder / "job.py"
    job.write_text(job.read_text().replace("num_rounds=2", "num_rounds=5"))
    child = script.children.fedloom("sim", "job.py", cwd=script.folder)
    child.says("round 2/5", 40)
    return child


def _pid_of(script: Script, role: str) -> int:
    log = str((script.folder / f"runs/mistake/.sim/logs/{role}.log").resolve())
    open_files = {pid: psutil.Process(pid).open_files() for pid in script.children.alive()}
    (found,) = [pid for pid, files in open_files.items() if any(file.path == log for file in files)]
    return found


def test_killed_launcher_leaves_no_orphans(script: Script) -> None:
    script.write("import time; time.sleep(600)")
    child = script.children.fedloom("sim", "job.py", cwd=script.folder)
    deadline = time.monotonic() + 40
    while len(script.children.alive()) < 6:
        assert time.monotonic() < deadline, child.text
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    script.children.gone(5)


# ---------------------------------------------------------------- separate processes


def test_port_in_use(children: Any, workspace: Path, endpoint: str) -> None:
    port = int(endpoint.rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, _, err = children.fedloom_output("broker", "--bind", endpoint, "--store", workspace / "store")
    assert code == 3
    assert "in use" in err
    assert str(port) in err
    assert "Traceback" not in err


def test_bind_to_other_machines_needs_insecure(children: Any, workspace: Path) -> None:
    code, _, err = children.fedloom_output("broker", "--bind", "tcp://0.0.0.0:17600", "--store", workspace / "store")
    assert code == 3
    assert "--insecure" in err
    assert "Traceback" not in err


def test_no_broker(children: Any, endpoint: str) -> None:
    code, _, err = children.fedloom_output("job", "list", "--broker", endpoint, timeout_s=90)
    assert code == 3
    assert endpoint in err
    assert "Traceback" not in err


def test_two_executors_under_one_site_name(cluster: Any) -> None:
    cluster.broker().says("broker_ready")
    first = cluster.executor("site-1")
    first.says("executor_up")
    same_folder = cluster.executor("site-1")
    assert same_folder.wait(30) == 2
    assert "--workspace" in same_folder.text
    elsewhere = cluster.children.fedloom(
        "executor", "--broker", cluster.endpoint, "--site", "site-1", "-w", cluster.folder / "other"
    )
    assert elsewhere.wait(30) == 3
    assert "site-1" in elsewhere.text
    assert first.process.poll() is None


def test_too_few_sites_connect(cluster: Any, jobs: Any) -> None:
    """The wait is bounded, and its end says who was there."""
    cluster.broker()
    cluster.controller()
    cluster.executor("site-1")
    folder = jobs.export(clients=2)
    config = folder / "app/config/config_fed_server.json"
    server = json.loads(config.read_text())
    server["workflows"][0]["args"]["sites_s"] = 3.0
    config.write_text(json.dumps(server))
    job_id = cluster.submit(folder)
    code, out, _err = cluster.job("wait", job_id, timeout_s=60, ok=False)
    assert code == 1
    _, out, _ = cluster.job("status", job_id, "--json")
    status = json.loads(out)
    assert status["status"] == "FINISHED:FAILED"
    assert "2" in status["reason"]
    assert "1" in status["reason"]


def test_job_that_names_an_unknown_site(cluster: Any, jobs: Any) -> None:
    cluster.broker()
    cluster.controller()
    cluster.executor("site-1")
    folder = jobs.export(clients=1)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sites"] = ["site-1", "site-77"]
    (folder / "meta.json").write_text(json.dumps(meta))
    config = folder / "app/config/config_fed_server.json"
    server = json.loads(config.read_text())
    server["workflows"][0]["args"] |= {"sites_s": 3.0, "min_clients": 2}
    config.write_text(json.dumps(server))
    job_id = cluster.submit(folder)
    code, _, _ = cluster.job("wait", job_id, timeout_s=60, ok=False)
    assert code == 1
    status = json.loads(cluster.job("status", job_id, "--json")[1])
    assert status["status"] == "FINISHED:FAILED"
    assert "site-77" in status["reason"]


def test_unknown_job(cluster: Any) -> None:
    cluster.broker().says("broker_ready")
    code, _, err = cluster.job("status", "no-such-job", ok=False)
    assert code in (1, 2)
    assert "no-such-job" in err


def test_abort(cluster: Any, jobs: Any) -> None:
    cluster.broker()
    cluster.controller()
    cluster.executor("site-1")
    cluster.executor("site-2")
    job_id = cluster.submit(jobs.export(clients=2, rounds=50, fault="import time; time.sleep(600)"))
    deadline = time.monotonic() + 40
    while "site-2 1" not in jobs.runs():
        assert time.monotonic() < deadline, cluster.children.dump()
        time.sleep(0.1)
    cluster.job("abort", job_id)
    status = json.loads(cluster.job("status", job_id, "--json")[1])
    assert status["status"] == "FINISHED:ABORTED"
