"""The data process's loop over real sockets; this test plays the control process and the peers."""

from __future__ import annotations

import os
import random
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fedloom.broker.data import DataConfig, DataLoop, main
from fedloom.broker.sockets import free_endpoint
from fedloom.broker.spool import Spool
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.errors import FaultError, LinkError
from fedloom.serialization.messages import (
    Abort,
    Bye,
    Chunk,
    Fault,
    Finish,
    Get,
    Grant,
    Hello,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    Welcome,
)
from fedloom.serialization.stream import ChunkPlan

M = TypeVar("M")
KIB = 1024
S1, S2 = "1" * 32, "2" * 32
TIMEOUT_S = 20.0


def ref(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


BODY = random.Random(3).randbytes(3 * 1024 * KIB + 5)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_up_and_down(world: Any, durability: str) -> None:
    world.data(durability=durability)
    assert world.control.hello is not None
    assert world.control.hello.features == (world.config.bind,)
    peer = world.peer()
    payload = ref(BODY)
    answer, sent = peer.upload(BODY, Put(payload, S1, task="t", attempt=1))  # type: ignore[arg-type]
    assert answer == Stored(stream=S1, payload=payload)
    assert sent == ChunkPlan(len(BODY), 64 * KIB).count
    assert [q.local for q in world.control.questions] == ["", "landed"]
    assert {(q.task, q.attempt) for q in world.control.questions} == {("t", 1)}
    assert Spool(world.store).path(payload.id).read_bytes() == BODY
    assert peer.download(payload) == BODY
    assert peer.download(payload, S2, have=BODY[: 10 * 64 * KIB]) == BODY
    other = world.peer("s2")
    assert other.upload(BODY, Put(payload, S1)) == (Stored(stream=S1, payload=payload), 0)  # control has it


def test_many_peers_at_once(world: Any) -> None:
    world.data()
    bodies = {s: random.Random(s).randbytes(700 * KIB) for s in ("s1", "s2", "s3")}
    peers = {s: world.peer(s) for s in bodies}
    results: dict[str, Any] = {}

    def go(session: str) -> None:
        data = bodies[session]
        answer, _ = peers[session].upload(data, Put(ref(data), S1))
        results[session] = (answer, peers[session].download(ref(data)))

    threads = [threading.Thread(target=go, args=(s,)) for s in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert results == {s: (Stored(stream=S1, payload=ref(d)), d) for s, d in bodies.items()}


def test_resume_after_the_data_loop_was_restarted(world: Any) -> None:
    body = random.Random(4).randbytes(3 * BLOCK_BYTES)
    payload = ref(body, "r-t.1")
    first = world.data()
    peer = world.peer()
    grant, _ = peer.upload(body, Put(payload, S1), until=150)
    assert isinstance(grant, Grant)
    first.close()
    world.control.ready.clear()
    world.data()
    again = world.peer("s2")  # another process of the executor, with another stream
    answer, sent = again.upload(body, Put(payload, S2))
    assert answer == Stored(stream=S2, payload=payload)
    assert sent == 64  # one block of the three: two were there
    assert Spool(world.store).path(payload.id).read_bytes() == body


def test_the_same_link_goes_on_after_a_restart(world: Any) -> None:
    """The socket reconnects by itself; its first chunk is answered with Fault "session", then Hello and Put again."""
    body = random.Random(5).randbytes(2 * BLOCK_BYTES)
    payload = ref(body)
    first = world.data()
    peer = world.peer()
    before, _ = peer.upload(body, Put(payload, S1), until=100)
    assert isinstance(before, Grant)
    first.close()
    world.control.ready.clear()
    world.data()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert time.monotonic() < deadline
        peer.chunk(S1, body, 0)  # IMMEDIATE: blocks until the connection stands again
        if peer.socket.poll(200) and isinstance(fault := peer.receive().message, Fault):
            assert fault.code == "session"
            break
    peer.send(Hello("node", "executor", "boot", session="s1"))
    while not isinstance(message := peer.receive().message, Welcome):
        assert isinstance(message, Fault | Grant)
    answer, sent = peer.upload(body, Put(payload, S1))
    assert answer == Stored(stream=S1, payload=payload)
    assert sent == 64


def test_a_bad_digest_is_aborted(world: Any) -> None:
    world.data()
    peer = world.peer()
    answer, _ = peer.upload(BODY[:-1] + b"?", Put(ref(BODY), S1))
    assert isinstance(answer, Abort)
    assert (answer.stream, answer.code) == (S1, "corrupt")
    assert list(Spool(world.store).incoming.iterdir()) == []
    assert peer.upload(BODY, Put(ref(BODY), S2))[0] == Stored(stream=S2, payload=ref(BODY))


def test_oversize_payloads_and_frames(world: Any) -> None:
    world.data(bounds={"max_payload_bytes": 1000})
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    assert peer.expect(Abort).code == "size"
    small = b"x" * 900
    peer.send(Put(ref(small), S2))
    assert peer.expect(Grant).limit == 1
    big = b"y" * (64 * KIB + 1)  # over the link's tail, under the socket's last line
    peer.send(Chunk(S2, 0, len(big), zlib.crc32(big)), big)
    assert peer.expect(Fault).code == "malformed"
    peer.chunk(S2, small, 0)
    peer.send(Finish(S2))
    assert peer.expect(Stored).payload == ref(small)


def test_gaps_are_answered_with_the_watermark(world: Any) -> None:
    world.data()
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    grant = peer.expect(Grant)
    for index in (3, 1, 7):
        peer.chunk(S1, BODY, index)
        assert peer.expect(Grant) == grant
    answer, sent = peer.upload(BODY, Put(ref(BODY), S1))
    assert answer == Stored(stream=S1, payload=ref(BODY))
    assert sent == ChunkPlan(len(BODY), 64 * KIB).count


@pytest.mark.process
def test_a_stalled_stream_is_aborted(world: Any) -> None:
    world.data(stall_s=1.2)
    peer = world.peer()
    peer.send(Put(ref(BODY), S1))
    peer.expect(Grant)
    peer.chunk(S1, BODY, 0)
    started = time.monotonic()
    abort = peer.expect(Abort)
    assert abort.code == "stall" and abort.retry_after_s > 0
    assert 0.9 < time.monotonic() - started < 10


def test_local_files_are_taken_by_name(world: Any) -> None:
    world.data()
    spool = Spool(world.store)
    peer = world.peer()
    spool.incoming_path("x.up").write_bytes(BODY)
    peer.send(Put(ref(BODY), S1, local="x.up"))
    assert peer.expect(Stored) == Stored(stream=S1, payload=ref(BODY))
    assert spool.path(ref(BODY).id).read_bytes() == BODY
    assert not spool.incoming_path("x.up").exists()


def test_garbage_does_not_stop_the_loop(world: Any) -> None:
    world.data()
    peer = world.peer()
    garbage: list[list[bytes]] = [[b"x"], [b"x"] * 5, [b"", b""], [os.urandom(16), b"{}"], [b"\0" * 16, b"", b"tail"]]
    for frames in garbage:
        peer.socket.send_multipart(frames)
        assert peer.expect(Fault).code == "malformed"
    stranger = world.peer(greet=False)
    stranger.send(Put(ref(BODY), S1))
    assert stranger.expect(Fault).code == "session"
    stranger.send(Hello("n", "client", "b", session="nobody"))
    assert stranger.expect(Fault).code == "session"
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))


