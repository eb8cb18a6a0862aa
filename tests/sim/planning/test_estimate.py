"""A plan's arithmetic: from one client's figures to a fleet's, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fedloom.sim.devices import GpuMemory
from fedloom.sim.gpus import parse_gpus, slots
from fedloom.sim.planning.estimate import TASK_BYTES, TASK_S, estimate
from fedloom.sim.planning.figures import Fleet, Machine, Measured, Plan
from fedloom.sim.planning.report import advice, plan_text
from fedloom.sim.planning.watch import Look, task_cpu_s

MIB, GIB = 2**20, 2**30

#: A float32 model of a million numbers, and a client of half a second, most of it CPU.
ONE = Measured(
    site="site-1",
    rounds=2,
    model=4 * MIB,
    result=4 * MIB,
    checkpoint=8 * MIB,
    state=0,
    archive=5 * MIB,
    memory={"launcher": 10 * MIB, "warm": 200 * MIB, "broker": 20 * MIB, "data": 15 * MIB, "controller": 5 * MIB}
    | {"job": 40 * MIB, "agent": 30 * MIB},
    worker=100 * MIB,
    waiting=60 * MIB,
    startup_s=2.0,
    first_round_s=1.6,
    round_s=0.6,
    run_s=0.5,
    fold_s=0.01,
    cpu_s=0.4,
    start_cpu_s=0.8,
)
MACHINE = Machine(cores=2, memory=16 * GIB, quota=100 * GIB)


def fleet(clients: int, workers: int, *, gpus: str = "", share: float | str | None = None, **more: Any) -> Fleet:
    values: dict[str, Any] = {"tasks": clients, "rounds": 10, **more}
    return Fleet(clients=clients, slots=slots(parse_gpus(gpus), workers, share), **values)


def plan(of: Fleet, measured: Measured = ONE, machine: Machine = MACHINE, again: Callable[[int], Fleet] | None = None):
    return estimate("job", measured, of, machine, again)


def row(of: Plan, name: str) -> int:
    return next(one.bytes for one in of.memory if one.name == name)


def test_memory_of_scripts_is_that_of_those_that_run_and_those_that_wait() -> None:
    made = plan(fleet(100, 8, waiting=50))
    assert row(made, "launcher and warm process") == 210 * MIB
    assert row(made, "broker") == 35 * MIB + 100 * TASK_BYTES
    assert row(made, "controller") == 45 * MIB + 100 * TASK_BYTES
    assert row(made, "agent") == 38 * MIB + 100 * TASK_BYTES  # it folds what several send into an aggregate of its own
    assert row(made, "workers") == 800 * MIB
    assert row(made, "waiting scripts") == 50 * 60 * MIB
    assert made.memory_bytes == sum(one.bytes for one in made.memory)
    assert "42 of the scripts cannot wait" in made.notes[0]
    everybody = plan(fleet(20, 8, waiting=50))
    assert row(everybody, "waiting scripts") == 12 * 60 * MIB and not everybody.fleet.restarts


def test_functions_need_their_workers_alone() -> None:
    made = plan(fleet(10_000, 8, waiting=50, functions=True))
    # each adds up its own results
    assert [one.name for one in made.memory][-1] == "workers" and row(made, "workers") == 8 * (100 + 8) * MIB
    assert row(plan(fleet(31, 8, functions=True)), "workers") == 800 * MIB  # too few to be worth it
    assert row(made, "agent") == 30 * MIB + 10_000 * TASK_BYTES
    assert not made.fleet.restarts


def test_bytes_of_a_round() -> None:
    made = plan(fleet(100, 8, tasks=30))
    assert (made.down, made.up) == (30 * 4 * MIB, 30 * 4 * MIB)


def test_a_round_takes_as_long_as_the_slots_the_cores_or_the_fold() -> None:
    turn = ONE.round_s - ONE.run_s - ONE.fold_s
    # 2 slots on 2 cores: 50 tasks one after another in each
    assert plan(fleet(100, 2, functions=True)).round_s == pytest.approx(turn + 50 * 0.5 + 99 * TASK_S)
    # 100 slots on 2 cores: 41 CPU seconds
    assert plan(fleet(100, 100, functions=True)).round_s == pytest.approx(turn + 100 * 0.41 / 2 + 99 * TASK_S)
    # the agent's thread that folds, where the workers do not
    slow = replace(ONE, fold_s=1.0, round_s=1.6, first_round_s=2.6)
    assert plan(fleet(100, 100, functions=True), slow).round_s == pytest.approx(0.1 + 100.0 + 99 * TASK_S)


def test_starts_count_once_for_what_stays_and_every_time_for_what_does_not() -> None:
    stays = plan(fleet(8, 4, waiting=4))
    assert stays.first_round_s - stays.round_s == pytest.approx(max(2 * 0.5 + 2 * 1.0, 8 * 1.21 / 2) - 8 * 0.41 / 2)
    assert stays.total_s == pytest.approx(2.0 + stays.first_round_s + 9 * stays.round_s)
    ended = plan(fleet(8, 4, waiting=0))
    assert ended.round_s == ended.first_round_s == stays.first_round_s
    assert plan(fleet(8, 4, waiting=4, kept=False)).round_s == ended.round_s
    # workers of functions start once each, whatever the number of clients
    functions = plan(fleet(100, 4, functions=True))
    assert functions.first_round_s - functions.round_s == pytest.approx(4 * 0.8 / 2)


def test_what_does_not_fit_in_memory_is_refused_with_the_largest_number_that_does() -> None:
    def narrower(workers: int) -> Fleet:
        return fleet(1000, workers, functions=True)

    small = Machine(cores=2, memory=GIB, quota=100 * GIB)
    made = plan(narrower(100), machine=small, again=narrower)
    assert not made.fits
    assert "memory: 10.1 GiB are needed and 1.0 GiB are available (workers 9.8 GiB = 100 x 100.0 MiB" in made.reasons[0]
    most = made.most_workers
    assert most and plan(narrower(most), machine=small).fits and not plan(narrower(most + 1), machine=small).fits
    assert advice(made) == f"at most {most} at once fit: -t {most}"
    nothing = plan(narrower(100), machine=replace(small, memory=MIB), again=narrower)
    assert (nothing.most_workers, advice(nothing)) == (0, "not even one client at once fits")
    assert plan_text(made).endswith("it does not fit") and plan_text(plan(narrower(2))).endswith("it fits")


def test_what_does_not_fit_on_the_disk_is_refused() -> None:
    # the archive, the models before and after a round, two checkpoints, a result: as the broker counts it
    least = plan(fleet(4, 2)).spool_least
    assert least == 5 * MIB + 3 * 4 * MIB + 2 * 8 * MIB
    assert plan(fleet(4, 2), machine=replace(MACHINE, quota=least)).fits
    made = plan(fleet(4, 2), machine=replace(MACHINE, quota=least - 1))
    assert made.reasons[0].startswith("disk: 33.0 MiB are needed in the spool and its quota is 33.0 MiB")
    # an aggregator that needs all results needs room for all of them
    all_of_them = plan(fleet(100, 2, collects=True, prefold=False))
    assert all_of_them.spool_least == least + 100 * 4 * MIB
    assert (
        "its aggregator needs" in plan(fleet(100, 2, collects=True), machine=replace(MACHINE, quota=least)).reasons[0]
    )


def test_the_spool_holds_partials_where_results_are_folded_before() -> None:
    base = plan(fleet(1000, 2)).spool_least
    assert plan(fleet(1000, 2)).spool == base + 4 * 8 * MIB  # of 256 results each
    tight = replace(MACHINE, quota=160 * MIB)
    assert plan(fleet(1000, 2, prefold=False), machine=tight).spool == base + 20 * MIB + 4 * MIB  # then a checkpoint


class TestGpus:
    ON_GPU = replace(ONE, gpu=3 * GIB)

    def machine(self, used: int = 0) -> Machine:
        return replace(MACHINE, gpus={name: GpuMemory(16 * GIB, used) for name in ("0", "1")})

    def test_each_gpu_holds_its_workers_and_its_share_of_those_that_wait(self) -> None:
        made = plan(fleet(10, 4, gpus="0,1", waiting=4), self.ON_GPU, self.machine())
        assert [(one.gpu, one.workers, one.processes, one.bytes) for one in made.gpus] == [
            ("0", 2, 4, 12 * GIB),
            ("1", 2, 4, 12 * GIB),
        ]
        assert made.fits and any("also share its speed" in note for note in made.notes)

    def test_a_group_takes_of_each_of_its_gpus(self) -> None:
        made = plan(fleet(2, 2, gpus="[0,1]", functions=True), self.ON_GPU, self.machine())
        assert [(one.gpu, one.processes, one.bytes) for one in made.gpus] == [("0", 2, 6 * GIB), ("1", 2, 6 * GIB)]

    def test_what_does_not_fit_is_refused(self) -> None:
        def narrower(workers: int) -> Fleet:
            return fleet(20, workers, gpus="0,1", functions=True)

        made = plan(narrower(8), self.ON_GPU, self.machine(used=8 * GIB), narrower)
        assert made.reasons[0] == "GPU 0: 12.0 GiB are needed and 8.0 GiB are free (4 processes, 3.0 GiB each)"
        assert made.most_workers == 4

    def test_a_client_that_needs_more_than_its_share_is_refused(self) -> None:
        made = plan(fleet(8, 8, gpus="0", share=0.125, functions=True), self.ON_GPU, self.machine())
        assert made.reasons == ("GPU 0: a client took 3.0 GiB, and its share is 2.0 GiB (0.125 of the GPU)",)

    def test_what_is_not_known_is_not_refused(self) -> None:
        made = plan(fleet(8, 8, gpus="0"), ONE)
        assert made.fits and made.gpus[0].bytes is None
        assert any("nvidia-smi did not say" in note for note in made.notes)


def test_cpu_of_a_task_is_taken_at_the_rate_at_which_it_was_seen() -> None:
    # three quarters of a core from 0.2 s on, seen from 0.4 s on: the commit before it was heard of late
    looks = [Look(0.05 * n, max(0.0, min(0.05 * n, 2.2) - 0.2) * 0.75, 0) for n in range(60)]
    assert task_cpu_s(looks, looks[8], looks[-1], [2.0, 2.0]) == pytest.approx(1.5, rel=0.03)
    # several processes of one client: more than one core
    wide = [Look(0.05 * n, 0.05 * n * 3, 0) for n in range(41)]
    assert task_cpu_s(wide, wide[0], wide[-1], [2.0]) == pytest.approx(6.0)


def test_cpu_of_a_short_task_is_its_part_of_all() -> None:
    begin, late = Look(0.0, 0.0, 0), Look(0.9, 0.06, 0)  # both commits were heard of behind the last task
    assert task_cpu_s([begin, late], late, late, [0.2, 0.1]) == pytest.approx(0.02)
    assert task_cpu_s([begin, late], late, late, [0.002, 0.001]) == 0.001  # a tick of the clock is no task's time
