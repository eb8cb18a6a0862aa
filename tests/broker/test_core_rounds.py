"""Rounds through the control core with plain objects: gathers, replays, checkpoints, partials."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Assign,
    Cancel,
    Checkpoint,
    Claimed,
    ClaimJob,
    Commit,
    Done,
    DoneItem,
    EndJob,
    Fault,
    Get,
    PayloadId,
    PayloadRef,
    Receipt,
    Stored,
)

# ---------------------------------------------------------------- a round


def test_a_whole_round(world: Any, tools: Any) -> None:
    job = world.job(num_rounds=2)
    a, b = world.executor("site-1"), world.executor("site-2")
    model = job.put(b"model 0", job=job.hello.job, claim=1)
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2, payload=model, config={"lr": 0.1}))
    receipt = job.one(Receipt)
    assert (receipt.state, receipt.tasks, receipt.results) == ("open", 2, 0)

    (task_a,), (task_b,) = tools.work(a), tools.work(b)
    assert task_a[0].payload == model and task_a[0].config == {"lr": 0.1} and task_a[2] == "site-1"
    assert tools.finish(a, task_a, b"from a", meta={"metrics": {"loss": 1.5}}).tasks == (task_a[1],)
    done, tail = next((m, t) for m, t in job.got if isinstance(m, Done))
    assert tail == b"from a" and done.items[0].meta == {"metrics": {"loss": 1.5}} and done.items[0].index == 0
    job.take(Done)
    assert tools.finish(b, task_b, b"from b").tasks == (task_b[1],)
    assert tools.indices(job) == [1]
    receipt = job.one(Receipt)
    assert (receipt.state, receipt.results) == ("closed", 2)

    new = job.put(b"model 1", job=job.hello.job, claim=1)
    job.send(Commit(job.ref(), job.hello.job, 1, 0, model=new, record={"round": 0, "weight_sum": 2.0}))
    assert job.one(Answer).data == {"round": 0}
    assert not world.core.state.ledger.gathers, "a committed round's gathers are gone"
    assert not world.core.state.spool.exists(model.id), "the model of the round before has no holder any more"
    assert world.core.state.spool.exists(new.id)

    job.send(EndJob(job.ref(), job.hello.job, 1, "FINISHED:COMPLETED"))
    assert job.one(Answer).data == {"status": "FINISHED:COMPLETED"}
    assert a.one(Cancel).ended and b.one(Cancel).ended
    client = world.client()
    client.send(Ask(client.ref(), "job", job.hello.job))
    answer = client.one(Answer).data
    assert (answer["status"], answer["round"], answer["rounds"]) == ("FINISHED:COMPLETED", 1, 2)
    assert answer["sites"] == ["site-1", "site-2"] and answer["commit"]["model"]["id"] == new.id
    client.send(Ask(client.ref(), "rounds", job.hello.job))
    assert client.one(Answer).data["rounds"] == [{"round": 0, "weight_sum": 2.0}]


def test_assign_brings_the_small_payload_and_the_archive(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    model = job.put(b"weights", job=job.hello.job, claim=1)
    job.send(*tools.opening(job, sites=("site-1",), payload=model))
    assign, tail = next((m, t) for m, t in a.got if isinstance(m, Assign))
    assert tail == b"weights" and assign.archive.size == len(b"archive of token")
    a.send(Get("0" * 32, assign.archive.id, 0, 0, ref=9))
    ((stored, tail),) = [(m, t) for m, t in a.got if isinstance(m, Stored)]
    assert (stored.ref, tail) == (9, b"archive of token")


def test_opening_without_sites_waits_for_enough_of_them(world: Any, tools: Any) -> None:
    job = world.job()
    job.send(*tools.opening(job, min_clients=2, sites_s=30.0))
    assert job.one(Receipt).state == "waiting"
    world.executor("site-1")
    assert not job.take(Receipt)
    world.executor("site-2")
    receipt = job.one(Receipt)
    assert (receipt.state, receipt.tasks) == ("open", 2)


def test_waiting_for_sites_ends(world: Any, tools: Any) -> None:
    job = world.job()
    job.send(*tools.opening(job, min_clients=2, sites_s=30.0))
    world.executor("site-1")
    world.pass_time(31)
    *_, receipt = job.take(Receipt)
    assert receipt.state == "failed" and "1 of 2 sites" in receipt.reason


# ---------------------------------------------------------------- replays


def test_a_reconnected_job_process_gets_what_it_does_not_have(world: Any, tools: Any) -> None:
    job = world.job()
    executors = [world.executor(f"site-{i}") for i in range(4)]
    sites = tuple(f"site-{i}" for i in range(4))
    message, tail = tools.opening(job, sites=sites, min_clients=4)
    job.send(message, tail)
    for executor in executors[:3]:
        tools.finish(executor, tools.work(executor)[0], executor.hello.node.encode())
    assert tools.indices(job) == [0, 1, 2]
    job.connect()
    job.got.clear()
    job.send(tools.opening(job, sites=sites, min_clients=4, have=1)[0], tail)
    assert job.one(Receipt).state == "open"
    assert tools.indices(job) == [1, 2]
    tools.finish(executors[3], tools.work(executors[3])[0])
    assert tools.indices(job) == [3]
    assert job.one(Receipt).state == "closed"


def test_a_new_claim_replays_the_same_set_in_the_same_order_after_a_restart(world: Any, tools: Any) -> None:
    job = world.job()
    executors = [world.executor(f"site-{i}") for i in range(3)]
    sites = tuple(f"site-{i}" for i in range(3))
    job.send(*tools.opening(job, sites=sites, min_clients=3))
    for executor in reversed(executors):
        tools.finish(executor, tools.work(executor)[0], executor.hello.node.encode())
    first = [(i.site, i.index) for d in job.take(Done) for i in d.items]
    world.restart()
    controller = world.peer("controller", "controller/other")
    controller.send(ClaimJob(1))
    assert not controller.take(Claimed), "the claim of the running process still holds"
    world.pass_time(world.settings.start_s + 1)
    claimed = controller.one(Claimed)
    assert claimed.claim == 2 and claimed.commit is None
    again = world.process(claimed)
    again.send(*tools.opening(again, sites=sites, min_clients=3))
    receipt = again.take(Receipt)[0]
    assert (receipt.state, receipt.results) == ("closed", 3)
    dones = [(m, t) for m, t in again.got if isinstance(m, Done)]
    assert [(i.site, i.index) for d, _ in dones for i in d.items] == first
    assert b"".join(t for _, t in dones) == b"executor/site-2executor/site-1executor/site-0"

    job.connect()
    assert job.one(Fault).code == "fenced"


def test_another_specification_under_the_same_key_is_fatal(world: Any, tools: Any) -> None:
    job = world.job()
    job.send(*tools.opening(job, sites=("site-1",), config={"lr": 1}))
    job.send(*tools.opening(job, sites=("site-1",), config={"lr": 2}))
    fault = job.one(Fault)
    assert fault.code == "nondeterministic" and fault.fatal


def test_key_order_of_the_configuration_does_not_matter(world: Any, tools: Any) -> None:
    job = world.job()
    job.send(*tools.opening(job, sites=("site-1",), config={"lr": 1, "more": {"a": 1, "b": 2}}))
    job.send(*tools.opening(job, sites=("site-1",), config={"more": {"b": 2, "a": 1}, "lr": 1}))
    assert not job.take(Fault) and [r.state for r in job.take(Receipt)] == ["open", "open"]


# ---------------------------------------------------------------- checkpoints


def checkpointed(world: Any, tools: Any, big: bool = False) -> tuple[Any, list[Any], PayloadRef, Receipt]:
    job = world.job()
    executors = [world.executor(f"site-{i}") for i in range(3)]
    sites = tuple(f"site-{i}" for i in range(3))
    job.send(*tools.opening(job, sites=sites, min_clients=3))
    receipt = job.one(Receipt)
    for executor in executors[:2]:
        tools.finish(executor, tools.work(executor)[0], b"r", meta={"metrics": {"n": 1}})
    job.take(Done)
    partial = job.put(b"aggregate of two", id="p-" + "a" * 32, job=job.hello.job, claim=job.hello.claim)
    job.send(Checkpoint(job.ref(), job.hello.job, job.hello.claim, receipt.gather, partial, 2))
    assert job.one(Answer).data == {"covered": 2}
    return job, executors, partial, receipt


def test_after_a_checkpoint_a_replay_folds_it_in_place_of_what_it_covers(world: Any, tools: Any) -> None:
    _, executors, partial, _ = checkpointed(world, tools)
    world.restart()
    controller = world.peer("controller", "controller/other")
    controller.send(ClaimJob(1))
    world.pass_time(world.settings.start_s + 1)
    again = world.process(controller.one(Claimed))
    again.send(*tools.opening(again, sites=("site-0", "site-1", "site-2"), min_clients=3))
    kinds = [type(m).__name__ for m, _ in again.got if isinstance(m, Receipt | Done)]
    assert kinds == ["Receipt", "Done"]
    done = again.one(Done)
    assert done.partial == partial
    assert [(i.index, i.site, i.inline_bytes) for i in done.items] == [(0, "site-0", 0), (1, "site-1", 0)]
    assert done.items[0].meta == {"metrics": {"n": 1}}
    executors[2].got.clear()
    last = executors[2].connect()
    tools.finish(last, tools.work(last)[0], b"third")
    assert tools.indices(again) == [2]
    assert again.take(Receipt)[-1].state == "closed"


def test_a_checkpoint_frees_the_payloads_that_it_covers(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2))
    receipt = job.one(Receipt)
    assign, ref, site = tools.work(a)[0]
    payload = a.put(b"big result", id=f"r-{ref.task}.1", task=ref.task, attempt=1, job=assign.job)
    a.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, payload),)))
    assert a.one(Stored).tasks == (ref,)
    assert world.core.state.spool.exists(payload.id)
    partial = job.put(b"aggregate", id="p-1", job=job.hello.job, claim=1)
    job.send(Checkpoint(job.ref(), job.hello.job, 1, receipt.gather, partial, 1))
    assert not world.core.state.spool.exists(payload.id) and world.core.state.spool.exists(partial.id)
    newer = job.put(b"aggregate again", id="p-2", job=job.hello.job, claim=1)
    job.send(Checkpoint(job.ref(), job.hello.job, 1, receipt.gather, newer, 1))
    assert not world.core.state.spool.exists(partial.id) and world.core.state.spool.exists(newer.id)
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    assert not world.core.state.spool.exists(newer.id)


@pytest.mark.parametrize("covered", [0, 3])
def test_a_checkpoint_covers_only_what_is_there(world: Any, tools: Any, covered: int) -> None:
    job, _, partial, receipt = checkpointed(world, tools)
    job.send(Checkpoint(job.ref(), job.hello.job, 1, receipt.gather, partial, covered))
    assert job.one(Fault).code == "checkpoint"


# ---------------------------------------------------------------- partials


def test_a_partial_settles_all_its_tasks_at_once(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor(*(f"site-{i}" for i in range(4)), node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=4, partials=True))
    tasks = tools.work(pool)
    payload = pool.put(b"sum of four", id="p-x", job=job.hello.job)
    pool.send(tools.partial_of(pool, tasks, payload))
    assert set(pool.one(Stored).tasks) == {t[1] for t in tasks}
    done = job.one(Done)
    assert done.partial == payload and [i.index for i in done.items] == [0, 1, 2, 3]
    assert job.take(Receipt)[-1].state == "closed"
    pool.send(tools.partial_of(pool, tasks, payload))
    assert set(pool.one(Stored).tasks) == {t[1] for t in tasks}, "a repeat is answered alike"
    assert not job.take(Done)
    world.restart()
    gather = next(iter(world.core.state.ledger.gathers.values()))
    assert gather.partials["p-x"].count == 4 and [r.partial for r in gather.results] == ["p-x"] * 4


def test_one_conflict_refuses_the_whole_partial_and_queues_the_rest_again(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor("site-0", "site-1", "site-2", node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=3, partials=True))
    tasks = tools.work(pool)
    tools.finish(pool, tasks[0], b"single")
    job.take(Done)
    payload = pool.put(b"sum", id="p-x", job=job.hello.job)
    pool.send(tools.partial_of(pool, tasks, payload))
    stored = pool.one(Stored)
    assert not stored.tasks
    assert {(r.code, r.requeued) for r in stored.refused} == {("late", False), ("conflict", True)}
    assert not job.take(Done)
    assert not world.core.state.spool.exists(payload.id)
    again = tools.work(pool)
    assert {(t[2], t[1].attempt) for t in again} == {("site-1", 2), ("site-2", 2)}


def test_an_inline_partial(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor("site-0", "site-1", node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=2, partials=True))
    tasks = tools.work(pool)
    items = tuple(DoneItem(ref.task, ref.attempt, site) for _, ref, site in tasks)
    done = Done(job.hello.job, tasks[0][0].gather, items, PayloadRef(PayloadId("p-i"), 5), 5)
    pool.send(done, b"inlin")
    assert len(pool.one(Stored).tasks) == 2
    assert [(m.partial_inline_bytes, t) for m, t in job.got if isinstance(m, Done)] == [(5, b"inlin")]