def test_a_bug_in_handling_a_message_is_counted_and_survived(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world.data()
    peer = world.peer()

    def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(data.loop.transfers.downloads, "on_get", bug)
        peer.send(Get(S1, ref(BODY).id, 0, 1))
        peer.send(Put(ref(BODY), S1))
        peer.expect(Grant)
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))


def test_an_ended_session_is_told(world: Any) -> None:
    world.data()
    peer = world.peer()
    world.control.orders.append(Bye("s1"))
    assert peer.expect(Fault).code == "session"


@pytest.mark.process
def test_control_that_is_slow_to_answer_is_asked_again(world: Any) -> None:
    world.data()
    world.control.answer = lambda put: None if len(world.control.questions) == 1 else world.control.admit(put)
    peer = world.peer()
    assert peer.upload(BODY, Put(ref(BODY), S1))[0] == Stored(stream=S1, payload=ref(BODY))
    assert world.control.questions[0] == world.control.questions[1]


def test_a_slow_reader_is_not_sent_more_than_it_granted(world: Any) -> None:
    world.data()
    peer = world.peer()
    peer.upload(BODY, Put(ref(BODY), S1))
    peer.send(Get(S2, ref(BODY).id, 0, 3))
    got = [peer.expect(Chunk).index for _ in range(3)]
    assert got == [0, 1, 2]
    assert not peer.socket.poll(300)


def test_binds_that_are_not_allowed_or_not_free(tmp_path: Path) -> None:
    config = DataConfig(store=tmp_path / "s", bind="tcp://0.0.0.0:0", internal=f"ipc://{tmp_path}/i")
    with pytest.raises(FaultError, match="insecure"):
        DataLoop(config)
    endpoint = free_endpoint("tcp://127.0.0.1:*")
    first = DataLoop(replace(config, bind=endpoint))
    try:
        with pytest.raises(LinkError, match="in use"):
            DataLoop(replace(config, bind=endpoint))
    finally:
        first.close()


def test_config_travels_as_json(tmp_path: Path) -> None:
    config = DataConfig(tmp_path, "tcp://127.0.0.1:1", "ipc:///i", integrity="size", window=3, parent=7)
    assert DataConfig.from_json(config.to_json()) == config
    assert main([]) == 2
