"""Each bound of the data process is reached: it holds, the answer says what is allowed, and work goes on."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.broker.data import DataConfig, DataLoop
from fedloom.broker.transfers import CONTROL, Limits, Outgoing
from fedloom.serialization.messages import (
    Abort,
    Chunk,
    Event,
    Fault,
    Finish,
    Get,
    Grant,
    Hello,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Stored,
    Welcome,
)

A, B = b"route-a", b"route-b"
KIB = 1024
LIMITS = Limits(chunk_bytes=64 * KIB, window=4)
BODY = bytes(300 * KIB)


def ref(name: str, size: int = len(BODY)) -> PayloadRef:
    return PayloadRef(PayloadId(name), size)


def stream(number: int) -> str:
    return f"{number:032x}"


def told(bench: Any, name: str) -> dict[str, Any]:
    """What control was told last of a bound."""
    bench.take(CONTROL, Event)
    bench.transfers._told = {}
    bench.after(1.0)
    return bench.take(CONTROL, Event)[-1].data[name]


def works(bench: Any, route: bytes = B) -> None:
    """A payload comes in, whole."""
    bench.take(CONTROL, Put)
    put = Put(ref("r-works.1"), stream(0xFFFF), "j", task="works", attempt=1)
    bench.admit(route, put)
    bench.chunks(route, put.stream, range(4), BODY)
    bench.chunk(route, put.stream, 4, BODY)
    bench.peer(route, Finish(put.stream))
    bench.store(route)
    assert bench.take(route, Stored)[-1].payload.size == len(BODY)


def busy(bench: Any, route: bytes, name: str, most: int) -> None:
    """The one refusal, which is worth another try."""
    abort = bench.take(route, Abort)[-1]
    assert abort.code == "busy" and abort.retry_after_s > 0 and f"at most {most} ({name})" in abort.reason


def test_streams(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, max_streams=3))
    for n in range(5):
        bench.peer(A, Put(ref(f"r-{n}.1"), stream(n), "j", task=f"{n}", attempt=1))
    assert len(bench.transfers.uploads) == 3
    busy(bench, A, "max_streams", 3)
    assert told(bench, "max_streams") == {"limit": 3, "used": 3, "reached": 2}
    bench.peer(A, Abort(stream(0), "cancelled", ""))
    works(bench)


def test_streams_of_a_peer(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, max_streams_per_peer=2))
    bench.spool.store("b3-model", [BODY])
    for n in range(3):
        bench.peer(A, Put(ref(f"r-{n}.1"), stream(n), "j", task=f"{n}", attempt=1))
        bench.peer(A, Get(stream(100 + n), PayloadId("b3-model"), 0, 1))
    busy(bench, A, "max_streams_per_peer", 2)
    assert len(bench.transfers.uploads) == len(bench.transfers.downloads) == 2
    assert told(bench, "max_streams_per_peer") == {"limit": 2, "used": 2, "reached": 2}
    works(bench)


def test_payload_bytes(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, max_payload_bytes=len(BODY)))
    bench.peer(A, Put(ref("r-1.1", len(BODY) + 1), stream(1), "j", task="1", attempt=1))
    abort = bench.one(A, Abort)
    assert abort.code == "size" and not abort.retry_after_s
    assert str(len(BODY) + 1) in abort.reason and f"at most {len(BODY)} (max_payload_bytes)" in abort.reason
    assert told(bench, "max_payload_bytes")["reached"] == 1
    works(bench)


def test_window_bytes(make_bench: Any, tmp_path: Path) -> None:
    """All uploads share it: the more there are, the less each may send ahead, and each may send a chunk."""
    bench = make_bench(tmp_path, replace(LIMITS, window_bytes=8 * 64 * KIB))
    for n in range(20):
        bench.admit(A, Put(ref(f"r-{n}.1"), stream(n), "j", task=f"{n}", attempt=1))
    grants = bench.take(A, Grant)
    assert [g.limit for g in grants] == [4, 4, 2, 2] + [1] * 16
    bench.chunks(A, stream(0), range(4), BODY)
    assert bench.take(A, Grant)[-1].limit == 5, "the first has one chunk more from now on"
    found = told(bench, "window_bytes")
    assert found["limit"] == 8 * 64 * KIB and found["used"] <= (20 + 8) * 64 * KIB and found["reached"] > 16
    works(bench)


def test_peers(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, max_peers=2))
    for n in range(4):
        bench.peer(b"early%d" % n, Hello("n", "executor", "b", session=f"unknown{n}"))
    assert bench.take(b"early3", Fault)[-1].code == "too_many"
    assert told(bench, "max_peers")["reached"] == 2
    works(bench)
    for n in range(3):
        bench.control(Welcome(f"s{n}", "control-1"))
    assert len(bench.transfers._sessions) == 2, "control bounds the sessions first: max_sessions"


def test_faults(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, faults_per_s=5))
    strangers = [b"stranger%d" % n for n in range(50)]
    for route in strangers:
        bench.peer(route, Ping())
    assert sum(len(bench.take(route, Fault)) for route in strangers if route in bench.out) == 5
    assert told(bench, "faults_per_s")["reached"] == 45
    works(bench)


def test_streams_that_ended(make_bench: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, replace(LIMITS, max_ended=10))
    for n in range(30):
        bench.peer(A, Abort(stream(n), "cancelled", ""))
    assert told(bench, "max_ended") == {"limit": 10, "used": 10, "reached": 20}
    bench.take(A, Abort)
    bench.peer(A, Chunk(stream(29), 0, 1, 0), b"x")
    assert not bench.take(A, Abort), "those that are remembered are not answered"
    works(bench)


def loop_of(tmp_path: Path, **bounds: int) -> DataLoop:
    config = DataConfig(tmp_path / "s", f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/i", bounds=bounds)
    return DataLoop(config)


def test_messages_for_a_peer(tmp_path: Path) -> None:
    """A peer that takes nothing is dropped, with what waits for it; it says Hello again and goes on."""
    loop = loop_of(tmp_path, peer_outbox_messages=5)
    try:
        loop._outboxes[A] = deque()  # its socket was full
        loop.transfers._routes[A] = "s"
        for _ in range(5):
            loop._send(Outgoing(A, Pong()))
        assert len(loop._outboxes[A]) == 5 and A in loop.transfers._routes
        loop._send(Outgoing(A, Pong()))
        assert A not in loop._outboxes and A not in loop.transfers._routes
        assert loop.transfers.figures()["peer_outbox_messages"].reached == 1
    finally:
        loop.close()


def test_messages_for_control(tmp_path: Path) -> None:
    """Control is away: the oldest questions go, each is asked again."""
    loop = loop_of(tmp_path, control_outbox_messages=5)
    try:
        for _ in range(20):
            loop._send(Outgoing(CONTROL, Pong()))
        assert len(loop._outboxes[CONTROL]) == 5
        assert loop.transfers.figures()["control_outbox_messages"].reached == 15
    finally:
        loop.close()
