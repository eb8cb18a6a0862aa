"""Every message, there and back, and against the golden frames that hold what version 1 of the protocol looks like.

`tests/golden/KIND.hex` has one frame a line: envelope, body, and the tail where there is one. A golden file is written
once and not changed: a peer of that version exists. `python tests/serialization/test_messages.py` writes missing ones.
"""

from __future__ import annotations

import struct
import sys
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.serialization import messages as m
from fedloom.serialization.codec import encode_fields, pack
from fedloom.serialization.envelope import MAX_BODY_BYTES, pack_envelope
from fedloom.serialization.errors import CodecError, EnvelopeError, WireError
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

JOB = m.JobId("job-1")
SITE = m.Site("site-1")
TASK = m.TaskId("0123456789abcdef0123456789abcdef")
GATHER = m.GatherId("g123456789abcdef0123456789abcdef")
STREAM = "00112233445566778899aabbccddeeff"
BLOB = m.PayloadRef(m.PayloadId("b3-" + "ab" * 32), 4096, "ab" * 32, "blob")
MODEL = m.PayloadRef(m.PayloadId("b3-" + "cd" * 32), 10_000_000_000, "cd" * 32)
ONE = m.TaskRef(TASK, 2)

#: One of each kind, all fields set. Sequence numbers are the kinds.
SAMPLES: list[tuple[m.Message, bytes]] = [
    (
        m.Hello("executor/site-1", "executor", "b007", 3, "s-1", 4, "pool-a", JOB, 5, ("partials", "local")),
        pack({"sites": ["site-1"], "held": [[TASK, 2]]}),
    ),
    (
        m.Welcome(
            session="s-1",
            epoch="e-1",
            minor=1,
            ping_s=2.5,
            dead_s=15.0,
            data_endpoint="tcp://127.0.0.1:7601",
            chunk_bytes=262144,
            window=16,
            spool_dir="/var/spool/fedloom",
            spool_token="secret",
            integrity="size",
            features=("partials",),
        ),
        b"",
    ),
    (m.Ping(3), b""),
    (m.Pong(), b""),
    (m.Bye("done"), b""),
    (
        m.OpenGather(
            ref=7,
            job=JOB,
            claim=2,
            round=3,
            step=1,
            name="train",
            rule=m.CloseRule(2, 600.0, 5.0, 30.0),
            payload=MODEL,
            fold=BLOB,
            config={"lr": 0.1, "tags": ["a", None, True], "raw": b"\x00\x01"},
            partials=True,
            sample=10,
            seed=42,
            max_attempts=3,
            lease_s=20.0,
            redo=1,
            have=4,
            behind=6,
        ),
        pack({"sites": ["site-1", "site-2"]}),
    ),
    (m.CloseGather(8, JOB, 2, GATHER), b""),
    (m.Receipt(7, JOB, GATHER, "closed", 3, 2, "quorum", (m.Failure(TASK, SITE, "raised", "Traceback"),)), b""),
    (
        m.Assign(
            job=JOB,
            gather=GATHER,
            round=3,
            step=1,
            name="train",
            items=(m.AssignItem(TASK, 2, SITE, "v-1", 6),),
            lease_s=20.0,
            archive=BLOB,
            payload=MODEL,
            fold=BLOB,
            config={"epochs": 2},
            partials=True,
            seed=42,
            redo=1,
        ),
        b"inline payload",
    ),
    (m.Accept((ONE,)), b""),
    (m.Decline((ONE,), "busy", 1.5), b""),
    (m.Progress(TASK, 2, 0.75, "epoch 3"), b""),
    (
        m.Done(
            job=JOB,
            gather=GATHER,
            items=(
                m.DoneItem(
                    task=TASK,
                    attempt=2,
                    site=SITE,
                    payload=MODEL,
                    inline_bytes=6,
                    meta={"params_type": "FULL", "metrics": {"acc": 0.5}},
                    state="v-2",
                    restarted=True,
                    run_s=12.25,
                    index=0,
                ),
            ),
            partial=BLOB,
            partial_inline_bytes=7,
        ),
        b"resultpartial",
    ),
    (m.Fail(TASK, 2, "killed", "signal 9", True, True), b""),
    (m.Cancel(JOB, (ONE,), "closed", True), b""),
    (m.Put(MODEL, STREAM, JOB, 2, TASK, 2, "w-1-ab", 9), b""),
    (m.Get(STREAM, MODEL.id, 5, 13, 10), b""),
    (m.Grant(STREAM, 3, 2**40, 2**40 + 8), b""),
    (m.Chunk(STREAM, 2**33, 5, 0x3610A686), b"hello"),
    (m.Finish(STREAM, "ab" * 32), b""),
    (m.Stored(STREAM, 9, MODEL, (ONE,), (m.Refusal(TASK, 1, "stale", "attempt 2 is current", True),)), b""),
    (m.Abort(STREAM, "quota", "site-1 is over its quota", 10.0), b""),
    (m.SubmitJob(11, "token", "digits", BLOB, JOB, {"sites": ["site-1"]}, m.JobId("job-0")), b""),
    (m.ClaimJob(12, JOB, 2, "its controller was stopped", True), b""),
    (m.Claimed(12, JOB, 3, "digits", BLOB, {"rounds": 5}, m.CommitRef(2, MODEL, BLOB, MODEL, {"round": 2})), b""),
    (m.Checkpoint(13, JOB, 3, GATHER, MODEL, 100), b""),
    (m.Commit(14, JOB, 3, 4, MODEL, BLOB, True, MODEL, {"metrics": {"acc": 0.9}}, 1, 3), b""),
    (m.EndJob(15, JOB, 3, "FINISHED:FAILED", "ValueError: no"), b""),
    (m.Event(JOB, "metric", SITE, {"acc": 0.9}, "text"), b""),
    (m.Ask(16, "events", JOB, 100, 50), b""),
    (m.Answer(16, {"job_id": "job-1"}), pack({"events": []})),
    (m.Fault("stale", "attempt 1; the current one is 2", 17, 99, True), b""),
]
#: Fields that the first version's messages did not have.
LATER = {"SubmitJob": {"start"}, "OpenGather": {"behind"}}
IDS = [type(message).__name__ for message, _ in SAMPLES]


