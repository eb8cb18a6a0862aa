"""What a gather and its tasks are: ids, sampling, and the rule by which a gather closes. Pure data and functions.

A task goes ``queued -> leased(attempt, owner, until) -> done | failed | cancelled | dead`` and back to ``queued`` when
its attempt is lost; `ledger` moves it. Ids are hashes of what a thing is, so opening again after a restart finds what
was recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from ..serialization.codec import encode_fields, pack
from ..serialization.messages import (
    DoneItem,
    Failure,
    GatherId,
    JobId,
    OpenGather,
    PayloadId,
    PayloadRef,
    Site,
    TaskId,
    TaskRef,
)

__all__ = [
    "FreshResult",
    "Gather",
    "PartialInfo",
    "Result",
    "Task",
    "TaskStatus",
    "Verdict",
    "choose_sites",
    "gather_id",
    "spec_digest",
    "task_id",
    "verdict",
]

TaskStatus = Literal["queued", "leased", "done", "failed", "cancelled", "dead"]
GatherState = Literal["waiting", "open", "closed", "failed"]


@dataclass(slots=True)
class Task:
    """One piece of work for one site; the fields after ``text`` are not journaled."""

    id: TaskId
    gather: GatherId
    site: Site
    ordinal: int
    status: TaskStatus = "queued"
    attempt: int = 0  # the last one given out; 0: none yet
    owner: str = ""  # the node that it was given to; still its owner when the lease has ended but was not given on
    tries: int = 0  # attempts that were lost or failed; what max_attempts bounds
    killed: int = 0  # attempts that took their process down
    base: str = ""  # the site-state version that the current attempt started from
    code: str = ""
    text: str = ""
    accepted: bool = False
    counted: bool = False  # the current attempt is among the tries: it may be lost, come back and be lost again
    progress: float = 0.0  # the current attempt's own word; 1: only its result's way here is left
    until: float = 0.0
    ready_at: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing can change its outcome any more."""
        return self.status not in ("queued", "leased")

    @property
    def given_up(self) -> bool:
        """Whether it has ended by failing: a dead letter, until somebody retries it."""
        return self.status in ("failed", "dead")

    @property
    def ref(self) -> TaskRef:
        """The current attempt."""
        return TaskRef(self.id, max(1, self.attempt))

    def failure(self) -> Failure:
        """How it ended without a result."""
        return Failure(self.id, self.site, self.code or self.status, self.text)


@dataclass(frozen=True, slots=True)
class Result:
    """An accepted result; its place in the gather's list is its index. Metadata and inline bytes are in the journal."""

    task: TaskId
    attempt: int
    site: Site
    payload: PayloadRef | None = None
    partial: str = ""  # the id of the partial that holds it


@dataclass(frozen=True, slots=True)
class PartialInfo:
    """An accepted partial: its payload (or inline bytes in the journal), and which results it is."""

    payload: PayloadRef
    first: int
    count: int
    inline: bool = False


@dataclass(frozen=True, slots=True)
class FreshResult:
    """A result, or a partial's results, on the way to the journal."""

    gather: GatherId
    index: int
    item: DoneItem
    inline: bytes | None = None
    partial: PayloadRef | None = None


@dataclass(slots=True)
class Gather:
    """A step's tasks, the results accepted so far in their order, and the rule of closing."""

    id: GatherId
    spec: OpenGather  # as asked for, without ref, claim, have and behind; without partials where the spool has no room
    digest: str
    requested: tuple[Site, ...]
    opened_at: float
    state: GatherState = "waiting"
    reason: str = ""
    quorum_at: float | None = None
    checkpoint: PayloadRef | None = None
    covered: int = 0  # results 0 to covered - 1 are in the checkpoint
    lost: bool = False  # results went with their payloads: a controller that has folded some must start over
    blocked: bool = False  # its payloads are gone: nothing is assigned until it is opened again with them
    tasks: dict[TaskId, Task] = field(default_factory=dict[TaskId, Task])
    results: list[Result] = field(default_factory=list[Result])
    partials: dict[str, PartialInfo] = field(default_factory=dict[str, PartialInfo])
    #: in the order of failing; only ever added to: what was retried since stays here, and may come a second time
    failed: list[TaskId] = field(default_factory=list[TaskId])
    left: int = 0  # tasks that have not ended
    arriving: int = 0  # of these, those of which only the result's way here is left

    @property
    def job(self) -> JobId:
        """The job it belongs to."""
        return self.spec.job

    @property
    def live(self) -> bool:
        """Whether results may still come."""
        return self.state in ("waiting", "open")

    @property
    def sites_known(self) -> bool:
        """Whether the sites were named, or must be drawn from those connected."""
        return bool(self.requested)

    def payload_ids(self) -> list[PayloadId]:
        """The payloads that its tasks need."""
        return [ref.id for ref in (self.spec.payload, self.spec.fold) if ref is not None]


