from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fedloom.broker.spool import Spool
from fedloom.broker.transfers import CONTROL, Limits, Transfers
from fedloom.serialization import faultpoints
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.errors import EnvelopeError, StorageError
from fedloom.serialization.messages import (
    Abort,
    Bye,
    Chunk,
    Done,
    Fault,
    Finish,
    Get,
    Grant,
    Hello,
    Message,
    Packet,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Stored,
    Welcome,
)
from fedloom.serialization.stream import ChunkPlan

M = TypeVar("M")
A, B = b"route-a", b"route-b"
S1, S2 = "1" * 32, "2" * 32
KIB = 1024
BODY = random.Random(1).randbytes(300 * KIB + 7)
LIMITS = Limits(chunk_bytes=64 * KIB, window=4, trust_local=True)


def ref(data: bytes = BODY, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


class Bench:
    """A Transfers with its spool, a clock, and a control process that this test plays."""

    def __init__(self, root: Path, limits: Limits = LIMITS, epoch: int = 0) -> None:
        self.spool = Spool(root, "process")
        self.now = 100.0
        self.epoch = epoch
        self.transfers = Transfers(self.spool, limits, boot="ab" * 8, next_epoch=self.next_epoch, endpoint="tcp://d")
        self.out: dict[bytes, list[tuple[Message, bytes]]] = {CONTROL: [], A: [], B: []}
        self.hold_landings = False
        for session, route in (("sa", A), ("sb", B)):
            self.control(Welcome(session, "control-1"))
            self.peer(route, Hello("node", "executor", "boot", session=session))
            (welcome,) = self.take(route, Welcome)
            assert (welcome.session, welcome.chunk_bytes, welcome.window) == (
                session,
                limits.chunk_bytes,
                limits.window,
            )

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def peer(self, route: bytes, message: Message, tail: bytes = b"") -> None:
        self.transfers.on_peer(route, Packet(message, tail), self.now)
        self.collect()

    def control(self, message: Message) -> None:
        self.transfers.on_control(Packet(message), self.now)
        self.collect()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.transfers.tick(self.now)
        self.collect()

    def work(self, blocked: tuple[bytes, ...] = (), max_bytes: int = 1 << 20, chunks: int = 100) -> bool:
        more = self.transfers.work(blocked, self.now, max_bytes=max_bytes, chunks=chunks)
        self.collect()
        return more

    def work_off(self) -> None:
        for _ in range(1000):
            if not self.work():
                return
        raise AssertionError("work without end")

    def collect(self) -> None:
        if not self.hold_landings:
            landings = self.transfers.landings()
            gone = self.spool.finish_all([landing for _, landing in landings])
            for key, landing in landings:
                self.transfers.landed(key, self.now, gone=landing in gone)
        for out in self.transfers.outgoing():
            self.out.setdefault(out.route, []).append((out.message, bytes(out.tail)))

    def take(self, route: bytes, kind: type[M]) -> list[M]:
        """All messages of this kind that were sent to a peer since; they are gone then."""
        found = [m for m, _ in self.out[route] if isinstance(m, kind)]
        self.out[route] = [(m, t) for m, t in self.out[route] if not isinstance(m, kind)]
        return found

    def one(self, route: bytes, kind: type[M]) -> M:
        (message,) = self.take(route, kind)
        return message

    def admit(self, route: bytes, put: Put) -> Put:
        """Put, and let control admit it; the question that control got."""
        self.peer(route, put)
        question = self.one(CONTROL, Put)
        self.control(Grant(question.stream, 0, 0, 0))
        return question

    def chunk(self, route: bytes, stream: str, index: int, data: bytes = BODY) -> None:
        start, stop = ChunkPlan(len(data), self.transfers.limits.chunk_bytes).span(index)
        part = data[start:stop]
        self.peer(route, Chunk(stream, index, len(part), zlib.crc32(part)), part)

    def chunks(self, route: bytes, stream: str, indexes: range, data: bytes = BODY) -> None:
        for index in indexes:
            self.chunk(route, stream, index, data)

    def store(self, route: bytes) -> PayloadRef:
        """Play control: the landed payload gets its row."""
        report = self.one(CONTROL, Put)
        assert report.local == "landed"
        assert self.spool.exists(report.payload.id, report.payload.size)
        self.control(Stored(stream=report.stream, payload=report.payload))
        return report.payload


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def no_faults() -> Iterator[None]:
    yield
    faultpoints.arm("")


class TestUpload:
    def test_from_put_to_stored(self, bench: Bench) -> None:
        put = Put(ref(), S1, job="j", claim=3, task="t", attempt=2, ref=9)  # type: ignore[arg-type]
        question = bench.admit(A, put)
        assert replace(question, stream=S1) == put
        assert question.stream != S1 and len(question.stream) == 32
        assert bench.one(A, Grant) == Grant(S1, 1, 0, 4)
        bench.chunks(A, S1, range(4))
        assert [g.next for g in bench.take(A, Grant)] == [2, 4]
        bench.chunk(A, S1, 4)
        assert bench.take(A, Stored) == []
        bench.peer(A, Finish(S1, ref().digest))
        report = bench.take(CONTROL, Put)
        assert report == [replace(question, local="landed")]
        assert bench.spool.path(ref().id).read_bytes() == BODY
        assert bench.take(A, Stored) == []  # only after the row
        bench.control(Stored(stream=question.stream, payload=ref()))
        assert bench.one(A, Stored) == Stored(stream=S1, ref=9, payload=ref())
        assert len(bench.transfers.uploads) == 0
        assert list(bench.spool.incoming.iterdir()) == []

    def test_the_digest_may_come_with_finish_and_finish_before_the_last_chunk_is_asked_for(self, bench: Bench) -> None:
        payload = replace(ref(id="r-1.1"), digest="")
        bench.admit(A, Put(payload, S1))
        bench.peer(A, Finish(S1, ref().digest))
        bench.chunks(A, S1, range(5))
        assert bench.store(A) == replace(payload, digest=ref().digest)
        assert bench.one(A, Stored).payload == replace(payload, digest=ref().digest)

    def test_no_bytes_at_all(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(b""), S1))
        bench.peer(A, Finish(S1))
        assert bench.store(A) == ref(b"")
        assert bench.spool.path(ref(b"").id).read_bytes() == b""

    def test_what_control_has_is_stored_at_once_and_what_it_refuses_is_aborted(self, bench: Bench) -> None:
        bench.peer(A, Put(ref(), S1))
        bench.control(Stored(stream=bench.one(CONTROL, Put).stream, payload=ref()))
        assert bench.one(A, Stored).stream == S1
        bench.peer(A, Put(ref(), S2))
        bench.control(Abort(bench.one(CONTROL, Put).stream, "fenced", "another claim", 1.5))
        assert bench.one(A, Abort) == Abort(S2, "fenced", "another claim", 1.5)
        assert bench.transfers.idle

    def test_questions_are_repeated_until_answered(self, bench: Bench) -> None:
        bench.peer(A, Put(ref(), S1))
        first = bench.one(CONTROL, Put)
        bench.after(1.0)
        assert bench.take(CONTROL, Put) == []
        bench.after(1.5)
        assert bench.one(CONTROL, Put) == first
        bench.control(Grant(first.stream, 0, 0, 0))
        bench.control(Grant(first.stream, 0, 0, 0))
        assert len(bench.take(A, Grant)) == 1
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1))
        landed = bench.one(CONTROL, Put)
        bench.after(2.5)
        assert bench.one(CONTROL, Put) == landed

    def test_a_repeated_put_goes_on_under_a_newer_epoch(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(3))
        bench.take(A, Grant)
        bench.peer(A, Put(ref(), S1))
        assert bench.take(CONTROL, Put) == []
        assert bench.one(A, Grant) == Grant(S1, 2, 3, 5)

    def test_another_stream_of_the_same_payload_takes_the_file_over(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(3))
        bench.take(A, Grant)
        bench.admit(B, Put(ref(), S2))
        abort = bench.one(A, Abort)
        assert (abort.stream, abort.code) == (S1, "superseded")
        assert abort.retry_after_s > 0
        assert bench.one(B, Grant) == Grant(S2, 2, 3, 5)
        bench.chunk(A, S1, 3)  # still on its way: ignored, and not answered
        assert bench.out[A] == []
        bench.chunks(B, S2, range(3, 5))
        bench.peer(B, Finish(S2))
        bench.store(B)
        assert bench.one(B, Stored).payload == ref()
        assert bench.take(A, Stored) == []

    def test_who_comes_while_the_file_is_being_stored_is_answered_with_the_other(self, bench: Bench) -> None:
        bench.hold_landings = True
        bench.admit(A, Put(ref(), S1, ref=1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1))
        bench.admit(B, Put(ref(), S2, ref=2))
        assert bench.take(B, Grant) == []
        bench.hold_landings = False
        bench.collect()
        bench.store(A)
        assert bench.one(A, Stored) == Stored(stream=S1, ref=1, payload=ref())
        assert bench.one(B, Stored) == Stored(stream=S2, ref=2, payload=ref())
        assert bench.transfers.idle

    def test_a_peer_that_vanishes_leaves_the_partial_file_and_comes_back_to_it(self, bench: Bench) -> None:
        bench.admit(A, Put(replace(ref(), id=PayloadId("r-1.1")), S1))
        bench.chunks(A, S1, range(3))
        bench.transfers.lost(A)
        assert bench.transfers.idle
        # less than one block is not worth remembering, so it starts anew here
        bench.admit(B, Put(replace(ref(), id=PayloadId("r-1.1")), S2))
        assert bench.one(B, Grant).next == 0

    def test_a_peer_that_vanishes_after_finish_is_still_stored(self, bench: Bench) -> None:
        bench.hold_landings = True
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1))
        bench.take(A, Grant)
        bench.transfers.lost(A)
        bench.hold_landings = False
        bench.collect()
        bench.store(A)
        assert bench.out[A] == []
        assert bench.transfers.idle

    @pytest.mark.parametrize("chunk_bytes", [1 << 20, 3 << 20, 1_000_003])
    def test_after_a_restart_of_the_broker_whole_blocks_count(self, tmp_path: Path, chunk_bytes: int) -> None:
        body = random.Random(2).randbytes(3 * BLOCK_BYTES + 99)
        limits = replace(LIMITS, chunk_bytes=chunk_bytes, window=64)
        bench = Bench(tmp_path, limits)
        bench.admit(A, Put(ref(body), S1))
        sent = (2 * BLOCK_BYTES + 2 * chunk_bytes) // chunk_bytes
        bench.chunks(A, S1, range(sent), body)
        old_epoch = bench.one(A, Grant).epoch if len(bench.out[A]) == 1 else bench.take(A, Grant)[-1].epoch

        bench = Bench(tmp_path, limits, epoch=old_epoch)  # nothing was closed: as after a kill
        bench.admit(B, Put(ref(body), S2))
        assert bench.take(B, Grant) == []
        assert bench.work(max_bytes=BLOCK_BYTES)  # a block a turn
        bench.work_off()
        grant = bench.one(B, Grant)
        assert grant.epoch > old_epoch
        kept = min(sent * chunk_bytes // BLOCK_BYTES, 3) * BLOCK_BYTES
        assert grant.next == kept // chunk_bytes
        bench.chunks(B, S2, range(grant.next, ChunkPlan(len(body), chunk_bytes).count), body)
        bench.peer(B, Finish(S2, ref(body).digest))
        bench.store(B)
        assert bench.spool.path(ref(body).id).read_bytes() == body
        assert bench.one(B, Stored).payload == ref(body)

    def test_a_file_that_lost_its_row_is_checked_and_reported_again(self, bench: Bench) -> None:
        bench.spool.store(ref().id, [BODY])
        bench.admit(A, Put(ref(), S1))
        bench.work_off()
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()
        assert bench.take(A, Grant) == []

    def test_a_damaged_file_that_lost_its_row_is_sent_again(self, bench: Bench) -> None:
        bench.spool.store(ref().id, [BODY[:-1] + b"?"])
        bench.admit(A, Put(ref(), S1))
        bench.work_off()
        assert bench.one(A, Abort).retry_after_s > 0
        bench.admit(A, Put(ref(), S1))
        assert bench.one(A, Grant).next == 0

    def test_integrity_by_size_asks_for_no_digest(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, digested=False))
        payload = PayloadRef(PayloadId("r-1.1"), len(BODY))
        bench.admit(A, Put(payload, S1))
        bench.chunks(A, S1, range(3))
        bench = Bench(tmp_path, replace(LIMITS, digested=False))
        bench.admit(A, Put(payload, S1))
        assert bench.one(A, Grant).next == 3
        bench.chunks(A, S1, range(3, 5))
        bench.peer(A, Finish(S1))
        assert bench.store(A) == payload


