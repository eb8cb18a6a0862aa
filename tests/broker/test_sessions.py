"""Sessions: reconnects, conflicts, silence, and outboxes with a bound."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.broker.sessions import Session, Sessions, Timing
from fedloom.serialization.errors import FaultError
from fedloom.serialization.messages import Hello, Pong


def hello(node: str = "executor/a", boot: str = "b1", role: Any = "executor", **fields: Any) -> Hello:
    return Hello(node=node, role=role, boot=boot, **fields)


def arrive(sessions: Sessions, peer: bytes, message: Hello, sites: tuple[str, ...] = (), now: float = 0.0) -> Session:
    arrival = sessions.hello(peer, message, sites, now)
    assert arrival.session is not None
    return arrival.session


def test_the_same_boot_is_a_reconnect() -> None:
    sessions = Sessions()
    first = arrive(sessions, b"p1", hello(), ("a",))
    first.push(Pong())
    sessions.unreachable(first, 1.0)
    arrival = sessions.hello(b"p2", hello(), ("a", "b"), 2.0)
    assert arrival.state == "again" and arrival.session is first
    assert first.lost_at is None and not first.outbox, "what was queued for the old connection is gone"
    assert sessions.of(b"p2") is first and sessions.of(b"p1") is None
    assert sessions.by_site == {"a": first, "b": first}


def test_another_boot_waits_for_the_word_of_the_first() -> None:
    sessions = Sessions(Timing(ping_s=5.0))
    first = arrive(sessions, b"p1", hello(), ("a",), 100.0)
    assert sessions.hello(b"p2", hello(boot="b2"), ("a",), 200.0).state == "wait"
    assert not sessions.settle_arrivals(200.0), "nothing is known before the probe"
    assert sessions.to_probe(200.0) == [first]
    assert not sessions.settle_arrivals(200.1)
    ((peer, message, sites, _, fault),) = sessions.settle_arrivals(200.5)
    assert (peer, message.boot, sites) == (b"p2", "b2", ("a",))
    assert fault is not None and fault.code == "name_taken" and "executor/a" in str(fault)
    assert not sessions.waiting


def test_traffic_of_the_first_decides_at_once() -> None:
    sessions = Sessions()
    first = arrive(sessions, b"p1", hello(), ("a",), 100.0)
    sessions.hello(b"p2", hello(boot="b2"), ("a",), 200.0)
    sessions.heard(first, 200.01)
    ((*_, fault),) = sessions.settle_arrivals(200.02)
    assert fault is not None


def test_a_closed_connection_is_taken_over_after_a_moment() -> None:
    sessions = Sessions(Timing(takeover_s=1.0))
    first = arrive(sessions, b"p1", hello(), ("a",), 100.0)
    sessions.hello(b"p2", hello(boot="b2"), ("a",), 200.0, b"tail")
    sessions.to_probe(200.0)
    sessions.unreachable(first, 200.0)
    assert not sessions.settle_arrivals(200.9)
    ((peer, message, sites, payload, fault),) = sessions.settle_arrivals(201.1)
    assert fault is None and payload == b"tail"
    arrival = sessions.hello(peer, message, sites, 201.1)
    assert arrival.state == "new" and arrival.ended == (first,)
    assert sessions.by_site["a"] is arrival.session and list(sessions.by_id) == [arrival.session.id]


def test_a_first_that_returns_keeps_its_name() -> None:
    sessions = Sessions(Timing(takeover_s=1.0))
    first = arrive(sessions, b"p1", hello(), ("a",), 100.0)
    sessions.unreachable(first, 200.0)
    assert sessions.hello(b"p2", hello(boot="b2"), ("a",), 200.1).state == "wait"
    sessions.hello(b"p3", hello(), ("a",), 200.5)
    ((*_, fault),) = sessions.settle_arrivals(200.6)
    assert fault is not None and sessions.of(b"p3") is first


def test_a_reconnect_may_not_take_a_site_of_another() -> None:
    sessions = Sessions()
    arrive(sessions, b"p1", hello(), ("a",))
    arrive(sessions, b"p2", hello("executor/b"), ("b",))
    with pytest.raises(FaultError) as refused:
        sessions.hello(b"p3", hello(), ("a", "b"), 1.0)
    assert refused.value.code == "name_taken"


@pytest.mark.parametrize(
    "message", [hello(node=""), hello(boot=""), hello("client/x", role="client")], ids=["node", "boot", "sites"]
)
def test_bad_hellos(message: Hello) -> None:
    with pytest.raises(FaultError) as refused:
        Sessions().hello(b"p", message, ("a",), 0.0)
    assert refused.value.code == "hello"


def test_silence_and_lost_connections_are_death() -> None:
    sessions = Sessions(Timing(ping_s=5.0, dead_s=30.0, lost_s=10.0))
    silent = arrive(sessions, b"p1", hello("client/1", role="client"))
    lost = arrive(sessions, b"p2", hello("client/2", role="client"))
    back = arrive(sessions, b"p3", hello("client/3", role="client"))
    sessions.unreachable(lost, 5.0)
    sessions.unreachable(back, 5.0)
    sessions.heard(back, 14.0)
    assert sessions.dead(15.0) == []
    assert sessions.dead(15.1) == [lost]
    sessions.end(lost)
    assert sessions.dead(30.1) == [silent]
    sessions.end(silent)
    assert list(sessions.by_node) == ["client/3"] and list(sessions.by_peer) == [b"p3"]


def test_silent_sessions_are_probed_once_a_ping() -> None:
    sessions = Sessions(Timing(ping_s=4.0))
    session = arrive(sessions, b"p1", hello("client/1", role="client"), now=100.0)
    assert sessions.to_probe(105.0) == []
    assert sessions.to_probe(106.5) == [session]
    assert sessions.to_probe(107.0) == []
    assert sessions.to_probe(110.6) == [session]


def test_outboxes_are_bounded() -> None:
    timing = Timing(outbox_messages=10, outbox_bytes=1_000_000)
    sessions = Sessions(timing)
    session = arrive(sessions, b"p1", hello("client/1", role="client"))
    for _ in range(5):
        assert session.room
        session.push(Pong())
    assert not session.room, "derived messages leave half of it to answers"
    for _ in range(5):
        session.push(Pong())
    assert not session.overflowed and sessions.dead(0.0) == []
    session.push(Pong())
    assert session.overflowed and len(session.outbox) == 10 and sessions.dead(0.0) == [session]
    while session.outbox:
        session.pop()
    assert session.outbox_bytes == 0
    session.push(Pong(), b"x" * 600_000)
    assert not session.room
    outgoing = session.pop()
    session.unpop(outgoing)
    assert session.outbox_bytes > 600_000 and sessions.ready == {session.id}


def test_the_number_of_sessions_is_bounded() -> None:
    sessions = Sessions(Timing(max_sessions=2))
    arrive(sessions, b"p1", hello("client/1", role="client"))
    arrive(sessions, b"p2", hello("client/2", role="client"))
    with pytest.raises(FaultError) as refused:
        sessions.hello(b"p3", hello("client/3", role="client"), (), 0.0)
    assert refused.value.code == "too_many"
    assert arrive(sessions, b"p4", hello("client/1", role="client")), "a reconnect is no new one"
