"""Jobs and sessions through the control core: submissions, claims, commits, who is connected and who may what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fedloom.serialization.codec import unpack
from fedloom.serialization.errors import EnvelopeError
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Bye,
    Cancel,
    Claimed,
    ClaimJob,
    Commit,
    Done,
    DoneItem,
    Event,
    Fault,
    Hello,
    JobId,
    Packet,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Receipt,
    SubmitJob,
    Welcome,
)

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


def test_what_is_opened_behind_a_refused_commit_is_refused(world: Any, tools: Any) -> None:
    job = world.job()
    gone = PayloadRef(PayloadId("b3-" + "0" * 64), 9, "0" * 64)
    commit = Commit(job.ref(), job.hello.job, 1, 0, state=gone)
    job.send(commit)
    assert job.one(Fault).ref == commit.ref
    opening, sites = tools.opening(job, sites=("site-1",), round=1)
    job.send(replace(opening, behind=commit.ref), sites)
    assert job.one(Fault).code == "uncommitted"
    assert not world.core.state.ledger.gathers
    again = Commit(job.ref(), job.hello.job, 1, 0)
    job.send(again)
    job.send(replace(opening, behind=again.ref), sites)
    assert job.one(Receipt).gather and len(world.core.state.ledger.gathers) == 1


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
            Packet(Done(assign.job, assign.gather, (DoneItem(ref.task, 1, site, inline_bytes=30_000),)), b"z" * 30_000),
            world.now,
        )
        world.core.commit()
    assert session.outbox_bytes < world.settings.timing.outbox_bytes, "the outbox is bounded"
    assert len(session.outbox) < world.settings.timing.outbox_messages
    world.peers[job.address] = job
    world.turn()
    assert tools.indices(job) == list(range(300))
