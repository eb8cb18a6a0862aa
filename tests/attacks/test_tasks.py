"""Work that is not the sender's: forged, stale, late and repeated results, claims, gathers, partials."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError, FencedError, NondeterministicError
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Ask,
    Assign,
    Checkpoint,
    ClaimJob,
    CloseGather,
    CloseRule,
    Commit,
    Decline,
    Done,
    EndJob,
    Fail,
    GatherId,
    Get,
    JobId,
    OpenGather,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Progress,
    Put,
    Receipt,
    Stored,
    SubmitJob,
    TaskId,
    TaskRef,
)

pytestmark = pytest.mark.process


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    return value


class Victim:
    """A site with a task under way, and a thief beside it."""

    def __init__(self, ground: Any, wire: Callable[..., Any], **opening: Any) -> None:
        self.ground = ground
        self.site = f"v-{secrets.token_hex(3)}"
        self.peer = wire("executor", self.site)
        self.thief = wire("executor", f"t-{secrets.token_hex(3)}")
        self.receipt = ground.job.gather(self.site, **opening)
        self.assign, self.item = self.peer.work()

    def done(self, item: Any = None, **fields: Any) -> Done:
        return replace(Done(self.assign.job, self.assign.gather, (item or self.item,)), **fields)

    def finish(self) -> None:
        """The victim's own result is taken, whatever the thief did."""
        self.peer.send(self.done(replace(self.item, inline_bytes=5)), b"right")
        stored = self.peer.take(Stored)
        assert stored.tasks == (TaskRef(self.item.task, self.item.attempt),), stored
        job = self.ground.job
        done = job.take(Done, where=lambda m: m.gather == self.receipt.gather)
        assert done.items[0].site == self.site
        job.take(Receipt, where=lambda m: m.gather == self.receipt.gather and m.state == "closed")


@pytest.fixture
def victim(ground: Any, wire: Callable[..., Any]) -> Victim:
    return Victim(ground, wire)


def inline(peer: Any, payload: PayloadRef, data: bytes, **fields: Any) -> None:
    peer.send(Put(payload, ref=7, **fields), data)


def ref_of(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


# ---------------------------------------------------------------- results of others


def test_a_forged_result(ground: Any, victim: Victim) -> None:
    """Task ids can be computed by anybody; only the owner of the current attempt settles it."""
    counted = ground.count("refused.stale")
    victim.thief.send(victim.done(replace(victim.item, inline_bytes=5)), b"wrong")
    refusal = victim.thief.take(Stored).refused[0]
    assert (refusal.code, refusal.reason) == ("stale", f"attempt 1 of {victim.peer.hello.node} is the current one")
    assert ground.count("refused.stale") == counted + 1
    forged = [e for e in ground.events() if e["kind"] == "result_refused" and e["data"]["task"] == victim.item.task]
    assert [e["site"] for e in forged] == [""], "the site that it named was not the sender's"
    victim.finish()


def test_an_upload_for_another_s_task(ground: Any, victim: Victim) -> None:
    """Else bytes under the result's id would be there first, and the true ones be refused."""
    task, attempt = victim.item.task, victim.item.attempt
    payload = ref_of(b"wrong", f"r-{task}.{attempt}")
    owner = {"job": victim.assign.job, "task": task, "attempt": attempt}
    inline(victim.thief, payload, b"wrong", **owner)
    victim.thief.refused("forbidden", "does not work on task")
    inline(victim.thief, payload, b"wrong", job=victim.assign.job)
    victim.thief.refused("payload_id", "is kept for the result of that attempt")
    own = ref_of(b"right", f"r-{task}.{attempt}")
    inline(victim.peer, own, b"right", **owner)
    assert victim.peer.take(Stored).payload == own
    victim.finish()


def test_a_done_that_names_another_s_payload(ground: Any, victim: Victim) -> None:
    """A refused result's payload goes; not where it is the victim's, which waits for its own Done."""
    task, attempt = victim.item.task, victim.item.attempt
    payload = ref_of(b"right", f"r-{task}.{attempt}")
    inline(victim.peer, payload, b"right", job=victim.assign.job, task=task, attempt=attempt)
    victim.peer.take(Stored)
    victim.thief.send(victim.done(replace(victim.item, payload=payload)))
    assert victim.thief.take(Stored).refused[0].code == "stale"
    victim.thief.send(victim.done(replace(victim.item, payload=payload, meta={"k": "x" * 62_000})))
    assert victim.thief.take(Stored).refused[0].code == "too_large"
    victim.peer.send(victim.done(replace(victim.item, payload=payload)))
    assert victim.peer.take(Stored).tasks == (TaskRef(task, attempt),)


@pytest.mark.parametrize("what", ["fail", "decline", "progress", "accept"])
def test_orders_about_another_s_task(ground: Any, victim: Victim, what: str) -> None:
    """They change nothing: the victim's attempt stays the current one."""
    ref = TaskRef(victim.item.task, victim.item.attempt)
    victim.thief.send(
        {
            "fail": Fail(ref.task, ref.attempt, "x", "not true"),
            "decline": Decline((ref,), "not true"),
            "progress": Progress(ref.task, ref.attempt, 1.0),
            "accept": Accept((ref,)),
        }[what]
    )
    victim.thief.send(Ping())
    victim.thief.take(Pong)
    victim.finish()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"task": TaskId("f" * 32)}, "unknown", "has no such task"),
        ({"attempt": 2}, "stale", "attempt 1 of executor/.* is the current one"),
        ({"payload": PayloadRef(PayloadId("p-none"), 10)}, "lost_payload", "put it first"),
    ],
    ids=["unknown task", "attempt never given", "payload never put"],
)
def test_a_done_that_cannot_be(
    ground: Any, wire: Callable[..., Any], change: dict[str, Any], code: str, words: str
) -> None:

    victim = Victim(ground, wire, max_attempts=9)
    victim.peer.send(victim.done(replace(victim.item, **change)))
    refusal = victim.peer.take(Stored).refused[0]
    assert refusal.code == code and re.search(words, refusal.reason), refusal


