"""Streams that lie: wrong bytes, wrong order, wrong size, another's, and those that never end."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import Abort, Chunk, Finish, Get, Grant, PayloadId, PayloadRef, Put, Stored

pytestmark = pytest.mark.process

MIB = 1024 * 1024
BODY = secrets.token_bytes(3 * MIB + 5)


def stream() -> str:
    return secrets.token_hex(16)


def ref_of(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


def fresh() -> tuple[bytes, PayloadRef]:
    """Bytes that the broker cannot have yet."""
    data = secrets.token_bytes(16) + BODY[16:]
    return data, ref_of(data)


class Sender:
    """An upload, chunk by chunk."""

    def __init__(self, peer: Any, payload: PayloadRef, data: bytes, **put: Any) -> None:
        self.peer, self.data, self.stream = peer, data, stream()
        self.put = Put(payload, self.stream, **put)
        peer.put(self.put)

    def granted(self) -> Grant:
        return self.peer.take_data(Grant, where=lambda m: m.stream == self.stream)

    def chunk(self, index: int, data: bytes | None = None, crc32: int | None = None, length: int | None = None) -> None:
        data = self.data[index * MIB : (index + 1) * MIB] if data is None else data
        crc32 = zlib.crc32(data) if crc32 is None else crc32
        self.peer.put(Chunk(self.stream, index, len(data) if length is None else length, crc32), data)

    def aborted(self, code: str, words: str = "") -> Abort:
        abort = self.peer.take_data(Abort, where=lambda m: m.stream == self.stream)
        assert abort.code == code, abort
        assert words in abort.reason, abort
        return abort

    def finish(self, digest: str = "") -> None:
        self.peer.put(Finish(self.stream, digest))

    def whole(self) -> Stored:
        """All of it, as it should be."""
        self.granted()
        for index in range(-(-len(self.data) // MIB)):
            self.chunk(index)
        self.finish()
        return self.peer.take_data(Stored, where=lambda m: m.stream == self.stream)


@pytest.fixture
def peer(wire: Callable[..., Any]) -> Any:
    return wire().open_data()


# ---------------------------------------------------------------- bytes


def test_wrong_bytes(ground: Any, peer: Any) -> None:
    """Of the right length and with checksums of their own: the digest tells, and the file goes."""
    data, payload = fresh()
    sender = Sender(peer, payload, data[:-1] + b"?")
    sender.granted()
    for index in range(4):
        sender.chunk(index)
    sender.finish()
    abort = sender.aborted("corrupt", f"not {payload.digest}")
    assert abort.retry_after_s == 0
    assert not list((ground.store / "incoming").glob(f"{payload.id}*"))


def test_a_digest_at_the_end_that_is_another(ground: Any, peer: Any) -> None:
    data, payload = fresh()
    sender = Sender(peer, replace(payload, id=PayloadId(f"p-{secrets.token_hex(8)}"), digest=""), data)
    sender.granted()
    for index in range(4):
        sender.chunk(index)
    sender.finish("0" * 64)
    sender.aborted("corrupt", "not " + "0" * 64)


def test_a_checksum_that_is_wrong_three_times(ground: Any, peer: Any) -> None:
    """Once is the network's, and asked for again; three times in a row is the sender's."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    sender.granted()
    sender.chunk(0, crc32=1)
    assert sender.granted().next == 0
    sender.chunk(0)
    for _ in range(3):
        sender.chunk(1, crc32=1)
    sender.aborted("corrupt", "3 chunks in a row do not match their checksum")
    assert Sender(peer, payload, data).whole().payload == payload