Verdict = tuple[Literal["open", "closed", "failed"], str]


def verdict(gather: Gather, now: float) -> Verdict:
    """Whether an open gather closes now, and why; also notes the time of the quorum."""
    rule = gather.spec.rule
    got, left = len(gather.results), gather.left
    if got + left < rule.min_clients:
        if len(gather.tasks) < rule.min_clients:
            return (
                "failed",
                f"{len(gather.tasks)} sites for min_clients {rule.min_clients}: name more, or ask for fewer",
            )
        failed = sum(task.given_up for task in gather.tasks.values())
        return "failed", f"{rule.min_clients} results cannot be reached: {got} came, {failed} tasks failed"
    if left == 0:
        return "closed", ""
    if got >= rule.min_clients:
        if gather.quorum_at is None:
            gather.quorum_at = now
        extra_s = _extra_s(gather, gather.quorum_at)
        if extra_s is not None and now >= gather.quorum_at + extra_s:
            return "closed", f"{got} results and {extra_s:g} s more"
    if rule.deadline_s is not None and now >= gather.opened_at + rule.deadline_s:
        if got >= rule.min_clients:
            return "closed", f"deadline of {rule.deadline_s:g} s"
        return "failed", f"{got} of {rule.min_clients} results at the deadline of {rule.deadline_s:g} s"
    return "open", ""


def _extra_s(gather: Gather, quorum_at: float) -> float | None:
    """How long a gather that has its quorum waits for the others; None: until each of them has ended."""
    rule = gather.spec.rule
    waits = [] if rule.after_quorum_s is None else [rule.after_quorum_s]
    if rule.straggler_patience is not None:
        waits.append(rule.straggler_patience * max(0.0, quorum_at - gather.opened_at))
    return min(waits, default=None)


def next_check(gather: Gather) -> list[float]:
    """The times at which the rule alone may close the gather."""
    rule = gather.spec.rule
    times: list[float] = []
    if gather.state == "waiting":
        times.append(gather.opened_at + rule.sites_s)
    if rule.deadline_s is not None:
        times.append(gather.opened_at + rule.deadline_s)
    if gather.quorum_at is not None and (extra_s := _extra_s(gather, gather.quorum_at)) is not None:
        times.append(gather.quorum_at + extra_s)
    return times


def gather_id(job: str, round_: int, step: int, name: str, redo: int = 0) -> GatherId:
    """The id of a step's gather: the same key, the same id."""
    return GatherId("g" + _hash(job, round_, step, name, redo)[:31])


def task_id(job: str, round_: int, step: int, name: str, site: str, redo: int = 0) -> TaskId:
    """The id of one site's task in a step."""
    return TaskId(_hash(job, round_, step, name, site, redo)[:32])


def _hash(*parts: object) -> str:
    return hashlib.sha256(pack([str(part) for part in parts])).hexdigest()


def strip(spec: OpenGather) -> OpenGather:
    """The specification alone: without what differs between two askings for the same gather."""
    return replace(spec, ref=0, claim=0, have=0, behind=0)


def spec_digest(spec: OpenGather, sites: Sequence[str]) -> str:
    """What must be equal when a gather is opened again under the same key."""
    return hashlib.sha256(pack([_sorted(encode_fields(strip(spec))), list(sites)])).hexdigest()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value)
        return {key: _sorted(pairs[key]) for key in sorted(pairs)}
    if isinstance(value, list):
        return [_sorted(item) for item in cast("list[Any]", value)]
    return value


def choose_sites(sites: Iterable[str], sample: int, seed: int, round_: int, step: int) -> list[Site]:
    """``sample`` of the sites in a random order that (seed, round, step) fix, whatever order they came in; 0 takes all.

    Ranking by a hash rather than a generator: the draw does not depend on Python's version, and one site more or less
    moves no other.
    """
    unique = sorted(set(sites))
    if not 0 < sample < len(unique):
        return [Site(site) for site in unique]
    ranked = sorted(unique, key=lambda site: _hash("sample", seed, round_, step, site))
    return [Site(site) for site in ranked[:sample]]
