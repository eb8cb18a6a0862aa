"""Several workflows in one job: each counts its own rounds, and their records stand in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fedloom.recipe import Job, SimEnv
from fedloom.serialization.jobspec import Component
from safetensors.numpy import load_file

CLIENT = """\
from fedloom.client import FLModel


def train(model, ctx):
    told = {"told": float(model.current_round), "of": float(model.total_rounds), "ctx": float(ctx.round)}
    return FLModel(params={"w": model.params["w"] + 1 + model.current_round}, metrics=told)
"""


@pytest.mark.process
def test_fedavg_twice(here: Path) -> None:
    (here / "client.py").write_text(CLIENT)
    job = Job("twice", min_clients=2, num_rounds=2)
    place = job.add_code("client.py")
    model = job.set_model({"w": np.zeros(3, np.float32)})
    for rounds in (2, 3):
        args = {"num_rounds": rounds, "min_clients": 2, "initial_model": model}
        job.add_workflow("fedloom.controller.workflows.fedavg.FedAvg", args)
    args = {"task_script_path": place, "function": "train"}
    job.add_executor(Component("fedloom.executor.script.FunctionExecutor", args))
    run = SimEnv(num_clients=2, num_threads=1, workspace_root=here / "ws", show_progress=False).deploy(job)
    records = run.metrics()
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    assert [record.get("workflow", 0) for record in records] == [0, 0, 1, 1, 1]
    assert [record["metrics"]["told"] for record in records] == [0, 1, 0, 1, 2]
    assert [record["metrics"]["ctx"] for record in records] == [0, 1, 0, 1, 2]
    assert [record["metrics"]["of"] for record in records] == [2, 2, 3, 3, 3]
    params = load_file(run.get_result() / "model.safetensors")
    assert np.array_equal(params["w"], np.full(3, 1 + 2 + 1 + 2 + 3, np.float32)), "the second began with the first's"