def frames_of(message: m.Message, tail: bytes) -> list[bytes]:
    return [bytes(frame) for frame in m.encode(message, tail, message.KIND)]


def golden_file(message: m.Message) -> Path:
    return GOLDEN / f"{type(message).__name__}.hex"


def test_every_kind_has_a_sample_and_a_golden_file() -> None:
    assert {type(message) for message, _ in SAMPLES} == set(m.KINDS.values())
    assert len(m.KINDS) == len(SAMPLES)
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(IDS)


@pytest.mark.parametrize(("message", "tail"), SAMPLES, ids=IDS)
def test_samples_set_every_field(message: m.Message, tail: bytes) -> None:
    for field in fields(message):
        if field.default is not MISSING:
            assert getattr(message, field.name) != field.default, field.name
        elif field.default_factory is not MISSING:
            assert getattr(message, field.name), field.name


@pytest.mark.parametrize(("message", "tail"), SAMPLES, ids=IDS)
def test_golden_frames(message: m.Message, tail: bytes) -> None:
    golden = [bytes.fromhex(line) for line in golden_file(message).read_text().splitlines()]
    assert frames_of(message, tail) == golden
    assert m.decode(golden) == m.Packet(message, tail, message.KIND)
    views = [memoryview(bytearray(frame)) for frame in golden]
    assert m.decode(views).message == message


@pytest.mark.parametrize("file", sorted((GOLDEN / "first").glob("*.hex")), ids=lambda file: file.stem)
def test_frames_that_the_first_version_sent_are_read(file: Path) -> None:
    """So that parties can be upgraded one by one: what it knew is what it was, what came later has its default."""
    packet = m.decode([bytes.fromhex(line) for line in file.read_text().splitlines()])
    sample, tail = next((message, tail) for message, tail in SAMPLES if type(message).__name__ == file.stem)
    assert type(packet.message) is type(sample)
    assert bytes(packet.tail) == tail
    later = {field.name for field in fields(sample) if getattr(packet.message, field.name) == field.default}
    assert later == LATER.get(file.stem, set())
    assert replace(sample, **{name: getattr(packet.message, name) for name in later}) == packet.message


@pytest.mark.parametrize(("message", "tail"), SAMPLES, ids=IDS)
def test_a_message_of_defaults(message: m.Message, tail: bytes) -> None:
    required = [f.name for f in fields(message) if f.default is MISSING and f.default_factory is MISSING]
    bare = type(message)(**{name: getattr(message, name) for name in required})
    frames = m.encode(bare)
    assert len(frames) == 2
    assert m.decode(frames) == m.Packet(bare)
    if not isinstance(message, m.Grant | m.Chunk):
        assert encode_fields(bare).keys() == set(required)


