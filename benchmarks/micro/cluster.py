"""A broker, a controller and embedded executors as processes of their own on this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from fedloom.broker.service import Broker, start_broker
from fedloom.recipe import NumpyFedAvgRecipe, ProdEnv
from fedloom.recipe.client import JobClient
from jobs.workload import EVENTS, differences, numpy_model, read_events, round_starts
from systems import JOBS

HERE = Path(__file__).resolve().parent
_UP_S = 60.0
_STOP_S = 5.0


@dataclass
class Cluster:
    """Running processes; see `cluster`."""

    folder: Path
    broker: Broker
    env: dict[str, str]
    children: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    sites: int = 0

    @property
    def events(self) -> Path:
        """Where executors and the aggregator note what they do."""
        return Path(self.env[EVENTS])

    def python(self, *argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a child with the cluster's environment; it is ended with the cluster."""
        log: IO[bytes] = (self.folder / f"{len(self.children):02d}.log").open("wb")
        child = subprocess.Popen(
            [sys.executable, *argv], env=self.env | (env or {}), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        self.children.append(child)
        return child

    def executor(
        self, sites: int = 1, *, capacity: int = 1, mib: int = 0, together: int = 0, remote: bool = False
    ) -> None:
        """An embedded executor in a process of its own, for so many more sites.

        Args:
            mib: what a task returns; 0: the received model as it is.
            together: a result leaves when so many executors have theirs ready.
            remote: nothing is handed over as a file, as if it were on another machine than the broker.
        """
        words = ["--broker", self.broker.endpoint, "--first", self.sites + 1, "--sites", sites, "--capacity", capacity]
        words += ["--mib", mib, "--together", together, "--folder", self.folder / f"executor-{self.sites}"]
        env = {"FEDLOOM_NO_LOCAL": "1"} if remote else {}
        self.python(str(HERE / "embedded.py"), *(str(word) for word in words), env=env)
        self.sites += sites

    def wait(self) -> None:
        """Until all sites are connected.

        Raises:
            RuntimeError: a process has ended, or they are not there in time.
        """
        deadline = time.monotonic() + _UP_S
        with JobClient(self.broker.endpoint) as client:
            while sum(1 for site in client.sites() if site.get("live")) < self.sites:
                self.check()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.sites} sites were not connected within {_UP_S:g} s")
                time.sleep(0.02)

    def check(self) -> None:
        """Raises RuntimeError where a process has ended."""
        for number, child in enumerate(self.children):
            if child.poll() is not None:
                said = (self.folder / f"{number:02d}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{child.args} ended with {child.returncode}:\n{said}")

    def run(self, rounds: int, *, mib: int = 0, tensors: int = 4, **options: Any) -> list[float]:
        """A job of so many rounds with all sites; the seconds from each round's first task to the next round's."""
        self.events.unlink(missing_ok=True)
        recipe = NumpyFedAvgRecipe(
            name="bench",
            model=numpy_model("big", mib, tensors) if mib else np.zeros(10, np.float32),
            min_clients=self.sites,
            num_rounds=rounds,
            train_script=f"{JOBS / 'tasks.py'}:train",  # never called: embedded executors have a function of their own
            **options,
        )
        run = recipe.execute(ProdEnv(self.broker.endpoint))
        if (status := run.wait(timeout=300)) != "FINISHED:COMPLETED":
            raise RuntimeError(f"the job ended as {status}: {run.get_reason()}")
        return differences(round_starts(read_events(self.events)))

    def close(self) -> None:
        """End the children, the last first."""
        for child in reversed(self.children):
            child.terminate()
        for child in reversed(self.children):
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def cluster(*, controller: bool = True, bind: str = "tcp://127.0.0.1:*", **options: Any) -> Generator[Cluster]:
    """A broker (options are fields of `BrokerConfig`) and a controller."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-bench-")))
        path = os.pathsep.join(filter(None, [str(JOBS), str(HERE), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, EVENTS: str(folder / "events.jsonl")}
        broker = stack.enter_context(start_broker(folder / "store", bind, **options))
        made = Cluster(folder, broker, env)
        stack.callback(made.close)
        if controller:
            made.python("-m", "fedloom", "controller", "--broker", broker.endpoint)
        yield made
