"""`run_simulation`: what is refused beforehand, whole runs, and every way in which one may end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fedloom.serialization.errors import JobError, LinkTimeout, ProcessError
from fedloom.sim.launcher import SimConfig, SimResult, run_simulation
from safetensors.numpy import load_file

SITES = tuple(f"site-{number}" for number in range(1, 5))
MakeJob = Callable[..., Path]


def config(job: Path, tmp_path: Path, **more: Any) -> SimConfig:
    settings: dict[str, Any] = {"sites": SITES, "show_progress": False, "timeout_s": 90.0, **more}
    return SimConfig(job, tmp_path / "a workspace", **settings)


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        threading.Event().wait(0.02)
    return true()


def started_by(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---------------------------------------------------------------- refused before anything starts


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ({"sites": ()}, "no sites to simulate"),
        ({"sites": ("a", "a")}, "name one twice"),
        ({"sites": ("a/b",)}, "site name 'a/b'"),
        ({"sites": ("site-1",)}, "min_clients=2 but 1 sites take part"),
        ({"threads": 0}, "at least 1"),
        ({"gpu": "0;1"}, "GPU"),
        ({"gpu": "0,7"}, "no GPU '7' on this machine: it has GPU 0 to 3"),
        ({"gpu_memory_share": 0.5}, "without GPUs"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], seen: str
) -> None:
    monkeypatch.setenv("FEDLOOM_GPUS", "4")
    job = make_job(min_clients=2)
    with pytest.raises(JobError, match=seen):
        run_simulation(config(job, tmp_path, **more))
    assert not (tmp_path / "a workspace").exists()


def test_a_job_that_names_its_sites_has_no_others(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"'site-2' has no part in job .*, which names berlin, site-1"):
        run_simulation(config(make_job(sites=("berlin", "site-1")), tmp_path))


def test_a_folder_that_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        run_simulation(config(tmp_path / "nowhere", tmp_path))


def test_a_workspace_with_somebodys_files_is_left_alone(make_job: MakeJob, tmp_path: Path) -> None:
    thesis = tmp_path / "a workspace" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(JobError, match="did not make"):
        run_simulation(config(make_job(), tmp_path))
    assert thesis.read_text() == "years of work"


# ---------------------------------------------------------------- whole runs


@pytest.mark.process
@pytest.mark.parametrize("threads", [1, 2, None])
def test_a_run_from_job_to_result_folder(make_job: MakeJob, tmp_path: Path, threads: int | None) -> None:
    result = run_simulation(config(make_job(rounds=3, min_clients=4), tmp_path, threads=threads, seed=7))
    assert (result.status, result.reason, result.failures) == ("FINISHED:COMPLETED", "", ())
    folder = tmp_path / "a workspace"
    assert result.result_dir == folder
    model = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(model["weight"], np.arange(6, dtype=np.float32).reshape(2, 3) + 3)
    np.testing.assert_array_equal(model["bias"], np.full(3, 3, np.float32))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["results"] for line in lines] == [4, 4, 4]
    # 0.1, 0.2, 0.3, 0.4 with the weights 1, 2, 3, 4
    assert [line["metrics"]["accuracy"] for line in lines] == pytest.approx([0.3] * 3)
    assert result.metrics["accuracy"] == pytest.approx(0.3)
    assert tuple(lines) == result.rounds
    assert json.loads((folder / "job" / "meta.json").read_text())["seed"] == 7
    assert sorted(path.name for path in (folder / "sites").iterdir()) == list(SITES)
    logs = {path.name for path in (folder / "logs").iterdir()}
    assert {f"{site}.log" for site in SITES} | {"_agent.log", "_broker.log", "_data.log", "_controller.log"} <= logs
    assert not (folder / "logs").is_symlink()
    assert not (folder / ".sim").exists()
    assert started_by(os.getpid()) == []


@pytest.mark.process
def test_a_run_in_a_thread_and_in_a_deep_folder(make_job: MakeJob, tmp_path: Path) -> None:
    """No signal handlers there, and a path that no unix socket could have."""
    deep = tmp_path / ("d" * 120)
    results: list[SimResult] = []
    run = SimConfig(make_job(), deep, SITES, show_progress=False, timeout_s=90.0)
    thread = threading.Thread(target=lambda: results.append(run_simulation(run)))
    thread.start()
    thread.join(90.0)
    assert [result.status for result in results] == ["FINISHED:COMPLETED"]
    assert started_by(os.getpid()) == []


NOISE = """
import numpy as np
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    params = {name: value + np.random.standard_normal(value.shape).astype("f4") for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 3}))
"""


@pytest.mark.process
def test_the_same_seed_gives_the_same_bits_however_the_sites_are_run(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(NOISE, rounds=3, min_clients=4)
    ways: dict[str, dict[str, Any]] = {
        "all at once": {"threads": 4},
        "one by one": {"threads": 1},
        "scripts ended between tasks": {"threads": 2, "max_parked": 1},
        "not folded before": {"threads": 2, "prefold": False},
        "another seed": {"seed": 5},
    }
    bits: dict[str, bytes] = {}
    partials: dict[str, int] = {}
    for way, settings in ways.items():
        result = run_simulation(config(job, tmp_path, **settings))
        assert result.completed, result.reason
        bits[way] = (result.result_dir / "model.safetensors").read_bytes()
        partials[way] = sum(record["partials"] for record in result.rounds)
    other = bits.pop("another seed")
    assert len(set(bits.values())) == 1
    assert other not in bits.values()
    assert partials == {way: 0 if way == "not folded before" else 12 for way in ways}


@pytest.mark.process
def test_what_a_site_sees(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_GPUS", "4")  # placement alone, whatever this machine has
    job = make_job(
        """
        import json, os, sys, threading
        import fedloom.client as flare
        with open("left behind.txt", "w") as file:
            file.write(flare.get_site_name() if False else "mine")
        print("hello from", os.getpid(), flush=True)
        flare.init()
        while flare.is_running():
            model = flare.receive()
            print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), "omp", os.environ["OMP_NUM_THREADS"], sys.argv[1:])
            print("share", os.environ["FEDLOOM_GPU_MEMORY_FRACTION"])
            flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
        """,
        rounds=1,
        executor={"task_script_args": "--lr 0.1 'two words'"},
    )
    result = run_simulation(config(job, tmp_path, gpu="[0,1],[2,3]", threads=4, gpu_memory_share="equal"))
    assert result.completed, result.reason
    said = [(result.result_dir / "logs" / f"{site}.log").read_text() for site in SITES]
    assert all("['--lr', '0.1', 'two words']" in text for text in said)
    assert all("omp 1" in text and "share 0.5\n" in text for text in said)
    groups = sorted(text.partition("gpu ")[2].partition(" ")[0] for text in said)
    assert groups == ["0,1", "0,1", "2,3", "2,3"]
    assert len({text.split()[2] for text in said}) == 4, "each site is a process of its own"
    for site in SITES:
        assert (result.result_dir / "sites" / site / "left behind.txt").read_text() == "mine"


# ---------------------------------------------------------------- other ends


@pytest.mark.process
def test_a_script_that_raises_ends_the_run_with_its_own_traceback(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        import fedloom.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            if flare.get_site_name() == "site-3":
                raise ValueError("this is my mistake")
            flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
        """,
        min_clients=4,
    )
    result = run_simulation(config(job, tmp_path))
    assert result.status == "FINISHED:FAILED"
    assert not result.completed
    first = result.failures[0]
    assert first.site == "site-3"
    assert "ValueError: this is my mistake" in first.text
    script = result.result_dir / "job" / "app" / "custom" / "client.py"
    assert f'File "{script}", line 7' in first.text, "the file is there to be looked at"
    assert script.read_text().splitlines()[6].strip() == 'raise ValueError("this is my mistake")'
    assert result.reason.endswith(first.text)
    assert "this is my mistake" in (result.result_dir / "logs" / "site-3.log").read_text()
    assert started_by(os.getpid()) == []