@pytest.mark.parametrize(("message", "tail"), SAMPLES, ids=IDS)
def test_a_cut_or_changed_body_is_a_wire_error(message: m.Message, tail: bytes) -> None:
    body = frames_of(message, tail)[1]
    for at in range(len(body)):
        for changed in (body[:at], body[:at] + bytes([body[at] ^ 0x55]) + body[at + 1 :]):
            # with a checksum that is right, as a peer who means it would send it
            with suppress(WireError):
                m.decode([pack_envelope(message.KIND, 0, changed), changed])
            with pytest.raises(EnvelopeError):
                m.decode([pack_envelope(message.KIND, 0, body), changed])


@pytest.mark.parametrize(("message", "tail"), SAMPLES, ids=IDS)
def test_values_of_other_types_are_codec_errors(message: m.Message, tail: bytes) -> None:
    if isinstance(message, m.Grant | m.Chunk):
        return
    good = encode_fields(message)
    for name in good:
        for odd in (None, True, -1, 2**63, 1.5, "\0", "x" * 70_000, b"x", [], [1], [{}], {}, {"a": 1}):
            body = pack({**good, name: odd})
            with suppress(WireError):
                m.decode([pack_envelope(message.KIND, 0, body), body])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 200])
@pytest.mark.parametrize("partial", [None, MODEL])
def test_items_packed_before_are_the_same_message(count: int, partial: m.PayloadRef | None) -> None:
    items = tuple(m.DoneItem(TASK, n + 1, SITE, meta={"items": []}, run_s=n / 7, index=n) for n in range(count))
    job = m.JobId("åitems")  # holds the bytes that the items' key begins with
    packed = tuple(pack(encode_fields(item)) for item in items)
    as_packed = m.encode(m.PackedDone(job, GATHER, packed, partial, 3), b"abc", 7)
    assert as_packed == m.encode(m.Done(job, GATHER, items, partial, 3), b"abc", 7)


def test_unknown_kinds() -> None:
    for kind in set(range(256)) - set(m.KINDS):
        with pytest.raises(CodecError, match=f"kind {kind} is unknown"):
            m.decode([pack_envelope(kind, 0, b"\x80"), b"\x80"])


def test_a_newer_minors_keys_are_ignored() -> None:
    body = pack({"free": 2, "mood": "good"})
    assert m.decode([pack_envelope(3, 0, body), body]).message == m.Ping(2)


def test_a_body_over_the_limit_is_the_senders_error() -> None:
    with pytest.raises(CodecError, match=r"Event of .* bytes; at most 65536"):
        m.encode(m.Event(JOB, "log", data={"a": "x" * MAX_BODY_BYTES}))


def _nested(depth: int) -> dict[str, Any]:
    return {"a": _nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    "message",
    [
        m.Accept((m.TaskRef(TASK, 0),)),
        m.Accept((m.TaskRef(m.TaskId("../up"), 1),) * 2),
        m.Accept((ONE,) * 513),
        m.Fail(TASK, 1, "code", retryable=1),  # pyright: ignore[reportArgumentType]
        m.Bye("x" * 1025),
        m.Event(JOB, "log", data=_nested(16)),
        m.Grant("00", 0, 0, 0),
    ],
)
def test_the_sender_refuses_what_nobody_would_read(message: m.Message) -> None:
    """One level less, a number derived from Python's own and all samples are taken, and give the same frames."""
    with pytest.raises(WireError) as ours:
        m.encode_checked(message)
    with pytest.raises(WireError) as theirs:
        m.decode(m.encode(message))
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(EnvelopeError, match="tail"):
        m.encode_checked(m.Pong(), bytes(2 * 1024 * 1024))
    taken = [(m.Event(JOB, "log", data=_nested(15)), b""), (m.Decline((ONE,), "", np.float64(1.5)), b"")]
    for sample, tail in taken + [(each, tail) for each, tail in SAMPLES if not isinstance(each, m.Chunk)]:
        assert m.encode_checked(sample, tail) == m.encode(sample, tail)


def test_nan_is_the_senders_error() -> None:
    with pytest.raises(CodecError, match="finite"):
        m.encode(m.Event(JOB, "metric", data={"loss": float("nan")}))


