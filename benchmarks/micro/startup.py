"""What it takes to be ready: processes before any work, a simulation's first task, a site's first training step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, Target
from jobs.workload import read_events, round_starts
from measure import descendants, memory_of, watch
from micro.cluster import cluster
from rows import Row
from systems import BY_KEY, JOBS, environment

_MIB = 2**20
_SETTLE_S = 1.0
_PLAIN = "import msgpack, numpy, zmq"


def measure(*, quick: bool = False) -> list[Figure]:
    """Seconds and MiB, each beside what the imports alone take."""
    return [*_services(), *_first_task(2 if quick else 5), *_sites(2 if quick else 8)]


def _services() -> list[Figure]:
    """Broker and controller as services, idle."""
    plain = subprocess.Popen([sys.executable, "-c", f"{_PLAIN}; input()"], stdin=subprocess.PIPE)
    with cluster() as running:
        time.sleep(_SETTLE_S)
        running.check()
        pids = [running.broker.pid, running.broker.data_pid, running.children[0].pid]
        pids += [pid for pid in descendants(running.children[0].pid) if pid not in pids]
        total = sum(memory_of(pid)[0] for pid in pids) / _MIB
        torch = [pid for pid in pids if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
        alone = memory_of(plain.pid)[0] / _MIB
    plain.communicate(b"\n")
    note = f"{len(pids)} processes" + (f"; torch is loaded in {len(torch)}" if torch else ", none with torch")
    # 120 MB are 114 MiB
    goal = Target(120e6 / _MIB)
    return [Figure("broker and controller before work, PSS", total, "MiB", f"`{_PLAIN}`", alone, goal, note)]


def _first_task(runs: int) -> list[Figure]:
    """`fedloom sim` to the first task of a numpy job."""
    row = Row("startup", "", "np", clients=2, rounds=1, at_once=2)
    system = BY_KEY["exact"]
    seconds: list[float] = []
    imports: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", _PLAIN], check=True)
        imports.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name:
            folder = Path(name)
            env = environment(system, folder / "events.jsonl", folder / "result.npz")
            measured = watch(system.command(system.python, row, folder / "work"), env=env, cwd=folder, every_s=60)
            if measured.code:
                raise RuntimeError(f"fedloom sim ended with {measured.code}: {measured.said[-1500:]}")
            seconds.append(round_starts(read_events(folder / "events.jsonl"))[0] - measured.started_at)
    plain = statistics.median(imports)
    return [
        Figure("`fedloom sim` to the first task, no torch", statistics.median(seconds), "s", _PLAIN, plain, Target(0.6))
    ]


def _sites(clients: int) -> list[Figure]:
    """A site's script with torch: its fork to the end of its first training step."""
    env = {**os.environ, "PYTHONPATH": str(JOBS), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        env |= {"BENCH_EVENTS": str(folder / "events.jsonl"), "BENCH_RESULT": ""}
        script = str(JOBS / "step.py")
        subprocess.run([sys.executable, script], env=env, check=True, capture_output=True)
        (alone,) = read_events(folder / "events.jsonl")
        (folder / "events.jsonl").unlink()
        argv = [str(Path(sys.executable).with_name("fedloom")), "sim", str(JOBS / "job_step.py"), "-w", str(folder)]
        measured = watch([*argv, "--", str(clients)], env=env, cwd=folder, every_s=60)
        if measured.code:
            raise RuntimeError(f"fedloom sim ended with {measured.code}: {measured.said[-1500:]}")
        steps = [entry for entry in read_events(folder / "events.jsonl") if entry["event"] == "step"]
    ready = statistics.median(step["ready_s"] for step in steps) * 1000
    private = statistics.median(step["private"] for step in steps) / _MIB
    against = "a process of its own"
    return [
        Figure("a site ready, fork to first training step", ready, "ms", against, alone["ready_s"] * 1000, Target(150)),
        Figure("a site ready, private memory", private, "MiB", against, alone["private"] / _MIB, Target(25)),
    ]