class TestBadUploads:
    def test_a_wrong_digest_drops_the_partial(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5), BODY[:-1] + b"?")
        bench.peer(A, Finish(S1, ref().digest))
        abort = bench.one(A, Abort)
        assert (abort.code, abort.retry_after_s) == ("corrupt", 0.0)
        assert list(bench.spool.incoming.iterdir()) == []
        assert not bench.spool.exists(ref().id)

    def test_finish_must_say_the_digest_of_the_put(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1, "0" * 64))
        assert bench.one(A, Abort).code == "corrupt"

    def test_gap_duplicate_and_a_flipped_bit_are_answered_by_the_watermark(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.take(A, Grant)
        bench.chunk(A, S1, 0)
        for index in (0, 2, 3):
            bench.chunk(A, S1, index)
            assert bench.one(A, Grant) == Grant(S1, 1, 1, 5)
        part = BODY[64 * KIB : 128 * KIB]
        bench.peer(A, Chunk(S1, 1, len(part), zlib.crc32(part)), part[:-1] + b"?")
        assert bench.one(A, Grant).next == 1
        for _ in range(2):
            bench.peer(A, Chunk(S1, 1, len(part), 0), part)
        assert bench.one(A, Abort).code == "corrupt"
        bench.take(A, Grant)
        bench.admit(A, Put(ref(), S1))
        assert bench.one(A, Grant).next == 0

    def test_chunks_nobody_granted_end_it(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        for _ in range(200):
            bench.chunk(A, S1, 4)
        assert bench.one(A, Abort).code == "protocol"

    @pytest.mark.parametrize(
        ("put", "code"),
        [
            (Put(replace(ref(), id=PayloadId("../x")), S1), "name"),
            (Put(ref(), S1, local="../x"), "name"),
            (Put(ref(), S1, local="b3-1.part"), "name"),
            (Put(replace(ref(), size=1 << 41), S1), "size"),
            (Put(replace(ref(), digest="0" * 64), S1), "digest"),
        ],
    )
    def test_refused_before_control_is_asked(self, bench: Bench, put: Put, code: str) -> None:
        bench.peer(A, put)
        assert bench.one(A, Abort).code == code
        assert bench.take(CONTROL, Put) == []

    def test_open_streams_are_bounded(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, max_streams=3, max_streams_per_peer=2))
        for index in range(3):
            bench.peer(A, Put(ref(id=f"r-{index}.1"), f"{index:032x}"))
        abort = bench.one(A, Abort)
        assert (abort.code, abort.stream) == ("busy", f"{2:032x}")
        assert abort.retry_after_s > 0
        for index in range(2):
            bench.peer(B, Put(ref(id=f"r-{index}.2"), f"{index:032x}"))
        assert bench.one(B, Abort).code == "busy"
        assert len(bench.transfers.uploads) == 3

    def test_a_stalled_stream_ends_and_its_file_stays(self, bench: Bench) -> None:
        body = BODY * 20
        bench.admit(A, Put(ref(body), S1))
        for start in range(0, 92, 2):
            bench.chunks(A, S1, range(start, start + 2), body)
        bench.take(A, Grant)
        for _ in range(29):
            bench.after(1.0)
        assert len(bench.take(A, Grant)) == 29  # it is asked for more all the time
        bench.after(1.5)
        abort = bench.one(A, Abort)
        assert abort.code == "stall" and abort.retry_after_s > 0
        bench.admit(A, Put(ref(body), S1))
        bench.work_off()
        assert bench.one(A, Grant).next == 64  # one whole block

    def test_a_stream_without_its_finish_stalls_too(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5))
        bench.after(31.0)
        assert bench.one(A, Abort).code == "stall"

    def test_a_full_disk_is_told_and_other_failures_are_loud(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fedloom.broker import incoming

        error = OSError(28, "No space left on device")

        def fail(*args: Any) -> int:
            raise error

        monkeypatch.setattr(incoming, "write_at", fail)
        bench.admit(A, Put(ref(), S1))
        bench.chunk(A, S1, 0)
        abort = bench.one(A, Abort)
        assert abort.code == "full" and abort.retry_after_s > 0
        error = OSError(5, "I/O error")
        bench.admit(A, Put(ref(), S1))
        with pytest.raises(StorageError, match="I/O"):
            bench.chunk(A, S1, 0)

    def test_a_landing_that_control_refuses_is_aborted(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(id="r-1.1"), S1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1))
        bench.control(Abort(bench.one(CONTROL, Put).stream, "stale", "attempt 1 of 2"))
        assert bench.one(A, Abort) == Abort(S1, "stale", "attempt 1 of 2")

    @pytest.mark.usefixtures("no_faults")
    def test_fault_points_are_passed(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        killed: list[int] = []
        monkeypatch.setattr(faultpoints.os, "kill", lambda pid, sig: killed.append(sig))
        faultpoints.arm("data.mid_upload:3,data.after_file_before_row:1")
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(2))
        assert killed == []
        bench.chunk(A, S1, 2)
        assert len(killed) == 1
        faultpoints.arm("data.after_file_before_row:1")
        bench.chunks(A, S1, range(3, 5))
        bench.peer(A, Finish(S1))
        assert len(killed) == 2


