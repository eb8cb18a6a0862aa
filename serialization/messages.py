"""Every message of the protocol, a frozen dataclass each; `docs/protocol.md` tells the conversation.

`KINDS` maps the kind number in the envelope to its class. Numbers are never used again and a key never changes its
type. ``ref`` correlates a request with its answer; 0 means that none is expected.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from .codec import Limit, check_plain, decode_fields, encode_fields, pack, show, unpack
from .envelope import (
    ENVELOPE_BYTES,
    KIND_AT,
    MAX_BODY_BYTES,
    MAX_TAIL_BYTES,
    Buffer,
    check_frames,
    pack_envelope,
    unpack_envelope,
)
from .errors import CodecError
from .jobmessages import Answer, Ask, Checkpoint, Claimed, ClaimJob, Commit, CommitRef, EndJob, Event, SubmitJob
from .payloadmessages import Abort, Chunk, Finish, Get, Grant, Put, Refusal, Stored
from .sessionmessages import Bye, Fault, Hello, Ping, Pong, Welcome
from .vocabulary import (
    INLINE_BYTES,
    INLINE_TOTAL_BYTES,
    Count,
    GatherId,
    GatherKey,
    JobId,
    JobKey,
    Name,
    PayloadId,
    PayloadRef,
    Role,
    Seconds,
    Short,
    Site,
    SiteKey,
    TaskId,
    TaskKey,
    TaskRef,
    Text,
)

__all__ = [
    "Abort",
    "Accept",
    "Answer",
    "Ask",
    "Assign",
    "AssignItem",
    "Bye",
    "Cancel",
    "Checkpoint",
    "Chunk",
    "ClaimJob",
    "Claimed",
    "CloseGather",
    "CloseRule",
    "Commit",
    "CommitRef",
    "Count",
    "Decline",
    "Done",
    "DoneItem",
    "EndJob",
    "Event",
    "Fail",
    "Failure",
    "Fault",
    "Finish",
    "GatherId",
    "Get",
    "Grant",
    "Hello",
    "INLINE_BYTES",
    "INLINE_TOTAL_BYTES",
    "JobId",
    "KINDS",
    "Message",
    "Name",
    "OpenGather",
    "PackedDone",
    "Packet",
    "PayloadId",
    "PayloadRef",
    "Ping",
    "Pong",
    "Progress",
    "Put",
    "Receipt",
    "Refusal",
    "Role",
    "Seconds",
    "Short",
    "Site",
    "Stored",
    "SubmitJob",
    "TaskId",
    "TaskRef",
    "Text",
    "Welcome",
    "decode",
    "encode",
    "encode_checked",
]

_STREAM_BYTES = 16
#: A Done's items, where there are none.
_NO_ITEMS = b"\xa5items\x90"


@dataclass(frozen=True, slots=True)
class CloseRule:
    """When a gather closes: all tasks ended, or the quorum reached and the extra wait over, or the deadline.

    The extra wait is ``after_quorum_s``, or ``straggler_patience`` times as long as the quorum took, whichever ends
    first. With neither every task is waited for.
    """

    min_clients: Annotated[int, Limit(low=1, high=1_000_000)] = 1
    deadline_s: Seconds | None = None  # from opening; at the deadline min_clients results close it, fewer fail it
    after_quorum_s: Seconds | None = None
    sites_s: Seconds = 60.0  # how long to wait for min_clients sites to connect, and for a lost site to return
    straggler_patience: Annotated[float, Limit(low=0, high=1_000_000)] | None = None

    @property
    def waits_for_all(self) -> bool:
        """Whether it closes only when every task has ended: then results may wait to be sent together."""
        return self.deadline_s is None and self.after_quorum_s is None and self.straggler_patience is None


@dataclass(frozen=True, slots=True)
class OpenGather:
    """job -> broker. Idempotent: the same key and specification return what was recorded.

    Tail: msgpack {"sites": [name]}. No sites means every connected site, or ``sample`` of them drawn from (seed, round,
    step).
    """

    KIND: ClassVar[int] = 10
    ref: Count
    job: JobKey
    claim: Count
    round: Count
    step: Count
    name: Name
    rule: CloseRule
    payload: PayloadRef | None = None
    fold: PayloadRef | None = None  # the fold plan; executors with pools need it
    config: dict[str, Any] = field(default_factory=dict)
    partials: bool = False
    sample: Annotated[int, Limit(low=0, high=1_000_000)] = 0
    seed: Count = 0
    max_attempts: Annotated[int, Limit(low=1, high=1000)] = 5
    lease_s: Seconds = 30.0
    redo: Annotated[int, Limit(low=0, high=16)] = 0  # > 0: the same step again for results that only a partial held
    have: Count = 0  # results this controller has already: the broker sends those behind
    behind: Count = 0  # the ref of a Commit that was not answered yet: refused if that was


@dataclass(frozen=True, slots=True)
class CloseGather:
    """job -> broker: close now with what is there. Answered by the gather's Receipt."""

    KIND: ClassVar[int] = 11
    ref: Count
    job: JobKey
    claim: Count
    gather: GatherKey


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that ended without a result."""

    task: TaskKey
    site: SiteKey
    code: Name
    text: Text = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """broker -> job: the state of a gather. Sent on opening, on each failed task, and on closing."""

    KIND: ClassVar[int] = 12
    ref: Count
    job: JobKey
    gather: GatherKey
    state: Literal["waiting", "open", "closed", "failed"]  # waiting: for min_clients sites to connect
    tasks: Count = 0
    results: Count = 0  # closed: exactly so many, numbered 0 to results - 1, are the round's
    reason: Text = ""
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class AssignItem:
    """One task of an Assign."""

    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]
    site: SiteKey
    state: Annotated[str, Limit(max_len=128)] = ""  # the site-state version to start from; "" where there is none yet
    settled: Count = 0  # how many tasks of this job the site has settled before


@dataclass(frozen=True, slots=True)
class Assign:
    """broker -> executor: tasks that share one specification. Tail: the payload's bytes where they fit inline."""

    KIND: ClassVar[int] = 13
    job: JobKey
    gather: GatherKey
    round: Count
    step: Count
    name: Name
    items: Annotated[tuple[AssignItem, ...], Limit(max_len=512)]
    lease_s: Seconds = 30.0
    archive: PayloadRef | None = None  # the job's code
    payload: PayloadRef | None = None
    fold: PayloadRef | None = None
    config: dict[str, Any] = field(default_factory=dict)
    partials: bool = False
    seed: Count = 0
    redo: Annotated[int, Limit(low=0, high=16)] = 0  # > 0: from the versions of the first try, not the current ones


