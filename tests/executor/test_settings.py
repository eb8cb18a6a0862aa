"""What a job says about its scripts, generators, and the service that keeps an executor up."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from fedloom.executor.agent import Agent, AgentConfig
from fedloom.executor.config import available_bytes, parked_by_memory
from fedloom.executor.script import FunctionExecutor, ScriptExecutor, settings_of
from fedloom.executor.seeding import seed_all, start_seed, task_seed
from fedloom.executor.service import run_executor
from fedloom.serialization.errors import FaultError, JobError, LinkTimeout
from fedloom.serialization.jobspec import Component

SCRIPT = "fedloom.executor.script.ScriptExecutor"


def test_settings_come_from_a_jobs_component():
    got = settings_of(
        Component(SCRIPT, {"task_script_path": "c.py", "task_script_args": "--a 'b c'", "launch_once": False})
    )
    assert isinstance(got, ScriptExecutor) and got.argv == ["--a", "b c"] and got.command_argv == ["python3", "-u"]
    path = "fedloom.executor.function.FunctionExecutor"
    got = settings_of(
        Component(path, {"task_script_path": "c.py", "function": "fit", "params_exchange_format": "pytorch"})
    )
    assert isinstance(got, FunctionExecutor) and got.function == "fit"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "task_script_path"),
        ({"task_script_path": ""}, "empty"),
        ({"task_script_path": "c.py", "comand": "x"}, "comand"),
        ({"task_script_path": "c.py", "launch_once": "yes"}, "launch_once='yes'"),
        ({"task_script_path": "c.py", "shutdown_timeout": -1}, "shutdown_timeout"),
        ({"task_script_path": "c.py", "params_exchange_format": "raw"}, "numpy"),
        ({"task_script_path": "c.py", "params_transfer_type": "HALF"}, "DIFF"),
    ],
)
def test_wrong_settings_are_named(args, words):
    with pytest.raises(JobError, match=words):
        settings_of(Component(SCRIPT, args))


def test_wrong_components_and_command_lines():
    with pytest.raises(JobError, match=r"os\.system.*is not here; known are ScriptExecutor, FunctionExecutor"):
        settings_of(Component("os.system", {"command": "exit"}))  # nothing of a job's is imported into the agent
    with pytest.raises(JobError, match="task_script_args"):
        _ = ScriptExecutor("c.py", "'open").argv
    with pytest.raises(JobError, match="function"):
        FunctionExecutor("c.py", "not a name")


def test_seeds_are_the_tasks_and_the_same_everywhere():
    assert task_seed(1, 2, 3, "site-1") == 5456670512729916979  # as on every machine and in every version
    assert len({task_seed(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in ("x", "y")}) == 16
    assert start_seed(1, "x") != task_seed(1, 0, 0, "x")
    draws = []
    for _ in range(2):
        seed_all(task_seed(1, 2, 3, "x"))
        draws.append((random.random(), np.random.random()))
    assert draws[0] == draws[1]


@pytest.mark.process
def test_the_service_waits_for_a_broker_and_for_its_own_past_life(broker, tmp_path):
    (tmp_path / ".lock").write_text("4711\n")  # it was killed
    stop = threading.Event()
    config = AgentConfig("fake", tmp_path, ("site-1",))
    refusals = [LinkTimeout("nobody there"), FaultError("name_taken", "still alive"), None]
    tries = []

    def make(config, spawner):
        broker.refuse = refusals[len(tries)]
        tries.append(threading.current_thread().name)
        return Agent(config, spawner, link_factory=broker.factory)

    runner = threading.Thread(
        target=lambda: run_executor(config, stop=stop, make_agent=make, on_up=lambda agent: stop.set()), name="service"
    )
    runner.start()
    runner.join(30)
    assert not runner.is_alive() and tries == ["service"] * 3 and broker.link.closed.is_set()
    assert (tmp_path / ".lock").read_text() == ""  # it has said goodbye


def test_the_service_gives_up_where_it_is_not_wanted(broker, tmp_path):
    config = AgentConfig("fake", tmp_path, ("site-1",))

    def make(config, spawner):
        return Agent(config, spawner, link_factory=broker.factory)

    broker.refuse = FaultError("name_taken", "another executor serves site-1")
    with pytest.raises(FaultError, match="another executor"):
        run_executor(config, make_agent=make)  # a stranger's
    (tmp_path / ".lock").write_text("4711\n")
    with pytest.raises(FaultError, match="another executor"):
        run_executor(config, make_agent=make, takeover_s=0.1)
    broker.refuse = FaultError("role", "not allowed")
    with pytest.raises(FaultError, match="not allowed"):
        run_executor(config, make_agent=make)


def test_how_many_scripts_may_wait_follows_the_memory():
    gib = 1024**3
    assert [parked_by_memory(n) for n in (0, gib, 16 * gib, 10**15)] == [8, 8, 32, 1024]
    assert parked_by_memory() == parked_by_memory(available_bytes()) and available_bytes() > 0


def test_names_and_capacity(tmp_path):
    assert AgentConfig("e", tmp_path, ("a", "b")).node == "executor/a"
    pool = AgentConfig("e", tmp_path, ("a", "b"), pool="p", capacity=4)
    assert pool.node == "pool/p" and pool.announced == 36
    assert AgentConfig("e", tmp_path, ("a",), capacity=3).announced == 3
    assert AgentConfig("e", tmp_path, ("a",), capacity=3, queue_ahead=5).announced == 8
    with pytest.raises(JobError, match="without sites"):
        Agent(AgentConfig("e", tmp_path, ()))