class TestLocal:
    def hand_over(self, bench: Bench, data: bytes = BODY, payload: PayloadRef | None = None) -> None:
        bench.spool.incoming_path("x.up").write_bytes(data)
        bench.admit(A, Put(payload or ref(), S1, local="x.up"))
        bench.work_off()

    def test_a_whole_file_is_moved(self, bench: Bench) -> None:
        self.hand_over(bench)
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()
        assert bench.spool.path(ref().id).read_bytes() == BODY
        assert list(bench.spool.incoming.iterdir()) == []

    def test_reading_it_takes_turns(self, bench: Bench) -> None:
        body = BODY * 40
        bench.spool.incoming_path("x.up").write_bytes(body)
        bench.admit(A, Put(ref(body), S1, local="x.up"))
        turns = 0
        while bench.work(max_bytes=BLOCK_BYTES):
            turns += 1
        assert turns >= len(body) // BLOCK_BYTES
        assert bench.store(A) == ref(body)

    def test_a_wrong_size_or_digest_is_refused(self, bench: Bench) -> None:
        self.hand_over(bench, BODY + b"x")
        assert bench.one(A, Abort).code == "size"
        self.hand_over(bench, BODY[:-1] + b"?")
        assert bench.one(A, Abort).code == "corrupt"
        assert list(bench.spool.incoming.iterdir()) == []

    def test_only_regular_files_that_are_there(self, bench: Bench, tmp_path: Path) -> None:
        bench.admit(A, Put(ref(), S1, local="none"))
        assert bench.one(A, Abort).code == "missing"
        (tmp_path / "secret").write_bytes(BODY)
        bench.spool.incoming_path("link").symlink_to(tmp_path / "secret")
        bench.spool.incoming_path("folder").mkdir()
        for name in ("link", "folder"):
            bench.admit(A, Put(ref(), S1, local=name))
            assert bench.one(A, Abort).code == "not_regular"

    def test_one_that_is_taken_away_meanwhile(self, bench: Bench) -> None:
        bench.hold_landings = True
        self.hand_over(bench)
        bench.spool.incoming_path("x.up").unlink()
        bench.hold_landings = False
        bench.collect()
        assert bench.one(A, Abort).code == "missing"
        assert bench.transfers.idle

    def test_one_that_control_has_already_is_removed(self, bench: Bench) -> None:
        bench.spool.incoming_path("x.up").write_bytes(BODY)
        bench.peer(A, Put(ref(), S1, local="x.up"))
        bench.control(Stored(stream=bench.one(CONTROL, Put).stream, payload=ref()))
        assert bench.one(A, Stored).payload == ref()
        assert list(bench.spool.incoming.iterdir()) == []

    def test_repeated_after_a_crash_between_file_and_row(self, bench: Bench) -> None:
        bench.spool.store(ref().id, [BODY])
        bench.admit(A, Put(ref(), S1, local="x.up"))
        bench.work_off()
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()

    def test_refused_without_trust(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, trust_local=False))
        bench.peer(A, Put(ref(), S1, local="x.up"))
        assert bench.one(A, Abort).code == "not_local"

    def test_integrity_by_size_moves_it_unread(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, digested=False))
        bench.spool.incoming_path("x.up").write_bytes(BODY)
        bench.admit(A, Put(PayloadRef(PayloadId("r-1.1"), len(BODY)), S1, local="x.up"))
        bench.store(A)
        assert bench.one(A, Stored).payload == PayloadRef(PayloadId("r-1.1"), len(BODY))


