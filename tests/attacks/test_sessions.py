"""Who may speak, and as whom: before Hello, twice, under another's name, in a role that may not."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fedloom.broker.core import ROLES
from fedloom.serialization.codec import pack
from fedloom.serialization.messages import (
    KINDS,
    Abort,
    Accept,
    Answer,
    Ask,
    Assign,
    Bye,
    Cancel,
    Checkpoint,
    Chunk,
    Claimed,
    ClaimJob,
    CloseGather,
    CloseRule,
    Commit,
    Decline,
    Done,
    EndJob,
    Event,
    Fail,
    Fault,
    Finish,
    GatherId,
    Get,
    Grant,
    Hello,
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
    Welcome,
    encode,
)

pytestmark = pytest.mark.process

JOB, GATHER, TASK, STREAM = JobId("j"), GatherId("g"), TaskId("t"), "0" * 32
REF = PayloadRef(PayloadId("b3-x"), 1)
#: One of each kind, with nothing wrong in it.
EXAMPLES: list[Any] = [
    Hello("n", "client", "b"),
    Welcome("s", "e"),
    Ping(),
    Pong(),
    Bye(),
    OpenGather(1, JOB, 1, 0, 0, "train", CloseRule()),
    CloseGather(1, JOB, 1, GATHER),
    Receipt(1, JOB, GATHER, "open"),
    Assign(JOB, GATHER, 0, 0, "train", ()),
    Accept(()),
    Decline(()),
    Progress(TASK, 1),
    Done(JOB, GATHER, ()),
    Fail(TASK, 1, "x"),
    Cancel(JOB),
    Put(REF),
    Get(STREAM, REF.id, 0, 0),
    Grant(STREAM, 0, 0, 0),
    Chunk(STREAM, 0, 0, 0),
    Finish(STREAM),
    Stored(),
    Abort(STREAM, "x"),
    SubmitJob(1, "t", "n", REF),
    ClaimJob(1),
    Claimed(1, JOB, 1),
    Checkpoint(1, JOB, 1, GATHER, REF, 0),
    Commit(1, JOB, 1, 0),
    EndJob(1, JOB, 1, "FINISHED:FAILED"),
    Event(JOB, "log"),
    Ask(1, "jobs"),
    Answer(1),
    Fault("x", "y"),
]


def test_the_table_has_every_kind() -> None:
    assert {type(example) for example in EXAMPLES} == set(KINDS.values())


# ---------------------------------------------------------------- before Hello, and again


def test_before_hello(ground: Any, wire: Callable[..., Any]) -> None:
    """Nothing at all is done for whoever has not said who it is."""
    peer = wire(join=False)
    for example in EXAMPLES:
        if isinstance(example, Hello):
            continue
        about = peer.send(example)
        peer.refused("session", f"{type(example).__name__} without a session: say Hello first", about=about)


@pytest.mark.parametrize("role", ["executor", "controller", "job", "client"])
def test_what_a_role_may_not(ground: Any, wire: Callable[..., Any], role: str) -> None:
    """Every kind that is another role's or the broker's own."""
    fields: dict[str, Any] = {}
    if role == "job":
        job = ground.second_job()
        fields = {"node": f"job/{job.job}/{job.claim}", "job": job.job, "claim": job.claim}
    peer = wire(role, **fields)
    forbidden = [e for e in EXAMPLES if role not in ROLES.get(type(e), ()) and not isinstance(e, Hello)]
    assert len(forbidden) > 15
    counted = ground.count("fault.forbidden")
    for example in forbidden:
        about = peer.send(example)
        kind = type(example).__name__
        fault = peer.refused("forbidden", f"a {role} may not send {kind} on the control link", about=about)
        assert not fault.fatal
    assert ground.count("fault.forbidden") == counted + len(forbidden)


def test_only_clients_abort_jobs(ground: Any, wire: Callable[..., Any]) -> None:
    for role in ("executor", "controller"):
        peer = wire(role)
        peer.send(Ask(5, "abort", ground.job.claimed.job))
        peer.refused("forbidden", f"a {role} may not abort a job; a client may")


def test_a_second_hello_is_the_same_session(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire("executor", "s-again")
    peer.send(peer.hello, pack({"sites": ["s-again"]}))
    assert peer.take(Welcome).session == peer.welcome.session


@pytest.mark.parametrize(
    "change",
    [{"role": "client"}, {"role": "controller"}, {"job": JobId("other")}, {"claim": 7}],
    ids=["role", "controller", "job", "claim"],
)
def test_a_second_hello_as_somebody_else(ground: Any, wire: Callable[..., Any], change: dict[str, Any]) -> None:
    """A boot stays what it said first: it cannot collect rights."""
    peer = wire("executor")
    peer.frames(*encode(replace(peer.hello, **change)))
    peer.refused("hello", "was a executor: another role or job needs another node or boot")
    peer.send(Ping())
    peer.take(Pong)


@pytest.mark.parametrize(
    ("role", "fields", "sites", "code", "words"),
    [
        ("client", {"node": ""}, [], "hello", "Hello needs a node name and a boot"),
        ("client", {"boot": ""}, [], "hello", "Hello needs a node name and a boot"),
        ("client", {}, ["s"], "hello", "a client serves no sites"),
        ("executor", {"node": "job/honest/9"}, [], "hello", "job/ID/CLAIM is its job process's alone"),
        ("job", {"job": JobId("none"), "claim": 1}, [], "unknown_job", "no job 'none' here"),
    ],
    ids=["no node", "no boot", "a client's site", "a job's name", "no such job"],
)
def test_a_hello_that_cannot_be(
    ground: Any, wire: Callable[..., Any], role: str, fields: dict[str, Any], sites: list[str], code: str, words: str
) -> None:
    peer = wire(role, join=False, **fields)
    peer.send(peer.hello, pack({"sites": sites}) if sites else b"")
    peer.refused(code, words)


# ---------------------------------------------------------------- forged names


def test_a_second_boot_of_a_live_name(ground: Any, wire: Callable[..., Any]) -> None:
    """The first one stays: it answers a probe, so the second is refused for good."""
    peer = wire("executor", "elsewhere", join=False, node=ground.executor.config.node)
    peer.send(peer.hello, pack({"sites": ["elsewhere"]}))
    fault = peer.refused("name_taken", "executor/honest.* is taken by .*, which is alive: stop that one, or give")
    assert fault.fatal


def test_a_site_of_a_live_executor(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire("executor", "honest", join=False)
    peer.send(peer.hello, pack({"sites": ["honest"]}))
    fault = peer.refused("name_taken", "a site of it is taken by executor/honest, which is alive")
    assert fault.fatal


def test_a_site_taken_by_a_second_hello(ground: Any, wire: Callable[..., Any]) -> None:
    """Neither can a session that is welcome already reach for it."""
    peer = wire("executor", "s-greedy")
    peer.send(peer.hello, pack({"sites": ["s-greedy", "honest"]}))
    peer.refused("name_taken", "site 'honest' is taken by executor/honest")


def test_a_second_process_of_a_claim(ground: Any, wire: Callable[..., Any]) -> None:
    """Under its own name it finds the name taken; under another it is no job process."""
    claimed = ground.job.claimed
    fields = {"job": claimed.job, "claim": claimed.claim}
    own = wire("job", join=False, node=f"job/{claimed.job}/{claimed.claim}", **fields)
    own.send(own.hello)
    assert own.refused("name_taken").fatal
    other = wire("job", join=False, **fields)
    other.send(other.hello)
    other.refused("hello", "job/ID/CLAIM is its job process's alone")


@pytest.mark.parametrize(("claim", "code"), [(0, "fenced"), (99, "unknown_claim")], ids=["too old", "never given"])
def test_a_claim_that_is_not_current(ground: Any, wire: Callable[..., Any], claim: int, code: str) -> None:
    job = ground.job.claimed.job
    peer = wire("job", join=False, node=f"job/{job}/{claim}", job=job, claim=claim)
    peer.send(peer.hello)
    assert peer.refused(code, f"claim {claim} to job {job}").fatal


def test_the_data_link_without_a_session(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire()
    for message in (Put(REF, STREAM), Get(STREAM, REF.id, 0, 1), Finish(STREAM), Ping(), Pong()):
        peer.put(message)
        peer.refused("session", "say Hello with the session of your control link first", data=True)


def test_the_data_link_with_a_stranger_s_session(ground: Any, wire: Callable[..., Any]) -> None:
    """A session's id is 128 random bits; a guess waits for two seconds and learns nothing."""
    peer = wire()
    peer.put(Hello(peer.hello.node, "client", peer.hello.boot, session=secrets.token_hex(16)))
    peer.put(Put(REF, STREAM))
    fault = peer.refused("session", "session '[0-9a-f]{32}' is unknown: say Hello on the control link first", data=True)
    assert not fault.fatal


