"""Same seed, same bits: whatever the number of workers, with and without partials, in any order of arrival."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import ProdEnv, SimEnv

pytestmark = pytest.mark.process


def simulate(
    jobs: Any, folder: Path, *, threads: int, prefold: bool = True, clients: int = 8, quota: int = 0, **options: Any
) -> Path:
    env = SimEnv(
        num_clients=clients,
        num_threads=threads,
        workspace_root=folder,
        show_progress=False,
        extra={"prefold": prefold, "broker": {"quota_bytes": quota}},
    )
    run = jobs.recipe(clients=clients, **options).execute(env)
    assert run.get_status() == "FINISHED:COMPLETED"
    return run.get_result()


def records(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("function", [False, True], ids=["script", "function"])
def test_workers_and_partials(jobs: Any, workspace: Path, sha256: Callable[[Path], str], function: bool) -> None:
    """The agent folds what is small; workers fold what is large where each of them has four results or more."""
    digests: dict[str, str] = {}
    for threads in (1, 2, 4):
        for prefold in (True, False):
            name = f"t{threads}-{'partials' if prefold else 'singles'}"
            elements = 20_000 if function else 7_500
            result = simulate(
                jobs, workspace / name, threads=threads, prefold=prefold, elements=elements, function=function
            )
            digests[name] = sha256(result)
            in_partials = sum(record["partials"] for record in records(result))
            tasks = sum(record["tasks"] for record in records(result))
            assert tasks == 8 * 3
            if prefold and (threads <= 2 or not function):
                assert in_partials > 0.9 * tasks
            else:
                assert in_partials == 0
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("function", [False, True], ids=["script", "function"])
def test_a_spool_without_room_for_partials(
    jobs: Any, workspace: Path, sha256: Callable[[Path], str], function: bool
) -> None:
    """A partial takes two models: where a single result's room is all there is, results come singly, and it goes on."""
    options = {"threads": 2, "clients": 20, "rounds": 2, "elements": 1 << 18, "function": function}
    narrow = simulate(jobs, workspace / "narrow", quota=int(8.3 * (1 << 20)), **options)
    wide = simulate(jobs, workspace / "wide", quota=20 << 20, **options)
    assert sha256(narrow) == sha256(wide)
    assert [record["partials"] for record in records(narrow)] == [0, 0]
    assert all(record["partials"] > 0 for record in records(wide))


def test_repeated_runs_and_other_seeds(jobs: Any, workspace: Path, sha256: Callable[[Path], str]) -> None:
    first = sha256(simulate(jobs, workspace / "a", threads=4))
    again = sha256(simulate(jobs, workspace / "b", threads=4))
    other = sha256(simulate(jobs, workspace / "c", threads=4, seed=8))
    assert first == again != other


@pytest.mark.parametrize("grow", [1e12, 1e-12], ids=["out of range", "too coarse"])
def test_scales_that_do_not_hold(jobs: Any, workspace: Path, sha256: Callable[[Path], str], grow: float) -> None:
    """A round whose values leave the planned scale is folded again; what only partials held is trained again, singly.

    Momentum in the site state shows that the tasks that ran again started from the state that the first try had.
    """
    options = {"grow": grow, "momentum": True, "elements": 500}
    partials = simulate(jobs, workspace / "partials", threads=2, **options)
    singles = simulate(jobs, workspace / "singles", threads=2, prefold=False, **options)
    assert sha256(partials) == sha256(singles)
    assert [record["refolds"] > 0 for record in records(partials)][1]
    assert records(partials)[1]["redone"] == 8
    assert records(singles)[1]["redone"] == 0
    assert all(record["state_lost"] == [] for record in records(partials))


def test_external_process_and_a_script_for_each_task(jobs: Any, workspace: Path, sha256: Callable[[Path], str]) -> None:
    """How the script is started changes nothing: forked, by a command of its own, or anew for each task."""
    forked = simulate(jobs, workspace / "forked", threads=2, momentum=True)
    external = simulate(
        jobs, workspace / "external", threads=2, momentum=True, launch_external_process=True, command="python3 -u"
    )
    anew = simulate(jobs, workspace / "anew", threads=2, momentum=True, launch_once=False)
    assert sha256(forked) == sha256(external) == sha256(anew)
    assert len(jobs.runs()) == 3 * 8 * 3


def test_at_a_broker_through_prod_env(jobs: Any, cluster: Any, workspace: Path, sha256: Callable[[Path], str]) -> None:
    """`recipe.execute(ProdEnv(endpoint))`, as a program uses it: the simulation's bits, streamed instead of mapped."""
    simulated = sha256(simulate(jobs, workspace / "sim", threads=2, elements=100_000))
    cluster.broker()
    cluster.controller(streamed=True)
    for number in range(1, 9):
        cluster.executor(f"site-{number}", streamed=number % 2 == 0)
    run = jobs.recipe(clients=8, elements=100_000).execute(ProdEnv(cluster.endpoint))
    assert run.wait(timeout=120) == "FINISHED:COMPLETED"
    assert run.get_status() == "FINISHED:COMPLETED"
    assert [record["round"] for record in run.metrics()] == [0, 1, 2]
    assert sha256(Path(run.get_result())) == simulated