@pytest.mark.parametrize(
    ("fields", "tail", "words"),
    [
        ({"items": "twice"}, b"", "Done names a task twice"),
        ({}, b"more", "inline sizes sum to 0, its tail has 4"),
        ({"partial_inline_bytes": 9}, b"", "inline sizes sum to 9, its tail has 0"),
    ],
    ids=["a task twice", "a tail nobody asked for", "a tail that is not there"],
)
def test_a_done_that_does_not_add_up(
    ground: Any, victim: Victim, fields: dict[str, Any], tail: bytes, words: str
) -> None:
    if fields.get("items") == "twice":
        fields = {"items": (victim.item, victim.item)}
    victim.peer.send(victim.done(**fields), tail)
    victim.peer.refused("malformed", words)
    victim.finish()


def test_a_result_for_a_gather_of_another_job(ground: Any, victim: Victim) -> None:
    victim.peer.send(victim.done(job=ground.second_job().job))
    refusal = victim.peer.take(Stored).refused[0]
    assert (refusal.code, refusal.reason) == ("closed", "its round is over")
    victim.finish()


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"k": "x" * 62_000}, "metadata is over .* bytes"),
        ({"metrics": nested(12)}, "metadata: data nested more than 16"),
    ],
    ids=["large", "deep"],
)
def test_metadata_that_nothing_can_hold(ground: Any, victim: Victim, meta: dict[str, Any], words: str) -> None:
    """It fits its own message, not the one to the job or the round's record: the task fails, and says so."""

    victim.peer.send(victim.done(replace(victim.item, meta=meta)))
    refusal = victim.peer.take(Stored).refused[0]
    assert refusal.code == "too_large" and re.search(words, refusal.reason)
    ended = ground.job.take(Receipt, where=lambda m: bool(m.failures))
    assert (ended.failures[0].site, ended.failures[0].code) == (victim.site, "too_large")


# ---------------------------------------------------------------- repeated, late, stale


def test_a_result_twice(ground: Any, victim: Victim) -> None:
    """A repeat gets the stored answer again, another result under the same attempt too; neither counts."""
    victim.finish()
    for data in (b"right", b"other"):
        victim.peer.send(victim.done(replace(victim.item, inline_bytes=5)), data)
        assert victim.peer.take(Stored).tasks == (TaskRef(victim.item.task, 1),)
    ground.job.commit()
    victim.peer.send(victim.done(replace(victim.item, inline_bytes=5)), b"right")
    assert victim.peer.take(Stored).tasks == (TaskRef(victim.item.task, 1),), "settled before its round went"


def test_a_stale_attempt(ground: Any, wire: Callable[..., Any]) -> None:
    """It was given back, and on: what comes from it is refused, and its upload as well."""
    victim = Victim(ground, wire)
    victim.peer.send(Fail(victim.item.task, 1, "lost", "try again", retryable=True))
    _, second = victim.peer.work()
    assert second.attempt == 2
    victim.peer.take(Stored)
    victim.peer.send(victim.done(replace(victim.item, inline_bytes=5)), b"stale")
    refusal = victim.peer.take(Stored).refused[0]
    assert (refusal.code, refusal.attempt) == ("stale", 1)
    assert "attempt 2 of" in refusal.reason
    data = ref_of(b"stale", f"r-{victim.item.task}.1")
    inline(victim.peer, data, b"stale", job=victim.assign.job, task=victim.item.task, attempt=1)
    victim.peer.refused("stale", "attempt 1 of task .*: 2 is current")
    victim.item = second
    victim.finish()