def test_a_session_that_has_ended(ground: Any, wire: Callable[..., Any]) -> None:
    """With Bye its data link is closed as well."""
    peer = wire().open_data()
    peer.send(Bye("done"))
    peer.welcome = None
    peer.refused("session", "the session ended: say Hello on the control link", data=True)
    peer.put(Ping())
    peer.refused("session", data=True)


@pytest.mark.parametrize(
    "message",
    [Pong(), Ask(1, "jobs"), Done(JOB, GATHER, ()), Welcome("s", "e"), Fault("x", "y"), Stored()],
    ids=lambda m: getattr(type(m), "__name__", "?"),
)
def test_what_does_not_belong_on_the_data_link(ground: Any, wire: Callable[..., Any], message: Any) -> None:
    peer = wire().open_data()
    peer.put(message)
    peer.refused("malformed", f"{type(message).__name__} does not belong on the data link", data=True)


def test_a_question_that_is_none(ground: Any, wire: Callable[..., Any]) -> None:
    peer = wire()
    peer.send(Ask(3, "passwords"))
    fault = peer.refused("unknown_question", "'passwords' is no question; ask for job, status, jobs, events")
    assert fault.ref == 3
    peer.send(Ask(4, "job", JobId("no-such")))
    peer.refused("unknown_job", "no job 'no-such' here")


def test_events_of_another_s_site(ground: Any, wire: Callable[..., Any]) -> None:
    """A site's log holds what its own executor said."""
    peer = wire("executor", "s-liar")
    peer.send(Event(ground.job.claimed.job, "log", "honest", text="all is lost"))
    peer.refused("forbidden", "does not serve honest: its events are another's")
    peer.send(Event(ground.job.claimed.job, "log", "s-liar", text="all is well"))
    peer.send(Ping())
    peer.take(Pong)
    texts = [event["text"] for event in ground.events()]
    assert "all is lost" not in texts and "all is well" in texts
