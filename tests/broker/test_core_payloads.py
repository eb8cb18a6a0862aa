"""Payloads through the control core: admission, expiry, and what the disk loses."""

from __future__ import annotations

from typing import Any

from fedloom.serialization.messages import (
    Assign,
    Commit,
    Done,
    DoneItem,
    Fault,
    Grant,
    Hello,
    PayloadId,
    PayloadRef,
    Put,
    Receipt,
    Stored,
    TaskId,
    Welcome,
)

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
