"""What goes wrong between peers and the control core: lost answers, stale and late results, odd Hellos, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.broker.sessions import Timing
from fedloom.serialization.codec import pack, unpack
from fedloom.serialization.messages import (
    Abort,
    Answer,
    Ask,
    Assign,
    Cancel,
    Checkpoint,
    Claimed,
    ClaimJob,
    CloseGather,
    Commit,
    Done,
    DoneItem,
    EndJob,
    Event,
    Fault,
    Hello,
    Packet,
    PayloadId,
    PayloadRef,
    Ping,
    Put,
    Receipt,
    Stored,
    SubmitJob,
    TaskRef,
    encode,
)

STREAM = "5" * 32


def ask(world: Any, what: str, job: str = "") -> dict[str, Any]:
    client = world.client()
    client.got.clear()
    client.send(Ask(1, what, job))
    ((answer, tail),) = [(m, t) for m, t in client.got if isinstance(m, Answer)]
    return answer.data or unpack(tail, max_bytes=1 << 20)


def commit(job: Any, round_: int = 0, **fields: Any) -> None:
    job.send(Commit(job.ref(), job.hello.job, job.hello.claim, round_, **fields))
    job.one(Answer)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    return value


# ---------------------------------------------------------------- results and their payloads


def test_a_stale_done_leaves_the_payload_of_the_current_attempt_alone(world: Any, tools: Any) -> None:
    job = world.job()
    old = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    stale = tools.work(old)[0]
    world.disconnect(old)
    new = world.executor("site-1", boot="b2")
    world.pass_time(3)
    assign, ref, site = tools.work(new)[0]
    payload = new.put(b"result of attempt 2", id=f"r-{ref.task}.2", task=ref.task, attempt=2, job=assign.job)
    assert tools.finish(new, stale, b"late").refused[0].code == "stale"
    assert world.core.state.spool.exists(payload.id)
    new.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 2, site, payload),)))
    assert [i.payload for d in job.take(Done) for i in d.items] == [payload]


def test_a_result_that_lands_too_late_leaves_no_file(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    world.executor("site-2")
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=1, step=0))
    assign, ref, _ = tools.work(a)[0]
    gather = job.take(Receipt)[0].gather
    final = PayloadRef(PayloadId(f"r-{ref.task}.1"), 6, "", "tensors")
    put = Put(final, STREAM, job=assign.job, task=ref.task, attempt=1)
    world.data(put)
    job.send(CloseGather(7, job.hello.job, 1, gather))
    world.core.state.spool.store(final.id, [b"result"])
    (answer,) = world.data(Put(final, STREAM, job=assign.job, task=ref.task, attempt=1, local="landed"))
    assert isinstance(answer, Abort) and answer.code == "closed" and not answer.retry_after_s
    assert not world.core.state.spool.exists(final.id), "a file that will never have a row"


def test_a_repeated_done_of_a_committed_round_is_answered_with_stored(world: Any, tools: Any) -> None:
    """Its Stored was lost: a refusal would have the executor throw its new site state away."""
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    task = tools.work(a)[0]
    tools.finish(a, task, state="v1")
    commit(job)
    assert tools.finish(a, task, state="v1").tasks == (task[1],)
    world.restart()
    a.connect(held=(task[1],))
    a.got.clear()
    again = tools.finish(a, task, state="v1")
    assert again.tasks == (task[1],) and not again.refused
    assert ask(world, "job", job.hello.job)["late"] == 0


def test_late_results_are_counted_by_round_and_recorded_with_the_reason(world: Any, tools: Any) -> None:
    job = world.job()
    executors = [world.executor(f"site-{i}") for i in range(4)]
    sites = tuple(f"site-{i}" for i in range(4))
    job.send(*tools.opening(job, sites=sites, min_clients=1))
    tasks = [tools.work(e)[0] for e in executors]
    tools.finish(executors[0], tasks[0])
    job.send(CloseGather(7, job.hello.job, 1, job.take(Receipt)[0].gather))
    assert tools.finish(executors[1], tasks[1]).refused[0].code == "closed"
    commit(job, record={"weight_sum": 1.0})
    assert tools.finish(executors[2], tasks[2]).refused[0].code == "closed"
    world.restart()
    executors[3].connect()
    assert tools.finish(executors[3], tasks[3]).refused[0].code == "closed"
    answer = ask(world, "job", job.hello.job)
    assert answer["late"] == 3
    assert ask(world, "rounds", job.hello.job)["rounds"] == [{"round": 0, "weight_sum": 1.0, "late": 2}]
    events = [e for e in ask(world, "events", job.hello.job)["events"] if e["kind"] == "result_refused"]
    assert [(e["site"], e["data"]["round"], e["data"]["code"]) for e in events] == [
        ("site-1", 0, "closed"),
        ("site-2", 0, "closed"),
        ("site-3", -1, "closed"),  # after a restart nobody knows which round it was
    ]


def test_metadata_that_no_message_to_the_job_can_hold_fails_its_task(world: Any, tools: Any) -> None:
    """It fits into the executor's Done and not into the job's, which has the result's number as well."""
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    task = tools.work(a)[0]
    size = 65_000
    while True:
        done = Done(task[0].job, task[0].gather, (DoneItem(task[1].task, 1, "site-1", meta={"k": "x" * size}),))
        if len(encode(done)[1]) >= 65_534:
            break
        size += 1
    a.send(done)
    assert [f.code for r in job.take(Receipt) for f in r.failures] == ["too_large"]
    assert world.core.state.ledger.tasks[task[1].task].status == "failed"