def test_a_result_after_the_close(ground: Any, wire: Callable[..., Any]) -> None:
    victim = Victim(ground, wire)
    job = ground.job
    job.link.request(CloseGather(job.link.next_ref(), job.claimed.job, job.claimed.claim, victim.receipt.gather))
    victim.peer.send(victim.done(replace(victim.item, inline_bytes=5)), b"later")
    refusal = victim.peer.take(Stored).refused[0]
    assert refusal.code == "closed" and "the gather is failed" in refusal.reason
    data = ref_of(b"later", f"r-{victim.item.task}.1")
    inline(victim.peer, data, b"later", job=victim.assign.job, task=victim.item.task, attempt=1)
    victim.peer.refused("closed", "is over: its result is not wanted")


# ---------------------------------------------------------------- jobs of others


@pytest.mark.parametrize("order", [CloseGather, Checkpoint, Commit, EndJob, OpenGather])
def test_a_process_of_another_job(ground: Any, wire: Callable[..., Any], order: type[Any]) -> None:
    """A job process is bound to the job and the claim of its Hello."""
    mine, theirs = ground.second_job(), ground.job.claimed
    peer = wire("job", node=f"job/{mine.job}/{mine.claim}", job=mine.job, claim=mine.claim)
    gather, ref = GatherId("g"), PayloadRef(PayloadId("b3-x"), 1)
    message = {
        CloseGather: CloseGather(5, theirs.job, theirs.claim, gather),
        Checkpoint: Checkpoint(5, theirs.job, theirs.claim, gather, ref, 0),
        Commit: Commit(5, theirs.job, theirs.claim, 10_000),
        EndJob: EndJob(5, theirs.job, theirs.claim, "FINISHED:FAILED"),
        OpenGather: OpenGather(5, theirs.job, theirs.claim, 0, 0, "train", CloseRule()),
    }[order]
    peer.send(message)
    fault = peer.refused("forbidden", f"does not run job {theirs.job} under claim {theirs.claim}")
    assert fault.ref == 5
    inline(peer, ref_of(b"mine"), b"mine", job=theirs.job, claim=theirs.claim)
    peer.refused("forbidden", f"does not run job {theirs.job}")
    assert ground.ask("job", theirs.job)["status"] == "RUNNING"


def test_payloads_under_a_claim_of_others(ground: Any, wire: Callable[..., Any]) -> None:
    """What a claim puts is taken beside the quota, and held until the next commit."""
    job = ground.job.claimed
    for role in ("client", "controller", "executor"):
        peer = wire(role)
        inline(peer, ref_of(b"stuff"), b"stuff", job=job.job, claim=job.claim)
        peer.refused("forbidden", f"does not run job {job.job} under {job.claim}")
    client = wire()
    inline(client, ref_of(b"stuff"), b"stuff", job=job.job)
    client.refused("forbidden", "a client puts a job's payload under its claim, or without a job")
    executor = wire("executor")
    inline(executor, ref_of(b"stuff"), b"stuff")
    executor.refused("job", "a payload of an executor names its job")


def test_a_job_said_to_be_lost_by_who_never_had_it(ground: Any, wire: Callable[..., Any]) -> None:
    """Five of these would fail the job."""
    job = ground.job.claimed
    peer = wire("controller")
    for _ in range(6):
        peer.send(ClaimJob(9, job.job, job.claim, "it died"))
        peer.refused("forbidden", f"claim {job.claim} to job {job.job} was not given to controller/")
    assert ground.ask("job", job.job)["status"] == "RUNNING"


def test_another_specification_for_an_open_gather(ground: Any) -> None:
    """Fatal for whoever runs the job's code: the same code would have asked the same."""
    job = ground.job
    message, tail = job.opening("nobody-1", round=job.round)
    job.link.request(message, tail)
    with pytest.raises(NondeterministicError, match="opened before"):
        job.link.request(replace(message, ref=job.link.next_ref(), config={"lr": 1}), tail)