@pytest.mark.parametrize("size", [0, 31, 35, 37, 100])
def test_structs_have_their_size(size: int) -> None:
    for cls in (m.Grant, m.Chunk):
        if cls.STRUCT.size != size:
            with pytest.raises(CodecError, match="exactly"):
                m.decode([pack_envelope(cls.KIND, 0, bytes(size)), bytes(size)])
    assert (m.Grant.STRUCT.size, m.Chunk.STRUCT.size) == (36, 32)


@pytest.mark.parametrize("stream", ["", "zz" * 16, "00" * 15, "00" * 17])
def test_structs_need_a_whole_stream_id(stream: str) -> None:
    for message in (m.Grant(stream, 0, 0, 0), m.Chunk(stream, 0, 0, 0)):
        with pytest.raises(CodecError, match="32 hex digits"):
            m.encode(message)


def test_structs_need_numbers_in_range() -> None:
    for message in (m.Grant(STREAM, -1, 0, 0), m.Grant(STREAM, 0, 2**64, 0), m.Chunk(STREAM, 0, 2**32, 0)):
        with pytest.raises(CodecError, match="unsigned"):
            m.encode(message)


def decoded_with(message: m.Message, **changes: Any) -> None:
    m.decode(m.encode(replace(message, **changes)))


@pytest.mark.parametrize("stream", ["x", "0" * 31, "0" * 33, "AB" * 16, "../" * 10 + "ab", "0" * 31 + "\n"])
def test_a_stream_is_32_hex_digits(stream: str) -> None:
    for message in (m.Put(MODEL), m.Finish(STREAM), m.Abort(STREAM, "x"), m.Get(STREAM, MODEL.id, 0, 1), m.Stored()):
        with pytest.raises(CodecError):
            decoded_with(message, stream=stream)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/b", "a\\b", "a\0", ".hidden", "a\n", "..", "."])
def test_what_becomes_a_file_name_leads_nowhere_else(name: str) -> None:
    with pytest.raises(CodecError):
        decoded_with(m.Put(MODEL), local=name)
    with pytest.raises(CodecError):
        decoded_with(m.Put(MODEL), payload=m.PayloadRef(m.PayloadId(name), 1))
    with pytest.raises(CodecError):
        decoded_with(m.Put(MODEL), job=m.JobId(name))
    with pytest.raises(CodecError):
        decoded_with(m.Put(MODEL), task=m.TaskId(name))
    with pytest.raises(CodecError):
        decoded_with(m.Event(JOB, "log"), site=m.Site(name))
    with pytest.raises(CodecError):
        decoded_with(m.CloseGather(1, JOB, 1, GATHER), gather=m.GatherId(name))


def test_sites_and_jobs_may_have_peoples_names() -> None:
    decoded_with(m.Event(JOB, "log"), site=m.Site("Klinik für Kardiologie, Köln"), job=m.JobId("Lauf 1"))


def test_a_payload_has_an_id() -> None:
    with pytest.raises(CodecError, match=r"payload\.id"):
        decoded_with(m.Put(MODEL), payload=m.PayloadRef(m.PayloadId(""), 1))


def test_the_tail_has_the_links_limit() -> None:
    frames = m.encode(m.Answer(1), b"x" * 100)
    assert m.decode(frames).tail == b"x" * 100
    with pytest.raises(EnvelopeError, match="at most 99"):
        m.decode(frames, max_tail_bytes=99)


def test_an_empty_tail_is_no_frame() -> None:
    assert len(m.encode(m.Answer(1), b"")) == 2
    assert m.decode([*m.encode(m.Answer(1)), b""]).tail == b""


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_noise_raises_nothing_else(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        m.decode(frames)


@given(st.sampled_from(sorted(m.KINDS)), st.binary(max_size=60))
def test_noise_behind_a_good_envelope_raises_nothing_else(kind: int, body: bytes) -> None:
    with suppress(WireError):
        m.decode([pack_envelope(kind, 0, body), body])


@given(
    st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
)
def test_any_grant_there_and_back(stream: bytes, epoch: int, next_: int, limit: int) -> None:
    grant = m.Grant(stream.hex(), epoch, next_, limit)
    frames = m.encode(grant)
    assert m.decode(frames).message == grant
    assert bytes(frames[1]) == struct.pack(">16sIQQ", stream, epoch, next_, limit)


def write_missing() -> None:
    """Write the golden files that do not exist yet."""
    for message, tail in SAMPLES:
        path = golden_file(message)
        if not path.exists():
            path.write_text("\n".join(frame.hex() for frame in frames_of(message, tail)) + "\n")
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    write_missing()