@pytest.mark.parametrize("length", [0, 1, MIB - 1], ids=["none", "one byte", "one less"])
def test_chunks_of_another_length(ground: Any, peer: Any, length: int) -> None:
    """Slow on purpose: each is asked for again, and after a window's worth the stream ends."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    sender.granted()
    for _ in range(80):
        sender.chunk(0, data[:length])
    sender.aborted("protocol", "of a length that is not the plan's")


def test_a_length_that_is_not_the_tail_s(ground: Any, peer: Any) -> None:
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    sender.granted()
    sender.chunk(0, length=5)
    peer.refused("malformed", f"chunk of {MIB} bytes says 5", data=True)
    sender.chunk(0)
    assert sender.granted().next <= 1


@pytest.mark.parametrize("index", [8, 10_000, 2**63], ids=["one too far", "far", "2^63"])
def test_chunks_beyond_the_grant(ground: Any, peer: Any, index: int) -> None:
    """Never written where they say: answered with what is granted, and after a window's worth the stream ends."""
    body = bytes(32 * MIB)
    payload = replace(ref_of(b""), id=PayloadId(f"p-{secrets.token_hex(8)}"), size=len(body), digest="")
    sender = Sender(peer, payload, body)
    assert sender.granted().limit == 8
    for _ in range(80):
        sender.chunk(index, b"x")
    sender.aborted("protocol", "chunks beyond the grant")
    used = [os.stat(path).st_size for path in (ground.store / "incoming").glob(f"{payload.id}*")]
    assert sum(used) < MIB


def test_chunks_out_of_order_and_twice(ground: Any, peer: Any) -> None:
    """Harmless: nothing is put together in memory, and no byte is taken twice."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    sender.granted()
    for index in (3, 1, 0, 0, 2, 0, 1, 1, 3, 2, 3):
        sender.chunk(index)
    sender.finish()
    sender.chunk(2)
    sender.chunk(3)
    assert peer.take_data(Stored, where=lambda m: m.stream == sender.stream).payload == payload
    got = ground.client.fetch(payload)
    assert got == data


def test_chunks_of_no_stream(ground: Any, peer: Any) -> None:
    """Said once a stream; a thousand of them are not answered a thousand times."""
    unknown = stream()
    for _ in range(1000):
        peer.put(Chunk(unknown, 0, 1, zlib.crc32(b"x")), b"x")
    abort = peer.take_data(Abort)
    assert (abort.stream, abort.code) == (unknown, "unknown_stream")
    peer.silent(Abort, data=True)


# ---------------------------------------------------------------- what is put


@pytest.mark.parametrize(
    ("put", "code", "words"),
    [
        ({"size": 1 << 50}, "size", "bytes; at most"),
        ({"digest": "0" * 64}, "digest", "is named by another digest than its own"),
        ({"id": PayloadId("r-guess.1")}, "payload_id", "is kept for the result of that attempt"),
    ],
    ids=["a petabyte", "another digest", "a result's name"],
)
def test_a_put_that_cannot_be(ground: Any, peer: Any, put: dict[str, Any], code: str, words: str) -> None:
    data, payload = fresh()
    sender = Sender(peer, replace(payload, **put), data)
    abort = sender.aborted(code, words)
    assert abort.retry_after_s == 0


def test_a_payload_of_another_size_under_a_known_id(ground: Any, peer: Any) -> None:
    """What is here stays; the same id with other bytes is a conflict."""
    data, payload = fresh()
    assert Sender(peer, payload, data).whole()
    sender = Sender(peer, replace(payload, size=7), data)
    sender.aborted("conflict", f"is here with {payload.size} bytes")


def test_for_another_s_task(ground: Any, wire: Callable[..., Any], peer: Any) -> None:
    """The data process says whose Put it is, and control knows whose task."""
    site = f"v-{secrets.token_hex(3)}"
    victim = wire("executor", site).open_data()
    ground.job.gather(site)
    assign, item = victim.work()
    data = secrets.token_bytes(100_000)
    payload = ref_of(data, f"r-{item.task}.1")
    owner = {"job": assign.job, "task": item.task, "attempt": 1}
    thief = wire("executor").open_data()
    Sender(thief, payload, data, **owner).aborted("forbidden", "does not work on task")
    Sender(peer, payload, data, **owner).aborted("forbidden", "does not work on task")
    claimed = ground.job.claimed
    other = fresh()[1]
    Sender(thief, other, b"", job=claimed.job, claim=claimed.claim).aborted("forbidden", "does not run job")
    assert Sender(victim, payload, data, **owner).whole().payload == payload


def test_a_stream_of_another_peer(ground: Any, wire: Callable[..., Any], peer: Any) -> None:
    """Streams belong to connections: grants, chunks and aborts for another's reach nothing."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    sender.granted()
    sender.chunk(0)
    thief = wire().open_data()
    thief.put(Chunk(sender.stream, 1, 1, zlib.crc32(b"x")), b"x")
    thief.take_data(Abort, where=lambda m: m.code == "unknown_stream")
    thief.put(Finish(sender.stream, "0" * 64))
    thief.put(Abort(sender.stream, "mine now"))
    thief.put(Grant(sender.stream, 9, 0, 4))
    for index in (1, 2, 3):
        sender.chunk(index)
    sender.finish()
    assert peer.take_data(Stored, where=lambda m: m.stream == sender.stream).payload == payload


