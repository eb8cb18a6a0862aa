"""What the parts of an agent share: its settings and folders, the attempts in hand, and how they end without a result.

Everything but `held_refs`, `free` and `post` belongs to the agent's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import structlog

from ..serialization import spans
from ..serialization.codec import encode_fields, pack
from ..serialization.jobmessages import POINTS_KIND
from ..serialization.messages import Event, Fail, JobId, Site, TaskRef
from .cache import PayloadCache
from .channel import Map
from .client_context import tail_text
from .config import AgentConfig
from .deliver import LinkLike
from .jobs import JobFolders
from .outbox import Outbox
from .pointflow import PointFlows
from .runs import Key, Run, Work
from .slots import Slot, Slots
from .state import StateStore, version_name

log = structlog.get_logger(__name__)

_MAX_EVENT_BYTES = 32 * 1024
_MAX_GATHERS = 256


class Desk:
    """The attempts of one agent, from Assign until their result is stored."""

    def __init__(self, config: AgentConfig, post: Callable[[Callable[[], None]], None]) -> None:
        workspace = config.workspace
        self.config = config
        self.post = post
        self.cache = PayloadCache(workspace / "cache", config.cache_bytes)
        self.jobs = JobFolders(workspace)
        self.states = StateStore(workspace)
        self.outbox = Outbox(workspace / "outbox")
        self.slots: Slots[Key] = Slots(config.capacity, config.slot_envs)
        self.slot_of: dict[Key, Slot] = {}
        self.runs: dict[Key, Run] = {}
        self._attempts: dict[str, list[Run]] = {}  # by task
        self._gathers: dict[tuple[str, str], int] = {}
        self.ended_jobs: dict[str, None] = {}
        self.points = PointFlows(lambda job, site, data: self._tell(job, site, POINTS_KIND, data))
        self.digest = True  # whether results carry one
        self._link: LinkLike | None = None
        self._held_lock = threading.Lock()
        self._held: set[Key] = {held.key for held in self.outbox}
        self._occupied = 0
        self._io = ThreadPoolExecutor(4 + config.capacity, "fedloom-io")
        self._fold = ThreadPoolExecutor(1, "fedloom-fold")

    @property
    def link(self) -> LinkLike:
        """The agent's link."""
        assert self._link is not None
        return self._link

    @link.setter
    def link(self, link: LinkLike) -> None:
        self._link = link

    # ------------------------------------------------------------ any thread

    def held_refs(self) -> list[TaskRef]:
        """Every attempt that is ours until the broker says otherwise: what Hello tells."""
        with self._held_lock:
            return [TaskRef(task, attempt) for task, attempt in self._held]  # pyright: ignore[reportArgumentType]

    @property
    def free(self) -> int:
        """How many more tasks may come: those whose result waits for others, or for the broker, take no room."""
        return max(0, self.config.announced - self._occupied)

    @property
    def parked(self) -> int:
        """How many of the attempts here take no room any more, and the broker does not know."""
        return len(self.runs) - self._occupied

    # ------------------------------------------------------------ threads

    def submit(self, work: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """Run ``work`` in a pool thread, and ``done`` with its outcome in the agent's."""
        self._into(self._io, work, done)

    def fold(self, work: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """As `submit`, in the one thread that folds."""
        self._into(self._fold, work, done)

    def _into(self, pool: ThreadPoolExecutor, work: Callable[[], Any], done: Callable[..., None]) -> None:
        def run() -> None:
            value: Any = None
            error: Exception | None = None
            try:
                value = work()
            except Exception as caught:  # noqa: BLE001 - the pool's outermost guard: the agent's thread decides
                error = caught
            self.post(lambda: done(value, error))

        pool.submit(run)

    def close(self) -> None:
        """Take no more work for the pools."""
        for pool in (self._io, self._fold):
            pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ attempts

    def add(self, run: Run) -> None:
        """A new attempt."""
        self.runs[run.key] = run
        self._attempts.setdefault(run.item.task, []).append(run)
        self._occupied += 1
        with self._held_lock:
            self._held.add(run.key)

    def count_tasks(self, gather: tuple[str, str], more: int) -> int:
        """How many tasks of a gather have come here, with these."""
        known = self._gathers.pop(gather, 0) + more
        self._gathers[gather] = known
        if len(self._gathers) > _MAX_GATHERS:
            del self._gathers[next(iter(self._gathers))]
        return known

    def attempts(self, task: str) -> list[Run]:
        """The attempts at a task that are here."""
        return list(self._attempts.get(task, ()))

    def leave_slot(self, run: Run) -> None:
        """It works no more: others may."""
        self.slots.release(run.key)
        slot = self.slot_of.pop(run.key, None)
        if slot is not None and run.slot_at:
            round, lane = run.work.assign.round, f"slot-{slot.index + 1}"
            spans.end("slot", run.slot_at, round=round, site=run.item.site, task=run.item.task, lane=lane)
        if run.occupies:
            run.occupies = False
            self._occupied -= 1

    def close_run(self, key: Key) -> None:
        """Forget a run. The attempt stays ours: its result is on its way."""
        run = self.runs.pop(key, None)
        if run is None:
            return
        others = [other for other in self._attempts.pop(run.item.task) if other is not run]
        if others:
            self._attempts[run.item.task] = others
        self.leave_slot(run)
        run.work.open -= 1
        self.close_work(run.work)

    def close_work(self, work: Work) -> None:
        """The payload may go once it is here and nobody works with it any more."""
        if work.open <= 0 and work.prepared and work.pinned and work.assign.payload is not None:
            work.pinned = False
            self.cache.unpin(work.assign.payload.id)

    def let_go(self, key: Key) -> None:
        """The attempt is not ours any more."""
        with self._held_lock:
            self._held.discard(key)

    def end(self, run: Run) -> None:
        """The attempt is over without a result."""
        self.discard_files(run)
        self.close_run(run.key)
        self.let_go(run.key)

    def discard_files(self, run: Run) -> None:
        """What the attempt has written is nobody's."""
        if run.spec is not None:
            Path(run.spec.result_path).unlink(missing_ok=True)
            self.states.discard(run.item.site, run.job, version_name(*run.key))

    def fail(self, run: Run, code: str, text: str, *, retryable: bool = False, killed: bool = False) -> None:
        """Tell the broker that the attempt failed, and end it."""
        clean = tail_text(text).encode("utf-8", "replace").decode()
        log.warning("task_failed", job=run.job, site=run.item.site, task=run.work.assign.name, code=code, killed=killed)
        self.link.send(Fail(run.item.task, run.item.attempt, code, clean, retryable, killed))
        self.end(run)

    @contextmanager
    def answering(self, *runs: Run) -> Generator[None]:
        """Have these attempts fail, and tried again, where an error that nobody expected would leave them for ever."""
        try:
            yield
        except Exception as error:  # a guard like the loop's own; no task may wait for what has gone wrong here
            log.exception("task_not_handled", tasks=[run.item.task for run in runs])
            for run in runs:
                self.fail(self.runs.get(run.key, run), "internal", f"the executor failed: {error!r}", retryable=True)

    def event(self, job: str, site: str, message: Map) -> None:
        """Pass on what user code wants kept about the job."""
        told: Any = message.get("data")
        data = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
        kind = str(message.get("kind", POINTS_KIND))[:64]
        points: Any = data.get("points")
        if kind == POINTS_KIND and isinstance(points, list):
            self.points.add(job, site, [point for point in cast("list[Any]", points) if isinstance(point, dict)])
        else:
            self._tell(job, site, kind, data)

    def _tell(self, job: str, site: str, kind: str, data: Map) -> None:
        event = Event(JobId(job), kind, Site(site), data)
        if len(pack(encode_fields(event))) > _MAX_EVENT_BYTES:
            log.warning("event_too_large", job=job, site=site, allowed_bytes=_MAX_EVENT_BYTES)
            return
        self.link.send(event)
