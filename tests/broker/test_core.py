"""Conversations through the control core with plain objects: what a peer says, what it hears, what survives a crash."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.serialization.codec import unpack
from fedloom.serialization.errors import EnvelopeError
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Assign,
    Bye,
    Cancel,
    Checkpoint,
    Claimed,
    ClaimJob,
    CloseGather,
    Commit,
    Decline,
    Done,
    DoneItem,
    EndJob,
    Event,
    Fail,
    Fault,
    Get,
    Grant,
    Hello,
    JobId,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Receipt,
    Stored,
    SubmitJob,
    TaskId,
    Welcome,
)


def indices(job: Any) -> list[int]:
    return [item.index for done in job.take(Done) for item in done.items]


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
    assert indices(job) == [1]
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
    assert indices(job) == [0, 1, 2]
    job.connect()
    job.got.clear()
    job.send(tools.opening(job, sites=sites, min_clients=4, have=1)[0], tail)
    assert job.one(Receipt).state == "open"
    assert indices(job) == [1, 2]
    tools.finish(executors[3], tools.work(executors[3])[0])
    assert indices(job) == [3]
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
    assert indices(again) == [2]
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


def partial_of(executor: Any, tasks: list[Any], payload: PayloadRef) -> Done:
    assign = tasks[0][0]
    items = tuple(DoneItem(ref.task, ref.attempt, site) for _, ref, site in tasks)
    return Done(assign.job, assign.gather, items, partial=payload)


def test_a_partial_settles_all_its_tasks_at_once(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor(*(f"site-{i}" for i in range(4)), node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=4, partials=True))
    tasks = tools.work(pool)
    payload = pool.put(b"sum of four", id="p-x", job=job.hello.job)
    pool.send(partial_of(pool, tasks, payload))
    assert set(pool.one(Stored).tasks) == {t[1] for t in tasks}
    done = job.one(Done)
    assert done.partial == payload and [i.index for i in done.items] == [0, 1, 2, 3]
    assert job.take(Receipt)[-1].state == "closed"
    pool.send(partial_of(pool, tasks, payload))
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
    pool.send(partial_of(pool, tasks, payload))
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


# ---------------------------------------------------------------- leases


def test_a_returning_executor_takes_its_leases_up_again_after_a_restart(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    task = tools.work(a)[0]
    world.restart()
    a.connect(held=(task[1],))
    assert not a.take(Assign) and not a.take(Cancel)
    assert tools.finish(a, task).tasks == (task[1],)


def test_what_a_restarted_executor_does_not_hold_is_given_again(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    old = tools.work(a)[0]
    world.disconnect(a)
    new = world.executor("site-1", boot="b2")
    world.pass_time(3)
    new_task = tools.work(new)[0]
    assert new_task[1].attempt == 2
    stale = tools.finish(new, old)
    assert stale.refused[0].code == "stale" and not stale.tasks
    assert tools.finish(new, new_task).tasks == (new_task[1],)


def test_a_result_of_another_node_is_stale(world: Any, tools: Any) -> None:
    job = world.job()
    a, b = world.executor("site-1"), world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2))
    task = tools.work(a)[0]
    assert tools.finish(b, task).refused[0].code == "stale"
    assert tools.finish(a, task).tasks == (task[1],)


def test_repeats_of_a_done_are_answered_and_counted_once(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2))
    task = tools.work(a)[0]
    for _ in range(3):
        assert tools.finish(a, task).tasks == (task[1],)
    assert indices(job) == [0]


def test_an_unaccepted_assign_lapses(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), lease_s=10.0))
    assert len(tools.work(a, accept=False)) == 1
    world.pass_time(11)
    (again,) = tools.work(a)
    assert again[1].attempt == 2


def test_traffic_renews_an_accepted_lease(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), lease_s=10.0))
    task = tools.work(a)[0]
    world.pass_time(600)
    assert not a.take(Assign)
    assert tools.finish(a, task).tasks == (task[1],)


def test_decline_costs_no_try(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), max_attempts=1))
    for n in range(1, 5):
        task = tools.work(a, accept=False)[0]
        assert task[1].attempt == n
        a.send(Decline((task[1],), "busy", 0.1))
        world.pass_time(1)
    assert tools.finish(a, tools.work(a)[0]).tasks


def test_capacity_and_free_slots_bound_what_is_assigned(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor(*(f"s{i}" for i in range(10)), node="pool/p", capacity=3)
    job.send(*tools.opening(job, sites=pool.sites, min_clients=10, partials=True))
    first = tools.work(pool)
    assert len(first) == 3
    pool.send(Ping(free=2))
    second = tools.work(pool)
    assert len(second) == 2, "two of the three wait in an unsent partial and occupy no slot"
    pool.send(Ping(free=0))
    assert not tools.work(pool)
    tools.finish(pool, second[0])
    world.turn()
    held = world.core.state.ledger.owners["pool/p"]
    assert len(held.leased) <= held.capacity + held.parked


# ---------------------------------------------------------------- failures


def test_user_code_that_raises_ends_the_task_and_the_gather(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    task = tools.work(a)[0]
    job.take(Receipt)
    a.send(Fail(task[1].task, 1, "user_code", "Traceback: ValueError: no data"))
    assert a.one(Stored).tasks == (task[1],)
    receipts = job.take(Receipt)
    assert receipts[-1].state == "failed"
    (failure,) = [f for r in receipts for f in r.failures]
    assert (failure.site, failure.code) == ("site-1", "user_code") and "no data" in failure.text
    client = world.client()
    client.send(Ask(1, "events", job.hello.job))
    events = client.one(Answer).data["events"]
    assert [e["kind"] for e in events] == ["submitted", "claimed", "task_failed"]


def test_a_task_that_kills_three_processes_is_dead(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    for _ in range(3):
        task = tools.work(a)[0]
        a.send(Fail(task[1].task, task[1].attempt, "died", "signal 9", retryable=True, killed=True))
        world.pass_time(20)
    assert not a.take(Assign)
    (failure,) = [f for r in job.take(Receipt) for f in r.failures]
    assert failure.code == "killed"


def test_max_attempts(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), max_attempts=2))
    for _ in range(2):
        task = tools.work(a)[0]
        a.send(Fail(task[1].task, task[1].attempt, "oom", "no memory", retryable=True))
        world.pass_time(20)
    (failure,) = [f for r in job.take(Receipt) for f in r.failures]
    assert failure.code == "max_attempts" and "no memory" in failure.text


def test_a_site_that_is_gone(world: Any, tools: Any) -> None:
    job = world.job()
    world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2, sites_s=20.0))
    world.pass_time(21)
    receipts = job.take(Receipt)
    assert receipts[-1].state == "failed"
    assert [(f.site, f.code) for r in receipts for f in r.failures] == [("site-2", "site_gone")]


def test_closing_cancels_the_rest_and_refuses_late_results(world: Any, tools: Any) -> None:
    job = world.job()
    a, b = world.executor("site-1"), world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=1))
    task_a, task_b = tools.work(a)[0], tools.work(b)[0]
    tools.finish(a, task_a)
    gather = job.take(Receipt)[0].gather
    job.send(CloseGather(77, job.hello.job, 1, gather))
    receipt = next(r for r in job.take(Receipt) if r.ref == 77)
    assert (receipt.state, receipt.results) == ("closed", 1)
    assert b.one(Cancel).tasks == (task_b[1],)
    assert tools.finish(b, task_b).refused[0].code == "closed"
    client = world.client()
    client.send(Ask(1, "events", job.hello.job))
    late = [e for e in client.one(Answer).data["events"] if e["kind"] == "result_refused"]
    assert [(e["site"], e["data"]["code"]) for e in late] == [("site-2", "closed")]


def test_deadline_with_and_without_enough(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=1, deadline_s=60.0))
    tools.finish(a, tools.work(a)[0])
    world.pass_time(61)
    assert job.take(Receipt)[-1].state == "closed"
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2, deadline_s=60.0, step=1))
    tools.finish(a, tools.work(a)[0])
    world.pass_time(61)
    receipt = job.take(Receipt)[-1]
    assert receipt.state == "failed" and "deadline" in receipt.reason


def test_after_quorum(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=1, after_quorum_s=5.0))
    tools.finish(a, tools.work(a)[0])
    world.pass_time(4)
    assert [r.state for r in job.take(Receipt)] == ["open"]
    world.restart()
    job.connect()
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=1, after_quorum_s=5.0, have=1))
    world.pass_time(2)
    assert job.take(Receipt)[-1].state == "closed", "the time of the quorum survives a restart"


# ---------------------------------------------------------------- site state


def test_site_state_versions(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    seen: list[tuple[str, int]] = []
    for step in range(3):
        job.send(*tools.opening(job, sites=("site-1",), step=step))
        task = tools.work(a)[0]
        seen.append((task[0].items[0].state, task[0].items[0].settled))
        tools.finish(a, task, state=f"v{step}")
    assert seen == [("", 0), ("v0", 1), ("v1", 2)]
    job.send(*tools.opening(job, sites=("site-1",), step=1, redo=1))
    redo = tools.work(a)[0]
    assert redo[0].items[0].state == "v0", "a redo starts where the original attempt did"
    tools.finish(a, redo, state="v1-again")
    world.restart()
    assert world.core.state.ledger.site_state(job.hello.job, "site-1").version == "v2"


def test_a_redo_of_the_last_step_moves_the_state(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    tools.finish(a, tools.work(a)[0], state="v0")
    job.send(*tools.opening(job, sites=("site-1",), redo=1))
    tools.finish(a, tools.work(a)[0], state="v0-again")
    assert world.core.state.ledger.site_state(job.hello.job, "site-1").version == "v0-again"


# ---------------------------------------------------------------- jobs


def test_claims_go_up_and_a_lost_process_gives_the_job_out_again(world: Any) -> None:
    job_id = world.submit()
    controller = world.peer("controller", "controller/a")
    for claim in range(1, 5):
        controller.send(ClaimJob(controller.ref()))
        world.pass_time(11)
        assert controller.one(Claimed).claim == claim
        controller.send(ClaimJob(0, job_id, claim, f"exit code {claim}"))
    controller.send(ClaimJob(controller.ref()))
    world.pass_time(11)
    assert controller.one(Claimed).claim == 5
    controller.send(ClaimJob(0, job_id, 5, "signal 11"))
    client = world.client()
    client.send(Ask(1, "job", job_id))
    answer = client.one(Answer).data
    assert answer["status"] == "FINISHED:FAILED" and "5 times" in answer["reason"] and "signal 11" in answer["reason"]


def test_a_commit_forgives_crashes(world: Any) -> None:
    job = world.job()
    state = world.core.state.jobs.jobs[job.hello.job]
    state.crashes = 4
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    assert state.crashes == 0


def test_a_waiting_controller_gets_a_job_as_soon_as_one_comes(world: Any) -> None:
    controller = world.peer("controller", "controller/a")
    controller.send(ClaimJob(3))
    assert not controller.take(Claimed)
    job_id = world.submit()
    claimed = controller.one(Claimed)
    assert (claimed.ref, claimed.job, claimed.claim) == (3, job_id, 1)


def test_a_repeated_claim_is_answered_alike(world: Any) -> None:
    job_id = world.submit()
    controller = world.peer("controller", "controller/a")
    controller.send(ClaimJob(3))
    controller.take(Claimed)
    world.restart()
    controller.connect()
    controller.send(ClaimJob(3))
    claimed = controller.one(Claimed)
    assert (claimed.job, claimed.claim) == (job_id, 1)


def test_a_dead_controllers_job_goes_to_the_standby(world: Any, tools: Any) -> None:
    job = world.job()
    standby = world.peer("controller", "controller/standby")
    standby.send(ClaimJob(1))
    world.disconnect(job)
    world.disconnect(next(p for p in world.peers.values() if p.hello.node == "controller/token"))
    world.pass_time(world.settings.timing.lost_s + world.settings.timing.ping_s * 2)
    claimed = standby.one(Claimed)
    assert claimed.claim == 2
    world.process(claimed)
    job.connect()
    assert job.one(Fault).code == "fenced"


def test_commit_is_idempotent_and_fenced(world: Any) -> None:
    job = world.job()
    model = job.put(b"m", job=job.hello.job, claim=1)
    commit = Commit(job.ref(), job.hello.job, 1, 0, model=model, best=True, record={"a": 1})
    job.send(commit)
    job.send(commit)
    assert len(job.take(Answer)) == 2
    assert world.core.state.jobs.jobs[job.hello.job].commits == 1
    job.send(Commit(job.ref(), job.hello.job, 1, 0, model=model, record={"a": 2}))
    assert job.one(Fault).code == "committed"
    job.send(Commit(job.ref(), job.hello.job, 0, 1))
    fault = job.one(Fault)
    assert fault.code == "fenced" and fault.fatal


def test_best_and_commit_hold_their_models(world: Any) -> None:
    job = world.job()
    first = job.put(b"first", job=job.hello.job, claim=1)
    job.send(Commit(job.ref(), job.hello.job, 1, 0, model=first, best=True))
    second = job.put(b"second", job=job.hello.job, claim=1)
    job.send(Commit(job.ref(), job.hello.job, 1, 1, model=second))
    spool = world.core.state.spool
    assert spool.exists(first.id) and spool.exists(second.id)
    third = job.put(b"third", job=job.hello.job, claim=1)
    job.send(Commit(job.ref(), job.hello.job, 1, 2, model=third, best=True))
    assert not spool.exists(first.id) and not spool.exists(second.id) and spool.exists(third.id)
    world.restart()
    commit = world.core.state.jobs.jobs[job.hello.job].commit
    assert commit.round == 2 and commit.best == third and commit.model == third


def test_abort(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    tools.work(a)
    client = world.client()
    client.send(Ask(4, "abort", job.hello.job))
    assert client.one(Answer).data == {"status": "FINISHED:ABORTED"}
    assert job.one(Cancel).ended
    assert any(c.ended for c in a.take(Cancel))
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    assert job.one(Fault).code == "fenced"


def test_submission_is_idempotent_and_needs_its_archive(world: Any) -> None:
    client = world.client()
    ghost = PayloadRef(PayloadId("b3-" + "0" * 64), 5)
    client.send(SubmitJob(1, "t", "x", ghost))
    assert client.one(Fault).code == "unknown_payload"
    archive = client.put(b"archive")
    for _ in range(2):
        client.send(SubmitJob(client.ref(), "t", "x", archive))
    first, second = client.take(Answer)
    assert first.data == second.data
    client.send(SubmitJob(client.ref(), "t2", "x", archive, JobId(first.data["job_id"])))
    assert client.one(Fault).code == "job_exists"


def test_large_answers_come_in_the_tail_and_in_pages(world: Any) -> None:
    job_id = world.submit()
    executor = world.executor("site-1")
    for n in range(60):
        executor.send(Event(job_id, "log", "site-1", {"n": n}, "x" * 15_000))
    client = world.client()
    seen: list[int] = []
    after, pages = 0, 0
    while True:
        client.got.clear()
        client.send(Ask(client.ref(), "events", job_id, after=after))
        message, tail = next((m, t) for m, t in client.got if isinstance(m, Answer))
        data = message.data or unpack(tail, max_bytes=1024 * 1024)
        if not data["events"]:
            break
        pages += 1
        seen += [e["data"].get("n", -1) for e in data["events"]]
        after = data["next"]
    assert seen == [-1, *range(60)] and pages >= 2


# ---------------------------------------------------------------- sessions


def test_hello_welcome_ping(world: Any) -> None:
    a = world.executor("site-1")
    welcome = a.one(Welcome)
    assert welcome.session and welcome.ping_s == 5.0
    a.send(Ping())
    a.one(Pong)
    assert any(isinstance(m, Welcome) and m.session == welcome.session for m in world.to_data)
    a.send(Bye())
    assert any(isinstance(m, Bye) and m.reason == welcome.session for m in world.to_data)


def test_a_second_live_boot_is_refused_until_the_first_is_dead(world: Any) -> None:
    a = world.executor("site-1")
    rival = world.executor("site-1", boot="b2")
    world.pass_time(1)
    fault = rival.one(Fault)
    assert fault.code == "name_taken" and fault.fatal
    a.send(Bye())
    rival.connect()
    rival.one(Welcome)


def test_a_site_of_a_live_executor_is_refused(world: Any) -> None:
    world.executor("site-1", "site-2", node="pool/p")
    rival = world.executor("site-2")
    world.pass_time(1)
    assert rival.one(Fault).code == "name_taken"


def test_roles(world: Any, tools: Any) -> None:
    client = world.client()
    client.send(ClaimJob(5))
    fault = client.one(Fault)
    assert (fault.code, fault.ref, fault.fatal) == ("forbidden", 5, False)
    a = world.executor("site-1")
    a.send(Commit(1, JobId("x"), 1, 0))
    assert a.one(Fault).code == "forbidden"
    job = world.job("one")
    other = world.job("two")
    job.send(tools.opening(other, sites=("site-1",))[0])
    assert job.one(Fault).code == "forbidden"


def test_without_hello(world: Any) -> None:
    stranger = tools_peer(world)
    stranger.send(Ask(9, "jobs"))
    fault = stranger.one(Fault)
    assert (fault.code, fault.ref, fault.fatal) == ("session", 0, False)


def tools_peer(world: Any) -> Any:
    peer = world.client()
    peer.send(Bye())
    peer.got.clear()
    return peer


def test_malformed_input_is_counted_and_ends_the_session(world: Any) -> None:
    a = world.executor("site-1")
    for _ in range(8):
        world.core.malformed(a.address, EnvelopeError("magic"), world.now)
        world.turn()
    faults = a.take(Fault)
    assert [f.fatal for f in faults] == [False] * 7 + [True]
    assert world.core.state.sessions.of(a.address) is None


@pytest.mark.parametrize("tail", [b"\xc1", b"\x81\xa5sites\x01", b"\x81\xa5sites\x91\x01", b"\x81\xa4held\x91\x91\x01"])
def test_a_bad_hello_tail(world: Any, tail: bytes) -> None:
    a = world.executor("site-1")
    a.got.clear()
    a.send(Hello("executor/site-9", "executor", "b9"), tail)
    assert a.one(Fault).code == "malformed"
    a.send(Ping())
    a.one(Pong)


def test_a_slow_job_process_gets_everything_in_the_end(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor(*(f"s{i}" for i in range(300)), node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=300))
    session = world.core.state.sessions.of(job.address)
    world.disconnect(job)  # its pipe is full: nothing is taken off its outbox
    world.peers.pop(job.address, None)
    tasks = tools.work(pool)
    assert len(tasks) == 300
    for task in tasks:
        assign, ref, site = task
        world.core.handle(
            pool.address,
            tools_packet(
                Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, inline_bytes=30_000),)), b"z" * 30_000
            ),
            world.now,
        )
        world.core.commit()
    assert session.outbox_bytes < world.settings.timing.outbox_bytes, "the outbox is bounded"
    assert len(session.outbox) < world.settings.timing.outbox_messages
    world.peers[job.address] = job
    world.turn()
    assert indices(job) == list(range(300))


def tools_packet(message: Any, tail: bytes = b"") -> Any:
    from fedloom.serialization.messages import Packet

    return Packet(message, tail)


# ---------------------------------------------------------------- payloads


def test_payload_admission_by_the_data_process(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    assign, ref, site = tools.work(a)[0]
    spool = world.core.state.spool
    final = PayloadRef(PayloadId(f"r-{ref.task}.1"), 6, "", "tensors")
    stream = "5" * 32
    put = Put(final, stream, job=assign.job, task=ref.task, attempt=1)
    assert world.data(put) == [Grant(stream, 0, 0, 0)]
    (answer,) = world.data(Put(final, stream, task=ref.task, attempt=1, local="landed"))
    assert answer.code == "lost", "no row without its file"
    spool.store(final.id, [b"result"])
    landed = Put(final, stream, job=assign.job, task=ref.task, attempt=1, local="landed")
    assert world.data(landed) == [Stored(stream, payload=final)]
    assert world.data(put) == [Stored(stream, payload=final)], "a repeat is answered at once"
    (answer,) = world.data(Put(PayloadRef(PayloadId("r-x.9"), 1), stream, task=ref.task, attempt=9))
    assert answer.code == "stale"
    (answer,) = world.data(Put(PayloadRef(PayloadId("r-y.1"), 1), stream, task=TaskId("nope"), attempt=1))
    assert answer.code == "closed"
    a.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, final),)))
    assert a.one(Stored).tasks == (ref,)
    assert job.take(Done)[-1].items[0].payload == final
    assert world.data(put) == [Stored(stream, payload=final)], "also once it has settled its task"


def test_a_done_without_its_payload_is_refused_and_redone(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    assign, ref, site = tools.work(a)[0]
    a.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, PayloadRef(PayloadId("r-1"), 4)),)))
    (refusal,) = a.one(Stored).refused
    assert (refusal.code, refusal.requeued) == ("lost_payload", True)
    assert tools.work(a)[0][1].attempt == 2


def test_an_uploaded_result_of_a_lost_attempt_is_removed(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    assign, ref, _ = tools.work(a)[0]
    payload = a.put(b"never settled", id=f"r-{ref.task}.1", task=ref.task, attempt=1, job=assign.job)
    assert world.core.state.spool.exists(payload.id)
    a.connect()
    assert tools.work(a)[0][1].attempt == 2
    world.turn()
    assert not world.core.state.spool.exists(payload.id)


def test_the_data_process_is_told_all_sessions(world: Any) -> None:
    a, b = world.executor("site-1"), world.executor("site-2")
    answers = world.data(Hello("data", "controller", "x"))
    assert {m.session for m in answers} == {a.one(Welcome).session, b.one(Welcome).session}


def test_a_damaged_put_is_refused(world: Any) -> None:
    client = world.client()
    client.send(Put(PayloadRef(PayloadId("b3-" + "0" * 64), 3), ref=1), b"abc")
    assert client.one(Fault).code == "digest"
    client.send(Put(PayloadRef(PayloadId("x"), 4), ref=1), b"abc")
    assert client.one(Fault).code == "size"


def test_unused_submissions_expire(world: Any) -> None:
    client = world.client()
    ref = client.put(b"archive never submitted")
    assert world.core.state.spool.exists(ref.id)
    world.pass_time(3700, step=50)
    assert not world.core.state.spool.exists(ref.id)


# ---------------------------------------------------------------- losses on the disk


def test_a_result_whose_file_is_gone_is_queued_again(world: Any, tools: Any) -> None:
    job = world.job()
    a, b = world.executor("site-1"), world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2))
    assign, ref, site = tools.work(a)[0]
    payload = a.put(b"on disk", id=f"r-{ref.task}.1", task=ref.task, attempt=1, job=assign.job)
    a.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, payload),)))
    tools.finish(b, tools.work(b)[0], b"inline")
    a.one(Stored)
    world.core.state.spool.delete(payload.id)
    (world.store / "payloads" / "zz").mkdir()
    (world.store / "payloads" / "zz" / "zz-without-a-row").write_bytes(b"x")
    world.restart()
    assert not (world.store / "payloads" / "zz" / "zz-without-a-row").exists()

    job.connect()
    job.got.clear()
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2, have=2))
    assert job.one(Fault).code == "lost_payload", "a process that has folded what is lost must start over"
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2))
    assert [i.site for d in job.take(Done) for i in d.items] == ["site-2"]
    assert job.take(Receipt)[0].state == "open"
    a.connect()
    (task,) = tools.work(a)
    assert task[1].attempt == 2
    tools.finish(a, task, b"again")
    assert [(i.site, i.index) for d in job.take(Done) for i in d.items] == [("site-1", 1)]
    assert job.take(Receipt)[-1].state == "closed"
    world.restart()
    gather = next(iter(world.core.state.ledger.gathers.values()))
    assert [r.site for r in gather.results] == ["site-2", "site-1"] and gather.state == "closed"


def test_a_gather_whose_model_is_gone_waits_for_it(world: Any, tools: Any) -> None:
    job = world.job()
    model = job.put(b"model", job=job.hello.job, claim=1)
    job.send(*tools.opening(job, sites=("site-1",), payload=model))
    world.core.state.spool.delete(model.id)
    world.restart()
    a = world.executor("site-1")
    assert not a.take(Assign)
    job.connect()
    assert job.put(b"model", job=job.hello.job, claim=1) == model
    job.send(*tools.opening(job, sites=("site-1",), payload=model))
    assert len(tools.work(a)) == 1


def test_a_job_whose_committed_model_is_gone_fails(world: Any) -> None:
    job = world.job()
    model = job.put(b"model", job=job.hello.job, claim=1)
    job.send(Commit(job.ref(), job.hello.job, 1, 0, model=model))
    world.core.state.spool.delete(model.id)
    world.restart()
    state = world.core.state.jobs.jobs[job.hello.job]
    assert state.status == "FINISHED:FAILED" and model.id in state.reason