@pytest.mark.parametrize("name", ["b3", "p"])
def test_a_payload_that_is_not_here(ground: Any, peer: Any, name: str) -> None:
    wanted = PayloadId(f"{name}-{secrets.token_hex(32)}")
    key = stream()
    peer.put(Get(key, wanted, 0, 8))
    abort = peer.take_data(Abort, where=lambda m: m.stream == key)
    assert abort.code == "unknown_payload", abort


def test_a_get_from_behind_the_end(ground: Any, peer: Any) -> None:
    data, payload = fresh()
    assert Sender(peer, payload, data).whole()
    key = stream()
    peer.put(Get(key, payload.id, 2**53, 2**53))
    peer.put(Get(stream(), payload.id, 0, 2**53))  # the whole of it at once: sent as its pipe takes it
    ground.honest_round()


# ---------------------------------------------------------------- without end


def test_puts_without_chunks(ground: Any, peer: Any) -> None:
    """A peer has at most 64 streams; the others are told to wait, and honest peers have theirs."""
    senders = [Sender(peer, ref_of(secrets.token_bytes(40_000)), b"") for _ in range(80)]
    granted = {peer.take_data(Grant).stream for _ in range(64)}
    busy = {peer.take_data(Abort, where=lambda m: m.code == "busy").stream for _ in range(16)}
    assert granted | busy == {sender.stream for sender in senders}
    ground.honest_round()


def test_a_grant_that_is_never_used(ground: Any, peer: Any) -> None:
    """It is repeated each second for as long as the stream may stand still, and holds no memory."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    first = sender.granted()
    again = sender.granted()
    assert (again.next, again.limit) == (first.next, first.limit)


def test_the_same_put_a_thousand_times(ground: Any, peer: Any) -> None:
    """One stream, one file, and an answer each, since any of them may be the repeat after a cut."""
    data, payload = fresh()
    sender = Sender(peer, payload, data)
    for _ in range(1000):
        peer.put(sender.put)
    sender.granted()
    for index in range(4):
        sender.chunk(index)
    sender.finish()
    assert peer.take_data(Stored, where=lambda m: m.stream == sender.stream).payload == payload


# ---------------------------------------------------------------- files by name


@pytest.mark.parametrize("name", ["../journal.db", "/etc/passwd", "a/b", "a\0b", ".token", "..", "x\n"])
def test_a_file_outside_of_incoming(ground: Any, peer: Any, name: str) -> None:
    """No such name leaves the message."""
    from fedloom.serialization.codec import pack
    from fedloom.serialization.envelope import pack_envelope

    body = pack({"payload": {"id": "p-x", "size": 1}, "stream": stream(), "local": name})
    peer.data.send_multipart([pack_envelope(Put.KIND, 0, body), body])
    peer.refused("malformed", r"Put\.local: .* is not of the form", data=True)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("link", "not_regular"), ("folder", "not_regular"), ("fifo", "not_regular"), ("none", "missing"),
     ("longer", "size"), ("other", "corrupt"), ("part", "name")],
)  # fmt: skip
def test_a_file_that_is_not_what_it_says(ground: Any, peer: Any, kind: str, code: str) -> None:
    """Links are not followed, folders and pipes are no files, and bytes are read before they count."""
    data, payload = b"some bytes of a result", ref_of(b"some bytes of a result", f"p-{secrets.token_hex(8)}")
    name = f"x-{secrets.token_hex(4)}.part" if kind == "part" else f"x-{secrets.token_hex(4)}"
    path = ground.store / "incoming" / name
    secret = ground.store / "secret"
    secret.write_bytes(data)
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "none":
        path.write_bytes({"longer": data + b"x", "other": data[::-1]}.get(kind, data))
    sender = Sender(peer, payload, b"", local=name)
    sender.aborted(code)
    assert secret.read_bytes() == data
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
