"""What uploads refuse, and files that local peers hand over."""

import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.transfers import CONTROL, Limits
from fedloom.serialization import faultpoints
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.errors import StorageError
from fedloom.serialization.messages import (
    Abort,
    Chunk,
    Finish,
    Grant,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
)

A, B = b"route-a", b"route-b"
S1, S2 = "1" * 32, "2" * 32
KIB = 1024
BODY = random.Random(1).randbytes(300 * KIB + 7)
LIMITS = Limits(chunk_bytes=64 * KIB, window=4, trust_local=True)


def ref(data: bytes = BODY, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


class TestBadUploads:
    def test_a_wrong_digest_drops_the_partial(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5), BODY[:-1] + b"?")
        bench.peer(A, Finish(S1, ref().digest))
        abort = bench.one(A, Abort)
        assert (abort.code, abort.retry_after_s) == ("corrupt", 0.0)
        assert list(bench.spool.incoming.iterdir()) == []
        assert not bench.spool.exists(ref().id)

    def test_finish_must_say_the_digest_of_the_put(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1, "0" * 64))
        assert bench.one(A, Abort).code == "corrupt"

    def test_gap_duplicate_and_a_flipped_bit_are_answered_by_the_watermark(self, bench: Any) -> None:
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

    def test_chunks_nobody_granted_end_it(self, bench: Any) -> None:
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
    def test_refused_before_control_is_asked(self, bench: Any, put: Put, code: str) -> None:
        bench.peer(A, put)
        assert bench.one(A, Abort).code == code
        assert bench.take(CONTROL, Put) == []

    def test_open_streams_are_bounded(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, max_streams=3, max_streams_per_peer=2))
        for index in range(3):
            bench.peer(A, Put(ref(id=f"r-{index}.1"), f"{index:032x}"))
        abort = bench.one(A, Abort)
        assert (abort.code, abort.stream) == ("busy", f"{2:032x}")
        assert abort.retry_after_s > 0
        for index in range(2):
            bench.peer(B, Put(ref(id=f"r-{index}.2"), f"{index:032x}"))
        assert bench.one(B, Abort).code == "busy"
        assert len(bench.transfers.uploads) == 3

    def test_a_stalled_stream_ends_and_its_file_stays(self, bench: Any) -> None:
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

    def test_a_stream_without_its_finish_stalls_too(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunks(A, S1, range(5))
        bench.after(31.0)
        assert bench.one(A, Abort).code == "stall"

    def test_a_full_disk_is_told_and_other_failures_are_loud(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_landing_that_control_refuses_is_aborted(self, bench: Any) -> None:
        bench.admit(A, Put(ref(id="r-1.1"), S1))
        bench.chunks(A, S1, range(5))
        bench.peer(A, Finish(S1))
        bench.control(Abort(bench.one(CONTROL, Put).stream, "stale", "attempt 1 of 2"))
        assert bench.one(A, Abort) == Abort(S1, "stale", "attempt 1 of 2")

    @pytest.mark.usefixtures("no_faults")
    def test_fault_points_are_passed(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    def hand_over(self, bench: Any, data: bytes = BODY, payload: PayloadRef | None = None) -> None:
        bench.spool.incoming_path("x.up").write_bytes(data)
        bench.admit(A, Put(payload or ref(), S1, local="x.up"))
        bench.work_off()

    def test_a_whole_file_is_moved(self, bench: Any) -> None:
        self.hand_over(bench)
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()
        assert bench.spool.path(ref().id).read_bytes() == BODY
        assert list(bench.spool.incoming.iterdir()) == []

    def test_reading_it_takes_turns(self, bench: Any) -> None:
        body = BODY * 40
        bench.spool.incoming_path("x.up").write_bytes(body)
        bench.admit(A, Put(ref(body), S1, local="x.up"))
        turns = 0
        while bench.work(max_bytes=BLOCK_BYTES):
            turns += 1
        assert turns >= len(body) // BLOCK_BYTES
        assert bench.store(A) == ref(body)

    def test_a_wrong_size_or_digest_is_refused(self, bench: Any) -> None:
        self.hand_over(bench, BODY + b"x")
        assert bench.one(A, Abort).code == "size"
        self.hand_over(bench, BODY[:-1] + b"?")
        assert bench.one(A, Abort).code == "corrupt"
        assert list(bench.spool.incoming.iterdir()) == []

    def test_only_regular_files_that_are_there(self, bench: Any, tmp_path: Path) -> None:
        bench.admit(A, Put(ref(), S1, local="none"))
        assert bench.one(A, Abort).code == "missing"
        (tmp_path / "secret").write_bytes(BODY)
        bench.spool.incoming_path("link").symlink_to(tmp_path / "secret")
        bench.spool.incoming_path("folder").mkdir()
        for name in ("link", "folder"):
            bench.admit(A, Put(ref(), S1, local=name))
            assert bench.one(A, Abort).code == "not_regular"

    def test_one_that_is_taken_away_meanwhile(self, bench: Any) -> None:
        bench.hold_landings = True
        self.hand_over(bench)
        bench.spool.incoming_path("x.up").unlink()
        bench.hold_landings = False
        bench.collect()
        assert bench.one(A, Abort).code == "missing"
        assert bench.transfers.idle

    def test_one_that_control_has_already_is_removed(self, bench: Any) -> None:
        bench.spool.incoming_path("x.up").write_bytes(BODY)
        bench.peer(A, Put(ref(), S1, local="x.up"))
        bench.control(Stored(stream=bench.one(CONTROL, Put).stream, payload=ref()))
        assert bench.one(A, Stored).payload == ref()
        assert list(bench.spool.incoming.iterdir()) == []

    def test_repeated_after_a_crash_between_file_and_row(self, bench: Any) -> None:
        bench.spool.store(ref().id, [BODY])
        bench.admit(A, Put(ref(), S1, local="x.up"))
        bench.work_off()
        bench.store(A)
        assert bench.one(A, Stored).payload == ref()

    def test_refused_without_trust(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, trust_local=False))
        bench.peer(A, Put(ref(), S1, local="x.up"))
        assert bench.one(A, Abort).code == "not_local"

    def test_integrity_by_size_moves_it_unread(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, digested=False))
        bench.spool.incoming_path("x.up").write_bytes(BODY)
        bench.admit(A, Put(PayloadRef(PayloadId("r-1.1"), len(BODY)), S1, local="x.up"))
        bench.store(A)
        assert bench.one(A, Stored).payload == PayloadRef(PayloadId("r-1.1"), len(BODY))