@pytest.mark.process
@pytest.mark.parametrize("role", ["broker", "data"])
def test_a_process_that_does_not_even_start_is_told_at_once(make_job: MakeJob, tmp_path: Path, role: str) -> None:
    wrong: dict[str, Any] = {"integrity": "size", "FEDLOOM_NOTHING": 1} if role == "broker" else {"chunk_bytes": "many"}
    started = time.monotonic()
    with pytest.raises(ProcessError, match=f"the simulation's {role} process.* exit code 1; it said last"):
        run_simulation(config(make_job(), tmp_path, broker=wrong))
    assert time.monotonic() - started < 20.0
    assert started_by(os.getpid()) == []


@pytest.mark.process
def test_an_agent_that_does_not_even_start_is_told_at_once(make_job: MakeJob, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ProcessError, match=r"the simulation's agent process.* exit code 1; it said last"):
        run_simulation(config(make_job(), tmp_path, agent={"no_such_option": 1}))
    assert time.monotonic() - started < 20.0
    assert started_by(os.getpid()) == []


@pytest.mark.process
def test_a_failing_site_beyond_min_clients_is_reported_only(
    make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(
        """
        import fedloom.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            if flare.get_site_name() == "site-3":
                raise ValueError("this is my mistake")
            flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
        """,
        min_clients=3,
        rounds=1,
    )
    result = run_simulation(config(job, tmp_path, show_progress=True))
    assert result.completed, result.reason
    assert [failure.site for failure in result.failures] == ["site-3"]
    assert result.rounds[0]["results"] == 3
    shown = capsys.readouterr().err
    assert "round 1/1: 3 sites" in shown
    assert "  site-3 failed: ValueError: this is my mistake\n" in shown
    assert "Traceback" not in shown


SLEEPER = """
import time
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    time.sleep(300)
"""


@pytest.mark.process
def test_a_bounded_run_ends_in_time(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(LinkTimeout, match="bounded by timeout_s"):
        run_simulation(config(make_job(SLEEPER), tmp_path, timeout_s=8.0))
    assert started_by(os.getpid()) == []
    assert not (tmp_path / "a workspace" / ".sim").exists()


SCRIPT = """
import sys, threading
from pathlib import Path
from fedloom.sim.launcher import SimConfig, SimResult, run_simulation
sites = tuple(f"site-{n}" for n in range(1, 5))
print("only once", flush=True)
result = run_simulation(SimConfig(Path(sys.argv[1]), Path(sys.argv[2]), sites))
print(result.status)
sys.exit(0 if result.completed else 1)
"""


@pytest.fixture
def tmpdir_env() -> Iterator[Path]:
    """A temporary folder of the run's own, with a short name; nothing may be left in it but the user's own, empty."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    assert until(lambda: len(list(folder.rglob("*"))) <= 1), list(folder.rglob("*"))
    shutil.rmtree(folder)


Launch = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path, tmpdir_env: Path) -> Launch:
    """Runs a job by a script of its own, one that has no ``__main__`` guard."""

    def start(job: Path) -> subprocess.Popen[str]:
        script = tmp_path / "job.py"
        script.write_text(SCRIPT)
        return subprocess.Popen(
            [sys.executable, script, job, tmp_path / "a workspace"],
            env={**os.environ, "TMPDIR": str(tmpdir_env)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def working(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes of the run, once its four sites have theirs."""
    found: list[psutil.Process] = []

    def all_there() -> bool:
        assert process.poll() is None, process.communicate()
        found[:] = started_by(process.pid)
        # warm, broker, data, controller, agent, job, and four sites
        return len(found) >= 10

    assert until(all_there, 60.0), [p.cmdline() for p in found]
    return found


@pytest.mark.process
def test_a_script_without_a_guard_runs_once(make_job: MakeJob, launch: Launch, tmp_path: Path) -> None:
    out, err = launch(make_job()).communicate(timeout=90)
    assert out == "only once\nFINISHED:COMPLETED\n", err
    assert "round 2/2: 4 sites, accuracy 0.3000" in err
    assert str(tmp_path / "a workspace" / "model.safetensors") in err
    assert "\x1b" not in err


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything_within_a_second(
    make_job: MakeJob, launch: Launch, tmp_path: Path, number: int
) -> None:
    process = launch(make_job(SLEEPER))
    processes = working(process)
    started = time.monotonic()
    process.send_signal(number)
    process.wait(10)
    took = time.monotonic() - started
    _, err = process.communicate()
    assert [p for p in processes if not gone(p)] == []
    assert process.returncode in (-signal.SIGINT, 130), err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert took < 1.5, took  # a second, and the interpreter's own end on a busy machine
    folder = tmp_path / "a workspace"
    assert not (folder / ".sim").exists()
    assert (folder / "logs" / "site-1.log").exists()


@pytest.mark.process
def test_an_interrupt_while_modules_are_loaded(make_job: MakeJob, launch: Launch) -> None:
    process = launch(make_job("import torch\nimport sklearn.datasets\n"))
    assert until(lambda: len(started_by(process.pid)) == 1, 30.0)
    (warm,) = started_by(process.pid)
    assert not until(lambda: len(started_by(process.pid)) > 1, 0.7), "loading takes longer than this"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 1.5
    assert gone(warm)


@pytest.mark.process
def test_a_launcher_that_is_killed_leaves_nothing_running(make_job: MakeJob, launch: Launch) -> None:
    process = launch(make_job(SLEEPER))
    processes = working(process)
    process.kill()
    process.communicate()
    assert until(lambda: all(gone(p) for p in processes), 3.0), [p for p in processes if not gone(p)]


@pytest.mark.process
@pytest.mark.parametrize("role", ["broker", "data", "controller", "agent"])
def test_a_process_that_dies_ends_the_run_with_a_clear_error(
    make_job: MakeJob, launch: Launch, tmp_path: Path, role: str
) -> None:
    process = launch(make_job(SLEEPER))
    processes = working(process)
    log = tmp_path / "a workspace" / ".sim" / "logs" / f"{role}.log"
    target = next(p for p in processes if any(file.path == str(log) for file in p.open_files()))
    started = time.monotonic()
    target.kill()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 5.0
    assert process.returncode == 1
    assert f"the simulation's {role} process (pid {target.pid}) was killed by SIGKILL" in err
    assert until(lambda: all(gone(p) for p in processes))