def test_a_partial_waits_for_its_done_over_a_new_claim(world: Any, tools: Any) -> None:
    job = world.job()
    pool = world.executor("site-0", "site-1", node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=2, partials=True))
    tasks = tools.work(pool)
    payload = pool.put(b"sum", id="p-x", job=job.hello.job)
    controller = next(p for p in world.peers.values() if p.hello.role == "controller")
    controller.send(ClaimJob(0, job.hello.job, 1, "exit code 1"))
    controller.send(ClaimJob(controller.ref()))
    world.pass_time(1)
    assert controller.one(Claimed).claim == 2
    pool.send(tools.partial_of(pool, tasks, payload))
    assert len([s for m, _ in pool.got if hasattr(m, "refused") for s in m.tasks]) == 2


# ---------------------------------------------------------------- nothing is left behind


def files(world: Any) -> set[str]:
    store = world.store
    return {p.name for p in (store / "payloads").rglob("*") if p.is_file()} | {
        p.name for p in (store / "incoming").iterdir()
    }


@pytest.mark.parametrize("end", ["FINISHED:COMPLETED", "FINISHED:FAILED", "abort", "crashes"])
def test_after_a_job_the_spool_holds_exactly_what_is_referenced(world: Any, tools: Any, end: str) -> None:
    job = world.job()
    pool = world.executor(*(f"site-{i}" for i in range(6)), node="pool/p")
    jid = job.hello.job
    archive = world.core.state.jobs.jobs[jid].archive
    model = job.put(b"model 0", job=jid, claim=1)
    job.send(*tools.opening(job, sites=pool.sites[:1], payload=model))
    tools.finish(pool, tools.work(pool)[0], state="v")
    best = job.put(b"model 1", job=jid, claim=1)
    state = job.put(b"state 1", job=jid, claim=1)
    commit(job, 0, model=best, state=state, best=True)
    last = job.put(b"model 2", job=jid, claim=1)
    commit(job, 1, model=last, state=state)

    # a round that ends in the middle: uploads with and without Done, a partial, checkpoints, the next model
    plan = job.put(b"plan", job=jid, claim=1)
    job.send(*tools.opening(job, sites=pool.sites, min_clients=6, partials=True, round=2, payload=last, fold=plan))
    gather = job.take(Receipt)[-1].gather
    tasks = tools.work(pool)
    done, waiting = tasks[0], tasks[1]
    result = pool.put(b"a result", id=f"r-{done[1].task}.1", task=done[1].task, attempt=1, job=jid)
    pool.send(Done(jid, gather, (DoneItem(done[1].task, 1, done[2], result),)))
    pool.take(Stored)
    pool.put(b"not done", id=f"r-{waiting[1].task}.1", task=waiting[1].task, attempt=1, job=jid)
    pool.send(tools.partial_of(pool, tasks[2:4], pool.put(b"a partial", id="p-1", job=jid)))
    assert len(pool.one(Stored).tasks) == 2
    pool.put(b"unsent partial", id="p-2", job=jid)
    first = job.put(b"checkpoint", id="p-3", job=jid, claim=1)
    job.send(Checkpoint(job.ref(), jid, 1, gather, first, 1))
    job.put(b"never used", job=jid, claim=1)
    incoming = world.store / "incoming"
    (incoming / f"r-{tasks[4][1].task}.1.part").write_bytes(b"half")
    (incoming / f"r-{tasks[4][1].task}.1.blocks").write_bytes(b"half")
    (incoming / "r-someone-elses.1.part").write_bytes(b"half")

    match end:
        case "abort":
            ask(world, "abort", jid)
        case "crashes":
            world.core.state.jobs.jobs[jid].crashes = 4
            controller = next(p for p in world.peers.values() if p.hello.role == "controller")
            controller.send(ClaimJob(0, jid, 1, "signal 9"))
        case status:
            job.send(EndJob(job.ref(), jid, 1, status))
    referenced = {archive.id, best.id, last.id, state.id}
    assert files(world) == referenced | {"r-someone-elses.1.part"}
    assert world.core.state.payloads.rows.keys() == referenced
    assert world.core.state.payloads.used_bytes == sum(r.size for r in world.core.state.payloads.rows.values())
    world.restart()
    assert files(world) == referenced | {"r-someone-elses.1.part"}
    assert not world.core.state.ledger.site_states and not world.core.state.ledger.tasks


