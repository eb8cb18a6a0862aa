"""From a task that has its slot to what its host is told. Runs in the agent's thread."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from ..serialization import spans
from ..serialization.errors import FedloomError
from ..serialization.messages import Event
from .desk import Desk
from .hostpool import HostPlan, HostPool
from .hosts import log_size
from .pace import Pace
from .plans import host_plan, task_spec
from .runs import Run
from .sitelogs import SiteLogs
from .slots import Slot
from .state import version_name

log = structlog.get_logger(__name__)


class Memories:
    """Which scripts may have kept memory of their own from task to task, and which of them have lost it. Pure."""

    def __init__(self) -> None:
        self._lost: set[str] = set()
        self._seen: set[str] = set()

    def lose(self, lane: str) -> None:
        """The process of a lane that goes on has ended."""
        self._lost.add(lane)

    def begins(self, run: Run, fresh: bool) -> bool:
        """A task begins; whether its script starts without a memory that it may have had (``fresh``: it starts)."""
        lane = run.lane
        elsewhere = lane not in self._seen and run.item.settled > 0
        without = fresh and (elsewhere or lane in self._lost)
        self._seen.add(lane)
        self._lost.discard(lane)
        return without

    def forget(self, job: str) -> None:
        """The job is over."""
        self._lost = {lane for lane in self._lost if not lane.startswith(f"{job}/")}
        self._seen = {lane for lane in self._seen if not lane.startswith(f"{job}/")}


class Starts:
    """Describes tasks to their hosts and hands them over."""

    def __init__(self, desk: Desk, hosts: HostPool, logs: SiteLogs, memories: Memories) -> None:
        self._desk = desk
        self._hosts = hosts
        self._logs = logs
        self._memories = memories
        self._pace = Pace()

    def took(self, run: Run, seconds: float) -> None:
        """How long a task has taken: quick ones are handed over several at a time."""
        self._pace.note((run.job, run.work.assign.name), seconds)

    def describe(self, run: Run) -> None:
        """Find out what its host or function is told of the task.

        Raises:
            JobError: a filter or setting of the job that cannot be had here. PayloadError: no such version of a state.
        """
        spans.end("queue", run.came_at, round=run.work.assign.round, site=run.item.site, task=run.item.task)
        run.came_at, run.slot_at = 0.0, spans.start()
        link = self._desk.link
        run.stage = "running"
        run.started_at = 0.0
        state_path = self._state_path(run)
        incoming = ""
        result_path = self._desk.outbox.payload_place(*run.key)
        if link.local is not None and not run.work.prefolds:
            incoming = f"x-{run.item.task}.{run.item.attempt}.{secrets.token_hex(4)}"
            result_path = str(link.local.incoming_path(incoming))
        run.incoming = incoming
        run.spec = task_spec(run, self._desk.jobs, state_path, self._state_out(run), result_path, self._desk.digest)

    def give(self, run: Run, slot: Slot) -> None:
        """Hand a task that was described to its host; quick ones that wait go along.

        Raises:
            JobError: the script is not there, or its command line cannot be read. OSError: no host can be started.
        """
        plan = host_plan(run, slot, self._desk.jobs, self._desk.config.env)
        self._watch_log(run, plan)
        if plan.lane:
            fresh = self._hosts.find(plan.key) is None
            assert run.spec is not None
            if self._memories.begins(run, fresh and not plan.once and not run.spec.state_path):
                run.restarted = True
            self._hosts.give(run, plan)
            self._desk.slots.bind(plan.lane, slot)
        else:
            # to one that runs: where it has to be started first, that may fail
            behind = self._behind(run, slot, self._same_worker(run)) if self._hosts.find(plan.key) else []
            for other in behind:
                self._watch_log(other, plan)
            self._hosts.give(run, plan, behind)

    def along(self, run: Run, slot: Slot) -> list[Run]:
        """Tasks for the same embedded function that are begun with this one, where they are quick."""
        return self._behind(run, slot, lambda other: other.gather == run.gather and other.work.prepared)

    def _same_worker(self, run: Run) -> Callable[[Run], bool]:
        """Which tasks the worker of this one can do as well."""
        job, settings = run.work.job, run.settings
        assert job is not None
        app = job.spec.client_app_of(run.item.site).name
        return lambda other: (
            other.gather == run.gather
            and ((theirs := other.settings) is settings or theirs == settings)
            and other.work.in_workers == run.work.in_workers
            and job.spec.client_app_of(other.item.site).name == app
        )

    def _behind(self, run: Run, slot: Slot, alike: Callable[[Run], bool]) -> list[Run]:
        """Tasks that are done right behind this one, described, where they are quick."""
        desk = self._desk
        kind, slots = (run.job, run.work.assign.name), desk.slots
        most = self._pace.ahead(kind, slots.waiting, slots.capacity)
        out: list[Run] = []
        for key in slots.follow(slot, lambda key: alike(desk.runs[key]), most) if most else ():
            other = desk.runs[key]
            desk.slot_of[key] = slot
            try:
                self.describe(other)
            except (FedloomError, OSError) as error:
                desk.fail(other, "job", f"{other.item.site} cannot start the task: {error}")
                continue
            out.append(other)
        return out

    def _watch_log(self, run: Run, plan: HostPlan) -> None:
        assert run.spec is not None
        run.log_path = run.spec.log_path or plan.request.log_path
        run.log_start = log_size(run.log_path)
        self._logs.watch(run.job, run.item.site, run.log_path, time.monotonic(), run.log_start)

    def _state_path(self, run: Run) -> Path | None:
        item = run.item
        if not item.state:
            return None
        path = self._desk.states.path(item.site, run.job, item.state)
        if path.is_file():
            return path
        log.warning("state_lost", job=run.job, site=item.site, version=item.state)
        run.restarted = True
        data = {"task": item.task, "attempt": item.attempt, "version": item.state, "round": run.work.assign.round}
        text = f"{item.site} starts round {run.work.assign.round} without its state: version {item.state} is not here"
        self._desk.link.send(Event(run.work.assign.job, "state_lost", item.site, data, text))
        return None

    def _state_out(self, run: Run) -> str:
        return self._desk.states.place(run.item.site, run.job, version_name(run.item.task, run.item.attempt))
