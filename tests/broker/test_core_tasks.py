"""Tasks through the control core: leases, failures, the rule of closing, site state."""

from __future__ import annotations

from typing import Any

from fedloom.serialization.messages import (
    Answer,
    Ask,
    Assign,
    Cancel,
    CloseGather,
    Decline,
    Fail,
    Ping,
    Progress,
    Receipt,
    Stored,
)

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


def test_a_task_that_the_brokers_death_kept_from_its_executor_is_no_try(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), max_attempts=2))
    for attempt in range(2, 6):
        a.take(Assign)
        world.restart()
        a.connect()
        world.pass_time(2)
        (task,) = world.core.state.ledger.tasks.values()
        assert (task.attempt, task.tries, task.ended) == (attempt, 0, False)
    job.connect()
    assert tools.finish(a, tools.work(a)[0]).tasks


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
    assert tools.indices(job) == [0]


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


def test_the_status_counts_results_that_are_on_their_way(world: Any, tools: Any) -> None:
    """Each once, whatever becomes of the attempt."""
    job = world.job()
    pool = world.executor("site-1", "site-2", "site-3")
    job.send(*tools.opening(job, sites=("site-1", "site-2", "site-3"), min_clients=1))
    client = world.client()

    def done() -> int:
        client.send(Ask(client.ref(), "status", job.hello.job))
        data = client.one(Answer).data
        assert "sites" not in data and data["site_count"] == 3
        return data["gather"]["done"]

    first, second, third = tools.work(pool)
    for task in (first, second, second, third):
        pool.send(Progress(task[1].task, 1, 0.5))
        assert done() == 0
    for counted, task in ((1, first), (2, second), (2, second)):
        pool.send(Progress(task[1].task, 1, 1.0))
        assert done() == counted
    assert tools.finish(pool, first).tasks == (first[1],)
    assert done() == 2
    pool.send(Fail(second[1].task, 1, "site_error", retryable=True))
    world.pass_time(3)
    assert tools.work(pool)[0][1].attempt == 2
    assert done() == 1
    pool.send(Fail(third[1].task, 1, "user_code"))
    assert done() == 1


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


def test_patience_with_stragglers_goes_by_what_the_quorum_took(world: Any, tools: Any) -> None:
    job = world.job()
    a, b = world.executor("site-1"), world.executor("site-2")
    rule = {"sites": ("site-1", "site-2"), "min_clients": 1, "straggler_patience": 0.5}
    job.send(*tools.opening(job, **rule))
    late = tools.work(b)[0]
    world.pass_time(8)
    tools.finish(a, tools.work(a)[0])
    world.pass_time(3.5)
    assert [r.state for r in job.take(Receipt)] == ["open"]
    world.restart()
    job.connect()
    job.send(*tools.opening(job, **rule, have=1))
    world.pass_time(1)
    receipt = job.take(Receipt)[-1]
    assert (receipt.state, receipt.reason) == ("closed", "1 results and 4 s more")
    b.connect()
    refused = tools.finish(b, late).refused
    assert [item.code for item in refused] == ["closed"]


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