def test_a_job_that_the_disk_ended_frees_what_its_rounds_held(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    model = job.put(b"model", job=job.hello.job, claim=1)
    commit(job, 0, model=model)
    plan = job.put(b"plan", job=job.hello.job, claim=1)
    job.send(*tools.opening(job, sites=("site-1", "site-2"), min_clients=2, round=1, payload=model, fold=plan))
    assign, ref, site = tools.work(a)[0]
    payload = a.put(b"on disk", id=f"r-{ref.task}.1", task=ref.task, attempt=1, job=assign.job)
    a.send(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, payload),)))
    archive = world.core.state.jobs.jobs[job.hello.job].archive
    world.core.state.spool.delete(model.id)
    world.restart()
    assert ask(world, "job", job.hello.job)["status"] == "FINISHED:FAILED"
    assert files(world) == {archive.id}
    assert [e["kind"] for e in ask(world, "events", job.hello.job)["events"]][-1] == "ended"
    world.restart()
    assert files(world) == {archive.id}


def test_an_executor_that_missed_the_end_of_a_job_is_told_after_a_restart(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    tools.work(a)
    world.disconnect(a)
    ask(world, "abort", job.hello.job)
    world.restart()
    a.got.clear()
    a.connect()
    assert [(c.job, c.ended) for c in a.take(Cancel)] == [(job.hello.job, True)]


# ---------------------------------------------------------------- claims and sessions


def test_a_claimed_that_was_lost_on_the_way_is_repeated_at_the_reconnect(world: Any) -> None:
    job_id = world.submit()
    controller = world.peer("controller", "controller/a")
    controller.send(ClaimJob(3))
    controller.got.clear()  # it never arrived: the connection broke behind the broker's send
    controller.connect()
    controller.got.clear()
    controller.send(ClaimJob(3))
    claimed = controller.one(Claimed)
    assert (claimed.ref, claimed.job, claimed.claim) == (3, job_id, 1)


def test_a_boot_cannot_become_another_role_or_job(world: Any) -> None:
    one, two = world.job("one"), world.job("two")
    one.send(Hello(one.hello.node, "job", one.hello.boot, job=two.hello.job, claim=1), pack({}))
    assert one.one(Fault).code == "hello"
    one.send(Hello(one.hello.node, "executor", one.hello.boot), pack({"sites": ["s"]}))
    assert one.one(Fault).code == "hello"
    assert world.core.state.jobs.jobs[one.hello.job].live


def test_a_job_process_name_is_its_own(world: Any) -> None:
    """Nobody else may have it, which keeps the process out; and the process no other, beside which it would work."""
    job = world.job()
    world.disconnect(job)
    thief = world.executor("s", node=job.hello.node, boot="other")
    assert thief.one(Fault).code == "hello"
    second = world.peer("job", "job/second", boot="b2", job=job.hello.job, claim=1)
    assert second.one(Fault).code == "hello"
    job.connect()
    assert world.core.state.jobs.jobs[job.hello.job].live


def test_assigns_that_a_broken_link_swallowed_cost_no_try(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",), max_attempts=2))
    for attempt in range(1, 8):
        assert tools.work(a, accept=False)[0][1].attempt == attempt
        a.connect()
    task = world.core.state.ledger.tasks[next(iter(world.core.state.ledger.tasks))]
    assert task.tries == 0 and not task.ended


def test_a_repeated_hello_on_the_same_connection_keeps_the_session(world: Any, tools: Any) -> None:
    job = world.job()
    a = world.executor("site-1")
    job.send(*tools.opening(job, sites=("site-1",)))
    task = tools.work(a)[0]
    for _ in range(3):
        a.send(a.hello, pack({"sites": ["site-1", "site-1"], "held": [[task[1].task, task[1].attempt]] * 2}))
    assert len({m.session for m, _ in a.got if hasattr(m, "session")}) == 1
    assert not a.take(Assign) and tools.finish(a, task).tasks == (task[1],)


# ---------------------------------------------------------------- sizes and depths


def test_data_nested_so_deep_that_it_could_not_go_on_is_refused(world: Any) -> None:
    job = world.job()
    job.send(Commit(job.ref(), job.hello.job, 1, 0, record=nested(14)))
    assert job.one(Fault).code == "malformed"
    commit(job, 0, record=nested(12))
    executor = world.executor("site-1")
    executor.send(Event(job.hello.job, "log", "site-1", nested(14)))
    executor.send(Event(job.hello.job, "log", "site-1", nested(12)))
    client = world.client()
    archive = client.put(b"archive")
    client.send(SubmitJob(client.ref(), "deep", "x", archive, meta=nested(14)))
    assert client.one(Fault).code == "malformed"
    assert ask(world, "rounds", job.hello.job)["rounds"] == [{"round": 0} | nested(12)]
    assert ask(world, "events", job.hello.job)["events"][-1]["data"] == nested(12)
    world.restart()
    job.connect()
    job.send(ClaimJob(5, job.hello.job, 1))
    assert job.one(Claimed).commit.record == nested(12)


def test_meta_that_no_claimed_could_hold_is_refused(world: Any) -> None:
    client = world.client()
    archive = client.put(b"archive")
    client.send(SubmitJob(client.ref(), "big", "x", archive, meta={"k": "x" * 60_000}))
    fault = client.one(Fault)
    assert fault.code == "too_large" and "max_meta_bytes" in fault.text


def test_a_job_of_very_many_long_sites_can_be_asked_for(world: Any) -> None:
    job_id = world.submit()
    state = world.core.state
    state.jobs.add_sites(state.jobs.get(job_id), (f"{i:06}" + "x" * 250 for i in range(10_000)))
    world.turn()
    answer = ask(world, "job", job_id)
    assert answer["site_count"] == 10_000 and 100 < len(answer["sites"]) < 10_000


def test_more_tasks_than_an_outbox_holds_are_assigned_in_turns(tools: Any, tmp_path: Any) -> None:
    world = tools.World(tmp_path, timing=Timing(outbox_messages=32))
    job = world.job()
    sites = tuple(f"{i:05}" + "x" * 150 for i in range(6000))
    node = "pool/p"
    state = world.core.state
    pool = world.peer("executor", node, sites=sites[:3000], capacity=1_000_000)
    second = world.peer("executor", "pool/q", sites=sites[3000:], capacity=1_000_000)
    job.send(*tools.opening(job, min_clients=6000, config={"k": "x" * 39_000}))
    seen: set[TaskRef] = set()
    for _ in range(40):
        if len(seen) == 6000:
            break
        world.turn()
        for peer in (pool, second):
            refs = [TaskRef(i.task, i.attempt) for a in peer.take(Assign) for i in a.items]
            seen.update(refs)
            peer.send(Ping(free=1_000_000))
    assert len(seen) == 6000 and {r.attempt for r in seen} == {1}
    assert len(state.sessions.by_id) >= 3, "nobody was ended for an outbox that is full"
    world.journal.close()


def test_an_unexpected_packet_of_the_data_process_is_survived(world: Any) -> None:
    world.core.handle_data(Packet(Ask(1, "jobs")), world.now)
    world.turn()
