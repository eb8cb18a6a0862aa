"""A small job whose bits tell everything, and the processes that run it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe

CLIENT = '''\
"""Adds noise from the task's own generator, and keeps momentum if asked; every execution leaves a line."""
import argparse
import os

import fedloom.client as flare
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--runs")
parser.add_argument("--momentum", action="store_true")
parser.add_argument("--fault", default="")
parser.add_argument("--grow", type=float, default=1.0)
args = parser.parse_args()
flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    with open(args.runs, "a") as log:
        log.write(f"{site} {model.current_round}\\n")
    if args.fault and site == "site-2" and model.current_round == 1:
        exec(args.fault)
    value = np.array(model.params["numpy_key"])
    step = np.random.standard_normal(value.shape).astype(value.dtype) * 0.1
    if args.momentum:
        state = flare.state()
        step = step + 0.9 * state.get("velocity", np.zeros_like(step))
        state["velocity"] = step
    scale = np.float32(args.grow if model.current_round == 1 else 1)
    flare.send(flare.FLModel(
        params={"numpy_key": (value + step) * scale},
        metrics={"accuracy": float(np.abs(value).mean())},
        meta={"NUM_STEPS_CURRENT_ROUND": 3 + len(site) + int(site[-1])},
    ))
'''

FUNCTION = '''\
"""The same as a function, for the workers that serve any site."""
import numpy as np
from fedloom.client import FLModel


def train(model, ctx):
    value = np.array(model.params["numpy_key"])
    step = np.random.standard_normal(value.shape).astype(value.dtype) * 0.1
    return FLModel(
        params={"numpy_key": value + step},
        metrics={"accuracy": float(np.abs(value).mean())},
        meta={"NUM_STEPS_CURRENT_ROUND": 3 + len(ctx.site) + int(ctx.site[-1])},
    )
'''


class JobMaker:
    """Writes job folders whose clients log their executions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs_path = folder / "runs.log"

    def recipe(
        self,
        *,
        clients: int = 3,
        rounds: int = 3,
        elements: int = 1000,
        momentum: bool = False,
        function: bool = False,
        fault: str = "",
        grow: float = 1.0,
        **options: Any,
    ) -> NumpyFedAvgRecipe:
        code = self.folder / "code"
        code.mkdir(exist_ok=True)
        (code / "client.py").write_text(FUNCTION if function else CLIENT)
        words = ["--runs", f"'{self.runs_path}'"]
        words += ["--momentum"] if momentum else []
        words += ["--fault", repr(fault)] if fault else []
        words += ["--grow", str(grow)] if grow != 1.0 else []
        return NumpyFedAvgRecipe(
            **{
                "name": "bits",
                "model": np.linspace(-1, 1, elements, dtype=np.float32),
                "min_clients": clients,
                "num_rounds": rounds,
                "train_script": str(code / "client.py") + (":train" if function else ""),
                "train_args": "" if function else " ".join(words),
                "seed": 7,
                **options,
            }
        )

    def export(self, name: str = "job", **options: Any) -> Path:
        return self.recipe(**options).export(self.folder / name)

    def runs(self) -> list[str]:
        """A line "site round" for each execution of the script."""
        return self.runs_path.read_text().splitlines() if self.runs_path.exists() else []


@pytest.fixture
def jobs(workspace: Path) -> JobMaker:
    return JobMaker(workspace)


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    return lambda folder: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Cluster:
    """A broker, a controller and executors as separate processes over TCP, which can be killed and started again."""

    def __init__(self, children: Any, folder: Path, endpoint: str) -> None:
        self.children = children
        self.folder = folder
        self.endpoint = endpoint
        self.fault_log = folder / "faults.log"

    def _env(self, fault: str, streamed: bool) -> dict[str, str]:
        env = {"FEDLOOM_FAULT": fault, "FEDLOOM_FAULT_LOG": str(self.fault_log)} if fault else {}
        return env | ({"FEDLOOM_NO_LOCAL": "1"} if streamed else {})

    def broker(self, fault: str = "") -> Any:
        return self.children.fedloom(
            "broker", "--bind", self.endpoint, "--store", self.folder / "store", env=self._env(fault, False)
        )

    def controller(self, fault: str = "", streamed: bool = False) -> Any:
        return self.children.fedloom("controller", "--broker", self.endpoint, env=self._env(fault, streamed))

    def executor(self, site: str, fault: str = "", streamed: bool = False) -> Any:
        return self.children.fedloom(
            "executor",
            "--broker",
            self.endpoint,
            "--site",
            site,
            "--workspace",
            self.folder / f"ws {site}",
            env=self._env(fault, streamed),
        )

    def job(self, *words: str | Path, timeout_s: float = 120, ok: bool = True) -> tuple[int, str, str]:
        code, out, err = self.children.fedloom_output(
            "job", *words, timeout_s=timeout_s, env={"FEDLOOM_BROKER": self.endpoint}
        )
        if ok:
            assert code == 0, f"job {words[0]}: exit code {code}\n{out}\n{err}\n{self.children.dump()}"
        return code, out, err

    def submit(self, folder: Path) -> str:
        return json.loads(self.job("submit", folder, "--json")[1])["job_id"]

    def result(self, job_id: str, timeout_s: float = 120) -> Path:
        """Wait for the end and download."""
        self.job("wait", job_id, timeout_s=timeout_s)
        self.job("download", job_id, "-o", self.folder / f"result {job_id}")
        return self.folder / f"result {job_id}"

    def faults_hit(self) -> list[str]:
        return self.fault_log.read_text().splitlines() if self.fault_log.exists() else []


@pytest.fixture
def cluster(children: Any, workspace: Path, endpoint: str) -> Cluster:
    return Cluster(children, workspace, endpoint)


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for something to become true."""

    def wait(check: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not check():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            threading.Event().wait(0.05)

    return wait
