"""The systems of the table: how each is started on a row's work, and which of its processes are the server."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rows import Row

HERE = Path(__file__).resolve().parent
JOBS, PEERS = HERE / "jobs", HERE / "peers"
#: Where `make bench-peers` puts the others' environments.
ENVS = HERE.parent / "workspace" / "bench"

_BROKER_AND_CONTROLLER = frozenset({"broker", "data", "controller", "job"})
_JOB_SCRIPTS = {"np": "job_np.py", "big": "job_big.py", "digits": "job_digits.py"}


@dataclass(frozen=True, slots=True)
class System:
    """A system of the table.

    Attributes:
        python: the interpreter that has it.
        package: its distribution, for the version.
        command: the row's command line; the folder is empty, and gone after the run.
        server: whether a process of this role (see `measure.role_of`) is the server's side.
    """

    key: str
    title: str
    python: Path
    package: str
    command: Callable[[Path, Row, Path], list[str]]
    server: Callable[[str], bool] = lambda role: True
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def missing(self) -> str:
        """Why it cannot be started; "" where it can."""
        return "" if self.python.is_file() else "its environment is not installed: `make bench-peers`"

    def version(self) -> str:
        """Of its package; "" where there is none."""
        if not self.package or self.missing:
            return ""
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, timeout=60)
        return done.stdout.strip()


def _bare(python: Path, row: Row, folder: Path) -> list[str]:
    return [str(python), str(JOBS / "bare.py"), *row.args()]


def _fedloom(*more: str) -> Callable[[Path, Row, Path], list[str]]:
    def command(python: Path, row: Row, folder: Path) -> list[str]:
        script = str(JOBS / _JOB_SCRIPTS[row.kind])
        at_once = str(min(row.at_once, os.cpu_count() or 1))
        options = [*more, *(["--functions", "--at-once", at_once] if row.functions else [])]
        return [str(python.with_name("fedloom")), "sim", script, "-w", str(folder), "--", *row.args(), *options]

    return command


def _peer(script: str) -> Callable[[Path, Row, Path], list[str]]:
    def command(python: Path, row: Row, folder: Path) -> list[str]:
        return [*alone(), str(python), str(PEERS / script), *row.args()]

    return command


@functools.cache
def alone() -> tuple[str, ...]:
    """What gives a command no network but loopback, so that none waits for servers out there; () where not allowed."""
    words = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    try:
        works = subprocess.run([*words, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        works = False
    return words if works else ()


def _env_python(name: str) -> Path:
    return ENVS / f"env-{name}" / "bin" / "python"


_OURS = Path(sys.executable)
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

SYSTEMS = (
    System("bare", "bare loop", _OURS, "", _bare),
    System("exact", "fedloom", _OURS, "fedloom", _fedloom(), _BROKER_AND_CONTROLLER.__contains__),
    System(
        "float32", "fedloom, exact=False", _OURS, "fedloom", _fedloom("--float32"), _BROKER_AND_CONTROLLER.__contains__
    ),
    System(
        "nvflare",
        "NVFLARE",
        _env_python("nvflare"),
        "nvflare",
        _peer("nvflare_job.py"),
        lambda role: "simulator_worker" not in role,
    ),
    System(
        "flower",
        "Flower",
        _env_python("flower"),
        "flwr",
        _peer("flower_run.py"),
        lambda role: "flower_run.py" in role,
        _QUIET,
    ),
    System("pfl", "pfl-research", _env_python("pfl"), "pfl", _peer("pfl_run.py"), lambda role: "pfl_run.py" in role),
)
BY_KEY = {system.key: system for system in SYSTEMS}
OURS = ("bare", "exact", "float32")
OTHERS = ("nvflare", "flower", "pfl")


def environment(system: System, events: Path, result: Path) -> dict[str, str]:
    """What a run has beside the environment of whoever measures it."""
    path = os.pathsep.join(filter(None, [str(JOBS), str(PEERS), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "BENCH_EVENTS": str(events), "BENCH_RESULT": str(result), **system.env}
