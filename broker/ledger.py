"""The task machine: gathers over tasks under leases. Pure; times are arguments.

`leases` moves the tasks, `settle` takes results in, `gathers` holds data and the rule of closing; this opens, closes
and forgets gathers. What has changed is noted in ``dirty_*``, ``fresh`` and the like, which the journal empties once a
turn.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from ..serialization.errors import FaultError, NondeterministicError
from ..serialization.messages import GatherId, JobId, OpenGather, PayloadRef, Site, TaskId
from .gathers import (
    Gather,
    Task,
    choose_sites,
    gather_id,
    next_check,
    spec_digest,
    strip,
    task_id,
    verdict,
)
from .leases import Leases, Limits, Owner, SiteState

__all__ = ["Ledger", "Limits", "Owner", "SiteState"]


class Ledger(Leases):
    """All gathers that are not committed yet, their tasks and leases."""

    def __init__(self, limits: Limits | None = None, seed: int | None = None) -> None:
        super().__init__(limits, seed)
        #: the rounds of gathers that were forgotten lately, for results that come even later
        self.past: OrderedDict[GatherId, int] = OrderedDict()
        self.past_dropped = 0

    def open(self, message: OpenGather, sites: Sequence[str], now: float, *, partials: bool = True) -> Gather:
        """Open a gather, or find the one that is recorded under the same key.

        Args:
            partials: whether there is room for them, if the gather would take them.

        Raises:
            NondeterministicError: another specification is recorded under this key.
            FaultError: ``lost_payload`` (this controller must start over), ``too_many``, ``sites``.
        """
        gid = gather_id(message.job, message.round, message.step, message.name, message.redo)
        digest = spec_digest(message, sites)
        gather = self.gathers.get(gid)
        if gather is not None:
            self._reopen(gather, message, digest, now)
            return gather
        if len(set(sites)) != len(sites):
            raise FaultError("sites", f"gather {message.name!r} names a site twice")
        if len(sites) > self.limits.max_tasks:
            text = f"{len(sites)} sites; a gather may have {self.limits.max_tasks} (max_tasks): ask fewer, or raise it"
            raise FaultError("too_many", text, bound="max_tasks")
        self._check_room(message, len(sites))
        spec = replace(strip(message), partials=message.partials and partials)
        gather = Gather(gid, spec, digest, tuple(Site(site) for site in sites), now)
        self.gathers[gid] = gather
        self.dirty_gathers[gid] = gather
        for when in next_check(gather):
            self.timer(when, "gather", gid)
        if gather.sites_known:
            chosen = choose_sites(sites, message.sample, message.seed, message.round, message.step)
            self._start(gather, gather.requested if len(chosen) == len(sites) else chosen, now)
        else:
            self._try_start(gather, now)
        return gather

    def _check_room(self, message: OpenGather, sites: int) -> None:
        """One more gather of the job's, with so many tasks (0: not known yet)."""
        limits, open_ = self.limits, self.gathers_of(message.job)
        if len(open_) >= limits.max_gathers:
            text = f"{len(open_)} gathers since the last commit; at most {limits.max_gathers} (max_gathers): commit"
            raise FaultError("too_many", text, bound="max_gathers")
        tasks = sum(len(gather.tasks) for gather in open_) + min(sites, message.sample or sites)
        if tasks > limits.max_job_tasks:
            text = f"{tasks} tasks since the last commit; at most {limits.max_job_tasks} (max_job_tasks): commit"
            raise FaultError("too_many", text, bound="max_job_tasks")

    def _reopen(self, gather: Gather, message: OpenGather, digest: str, now: float) -> None:
        if gather.digest != digest:
            raise NondeterministicError(
                "nondeterministic",
                f"round {message.round} step {message.step} {message.name!r} was opened before with another"
                " specification: the workflow must ask for the same things when it runs again",
            )
        if message.have > len(gather.results) or (gather.lost and message.have) or 0 < message.have < gather.covered:
            raise FaultError(
                "lost_payload",
                f"the controller has {message.have} results of gather {gather.id}, the broker {len(gather.results)} of"
                " which some were lost on its disk: this process must end, the next one starts at the last commit",
            )
        if gather.lost or gather.blocked:
            gather.lost = gather.blocked = False
            self.dirty_gathers[gather.id] = gather
            for task in gather.tasks.values():
                if task.status == "queued":
                    self.enqueue(task, now)

    def _try_start(self, gather: Gather, now: float) -> None:
        """Draw the sites of a waiting gather once enough of them are connected, or the wait is over."""
        spec = gather.spec
        connected = len(self.node_of)
        late = now >= gather.opened_at + spec.rule.sites_s
        if connected >= (spec.rule.min_clients if late else max(spec.rule.min_clients, spec.sample)):
            sites = choose_sites(self.node_of, spec.sample, spec.seed, spec.round, spec.step)
            tasks = sum(len(other.tasks) for other in self.gathers_of(gather.job))
            most = min(self.limits.max_tasks, self.limits.max_job_tasks - tasks)
            self._start(gather, sites[: max(0, most)], now)
        elif late:
            reason = f"{connected} of {spec.rule.min_clients} sites connected within {spec.rule.sites_s:g} s"
            self._finish(gather, "failed", reason)

    def _start(self, gather: Gather, sites: Iterable[Site], now: float) -> None:
        spec = gather.spec
        gather.state = "open"
        self.dirty_gathers[gather.id] = gather
        for ordinal, site in enumerate(sites):
            tid = task_id(spec.job, spec.round, spec.step, spec.name, site, spec.redo)
            task = Task(tid, gather.id, site, ordinal)
            if spec.redo:
                first = self.tasks.get(task_id(spec.job, spec.round, spec.step, spec.name, site))
                task.base = first.base if first else self.site_state(spec.job, site).version
            self.adopt_task(gather, task, now)
            self.dirty_tasks[tid] = task
        self.check(gather, now)

    def gathers_of(self, job: JobId) -> list[Gather]:
        """A job's gathers that are not committed yet."""
        return [gather for gather in self.gathers.values() if gather.job == job]

    def adopt_gather(self, gather: Gather, now: float) -> None:
        """Take a journaled gather in; its tasks and results follow."""
        self.gathers[gather.id] = gather
        if gather.live:
            for when in next_check(gather):
                self.timer(max(now, when), "gather", gather.id)

    def check(self, gather: Gather, now: float) -> None:
        """Apply the rule of closing."""
        if gather.state != "open":
            return
        had_quorum = gather.quorum_at is not None
        state, reason = verdict(gather, now)
        if not had_quorum and gather.quorum_at is not None:
            self.dirty_gathers[gather.id] = gather
            for when in next_check(gather):
                self.timer(when, "gather", gather.id)
        if state != "open":
            self._finish(gather, state, reason)

    def close(self, gid: GatherId) -> Gather | None:
        """Close now with what is there; None if there is no such gather."""
        gather = self.gathers.get(gid)
        if gather is not None and gather.live:
            got, least = len(gather.results), gather.spec.rule.min_clients
            if got >= least:
                self._finish(gather, "closed", "closed by the controller")
            else:
                self._finish(gather, "failed", f"closed by the controller with {got} of {least} results")
        return gather

    def _finish(self, gather: Gather, state: Literal["closed", "failed"], reason: str) -> None:
        gather.state, gather.reason = state, reason
        self.dirty_gathers[gather.id] = gather
        for task in gather.tasks.values():
            if not task.ended:
                if task.status == "leased":
                    self.cancels.append((task.owner, gather.job, task.ref))
                task.code = "closed"
                self.end_task(gather, task, "cancelled")

    def retry(self, tid: TaskId, now: float) -> None:
        """Queue a task again that was given up, with fresh attempts and as much patience with its site as at first.

        Its attempts are numbered on, and what its last owner still holds of it is stale.

        Raises:
            FaultError: ``step_closed``, or ``not_dead`` where it was not given up.
        """
        task = self.tasks.get(tid)
        gather = self.gathers[task.gather] if task is not None else None
        if task is None or gather is None or gather.state != "open":
            raise FaultError("step_closed", f"the step of task {tid} is closed: it went on without it, or failed")
        if not task.given_up:
            raise FaultError("not_dead", f"task {tid} is {task.status}: only what was given up is retried")
        task.status, task.owner, task.code, task.text = "queued", "", "", ""
        task.tries = task.killed = 0
        task.accepted = task.counted = False
        task.ready_at = 0.0
        if task.site not in self.node_of:
            self.down_since[task.site] = now
        self.dirty_tasks[tid] = task
        self.adopt_task(gather, task, now)

    def set_checkpoint(self, gid: GatherId, payload: PayloadRef, covered: int) -> tuple[Gather, PayloadRef | None]:
        """Record a checkpoint over the results 0 to covered - 1; returns the gather and the checkpoint before.

        Raises:
            FaultError: ``unknown_gather``, or ``checkpoint`` where it covers what is not there or splits a partial.
        """
        gather = self.gathers.get(gid)
        if gather is None:
            raise FaultError("unknown_gather", f"gather {gid} is not open: its round is committed or it never was")
        if not gather.covered <= covered <= len(gather.results):
            raise FaultError(
                "checkpoint", f"covers {covered} results; allowed are {gather.covered} to {len(gather.results)} here"
            )
        if any(p.first < covered < p.first + p.count for p in gather.partials.values()):
            raise FaultError("checkpoint", f"covers {covered} results, which is in the middle of a partial")
        before = gather.checkpoint
        gather.checkpoint, gather.covered = payload, covered
        self.dirty_gathers[gid] = gather
        return gather, before

    def release(self, job: JobId, up_to_round: int | None = None) -> list[Gather]:
        """Forget a job's gathers up to a committed round (None: all), stopping what still runs of them."""
        gone = [
            g for g in self.gathers.values() if g.job == job and (up_to_round is None or g.spec.round <= up_to_round)
        ]
        for gather in gone:
            if gather.live:
                self._finish(gather, "failed", "the round was committed without it")
            del self.gathers[gather.id]
            self.dirty_gathers.pop(gather.id, None)
            self.past[gather.id] = gather.spec.round
            while len(self.past) > self.limits.max_past:
                self.past.popitem(last=False)
                self.past_dropped += 1
            for tid in gather.tasks:
                self.tasks.pop(tid, None)
                self.dirty_tasks.pop(tid, None)
            self.released.append(gather.id)
        ids = {g.id for g in gone}
        self.fresh = [f for f in self.fresh if f.gather not in ids]
        self.rewrites = [r for r in self.rewrites if r[0] not in ids]
        return gone

    def forget_job(self, job: JobId) -> list[Gather]:
        """The job has ended: forget its gathers and what its sites remember. Returns the gathers."""
        gone = self.release(job)
        for key in [key for key in self.site_states if key[0] == job]:
            del self.site_states[key]
            self.dirty_sites.discard(key)
        self.forgotten.append(job)
        return gone

    def lose_results(self, gather: Gather, gone: set[int], now: float) -> None:
        """Results went with their payloads: their tasks are queued again, the others are numbered anew.

        Whoever has folded some of them must start over, see `open`.
        """
        lost = [gather.results[index] for index in sorted(gone)]
        self.rewrites.append((gather.id, [index for index in range(len(gather.results)) if index not in gone]))
        gather.results = [r for index, r in enumerate(gather.results) if index not in gone]
        for name in {r.partial for r in lost if r.partial}:
            del gather.partials[name]
        for name, info in list(gather.partials.items()):
            first = next(at for at, r in enumerate(gather.results) if r.partial == name)
            gather.partials[name] = replace(info, first=first)
        gather.state, gather.reason, gather.quorum_at, gather.lost = "open", "", None, True
        self.dirty_gathers[gather.id] = gather
        for result in lost:
            task = self.tasks[result.task]
            task.status, task.owner, task.code = "queued", "", "lost_payload"
            self.dirty_tasks[task.id] = task
            self.adopt_task(gather, task, now)
        for when in next_check(gather):
            self.timer(max(now, when), "gather", gather.id)

    # ------------------------------------------------------------ owners and time

    def owner_up(self, node: str, sites: Iterable[str], capacity: int, now: float) -> None:
        """An executor connected (again) and serves these sites: gathers may wait for them."""
        super().owner_up(node, sites, capacity, now)
        for gather in list(self.gathers.values()):
            if gather.state == "waiting":
                self._try_start(gather, now)

    def tick(self, now: float) -> None:
        """Everything whose time has come: leases, backoffs, lost sites, deadlines."""
        while self.timers and self.timers[0][0] <= now:
            _, kind, key = heapq.heappop(self.timers)
            if kind != "gather":
                self.task_due(kind, TaskId(key), now)
                continue
            gather = self.gathers.get(GatherId(key))
            if gather is not None and gather.state == "waiting":
                self._check_waiting(gather, now)
            elif gather is not None:
                self.check(gather, now)

    def _check_waiting(self, gather: Gather, now: float) -> None:
        deadline_s = gather.spec.rule.deadline_s
        if deadline_s is not None and now >= gather.opened_at + deadline_s:
            self._finish(gather, "failed", f"no sites were chosen before the deadline of {deadline_s:g} s")
        else:
            self._try_start(gather, now)
