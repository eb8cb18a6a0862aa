"""Which clients a simulation has, where its folder is, and what a command line says over a script: before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe.env import SimEnv
from fedloom.recipe.logs import check_level
from fedloom.recipe.overrides import Overrides
from fedloom.recipe.simulate import SimOptions, check_named, checked, compat_hint, simulate
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec


def spec(**values: Any) -> JobSpec:
    parts = {
        "workflows": (Component("fedloom.controller.workflows.fedavg.FedAvg"),),
        "executors": (
            ExecutorSpec(
                ("*",), Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"})
            ),
        ),
    }
    return JobSpec(**({"name": "a job", "min_clients": 1} | parts | values))


@pytest.mark.parametrize(
    ("options", "named", "sites"),
    [
        ({"clients": ("a", "b")}, None, ["a", "b"]),
        ({"num_clients": 3}, None, ["site-1", "site-2", "site-3"]),
        ({}, ("berlin", "rome"), ["berlin", "rome"]),
        ({}, None, ["site-1", "site-2"]),
        ({"clients": ("rome",)}, ("berlin", "rome"), ["rome"]),
        ({"num_clients": 1}, ("site-1", "site-2"), ["site-1"]),
    ],
)
def test_three_ways_to_name_clients(options: dict[str, Any], named: tuple[str, ...] | None, sites: list[str]) -> None:
    """-c, then -n, then the job's own; of a job that names its sites some may be chosen."""
    assert SimOptions(**options).sites_for(spec(sites=named)) == sites


def test_a_client_that_the_job_does_not_name() -> None:
    with pytest.raises(JobError, match=r"client 'oslo' has no part in job 'a job': its meta.json names berlin, rome"):
        SimOptions(clients=("rome", "oslo")).sites_for(spec(sites=("berlin", "rome")))
    with pytest.raises(JobError, match="client 'site-3' has no part"):
        SimOptions(num_clients=3).sites_for(spec(sites=("site-1", "site-2")))


def test_a_client_that_the_job_cannot_do_without() -> None:
    with pytest.raises(JobError, match="mandatory client 'rome' of job 'a job' is not among the clients berlin"):
        SimOptions(clients=("berlin",)).sites_for(spec(mandatory_clients=("rome",)))


def test_names_of_clients_that_are_not_simulated_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is misspelled would be ignored; an evaluation would wait for it."""
    script = Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"})
    executors = (ExecutorSpec(("*",), script), ExecutorSpec(("*",), script, ("site1",)))
    weighted = Component("fedloom.controller.workflows.fedavg.FedAvg", {"aggregation_weights": {"oslo": 2.0}})
    check_named(spec(), ["site-1"])
    assert not capsys.readouterr().err
    job = spec(workflows=(weighted,), executors=executors, client_extra={"site_config": {"rome": {}, "site-1": {}}})
    check_named(job, ["site-1"])
    assert "settings for oslo, rome, site1, not among the clients" in capsys.readouterr().err
    cross = Component("fedloom.controller.workflows.crosssite.CrossSiteEval", {"participating_clients": ["site-9"]})
    with pytest.raises(JobError, match="participating_clients: 'site-9' is not among the clients site-1, site-2"):
        check_named(spec(workflows=(cross,)), ["site-1", "site-2"])


def test_an_extra_setting_that_there_is_not_is_said_before_the_last_run_is_moved(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    job = spec(name="x")
    job.write(folder)
    (job.custom_dir(folder) / "client.py").write_text("")
    env = SimEnv(num_clients=1, workspace_root=tmp_path / "ws", extra={"timeout": 5})
    with pytest.raises(JobError, match=r"extra: unknown 'timeout'; allowed are .*timeout_s"):
        simulate(env.options, folder=folder)
    assert not (tmp_path / "ws").exists()


def test_too_many_and_too_few() -> None:
    with pytest.raises(JobError, match="101 clients; at most 100: raise it with -m"):
        SimOptions(num_clients=101, max_clients=100).sites_for(spec())
    assert len(SimOptions(num_clients=101, max_clients=101).sites_for(spec())) == 101
    with pytest.raises(JobError, match="min_clients=3 but the simulation has 2 clients"):
        SimOptions(num_clients=2).sites_for(spec(min_clients=3))


def test_a_command_line_goes_before_the_script() -> None:
    script = SimOptions(num_clients=4, num_threads=2, gpu_config="0", log_level="info")
    by = Overrides(clients=("a",), num_threads=1)
    both = script.overridden(by)
    assert (both.clients, both.num_clients, both.num_threads) == (("a",), 0, 1)
    assert (both.gpu_config, both.log_level) == ("0", "info")
    assert script.overridden(Overrides(num_clients=8)).num_clients == 8


def test_more_groups_than_clients_is_said_before_the_last_run_is_moved(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    job = spec(name="x")
    job.write(folder)
    (job.custom_dir(folder) / "client.py").write_text("")
    with pytest.raises(JobError, match="2 GPU groups but 1 clients"):
        simulate(SimOptions(num_clients=1, gpu_config="0,1", workspace_root=tmp_path / "ws"), folder=folder)
    assert not (tmp_path / "ws").exists()


def test_gpus_that_are_not_there_are_said_before_the_last_run_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    job = spec(name="x")
    job.write(folder)
    (job.custom_dir(folder) / "client.py").write_text("")
    monkeypatch.setenv("FEDLOOM_GPUS", "0")
    with pytest.raises(JobError, match="GPU '0' was asked for, and no GPU was found on this machine"):
        simulate(SimOptions(num_clients=1, gpu_config="0", workspace_root=tmp_path / "ws"), folder=folder)
    assert not (tmp_path / "ws").exists()


def test_what_a_job_asks_of_gpus_is_told_where_its_workers_see_fewer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDLOOM_GPUS", "4")
    job = spec(name="wide", resource_spec={"site-2": {"num_of_gpus": 2}})
    checked(SimOptions(num_clients=2), job)  # without -gpu it is a simulation on the CPU, on purpose
    checked(SimOptions(num_clients=2, gpu_config="[0,1],[2,3]"), job)
    assert not capsys.readouterr().err
    checked(SimOptions(num_clients=2, gpu_config="0,1"), job)
    assert "site-2 asks for 2 GPUs (resource_spec), and a worker sees 1" in capsys.readouterr().err


def test_a_workspace_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("mine")
    with pytest.raises(JobError, match=r"workspace .*/ws is a file; name a folder, in which 'x' is made"):
        SimOptions(workspace_root=tmp_path / "ws").workspace_for("x")


@pytest.mark.parametrize(
    ("given", "level"),
    [("concise", "info"), ("FULL", "info"), ("verbose", "debug"), ("msg_only", "warning"), ("ERROR", "error")],
)
def test_log_levels_by_either_name(given: str, level: str) -> None:
    assert check_level(given) == level
    assert SimEnv(log_config=given).options.log_level == level


def test_a_script_that_misses_nvflare_is_told_of_the_switch() -> None:
    assert "--compat nvflare" in compat_hint("ModuleNotFoundError: No module named 'nvflare'")
    assert "--compat nvflare" in compat_hint("No module named 'nvflare.client'; 'nvflare' is not a package")
    assert compat_hint("No module named 'numpy'") == ""
