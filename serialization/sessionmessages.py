"""A session's messages: who speaks, whether it still does, and what was wrong with what it said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from .codec import Limit
from .vocabulary import NO_JOB, Count, JobKey, Name, Role, Short, Text


@dataclass(frozen=True, slots=True)
class Hello:
    """peer -> broker, first on each link. Tail: msgpack {"sites": [name], "held": [[task, attempt]]}."""

    KIND: ClassVar[int] = 1
    node: Name
    role: Role
    boot: Annotated[str, Limit(max_len=64)]  # random per process: a second live boot of a name is refused
    minor: Annotated[int, Limit(low=0, high=255)] = 0
    session: Annotated[str, Limit(max_len=64)] = ""  # data link only: the session that Welcome gave
    capacity: Annotated[int, Limit(low=0, high=1_000_000)] = 0
    pool: Name = ""
    job: JobKey = NO_JOB
    claim: Count = 0
    features: Annotated[tuple[Name, ...], Limit(max_len=64)] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """broker -> peer."""

    KIND: ClassVar[int] = 2
    session: Annotated[str, Limit(max_len=64)]
    epoch: Annotated[str, Limit(max_len=64)]  # the broker's own boot
    minor: Annotated[int, Limit(low=0, high=255)] = 0
    # none of them may be 0: a peer that believed it would turn without a rest
    ping_s: Annotated[float, Limit(low=0.001, high=86400)] = 5.0
    dead_s: Annotated[float, Limit(low=0.001, high=86400)] = 30.0
    data_endpoint: Short = ""
    chunk_bytes: Annotated[int, Limit(low=1, high=1 << 30)] = 1024 * 1024
    window: Annotated[int, Limit(low=1, high=1024)] = 8
    spool_dir: Short = ""  # co-located peers of the same user only: where payloads can be mapped
    spool_token: Short = ""  # what the file `.token` in that folder holds, which proves co-location
    integrity: Literal["digest", "size"] = "digest"
    features: Annotated[tuple[Name, ...], Limit(max_len=64)] = ()


@dataclass(frozen=True, slots=True)
class Ping:
    """peer -> broker: renews the session, the accepted leases it holds, and a job's claim."""

    KIND: ClassVar[int] = 3
    free: Annotated[int, Limit(low=0, high=1_000_000)] = 0


@dataclass(frozen=True, slots=True)
class Pong:
    """broker -> peer."""

    KIND: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class Bye:
    """Either side: the session ends now."""

    KIND: ClassVar[int] = 5
    reason: Short = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """broker -> peer: a request was refused, and why. Fatal: the session is over."""

    KIND: ClassVar[int] = 60
    code: Name
    text: Text
    ref: Count = 0
    about: Count = 0  # the sequence number of the message that caused it
    fatal: bool = False