@dataclass(frozen=True, slots=True)
class Accept:
    """executor -> broker: these attempts are being worked on; from now on pings renew their leases."""

    KIND: ClassVar[int] = 14
    tasks: Annotated[tuple[TaskRef, ...], Limit(max_len=512)]


@dataclass(frozen=True, slots=True)
class Decline:
    """executor -> broker: these attempts will not be worked on; queued again at once elsewhere or after the delay."""

    KIND: ClassVar[int] = 15
    tasks: Annotated[tuple[TaskRef, ...], Limit(max_len=512)]
    reason: Short = ""
    retry_after_s: Seconds = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """executor -> broker: a task's own word that it moves, shown to whoever watches."""

    KIND: ClassVar[int] = 16
    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]
    done: float = 0.0
    note: Short = ""


@dataclass(frozen=True, slots=True)
class DoneItem:
    """One finished attempt. A result of a partial has neither payload nor inline bytes."""

    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]
    site: SiteKey
    payload: PayloadRef | None = None
    inline_bytes: Annotated[int, Limit(low=0, high=INLINE_BYTES)] = 0  # this many bytes of the tail, in order
    meta: dict[str, Any] = field(default_factory=dict)  # FLModel's plain side: params_type, metrics, meta, rounds
    state: Annotated[str, Limit(max_len=128)] = ""  # the site-state version this attempt wrote; "" if none
    restarted: bool = False  # the script was started anew and kept memory outside the site state: state_lost
    run_s: Seconds = 0.0
    index: Annotated[int, Limit(low=-1, high=2**53)] = -1  # broker -> job: the result's number in its gather

    def numbered(self, site: Site, index: int) -> DoneItem:
        """The same as the result with this number, of this site. (`dataclasses.replace` takes twice as long.)"""
        return DoneItem(
            self.task, self.attempt, site, self.payload, self.inline_bytes, self.meta, self.state, self.restarted,
            self.run_s, index,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """executor -> broker -> job: finished attempts of one gather. Tail: the inline results, one after another.

    With ``partial`` all items together are that one payload, settled all or nothing. Answered by `Stored`.
    """

    KIND: ClassVar[int] = 17
    job: JobKey
    gather: GatherKey
    items: Annotated[tuple[DoneItem, ...], Limit(max_len=512)]
    partial: PayloadRef | None = None
    partial_inline_bytes: Annotated[int, Limit(low=0, high=INLINE_TOTAL_BYTES)] = 0


@dataclass(frozen=True, slots=True)
class PackedDone:
    """broker -> job: a `Done` whose items are the bytes that the journal has of them; no other on the wire."""

    KIND: ClassVar[int] = Done.KIND
    job: JobId
    gather: GatherId
    items: tuple[bytes, ...]
    partial: PayloadRef | None = None
    partial_inline_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fail:
    """executor -> broker: the attempt failed. Not retryable: the task's end (user code raised)."""

    KIND: ClassVar[int] = 18
    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]
    code: Name
    text: Text = ""
    retryable: bool = False
    killed: bool = False  # the task took its process down: three of these and it is dead


@dataclass(frozen=True, slots=True)
class Cancel:
    """broker -> executor: stop these attempts, or with no tasks everything of the job."""

    KIND: ClassVar[int] = 19
    job: JobKey
    tasks: Annotated[tuple[TaskRef, ...], Limit(max_len=512)] = ()
    reason: Short = ""
    ended: bool = False  # the job is over: its scripts may stop and its files may go


