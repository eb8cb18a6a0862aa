"""Tasks under leases: who works on what, and what happens when they vanish. Pure; times are arguments.

Only the current attempt may settle a task. A lease that has ended but was not given on is still current, so a returning
owner takes it up again in its Hello. An accepted lease goes on with any traffic of its owner.
"""

from __future__ import annotations

import heapq
import random
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..serialization.messages import Fail, GatherId, JobId, Site, TaskId, TaskRef
from .gathers import FreshResult, Gather, Task

__all__ = ["Leases", "Limits", "Owner", "SiteState"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How far the ledger may grow, and the pace of redelivery."""

    max_tasks: int = 200_000  # tasks a gather
    max_gathers: int = 1_000  # gathers a job may have before it commits
    max_job_tasks: int = 1_000_000  # tasks of all these gathers together
    max_past: int = 4096  # committed gathers whose rounds are remembered, for results that come even later
    max_killed: int = 3  # processes that a task may take down
    max_failure_chars: int = 4096  # of a failure's text; its end is kept
    max_backoff_s: float = 60.0
    retry_s: float = 1.0  # the first backoff; doubled with each try, jittered by half either way


@dataclass(slots=True)
class Owner:
    """An executor's node as the ledger sees it."""

    node: str
    sites: frozenset[str]
    capacity: int
    seen: float
    leased: set[TaskId] = field(default_factory=set[TaskId])
    unaccepted: int = 0
    parked: int = 0  # accepted tasks that occupy no slot any more: their result waits in an unsent partial, or uploads
    ready: deque[TaskId] = field(default_factory=deque[TaskId])

    @property
    def room(self) -> int:
        """How many more tasks it can take."""
        return self.capacity - (len(self.leased) - self.parked)

    def report(self, free: int) -> None:
        """Its own word on its free slots. Links keep order: what it has not accepted yet is not in its count."""
        accepted = len(self.leased) - self.unaccepted
        self.parked = max(0, min(accepted, accepted - (self.capacity - min(free, self.capacity))))


@dataclass(frozen=True, slots=True)
class SiteState:
    """What a site remembers of a job: the current version's name, and how many tasks it has settled."""

    version: str = ""
    settled: int = 0
    last: str = ""  # the task settled last, a redo counting as its original
    attempt: str = ""  # and by which attempt, as task.attempt: its Done may come again when its gather is gone


_NO_STATE = SiteState()


class Leases(ABC):
    """Tasks, the executors that own them, and timers. `Ledger` adds the gathers' own rules."""

    def __init__(self, limits: Limits | None = None, seed: int | None = None) -> None:
        self.limits = limits or Limits()
        self.gathers: dict[GatherId, Gather] = {}
        self.tasks: dict[TaskId, Task] = {}
        self.owners: dict[str, Owner] = {}
        #: nodes whose ready queue may hold something, in the order in which it came
        self.eager: dict[str, None] = {}
        self.node_of: dict[Site, str] = {}
        self.down_since: dict[Site, float] = {}
        self.site_states: dict[tuple[JobId, Site], SiteState] = {}
        #: stale attempts to tell their owners of: (node, job, attempt)
        self.cancels: list[tuple[str, JobId, TaskRef]] = []
        #: tasks that have failed or died, for the job's events
        self.bad_ends: list[Task] = []
        self.fresh: list[FreshResult] = []
        self.dirty_tasks: dict[TaskId, Task] = {}
        self.dirty_gathers: dict[GatherId, Gather] = {}
        self.dirty_sites: set[tuple[JobId, Site]] = set()
        self.released: list[GatherId] = []
        #: gathers that lost results on the disk, and which they keep
        self.rewrites: list[tuple[GatherId, list[int]]] = []
        #: jobs that ended: nothing of their sites is remembered
        self.forgotten: list[JobId] = []
        self.started_at = 0.0
        self._random = random.Random(seed)
        self._unended: defaultdict[Site, set[TaskId]] = defaultdict(set)
        #: leased tasks that the journal gave back and whose owners were not heard of since
        self._unclaimed: defaultdict[str, set[TaskId]] = defaultdict(set)
        self.timers: list[tuple[float, str, str]] = []

    @abstractmethod
    def check(self, gather: Gather, now: float) -> None:
        """Apply the rule of closing: a task of the gather has ended."""

    def site_state(self, job: JobId, site: Site) -> SiteState:
        """The site's current state version of a job."""
        return self.site_states.get((job, site), _NO_STATE)

    def adopt_task(self, gather: Gather, task: Task, now: float) -> None:
        """Take a new or journaled task into all indexes."""
        gather.tasks[task.id] = task
        self.tasks[task.id] = task
        if task.ended:
            return
        gather.left += 1
        self._unended[task.site].add(task.id)
        if task.site not in self.node_of:
            since = self.down_since.setdefault(task.site, now)
            self.timer(max(since, gather.opened_at) + gather.spec.rule.sites_s, "gone", task.id)
        if task.status == "queued":
            self.enqueue(task, now)
        else:
            self._unclaimed[task.owner].add(task.id)
            self.timer(task.until, "lease", task.id)

    # ------------------------------------------------------------ owners and sites

    def owner_up(self, node: str, sites: Iterable[str], capacity: int, now: float) -> None:
        """An executor connected (again) and serves these sites."""
        owner = self.owners.get(node) or Owner(node, frozenset(), capacity, now)
        self.owners[node] = owner
        for site in owner.sites.difference(sites):
            self._site_down(Site(site), now)
        owner.sites, owner.capacity, owner.seen = frozenset(sites), capacity, now
        owner.ready.clear()
        owner.parked = 0
        for site in sorted(owner.sites):
            self.node_of[Site(site)] = node
            self.down_since.pop(Site(site), None)
        for site in sorted(owner.sites):
            for tid in sorted(self._unended.get(Site(site), ()), key=lambda t: self.tasks[t].ordinal):
                if self.tasks[tid].status == "queued":
                    self.enqueue(self.tasks[tid], now)

    def owner_gone(self, node: str, now: float, *, polite: bool = False) -> None:
        """An executor's session ended: its tasks are queued again, its sites are down."""
        owner = self.owners.pop(node, None)
        if owner is None:
            return
        for site in owner.sites:
            self._site_down(Site(site), now)
        mine = sorted((self.tasks[tid] for tid in owner.leased), key=lambda t: (t.gather, t.ordinal))
        for task in mine:  # in an order that a set does not have: the same history draws the same backoffs
            self._requeue(task, now, "executor_gone", f"{node} left", counted=not polite, delay=None)

    def _site_down(self, site: Site, now: float) -> None:
        self.node_of.pop(site, None)
        self.down_since[site] = now
        for tid in self._unended.get(site, ()):
            task = self.tasks[tid]
            self.timer(now + self.gathers[task.gather].spec.rule.sites_s, "gone", tid)

    def renew(self, node: str, now: float) -> None:
        """Traffic of an executor: the leases of what it has accepted go on."""
        owner = self.owners.get(node)
        if owner is not None:
            owner.seen = now

    # ------------------------------------------------------------ leases

    def assign(self, node: str, most: int, now: float) -> list[Task]:
        """Lease up to ``most`` queued tasks of the executor's sites to it, as far as it has room."""
        owner = self.owners[node]
        out: list[Task] = []
        while owner.ready and len(out) < most and owner.room > 0:
            task = self.tasks.get(owner.ready.popleft())
            if task is None or task.status != "queued" or task.ready_at > now or self.node_of.get(task.site) != node:
                continue
            gather = self.gathers[task.gather]
            if gather.blocked:
                continue
            task.attempt += 1
            self.moved(task, 0.0)
            task.counted = False
            if not gather.spec.redo:
                task.base = self.site_state(gather.job, task.site).version
            self._lease(task, owner, now, accepted=False)
            out.append(task)
        return out

    def _lease(self, task: Task, owner: Owner, now: float, *, accepted: bool) -> None:
        lease_s = self.gathers[task.gather].spec.lease_s
        task.status, task.owner, task.accepted, task.until = "leased", owner.node, accepted, now + lease_s
        owner.leased.add(task.id)
        owner.unaccepted += not accepted
        self.dirty_tasks[task.id] = task
        self.timer(task.until, "lease", task.id)

    def _unlease(self, task: Task) -> None:
        owner = self.owners.get(task.owner)
        if owner is not None and task.id in owner.leased:
            owner.leased.discard(task.id)
            owner.unaccepted -= not task.accepted
            owner.parked = max(0, owner.parked - 1)

    def current(self, node: str, ref: TaskRef) -> Task | None:
        """The task, if this attempt is the current one, not ended, and this node's."""
        task = self.tasks.get(ref.task)
        if task is None or task.ended or task.attempt != ref.attempt or task.owner != node:
            return None
        return task

    def moved(self, task: Task, done: float) -> None:
        """The current attempt is so far; 1: only its result's way here is left."""
        if done != task.progress:
            self.gathers[task.gather].arriving += (done >= 1) - (task.progress >= 1)
            task.progress = done

    def accept(self, node: str, refs: Iterable[TaskRef], now: float) -> None:
        """The executor works on these; what is not its own any more is cancelled."""
        owner = self.owners[node]
        for ref in refs:
            task = self.current(node, ref)
            if task is None:
                self._cancel_stale(node, ref)
            elif task.status == "queued":
                self._lease(task, owner, now, accepted=True)
            elif not task.accepted:
                task.accepted = True
                owner.unaccepted -= 1

    def decline(self, node: str, refs: Iterable[TaskRef], retry_after_s: float, now: float) -> None:
        """The executor will not work on these: queued again, which counts as no try."""
        for ref in refs:
            task = self.current(node, ref)
            if task is not None and task.status == "leased":
                self._requeue(task, now, "declined", "", counted=False, delay=max(0.05, retry_after_s))

    def adopt(self, node: str, held: Iterable[TaskRef], now: float) -> None:
        """A returning executor's word on what it holds: those leases go on, its others are queued again."""
        owner = self.owners[node]
        kept: set[TaskId] = set()
        for ref in held:
            task = self.current(node, ref)
            if task is not None:
                kept.add(task.id)
                if task.status == "queued":
                    self._lease(task, owner, now, accepted=True)
                    continue
                if task.id not in owner.leased:  # known only by the journal, after the broker's own restart
                    owner.leased.add(task.id)
                elif not task.accepted:
                    owner.unaccepted -= 1
                task.accepted = True
                continue
            if not self._settled(owner, ref):
                self._cancel_stale(node, ref)
        unclaimed = self._unclaimed.pop(node, set[TaskId]())
        mine = [self.tasks.get(tid) for tid in owner.leased | unclaimed]
        lost = [t for t in mine if t and t.status == "leased" and t.owner == node and t.id not in kept]
        for task in sorted(lost, key=lambda t: (t.gather, t.ordinal)):
            # what it had not accepted was perhaps still on its way when the link broke, or when the broker died: no try
            text, accepted = f"{node} does not hold it", task.accepted and task.id not in unclaimed
            self._requeue(task, now, "executor_restarted", text, counted=accepted, delay=None)

    def _settled(self, owner: Owner, ref: TaskRef) -> bool:
        """Whether this attempt's result is in, be its round over or not: its Stored was lost, its Done comes again."""
        task = self.tasks.get(ref.task)
        if task is not None:
            return task.status == "done" and task.attempt == ref.attempt
        name = f"{ref.task}.{ref.attempt}"
        return any(
            name in (state.attempt, state.version)
            for (_, site), state in self.site_states.items()
            if site in owner.sites
        )

    def fail(self, node: str, message: Fail, now: float) -> bool:
        """An attempt failed; False where it was not current and nothing changed."""
        task = self.current(node, TaskRef(message.task, message.attempt))
        if task is None:
            return False
        text = message.text[-self.limits.max_failure_chars :]
        task.killed += message.killed
        if task.killed >= self.limits.max_killed:
            self._end_bad(task, "dead", "killed", f"it took {task.killed} processes down; the last said: {text}", now)
        elif message.retryable:
            self._requeue(task, now, message.code, text, counted=True, delay=0.0)
            if not task.ended:
                task.owner = ""  # it gave the attempt up: said twice, this counts once
        else:
            self._end_bad(task, "failed", message.code, text, now)
        return True

    def requeue(self, node: str, ref: TaskRef, code: str, text: str, now: float) -> bool:
        """Queue a task again whose result cannot be used; False where the attempt was not current."""
        task = self.current(node, ref)
        if task is not None:
            self._requeue(task, now, code, text, counted=True, delay=None)
        return task is not None

    def _requeue(self, task: Task, now: float, code: str, text: str, *, counted: bool, delay: float | None) -> None:
        """Back to the queue. ``delay`` None: at once the first time (nothing says that the task is to blame)."""
        if task.ended:
            return
        gather = self.gathers[task.gather]
        self._unlease(task)
        task.status, task.accepted = "queued", False
        task.code, task.text = code, text or task.text
        self.dirty_tasks[task.id] = task
        if counted:
            task.tries += not task.counted
            task.counted = True
            if task.tries >= gather.spec.max_attempts:
                said = f"; the last: {task.text}" if task.text else ""
                self._end_bad(task, "dead", "max_attempts", f"{task.tries} attempts failed ({code}){said}", now)
                return
            if delay == 0.0 or (delay is None and task.tries > 1):
                delay = min(self.limits.max_backoff_s, self.limits.retry_s * 2 ** min(task.tries - 1, 10))
                delay *= 0.5 + self._random.random()
        self.enqueue(task, now, delay or 0.0)

    def _end_bad(self, task: Task, status: Literal["failed", "dead"], code: str, text: str, now: float) -> None:
        gather = self.gathers[task.gather]
        task.code, task.text = code, text[: self.limits.max_failure_chars]
        gather.failed.append(task.id)
        self.bad_ends.append(task)
        self.end_task(gather, task, status)
        self.check(gather, now)

    def end_task(self, gather: Gather, task: Task, status: Literal["done", "failed", "cancelled", "dead"]) -> None:
        """The task's end: out of the queues and leases."""
        self._unlease(task)
        self.moved(task, 0.0)
        task.status = status
        gather.left -= 1
        self.dirty_tasks[task.id] = task
        unended = self._unended[task.site]
        unended.discard(task.id)
        if not unended:
            del self._unended[task.site]

    def _cancel_stale(self, node: str, ref: TaskRef) -> None:
        task = self.tasks.get(ref.task)
        self.cancels.append((node, self.gathers[task.gather].job if task else JobId(""), ref))

    def enqueue(self, task: Task, now: float, delay: float = 0.0) -> None:
        """Queue a task at its site's executor, now or later."""
        if delay > 0:
            task.ready_at = now + delay
            self.timer(task.ready_at, "ready", task.id)
            return
        owner = self.owners.get(self.node_of.get(task.site, ""))
        if owner is not None:
            owner.ready.append(task.id)
            self.eager[owner.node] = None

    # ------------------------------------------------------------ time

    def timer(self, when: float, kind: str, key: str) -> None:
        """Have `tick` look at this at that time."""
        heapq.heappush(self.timers, (when, kind, key))

    @property
    def next_at(self) -> float | None:
        """When `tick` has something to do next."""
        return self.timers[0][0] if self.timers else None

    def task_due(self, kind: str, tid: TaskId, now: float) -> None:
        """The time of a task's lease, backoff or lost site has come."""
        task = self.tasks.get(tid)
        if task is None or task.ended:
            return
        match kind:
            case "lease":
                self._lease_due(task, now)
            case "ready":
                if task.status == "queued" and task.ready_at <= now:
                    self.enqueue(task, now)
            case _:
                self._gone_due(task, now)

    def _lease_due(self, task: Task, now: float) -> None:
        if task.status != "leased":
            return
        owner = self.owners.get(task.owner)
        if owner is not None and task.accepted:
            task.until = max(task.until, owner.seen + self.gathers[task.gather].spec.lease_s)
        if task.until > now:
            self.timer(task.until, "lease", task.id)
            return
        counted = task.accepted or owner is None
        self._requeue(task, now, "lease", f"{task.owner} went silent", counted=counted, delay=None)

    def _gone_due(self, task: Task, now: float) -> None:
        since = self.down_since.get(task.site)
        gather = self.gathers[task.gather]
        if since is None:
            return
        due = max(since, gather.opened_at, self.started_at) + gather.spec.rule.sites_s
        if due > now:
            self.timer(due, "gone", task.id)
            return
        text = f"no executor has served {task.site} for {gather.spec.rule.sites_s:g} s"
        self._end_bad(task, "dead", "site_gone", text, now)