class TestDownload:
    @pytest.fixture(autouse=True)
    def stored(self, bench: Bench) -> None:
        bench.spool.store(ref().id, [BODY])

    def received(self, bench: Bench, route: bytes) -> dict[int, bytes]:
        out: dict[int, bytes] = {}
        for message, tail in bench.out[route]:
            if isinstance(message, Chunk):
                assert (message.length, message.crc32) == (len(tail), zlib.crc32(tail))
                out[message.index] = tail
        bench.take(route, Chunk)
        return out

    def test_as_grants_allow(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 2))
        bench.work()
        got = self.received(bench, A)
        assert sorted(got) == [0, 1]
        bench.work()
        assert bench.out[A] == []
        bench.peer(A, Grant(S1, 77, 2, 6))
        bench.work()
        got |= self.received(bench, A)
        assert b"".join(got[i] for i in sorted(got)) == BODY
        assert bench.one(A, Finish) == Finish(S1, ref().digest)
        bench.peer(A, Grant(S1, 77, 5, 5))
        assert bench.transfers.idle

    def test_a_repeated_get_goes_on_where_it_says(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 9))
        bench.work()
        assert len(self.received(bench, A)) == 5
        bench.take(A, Finish)
        bench.peer(A, Get(S1, ref().id, 3, 9))
        bench.work()
        assert sorted(self.received(bench, A)) == [3, 4]
        bench.one(A, Finish)
        bench.peer(A, Get(S1, ref().id, 5, 5))
        bench.work()
        bench.one(A, Finish)

    def test_turns_are_fair_bounded_and_spare_blocked_peers(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 9))
        bench.peer(A, Get(S2, ref().id, 0, 9))
        bench.peer(B, Get(S1, ref().id, 0, 9))
        assert bench.work(chunks=6)
        streams = [(m.stream, r) for r in (A, B) for m in bench.take(r, Chunk)]
        assert sorted(streams) == sorted([(S1, A), (S2, A), (S1, B)] * 2)
        bench.work(blocked=(A,))
        assert bench.take(A, Chunk) == []
        assert len(bench.take(B, Chunk)) == 3
        bench.work()
        assert len(bench.take(A, Chunk)) == 6

    def test_what_is_not_here_is_aborted(self, bench: Bench) -> None:
        for payload in ("r-9.9", "../../etc/passwd"):
            bench.peer(A, Get(S1, PayloadId(payload), 0, 1))
            assert bench.one(A, Abort).code == "unknown"
        assert bench.transfers.idle

    def test_no_bytes_at_all(self, bench: Bench) -> None:
        bench.spool.store("p-0", [])
        bench.peer(A, Get(S1, PayloadId("p-0"), 0, 0))
        bench.work()
        assert bench.one(A, Finish) == Finish(S1, "")

    def test_a_deleted_payload_is_sent_to_its_end(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 1))
        bench.work()
        bench.spool.delete(ref().id)
        bench.peer(A, Grant(S1, 1, 1, 9))
        bench.work()
        got = self.received(bench, A)
        assert b"".join(got[i] for i in sorted(got)) == BODY

    def test_one_cut_short_is_aborted(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 9))
        with bench.spool.path(ref().id).open("r+b") as file:
            file.truncate(100 * KIB)
        bench.work()
        assert bench.one(A, Abort).code == "unreadable"
        assert bench.transfers.idle

    def test_a_silent_peer_is_given_up(self, bench: Bench) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 2))
        bench.work()
        bench.after(31.0)
        assert bench.one(A, Abort).code == "stall"
        bench.peer(A, Get(S1, ref().id, 0, 9))
        bench.work()
        bench.after(6.0)  # sent whole: an answer is not owed
        assert bench.take(A, Abort) == []
        assert bench.transfers.idle

    def test_streams_are_bounded_and_can_be_cancelled(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, max_streams_per_peer=2))
        bench.spool.store(ref().id, [BODY])
        for index in range(3):
            bench.peer(A, Get(f"{index:032x}", ref().id, 0, 1))
        assert bench.one(A, Abort).code == "busy"
        bench.peer(A, Abort(f"{0:032x}", "cancelled"))
        assert len(bench.transfers.downloads) == 1
        bench.peer(A, Bye())
        assert bench.transfers.idle


