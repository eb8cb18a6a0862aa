"""A link without a broker: whose answer is whose, which faults end it, and that nothing of it stays open."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.link import Link
from fedloom.broker.linkstate import LinkState, Outgoing, Request
from fedloom.serialization.errors import (
    CodecError,
    FaultError,
    FencedError,
    LinkError,
    LinkTimeout,
    NondeterministicError,
)
from fedloom.serialization.messages import Answer, Ask, Commit, EndJob, Fault, Hello, JobId, Message
from structlog.testing import capture_logs


def hello() -> Hello:
    return Hello(node=f"client/{secrets.token_hex(4)}", role="client", boot=secrets.token_hex(8))


def fds() -> set[str]:
    """What this process has open, but not the numbers."""
    found: list[str] = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return set(found)


def state_of(got: list[Message]) -> LinkState:
    return LinkState("tcp://127.0.0.1:1", hello(), (), list, lambda: 0, lambda message, tail: got.append(message))


def test_answers_go_to_their_requests_and_repeats_to_nobody() -> None:
    got: list[Message] = []
    state = state_of(got)
    request = Request(Outgoing.of(Ask(5, "jobs")))
    state.ask(5, request)
    state.deliver(Answer(5, {"n": 1}), b"tail")
    state.deliver(Answer(5, {"n": 2}), b"")
    assert request.answer == (Answer(5, {"n": 1}), b"tail")
    state.forget(5)
    state.deliver(Answer(5, {"n": 3}), b"")
    state.deliver(Fault("late", "", ref=5), b"")
    assert got == []
    state.deliver(Answer(6), b"")
    assert got == [Answer(6)]
    state.free_pipe()


@pytest.mark.parametrize(
    ("code", "kind"), [("fenced", FencedError), ("nondeterministic", NondeterministicError), ("size", FaultError)]
)
def test_faults_become_typed_errors(code: str, kind: type[FaultError]) -> None:
    state = state_of([])
    request = Request(Outgoing.of(Ask(1, "jobs")))
    state.ask(1, request)
    state.deliver(Fault(code, "why", ref=1), b"")
    assert type(request.error) is kind
    assert request.error.code == code
    assert state.fatal is None
    state.free_pipe()


def test_fatal_fault_ends_every_wait() -> None:
    got: list[Message] = []
    state = state_of(got)
    requests = [Request(Outgoing.of(Ask(ref, "jobs"))) for ref in (1, 2)]
    for ref, request in enumerate(requests, 1):
        state.ask(ref, request)
    state.deliver(Fault("fenced", "gone", ref=1, fatal=True), b"")
    assert isinstance(state.fatal, FencedError)
    assert all(isinstance(request.error, FencedError) for request in requests)
    assert [m.fatal for m in got if isinstance(m, Fault)] == [True]
    state.free_pipe()


def test_a_gather_opened_otherwise_leaves_the_link_up() -> None:
    """The job process still has to say how the job ended."""
    got: list[Message] = []
    state = state_of(got)
    state.deliver(Fault("nondeterministic", "why", ref=7, fatal=True), b"")
    assert state.fatal is None
    assert [m.code for m in got if isinstance(m, Fault)] == ["nondeterministic"]
    state.free_pipe()


def test_waking_a_freed_link_writes_into_nobodys_file(tmp_path: Path) -> None:
    state = state_of([])
    state.free_pipe()
    with (tmp_path / "other").open("wb") as other, (tmp_path / "another").open("wb") as another:
        state.wake()
        state.free_pipe()
    assert other.closed
    assert another.closed
    assert [(tmp_path / name).stat().st_size for name in ("other", "another")] == [0, 0]


def test_no_broker() -> None:
    before = fds()
    with capture_logs() as logs:
        link = Link("tcp://127.0.0.1:9", hello())
        with pytest.raises(LinkTimeout, match="no broker"):
            link.start(0.3)
    assert link.state == "closed"
    assert len(logs) <= 1
    assert fds() <= before
    with pytest.raises(LinkError):
        link.request(Ask(link.next_ref(), "jobs"), timeout_s=5)


def test_link_that_never_starts_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    link = Link("tcp://127.0.0.1:9", hello())
    link.close()
    link.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "message",
    [
        EndJob(1, JobId("j"), 1, "FINISHED:FAILED", "x" * 20_000),
        Commit(1, JobId("j"), 1, 0, record={"text": "x" * 70_000}),
        Commit(1, JobId("j"), 1, 0, record={"loss": float("nan")}),
        Ask(1, "w" * 300),
    ],
    ids=["long reason", "large record", "nan", "long word"],
)
def test_what_no_broker_would_read_is_the_senders_error(message: Any) -> None:
    """In the sender's thread and at once: the link must not try it again and again, and nobody waits for an answer."""
    link = Link("tcp://127.0.0.1:9", hello())
    with pytest.raises(CodecError):
        link.request(message)
    link.close()
