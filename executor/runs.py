"""The agent's own records: what was assigned, and each attempt on its way to a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..serialization import spans
from ..serialization.errors import JobError
from ..serialization.messages import Assign, AssignItem, TaskRef
from .context import TaskContext, TaskFunction
from .embedded import Call
from .jobs import JobFolder
from .script import Settings
from .taskio import TaskSpec

Key = tuple[str, int]
_MARK_BYTES = 160
#: Gathers of which a worker keeps the fold plan: those that follow one another, and a few jobs beside each other.
MAX_PLANS = 16
Stage = Literal["preparing", "waiting", "running", "folding", "storing"]


@dataclass(slots=True)
class Work:
    """One Assign, prepared once for all of its tasks."""

    assign: Assign
    tail: bytes = b""
    job: JobFolder | None = None
    settings: dict[str, Settings] = field(default_factory=dict[str, Settings])  # by site
    refused: dict[str, JobError] = field(default_factory=dict[str, JobError])  # sites that nothing works for
    function: TaskFunction | None = None  # embedded: runs in a thread of this process
    payload: Path | bytes | None = None
    plan: bytes | None = None  # the fold's, where results may be folded here
    in_workers: bool = False  # folded where the tasks run: in worker processes, or this process's own threads
    prepared: bool = False  # the pool thread is done with it
    pinned: bool = False  # the payload is in the cache, and kept there
    open: int = 0  # tasks not finished: the payload stays pinned as long
    known: int = 0  # tasks of its gather that were given out to this executor up to now
    runs: list[Run] = field(default_factory=list["Run"])  # those that wait for it to be prepared

    @property
    def prefolds(self) -> bool:
        """Whether results of these tasks may be folded here."""
        return self.plan is not None


@dataclass(slots=True)
class Run:
    """One attempt at one task."""

    work: Work
    item: AssignItem
    stage: Stage = "preparing"
    spec: TaskSpec | None = None
    context: TaskContext | None = None  # embedded only, like the next
    call: Call | None = None
    cancelled: bool = False
    occupies: bool = True  # counts against what this executor has announced
    restarted: bool = False
    incoming: str = ""  # the result file's name in the broker's incoming folder, where it is written there
    kill_at: float = float("inf")  # a cancelled one that goes on is ended then
    started_at: float = 0.0
    log_path: str = ""
    log_start: int = 0
    came_at: float = field(default_factory=spans.start)  # these two: where a profile is taken
    slot_at: float = 0.0
    key: Key = field(init=False)  # the attempt
    lane: str = field(init=False)  # what must not overlap: a job's tasks at one site

    def __post_init__(self) -> None:
        self.key = (self.item.task, self.item.attempt)
        self.lane = f"{self.work.assign.job}/{self.item.site}"

    @property
    def settings(self) -> Settings | None:
        """What works on it: None where only an embedded function does."""
        return self.work.settings.get(self.item.site)

    @property
    def ref(self) -> TaskRef:
        """The attempt, as messages name it."""
        return TaskRef(self.item.task, self.item.attempt)

    @property
    def job(self) -> str:
        """Its job's id."""
        return self.work.assign.job

    @property
    def gather(self) -> tuple[str, str]:
        """What may be folded together."""
        return (self.work.assign.job, self.work.assign.gather)


def mark_of(key: Key) -> bytes:
    """How a worker notes the attempt that it is at, where its agent finds it after its death."""
    return f"{key[0]}.{key[1]}".encode().ljust(_MARK_BYTES)
