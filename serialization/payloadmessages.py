"""The messages that move a payload as chunks under grants. Part of `messages`, which has them all."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar

from .codec import Limit
from .vocabulary import (
    FILE_OR_NONE,
    NO_JOB,
    NO_TASK,
    Count,
    JobKey,
    Name,
    PayloadKey,
    PayloadRef,
    Seconds,
    Short,
    StreamKey,
    TaskKey,
    TaskRef,
)


@dataclass(frozen=True, slots=True)
class Put:
    """peer -> broker: a payload comes. Repeated after a reconnect; answered with a Grant at the watermark, or Stored.

    On the data link for chunks (``stream`` is 32 hex digits) or, with ``local``, for a finished file of that name in
    the spool's ``incoming`` folder. On the control link with the whole payload as tail.
    """

    KIND: ClassVar[int] = 30
    payload: PayloadRef
    stream: StreamKey = ""
    job: JobKey = NO_JOB
    claim: Count = 0
    task: TaskKey = NO_TASK  # a result or state of this attempt
    attempt: Annotated[int, Limit(low=0, high=2**31)] = 0
    local: Annotated[str, Limit(max_len=256, pattern=FILE_OR_NONE)] = ""
    ref: Count = 0


@dataclass(frozen=True, slots=True)
class Get:
    """peer -> broker, data link: send this payload as chunks under the stream's grants, from chunk ``next``."""

    KIND: ClassVar[int] = 31
    stream: StreamKey
    payload: PayloadKey
    next: Count
    limit: Count
    ref: Count = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """receiver -> sender: everything before ``next`` is here, chunks below ``limit`` may be sent.

    Absolute; the newest epoch wins.
    """

    KIND: ClassVar[int] = 32
    STRUCT: ClassVar[struct.Struct] = struct.Struct(">16sIQQ")
    stream: str
    epoch: int
    next: int
    limit: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """sender -> receiver. Tail: the chunk's bytes, whose crc32 this carries."""

    KIND: ClassVar[int] = 33
    STRUCT: ClassVar[struct.Struct] = struct.Struct(">16sQII")
    stream: str
    index: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Finish:
    """sender -> receiver: that was all; the payload's digest."""

    KIND: ClassVar[int] = 34
    stream: StreamKey
    digest: Annotated[str, Limit(max_len=64)] = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An attempt whose result was not accepted, and why."""

    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]
    code: Name  # stale, late, closed, duplicate, conflict, unknown, lost_payload
    reason: Short = ""
    requeued: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """broker -> peer: committed. Of a payload (``stream`` or ``ref`` names the Put) or of the results of a Done."""

    KIND: ClassVar[int] = 35
    stream: StreamKey = ""
    ref: Count = 0
    payload: PayloadRef | None = None
    tasks: Annotated[tuple[TaskRef, ...], Limit(max_len=512)] = ()
    refused: Annotated[tuple[Refusal, ...], Limit(max_len=512)] = ()


@dataclass(frozen=True, slots=True)
class Abort:
    """Either side: this stream ends. ``retry_after_s`` > 0: worth another try."""

    KIND: ClassVar[int] = 36
    stream: StreamKey
    code: Name
    reason: Short = ""
    retry_after_s: Seconds = 0.0