class TestSessions:
    def test_a_hello_waits_for_its_session(self, bench: Bench) -> None:
        bench.take(CONTROL, Hello)
        bench.peer(b"c", Hello("n", "job", "b", session="sc"))
        assert b"c" not in bench.out
        bench.peer(b"c", Put(ref(), S1))
        bench.after(1.0)
        assert bench.one(CONTROL, Hello).features == ("tcp://d",)  # control may have been restarted
        bench.control(Welcome("sc", "control-1"))
        assert bench.one(b"c", Welcome).session == "sc"
        bench.peer(b"c", Ping())
        assert bench.take(b"c", Pong) == [Pong()]

    def test_an_unknown_session_is_refused_after_a_while(self, bench: Bench) -> None:
        bench.peer(b"c", Hello("n", "job", "b", session="sc"))
        bench.after(1.9)
        assert b"c" not in bench.out
        bench.after(0.2)
        assert bench.one(b"c", Fault).code == "session"
        assert bench.transfers.idle

    def test_nothing_without_hello_and_answers_are_rationed(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, replace(LIMITS, faults_per_s=5))
        for _ in range(50):
            bench.peer(b"c", Put(ref(), S1))
        assert [f.code for f in bench.take(b"c", Fault)] == ["session"] * 5
        bench.after(1.0)
        bench.peer(b"c", Put(ref(), S1))
        assert len(bench.take(b"c", Fault)) == 1

    def test_an_ended_session_ends_its_streams(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.admit(B, Put(ref(id="r-1.1"), S2))
        bench.control(Bye("sa"))
        assert bench.one(A, Fault).code == "session"
        assert len(bench.transfers.uploads) == 1
        bench.peer(A, Hello("n", "job", "b", session="sa"))
        assert bench.take(A, Welcome) == []

    def test_a_reconnect_replaces_the_old_link(self, bench: Bench) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunk(A, S1, 0)
        bench.peer(b"c", Hello("node", "executor", "boot", session="sa"))
        bench.one(b"c", Welcome)
        assert bench.transfers.idle
        bench.chunk(A, S1, 1)
        assert bench.one(A, Fault).code == "session"

    def test_another_life_of_control_forgets_the_old_sessions(self, bench: Bench) -> None:
        bench.control(Welcome("sn", "control-2"))
        assert [bench.one(r, Fault).code for r in (A, B)] == ["session", "session"]
        bench.peer(b"c", Hello("node", "executor", "boot", session="sn"))
        bench.one(b"c", Welcome)

    def test_unknown_streams_are_told_once(self, bench: Bench) -> None:
        for _ in range(10):
            bench.chunk(A, S1, 0)
        abort = bench.one(A, Abort)
        assert abort.code == "unknown_stream" and abort.retry_after_s > 0
        bench.peer(A, Grant(S2, 1, 5, 5))  # the last grant of a download
        bench.peer(A, Finish(S1))
        assert bench.out[A] == []

    def test_bad_messages_are_counted_and_answered(self, bench: Bench) -> None:
        bench.peer(A, Done("j", "g", ()))  # type: ignore[arg-type]
        bench.peer(A, Put(ref(), "short"))
        bench.peer(A, Get("Z" * 32, ref().id, 0, 1))
        bench.peer(A, Chunk(S1, 0, 5, 0), b"four")
        bench.transfers.malformed(A, EnvelopeError("magic"), bench.now)
        bench.collect()
        assert [f.code for f in bench.take(A, Fault)] == ["malformed"] * 5
        assert bench.transfers.refused == {"WireError": 4, "EnvelopeError": 1}
        assert bench.transfers.idle
