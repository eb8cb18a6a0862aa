"""Downloads and the sessions of the data link, without sockets."""

import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.transfers import CONTROL, Limits
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import EnvelopeError
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
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Welcome,
)

A, B = b"route-a", b"route-b"
S1, S2 = "1" * 32, "2" * 32
KIB = 1024
BODY = random.Random(1).randbytes(300 * KIB + 7)
LIMITS = Limits(chunk_bytes=64 * KIB, window=4, trust_local=True)


def ref(data: bytes = BODY, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


class TestDownload:
    @pytest.fixture(autouse=True)
    def stored(self, bench: Any) -> None:
        bench.spool.store(ref().id, [BODY])

    def received(self, bench: Any, route: bytes) -> dict[int, bytes]:
        out: dict[int, bytes] = {}
        for message, tail in bench.out[route]:
            if isinstance(message, Chunk):
                assert (message.length, message.crc32) == (len(tail), zlib.crc32(tail))
                out[message.index] = tail
        bench.take(route, Chunk)
        return out

    def test_as_grants_allow(self, bench: Any) -> None:
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

    def test_a_repeated_get_goes_on_where_it_says(self, bench: Any) -> None:
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

    def test_turns_are_fair_bounded_and_spare_blocked_peers(self, bench: Any) -> None:
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

    def test_what_is_not_here_is_aborted(self, bench: Any) -> None:
        for payload in ("r-9.9", "../../etc/passwd"):
            bench.peer(A, Get(S1, PayloadId(payload), 0, 1))
            assert bench.one(A, Abort).code == "unknown_payload"
        assert bench.transfers.idle

    def test_no_bytes_at_all(self, bench: Any) -> None:
        bench.spool.store("p-0", [])
        bench.peer(A, Get(S1, PayloadId("p-0"), 0, 0))
        bench.work()
        assert bench.one(A, Finish) == Finish(S1, "")

    def test_a_deleted_payload_is_sent_to_its_end(self, bench: Any) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 1))
        bench.work()
        bench.spool.delete(ref().id)
        bench.peer(A, Grant(S1, 1, 1, 9))
        bench.work()
        got = self.received(bench, A)
        assert b"".join(got[i] for i in sorted(got)) == BODY

    def test_one_cut_short_is_aborted(self, bench: Any) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 9))
        with bench.spool.path(ref().id).open("r+b") as file:
            file.truncate(100 * KIB)
        bench.work()
        assert bench.one(A, Abort).code == "unreadable"
        assert bench.transfers.idle

    def test_a_silent_peer_is_given_up(self, bench: Any) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 2))
        bench.work()
        bench.after(31.0)
        assert bench.one(A, Abort).code == "stall"
        bench.peer(A, Get(S1, ref().id, 0, 9))
        bench.work()
        bench.after(6.0)  # sent whole: an answer is not owed
        assert bench.take(A, Abort) == []
        assert bench.transfers.idle

    def test_what_was_lost_of_one_sent_whole_is_sent_again(self, bench: Any) -> None:
        bench.peer(A, Get(S1, ref().id, 0, 9))
        bench.work()
        assert len(self.received(bench, A)) == 5
        for _ in range(9):
            bench.peer(A, Grant(S1, 1, 3, 9))  # each second of silence: it misses chunk 3
            bench.after(1.0)
            bench.work()
        assert bench.take(A, Chunk) == []
        bench.peer(A, Grant(S1, 1, 3, 9))
        bench.after(2.0)
        bench.work()
        assert sorted(self.received(bench, A)) == [3, 4]
        bench.peer(A, Grant(S1, 1, 5, 5))
        bench.after(6.0)
        assert bench.transfers.idle

    def test_streams_are_bounded_and_can_be_cancelled(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, max_streams_per_peer=2))
        bench.spool.store(ref().id, [BODY])
        for index in range(3):
            bench.peer(A, Get(f"{index:032x}", ref().id, 0, 1))
        assert bench.one(A, Abort).code == "busy"
        bench.peer(A, Abort(f"{0:032x}", "cancelled"))
        assert len(bench.transfers.downloads) == 1
        bench.peer(A, Bye())
        assert bench.transfers.idle


class TestSessions:
    def test_a_hello_waits_for_its_session(self, bench: Any) -> None:
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

    def test_an_unknown_session_is_refused_after_a_while(self, bench: Any) -> None:
        bench.peer(b"c", Hello("n", "job", "b", session="sc"))
        bench.after(1.9)
        assert b"c" not in bench.out
        bench.after(0.2)
        assert bench.one(b"c", Fault).code == "session"
        assert bench.transfers.idle

    def test_nothing_without_hello_and_answers_are_rationed(self, make_bench: Any, tmp_path: Path) -> None:
        bench = make_bench(tmp_path, replace(LIMITS, faults_per_s=5))
        for _ in range(50):
            bench.peer(b"c", Put(ref(), S1))
        assert [f.code for f in bench.take(b"c", Fault)] == ["session"] * 5
        bench.after(1.0)
        bench.peer(b"c", Put(ref(), S1))
        assert len(bench.take(b"c", Fault)) == 1

    def test_an_ended_session_ends_its_streams(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.admit(B, Put(ref(id="r-1.1"), S2))
        bench.control(Bye("sa"))
        assert bench.one(A, Fault).code == "session"
        assert len(bench.transfers.uploads) == 1
        bench.peer(A, Hello("n", "job", "b", session="sa"))
        assert bench.take(A, Welcome) == []

    def test_a_reconnect_replaces_the_old_link(self, bench: Any) -> None:
        bench.admit(A, Put(ref(), S1))
        bench.chunk(A, S1, 0)
        bench.peer(b"c", Hello("node", "executor", "boot", session="sa"))
        bench.one(b"c", Welcome)
        assert bench.transfers.idle
        bench.chunk(A, S1, 1)
        assert bench.one(A, Fault).code == "session"

    def test_another_life_of_control_forgets_the_old_sessions(self, bench: Any) -> None:
        bench.control(Welcome("sn", "control-2"))
        assert [bench.one(r, Fault).code for r in (A, B)] == ["session", "session"]
        bench.peer(b"c", Hello("node", "executor", "boot", session="sn"))
        bench.one(b"c", Welcome)

    def test_unknown_streams_are_told_once(self, bench: Any) -> None:
        for _ in range(10):
            bench.chunk(A, S1, 0)
        abort = bench.one(A, Abort)
        assert abort.code == "unknown_stream" and abort.retry_after_s > 0
        bench.peer(A, Grant(S2, 1, 5, 5))  # the last grant of a download
        bench.peer(A, Finish(S1))
        assert bench.out[A] == []

    def test_bad_messages_are_counted_and_answered(self, bench: Any) -> None:
        bench.peer(A, Done("j", "g", ()))  # type: ignore[arg-type]
        bench.peer(A, Put(ref(), "short"))
        bench.peer(A, Get("Z" * 32, ref().id, 0, 1))
        bench.peer(A, Chunk(S1, 0, 5, 0), b"four")
        bench.transfers.malformed(A, EnvelopeError("magic"), bench.now)
        bench.collect()
        assert [f.code for f in bench.take(A, Fault)] == ["malformed"] * 5
        assert bench.transfers.refused == {"WireError": 4, "EnvelopeError": 1}
        assert bench.transfers.idle
