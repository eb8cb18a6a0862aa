"""The messages about jobs: submit, claim, checkpoint, commit, end, ask. Part of `messages`, which has them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from .codec import Limit
from .vocabulary import NO_JOB, NO_SITE, Count, GatherKey, JobKey, Name, PayloadRef, SiteKey, Text


@dataclass(frozen=True, slots=True)
class SubmitJob:
    """client -> broker: a job whose archive is stored. Answered by Answer {"job_id", "round"}.

    ``token`` makes repeats harmless. With ``start`` it goes on behind another job's last commit: a broker that knows
    this says so by the feature ``start`` in its Welcome; one that does not would begin anew.
    """

    KIND: ClassVar[int] = 50
    ref: Count
    token: Annotated[str, Limit(max_len=64)]
    name: Name
    archive: PayloadRef
    job: JobKey = NO_JOB  # wanted id; "" lets the broker choose
    meta: dict[str, Any] = field(default_factory=dict)
    start: JobKey = NO_JOB


#: The feature of a broker that knows ``SubmitJob.start``.
START_FEATURE = "start"


@dataclass(frozen=True, slots=True)
class ClaimJob:
    """controller -> broker: give me a job; or with ``job`` and ``lost``: its process died, give it out again.

    ``stopped``: it did not die by itself, its controller was told to stop: not one of the crashes that fail a job.
    """

    KIND: ClassVar[int] = 51
    ref: Count
    job: JobKey = NO_JOB
    claim: Count = 0
    lost: Text = ""
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class CommitRef:
    """The last commit of a job, and the checkpoints behind it."""

    round: Count
    model: PayloadRef | None = None
    state: PayloadRef | None = None
    best: PayloadRef | None = None
    record: dict[str, Any] = field(default_factory=dict)
    workflow: Count = 0  # which of the job's workflows it is of
    first: Count = 0  # the number of that workflow's first round


@dataclass(frozen=True, slots=True)
class Claimed:
    """broker -> controller or job: the job is yours under this claim."""

    KIND: ClassVar[int] = 52
    ref: Count
    job: JobKey
    claim: Count
    name: Name = ""
    archive: PayloadRef | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    commit: CommitRef | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """job -> broker: an open gather's aggregate made durable.

    Covers its results 0 to ``covered`` - 1, whose payloads go.
    """

    KIND: ClassVar[int] = 53
    ref: Count
    job: JobKey
    claim: Count
    gather: GatherKey
    payload: PayloadRef
    covered: Count


@dataclass(frozen=True, slots=True)
class Commit:
    """job -> broker: the round is durable; model, state, record and round number become visible together."""

    KIND: ClassVar[int] = 54
    ref: Count
    job: JobKey
    claim: Count
    round: Count
    model: PayloadRef | None = None
    state: PayloadRef | None = None
    best: bool = False  # this commit's ``best_model`` (else its model) is the best so far
    best_model: PayloadRef | None = None
    record: dict[str, Any] = field(default_factory=dict)
    workflow: Count = 0  # as in CommitRef
    first: Count = 0


@dataclass(frozen=True, slots=True)
class EndJob:
    """job -> broker: the workflow returned or raised."""

    KIND: ClassVar[int] = 55
    ref: Count
    job: JobKey
    claim: Count
    status: Literal["FINISHED:COMPLETED", "FINISHED:FAILED", "FINISHED:ABORTED"]
    reason: Text = ""


#: The kind of the events that hold what scripts log, many points in one; see docs/protocol.md.
POINTS_KIND = "metric"


@dataclass(frozen=True, slots=True)
class Event:
    """anyone -> broker: something to keep about a job (log, metric, state_lost); read back by Ask "events"."""

    KIND: ClassVar[int] = 56
    job: JobKey
    kind: Name
    site: SiteKey = NO_SITE
    data: dict[str, Any] = field(default_factory=dict)
    text: Text = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """anyone -> broker: a question or an order about jobs: "jobs", "job", "events", "rounds", "sites", "abort", ...

    The orders "retry" and "drop" are about the dead letter whose number is ``after``.
    """

    KIND: ClassVar[int] = 57
    ref: Count
    what: Name
    job: JobKey = NO_JOB
    after: Count = 0
    limit: Annotated[int, Limit(low=1, high=10_000)] = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """broker -> whoever asked. Tail: msgpack of what does not fit in the body."""

    KIND: ClassVar[int] = 58
    ref: Count
    data: dict[str, Any] = field(default_factory=dict)
