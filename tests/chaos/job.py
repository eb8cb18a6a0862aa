"""The job that the matrix runs: pure in model, seed and site state, slow enough to be hit, each execution counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv

_CLIENT = '''\
"""Adds noise from the task's own generator and keeps momentum; says when it begins and ends."""
import os
import sys
import time

import fedloom.client as flare
import numpy as np

runs, work_s, keeps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])


def say(word, site, number):
    with open(runs, "a") as log:
        log.write(f"{word} {site} {number}\\n")


def step(model, state, site):
    value = np.array(model.params["numpy_key"])
    say("begin", site, model.current_round)
    time.sleep(work_s)
    velocity = 0.9 * state.get("velocity", np.float32(0)) + np.random.standard_normal(1)[0].astype(np.float32)
    if keeps:
        state["velocity"] = np.float32(velocity)
    noise = np.random.standard_normal(value.shape).astype(value.dtype) * np.float32(0.1)
    say("end", site, model.current_round)
    return flare.FLModel(
        params={"numpy_key": value + noise + np.float32(0.01) * np.float32(velocity)},
        meta={"NUM_STEPS_CURRENT_ROUND": 3 + int(site[-1])},
    )


def main():
    flare.init()
    site = flare.get_site_name()
    while flare.is_running():
        flare.send(step(flare.receive(), flare.state(), site))


main()
'''

_FUNCTION = '''\
"""The same as a function, for a worker."""
import os
import time

import numpy as np
from fedloom.client import FLModel


def train(model, ctx):
    runs, work_s = {runs!r}, {work_s!r}

    def say(word):
        with open(runs, "a") as log:
            log.write(f"{{word}} {{ctx.site}} {{model.current_round}}\\n")

    value = np.array(model.params["numpy_key"])
    say("begin")
    time.sleep(work_s)
    noise = np.random.standard_normal(value.shape).astype(value.dtype) * np.float32(0.1)
    say("end")
    return FLModel(params={{"numpy_key": value + noise}}, meta={{"NUM_STEPS_CURRENT_ROUND": 3 + int(ctx.site[-1])}})
'''


class ChaosJob:
    """One job folder, its log of executions, and the digest of its model where nothing goes wrong."""

    def __init__(self, folder: Path, *, sites: int, rounds: int, elements: int, function: bool, work_s: float,
                 keeps: bool = True) -> None:  # fmt: skip
        self.folder = folder
        self.rounds = rounds
        self.sites = [f"site-{number}" for number in range(1, sites + 1)]
        self.runs_path = folder / "runs.log"
        code = folder / "client.py"
        values = {"runs": str(self.runs_path), "work_s": work_s}
        code.write_text(_FUNCTION.format(**values) if function else _CLIENT)
        self._recipe = NumpyFedAvgRecipe(
            name="chaos",
            model=np.linspace(-1, 1, elements, dtype=np.float32),
            min_clients=sites,
            num_rounds=rounds,
            train_script=f"{code}:train" if function else str(code),
            train_args="" if function else f"'{self.runs_path}' {work_s} {int(keeps)}",
            seed=11,
        )

    def export(self) -> Path:
        return self._recipe.export(self.folder / "job")

    def undisturbed(self) -> str:
        """The model's digest after a simulation in which nothing happens."""
        env = SimEnv(clients=self.sites, num_threads=2, workspace_root=self.folder / "calm", show_progress=False)
        run = self._recipe.execute(env)
        assert run.get_status() == "FINISHED:COMPLETED"
        self.runs_path.unlink()
        return digest(run.get_result())

    def runs(self) -> Counter[str]:
        """How often each "begin site round" and "end site round" was said."""
        return Counter(self.runs_path.read_text().splitlines()) if self.runs_path.exists() else Counter()

    def training(self) -> list[str]:
        """Sites whose last word was that they begin."""
        last: dict[str, str] = {}
        if self.runs_path.exists():
            for line in self.runs_path.read_text().splitlines():
                word, site, _ = line.split()
                last[site] = word
        return [site for site, word in last.items() if word == "begin"]


def digest(result: Any) -> str:
    """Of a result folder's model."""
    return hashlib.sha256((Path(result) / "model.safetensors").read_bytes()).hexdigest()
