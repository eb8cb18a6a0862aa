"""`fedloom sim --plan` over real processes: one client is measured, and nothing of it is left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fedloom.serialization.errors import TaskError
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.sim.planning.trial import one_client, plan_simulation
from fedloom.sim.prepare import SimConfig

MakeJob = Callable[..., Path]
MIB = 2**20

#: Holds 64 MiB while it works, and half as much between its tasks.
HOLDER = """
import time
import numpy as np
import fedloom.client as flare

kept = np.ones(32 * 2**20 // 8)
flare.init()
while flare.is_running():
    model = flare.receive()
    time.sleep(0.15)  # long enough to be looked at
    work = np.ones(32 * 2**20 // 8)
    for _ in range(20):
        work += kept
    params = {name: value + 1 for name, value in model.params.items()}
    del work
    flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
"""


def test_the_measured_job_is_the_same_for_one_client_and_two_rounds() -> None:
    train = Component("fedloom.controller.workflows.fedavg.FedAvg", {"num_rounds": 50, "min_clients": 8, "sample": 4})
    rate = Component("fedloom.controller.workflows.crosssite.GlobalModelEval", {"participating_clients": ["b"]})
    script = Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"})
    spec = JobSpec("x", (train, rate), (ExecutorSpec(("*",), script),), 8, 50, 7, mandatory_clients=("b",))
    one = one_client(spec, "a")
    assert [workflow.args for workflow in one.workflows] == [{"num_rounds": 2, "min_clients": 1}]
    assert (one.sites, one.min_clients, one.num_rounds, one.mandatory_clients) == (("a",), 1, 2, ())
    assert (one.executors, one.seed) == (spec.executors, 7)


@pytest.mark.process
def test_a_plan_has_what_one_client_took(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(HOLDER, rounds=5, min_clients=3)
    before = sorted(tmp_path.rglob("*"))
    sites = tuple(f"site-{number}" for number in range(6))
    plan = plan_simulation(SimConfig(job, tmp_path / "results" / "x", sites, threads=2, timeout_s=90.0))
    assert sorted(tmp_path.rglob("*")) == before, "the measured run left something behind"
    one = plan.measured
    model = (job / "app" / "initial_model.safetensors").stat().st_size
    assert (one.site, one.rounds, one.model, one.result, one.checkpoint) == ("site-0", 2, model, one.result, 8 * 9)
    assert model <= one.result < model + 1024
    assert 32 * MIB < one.waiting < 56 * MIB < 64 * MIB < one.worker < 96 * MIB
    assert {"warm", "broker", "data", "controller", "job", "agent"} <= one.memory.keys()
    assert all(one.memory[role] < 100 * MIB for role in ("broker", "data", "controller", "job", "agent"))
    assert 0 < one.run_s < one.round_s and one.cpu_s > 0
    assert (plan.fleet.clients, plan.fleet.workers, plan.fleet.parked, plan.fleet.rounds) == (6, 2, 4, 5)
    assert plan.fits and plan.up == 6 * one.result
    assert json.loads(json.dumps(plan.to_json()))["measured"]["worker"] == one.worker


@pytest.mark.process
def test_a_client_that_fails_is_told_with_its_own_traceback(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("import fedloom.client as flare\nflare.init()\nflare.receive()\nraise ValueError('my mistake')\n")
    with pytest.raises(TaskError, match="ValueError: my mistake") as caught:
        plan_simulation(SimConfig(job, tmp_path / "ws", ("a", "b"), timeout_s=90.0))
    assert f'File "{job}/app/custom/client.py", line 4' in str(caught.value)
    assert not any("fedloom-plan" in note for note in getattr(caught.value, "__notes__", ()))


SCRIPT = """
import sys
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv

print("read")
recipe = NumpyFedAvgRecipe(name="adder", model=[1.0, 2.0], min_clients=2, num_rounds=7, train_script="client.py")
recipe.execute(SimEnv(num_clients=4))
sys.exit("not reached: the plan is all that was asked for")
"""


@pytest.mark.process
def test_the_command_refuses_what_no_machine_holds(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(HOLDER)
    (tmp_path / "job.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "fedloom", "sim", "job.py", "-n", "20000", "-m", "20000", "--plan", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["job"], plan["fits"], plan["threads"], plan["rounds"]) == ("adder", False, 20_000, 7)
    assert plan["reasons"][0].startswith("memory: ") and "are available (workers " in plan["reasons"][0]
    assert f"error: adder does not fit: {plan['reasons'][0]}" in done.stderr
    assert 0 < plan["most_threads"] < 20_000 and f"-t {plan['most_threads']}" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"client.py", "job.py"}