def test_orders_of_an_old_claim(ground: Any) -> None:
    """Fenced, in the same transaction; shown on a job of its own, whose process dies of it."""
    claimed = ground.second_job()
    from fedloom.broker.link import Link
    from fedloom.serialization.messages import Hello

    node = f"job/{claimed.job}/{claimed.claim}"
    link = Link(ground.endpoint, Hello(node, "job", secrets.token_hex(8), job=claimed.job, claim=claimed.claim))
    link.start()
    try:
        with pytest.raises(FencedError, match=f"claim 0 to job .*: claim {claimed.claim} holds it now; stop"):
            link.request(Commit(link.next_ref(), claimed.job, 0, 0))
    finally:
        link.close("done")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"token": ""}, "token", "a submission needs a token"),
        ({"job": JobId("a b")}, "job_id", "job id 'a b'; letters, digits"),
        ({"archive": PayloadRef(PayloadId("b3-none"), 5)}, "unknown_payload", "b3-none of 5 bytes is not here: put it"),
        ({"meta": {"k": "x" * 40_000}}, "too_large", "max_meta_bytes"),
        ({"meta": nested(14)}, "malformed", "nested more than 16 deep"),
        ({"job": "theirs"}, "job_exists", "was submitted before: choose another id, or none"),
    ],
    ids=["no token", "job id", "no archive", "meta too large", "meta too deep", "id taken"],
)
def test_a_submission_that_cannot_be(
    ground: Any, wire: Callable[..., Any], change: dict[str, Any], code: str, words: str
) -> None:
    if change.get("job") == "theirs":
        change = {"job": ground.job.claimed.job}
    peer = wire()
    archive = ground.blob(b"archive")
    peer.send(replace(SubmitJob(3, secrets.token_hex(4), "evil", archive), **change))
    assert peer.refused(code, words).ref == 3


@pytest.mark.parametrize(
    ("payload", "data", "code", "words"),
    [
        (ref_of(b"abcde"), b"abcdX", "digest", "arrived damaged: its digest is"),
        (ref_of(b"abcde"), b"abc", "size", "3 bytes for payload .* of 5; at most 32768 come whole"),
        (PayloadRef(PayloadId("b3-" + "0" * 64), 1), b"x", "digest", "arrived damaged"),
        (PayloadRef(PayloadId("p-large"), 40_000), bytes(40_000), "size", "larger ones on the data link"),
        (ref_of(b"x", "r-abc.1"), b"x", "payload_id", "is kept for the result of that attempt"),
    ],
    ids=["digest", "size", "another digest's name", "too large", "a result's name"],
)
def test_a_small_payload_that_is_not_what_it_says(
    ground: Any, wire: Callable[..., Any], payload: PayloadRef, data: bytes, code: str, words: str
) -> None:
    peer = wire()
    inline(peer, payload, data)
    assert peer.refused(code, words).ref == 7
    peer.send(Get("", payload.id, 0, 0, ref=8))
    peer.refused("unknown_payload", "is not here")


# ---------------------------------------------------------------- partials


@pytest.mark.parametrize("what", ["another's task", "no tasks", "twice", "not taken here"])
def test_a_partial_that_conflicts(ground: Any, wire: Callable[..., Any], what: str) -> None:
    """All or nothing: whatever is wrong with one of its tasks, none is settled."""
    victim = Victim(ground, wire, partials=what != "not taken here")
    sites = tuple(f"p-{secrets.token_hex(3)}-{n}" for n in range(2))
    pool = wire("executor", *sites)
    gather = ground.job.gather(*sites, partials=what != "not taken here", rule=CloseRule(min_clients=2))
    assign, _ = pool.work()
    items = tuple(replace(victim.item, task=i.task, attempt=i.attempt, site=i.site) for i in assign.items)
    data = b"a sum"
    done = Done(assign.job, assign.gather, items, ref_of(data, f"p-{secrets.token_hex(8)}"), len(data))
    if what == "another's task":
        done = replace(done, items=(*items, victim.item))
    elif what == "no tasks":
        done = replace(done, items=())
    elif what == "twice":
        done = replace(done, items=(*items, items[0]))
    pool.send(done, data)
    if what == "twice":
        pool.refused("malformed", "Done names a task twice")
    elif what == "no tasks":
        pool.send(Ask(3, "jobs"))
        pool.take(Answer)
    else:
        refused = pool.take(Stored).refused
        assert {r.code for r in refused} >= {"conflict"}
        words = "takes no partials" if what == "not taken here" else "of its tasks conflict, as .*: unknown"

        assert any(re.search(words, r.reason) for r in refused), refused
        assert all(r.requeued for r in refused if r.code == "conflict"), "its own tasks are to be done again"
        again = pool.take(Assign)
        assert {i.attempt for i in again.items} == {2}
    victim.finish()
    with pytest.raises(FaultError, match=r"is not open"):
        ground.job.commit()
        ref = ground.job.link.next_ref()
        job = ground.job.claimed
        ground.job.link.request(CloseGather(ref, job.job, job.claim, gather.gather))
