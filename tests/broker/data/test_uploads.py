"""Uploads without sockets: this test plays the peers, the control process and the disk's thread."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.transfers import CONTROL, Limits
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.messages import (
    Abort,
    Finish,
    Grant,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
)
from fedloom.serialization.stream import ChunkPlan

A, B = b"route-a", b"route-b"
S1, S2 = "1" * 32, "2" * 32
KIB = 1024
BODY = random.Random(1).randbytes(300 * KIB + 7)
LIMITS = Limits(chunk_bytes=64 * KIB, window=4, trust_local=True)


def ref(data: bytes = BODY, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


class TestUpload:
    def test_from_put_to_stored(self, bench: Any) -> None:
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

    def test_who_goes_on_after_the_end_has_not_heard_of_it_and_is_told_again(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1, ref=9))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1, ref().digest))
        bench.store(A)
        told = bench.one(A, Stored)
        bench.peer(A, Finish(S1, ref().digest))
        assert bench.take(A, Stored) == [], "on its way since before"
        for _ in range(3):
            bench.after(LIMITS.retry_s)
            bench.peer(A, Finish(S1, ref().digest))
            bench.chunk(A, S1, 4)
            assert bench.one(A, Stored) == told, "once"
        bench.admit(B, Put(ref(b"other"), S2))
        bench.peer(B, Abort(S2, "cancelled", ""))
        bench.after(LIMITS.retry_s)
        bench.peer(B, Finish(S2))
        assert bench.take(B, Abort) == [], "it ended that itself"

    def test_an_abort_that_was_lost_is_said_again(self, bench: Any) -> None:
        question = bench.admit(A, Put(ref(), S1))
        bench.chunk(A, S1, 0)
        bench.control(Abort(question.stream, "closed", "not wanted"))
        abort = bench.one(A, Abort)
        bench.after(LIMITS.retry_s)
        bench.chunk(A, S1, 1)
        assert bench.one(A, Abort) == abort

    def test_the_digest_may_come_with_finish_and_finish_before_the_last_chunk_is_asked_for(self, bench: Any) -> None:
        payload = replace(ref(id="r-1.1"), digest="")
        bench.admit(A, Put(payload, S1))
        bench.peer(A, Finish(S1, ref().digest))
        bench.chunks(A, S1, range(5))
        assert bench.store(A) == replace(payload, digest=ref().digest)
        assert bench.one(A, Stored).payload == replace(payload, digest=ref().digest)

    def test_no_bytes_at_all(self, bench: Any) -> None:
        bench.admit(A, Put(ref(b""), S1))
        bench.peer(A, Finish(S1))
        assert bench.store(A) == ref(b"")
        assert bench.spool.path(ref(b"").id).read_bytes() == b""

    def test_what_control_has_is_stored_at_once_and_what_it_refuses_is_aborted(self, bench: Any) -> None:
        bench.peer(A, Put(ref(), S1))
        bench.control(Stored(stream=bench.one(CONTROL, Put).stream, payload=ref()))
        assert bench.one(A, Stored).stream == S1
        bench.peer(A, Put(ref(), S2))
        bench.control(Abort(bench.one(CONTROL, Put).stream, "fenced", "another claim", 1.5))
        assert bench.one(A, Abort) == Abort(S2, "fenced", "another claim", 1.5)
        assert bench.transfers.idle

    def test_questions_are_repeated_until_answered(self, bench: Any) -> None:
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

    def test_a_repeated_put_goes_on_under_a_newer_epoch(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(3))
        bench.take(A, Grant)
        bench.peer(A, Put(ref(), S1))
        assert bench.take(CONTROL, Put) == []
        assert bench.one(A, Grant) == Grant(S1, 2, 3, 5)

    def test_another_stream_of_the_same_payload_takes_the_file_over(self, bench: Any) -> None:
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

    def test_who_comes_while_the_file_is_being_stored_is_answered_with_the_other(self, bench: Any) -> None:
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

    def test_a_peer_that_vanishes_leaves_the_partial_file_and_comes_back_to_it(self, bench: Any) -> None:
        bench.admit(A, Put(replace(ref(), id=PayloadId("r-1.1")), S1))
        bench.chunks(A, S1, range(3))
        bench.transfers.lost(A)
        assert bench.transfers.idle
        # less than one block is not worth remembering, so it starts anew here
        bench.admit(B, Put(replace(ref(), id=PayloadId("r-1.1")), S2))
        assert bench.one(B, Grant).next == 0

    def test_a_peer_that_vanishes_after_finish_is_still_stored(self, bench: Any) -> None:
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
    def test_after_a_restart_of_the_broker_whole_blocks_count(
        self, make_bench: Any, tmp_path: Path, chunk_bytes: int
    ) -> None:
        body = random.Random(2).randbytes(3 * BLOCK_BYTES + 99)
        limits = replace(LIMITS, chunk_bytes=chunk_bytes, window=64)
        bench = make_bench(tmp_path, limits)
        bench.admit(A, Put(ref(body), S1))
        sent = (2 * BLOCK_BYTES + 2 * chunk_bytes) // chunk_bytes
        bench.chunks(A, S1, range(sent), body)
        old_epoch = bench.one(A, Grant).epoch if len(bench.out[A]) == 1 else bench.take(A, Grant)[-1].epoch

        bench = make_bench(tmp_path, limits, epoch=old_epoch)  # nothing was closed: as after a kill
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

    def test_a_file_that_lost_its_row_is_checked_and_reported_again(self, bench: Any) -> None:
        bench.spool.store(ref().id, [BODY])
        bench.admit(A, Put(ref(), S1))
        bench.work_off()
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()
        assert bench.take(A, Grant) == []

    def test_a_damaged_file_that_lost_its_row_is_sent_again(self, bench: Any) -> None:
        bench.spool.store(ref().id, [BODY[:-1] + b"?"])
        bench.admit(A, Put(ref(), S1))
        bench.work_off()
        assert bench.one(A, Abort).retry_after_s > 0
        bench.admit(A, Put(ref(), S1))
        assert bench.one(A, Grant).next == 0

    def test_integrity_by_size_asks_for_no_digest(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, digested=False))
        payload = PayloadRef(PayloadId("r-1.1"), len(BODY))
        bench.admit(A, Put(payload, S1))
        bench.chunks(A, S1, range(3))
        bench = make_bench(tmp_path, replace(LIMITS, digested=False))
        bench.admit(A, Put(payload, S1))
        assert bench.one(A, Grant).next == 3
        bench.chunks(A, S1, range(3, 5))
        bench.peer(A, Finish(S1))
        assert bench.store(A) == payload