Message = (
    Hello | Welcome | Ping | Pong | Bye
    | OpenGather | CloseGather | Receipt | Assign | Accept | Decline | Progress | Done | Fail | Cancel
    | Put | Get | Grant | Chunk | Finish | Stored | Abort
    | SubmitJob | ClaimJob | Claimed | Checkpoint | Commit | EndJob | Event | Ask | Answer
    | Fault
)  # fmt: skip

KINDS: dict[int, type[Any]] = {cls.KIND: cls for cls in Message.__args__}


@dataclass(frozen=True, slots=True)
class Packet:
    """A message with its tail and the sender's sequence number, as it came off the wire."""

    message: Message
    tail: Buffer = b""
    sequence: int = 0


def encode(message: Message | PackedDone, tail: Buffer = b"", sequence: int = 0) -> list[Buffer]:
    """The frames of a message.

    Raises:
        CodecError: the body is over 64 KiB (what is larger travels as a payload), or holds what no message may.
    """
    return _frames(message, _body(message), tail, sequence)


def encode_checked(message: Message, tail: Buffer = b"", max_tail_bytes: int = MAX_TAIL_BYTES) -> list[Buffer]:
    """The frames of a message that `decode` will take.

    Raises:
        CodecError: as `encode`, or a field is out of its bounds. EnvelopeError: the tail is too large.
    """
    if isinstance(message, (Grant, Chunk)):
        frames = encode(message, tail)
        decode(frames, max_tail_bytes)
        return frames
    values = encode_fields(message)
    body = _packed(message, values)
    frames = _frames(message, body, tail)
    check_frames(frames, max_tail_bytes)
    try:
        check_plain(values)
        decode_fields(type(message), values)
    except CodecError:
        decode(frames, max_tail_bytes)  # a number or text of a type derived from Python's own goes out as plain
    return frames


def _body(message: Message | PackedDone) -> bytes:
    match message:
        case Grant():
            return _pack_struct(Grant.STRUCT, message.stream, message.epoch, message.next, message.limit)
        case Chunk():
            return _pack_struct(Chunk.STRUCT, message.stream, message.index, message.length, message.crc32)
        case PackedDone():
            return _bounded(message, _pack_done(message))
        case _:
            return _packed(message, encode_fields(message))


def _pack_done(message: PackedDone) -> bytes:
    """What `pack` makes of the Done with these items."""
    bare = Done(message.job, message.gather, (), message.partial, message.partial_inline_bytes)
    before, after = pack(encode_fields(bare)).split(_NO_ITEMS, 1)
    count = len(message.items)
    head = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((before, _NO_ITEMS[:-1], head, *message.items, after))


def _packed(message: Message, values: dict[str, Any]) -> bytes:
    return _bounded(message, pack(values))


def _bounded(message: Message | PackedDone, body: bytes) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise CodecError(
            f"{type(message).__name__} of {len(body)} bytes; at most {MAX_BODY_BYTES}:"
            " shorten its metadata, or send it as a payload"
        )
    return body


def _frames(message: Message | PackedDone, body: bytes, tail: Buffer, sequence: int = 0) -> list[Buffer]:
    envelope = pack_envelope(message.KIND, sequence, body, b"" if isinstance(message, Chunk) else tail)
    return [envelope, body, tail] if len(tail) else [envelope, body]


def _pack_struct(layout: struct.Struct, stream: str, *numbers: int) -> bytes:
    try:
        key = bytes.fromhex(stream)
        if len(key) != _STREAM_BYTES:  # struct would fill or cut it
            raise ValueError(stream)
        return layout.pack(key, *numbers)
    except (ValueError, struct.error):
        raise CodecError(
            f"stream {show(stream)} with {numbers}; 32 hex digits and unsigned numbers belong here"
        ) from None


def _is_chunk(envelope: Buffer) -> bool:
    """Whether the tail has a checksum of its own, in the body."""
    return len(envelope) == ENVELOPE_BYTES and envelope[KIND_AT] == Chunk.KIND


def decode(frames: Sequence[Buffer], max_tail_bytes: int = MAX_TAIL_BYTES) -> Packet:
    """A message out of its frames (without the routing id).

    Raises:
        EnvelopeError: the frames or the envelope are wrong.
        CodecError: an unknown kind, or a body that is not that message.
    """
    check_frames(frames, max_tail_bytes)
    tail = frames[2] if len(frames) == 3 else b""
    envelope = unpack_envelope(frames[0], frames[1], b"" if _is_chunk(frames[0]) else tail)
    cls = KINDS.get(envelope.kind)
    if cls is None:
        raise CodecError(f"message kind {envelope.kind} is unknown to protocol 1")
    body = frames[1]
    if cls is Grant or cls is Chunk:
        if len(body) != cls.STRUCT.size:
            raise CodecError(f"{cls.__name__} of {len(body)} bytes; it has exactly {cls.STRUCT.size}")
        stream, *rest = cls.STRUCT.unpack(body)
        return Packet(cls(stream.hex(), *rest), tail, envelope.sequence)
    return Packet(decode_fields(cls, unpack(body, max_bytes=MAX_BODY_BYTES)), tail, envelope.sequence)
