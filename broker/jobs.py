"""The job table: submissions, claims, commits, statuses. Pure; times are arguments.

A claim is the right of one job process to a job, an increasing integer: whatever comes with a lower one is fenced. It
lives while its job process's session does; before that process has said Hello, for ``start_s``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..serialization.errors import FaultError, FencedError
from ..serialization.messages import Commit, CommitRef, JobId, PayloadRef, SubmitJob

__all__ = ["CRASHES_MAX", "Job", "Jobs"]

CRASHES_MAX = 5
_STOPPED_S = 1.0
_RESTART_S = 0.25
_RESTART_MAX_S = 10.0


@dataclass(slots=True)
class Job:
    """One job; the fields after ``late`` are not journaled."""

    id: JobId
    token: str
    name: str
    archive: PayloadRef
    meta: dict[str, object]
    submitted_at: float
    status: str = "SUBMITTED"
    reason: str = ""
    claim: int = 0
    claimed_by: tuple[str, str, int] = ("", "", 0)  # controller node, its boot, its request: a repeat is answered alike
    commit: CommitRef | None = None
    commits: int = 0
    crashes: int = 0  # since the last commit
    ended_at: float | None = None
    sites: tuple[str, ...] = ()
    late: dict[str, int] = field(default_factory=dict[str, int])  # round: results that came and were refused
    live: bool = False  # the job process of this claim has a session
    claim_until: float = 0.0  # while not live: when the claim lapses
    available_at: float = 0.0
    lapsed: bool = field(default=False)

    @property
    def ended(self) -> bool:
        """Whether it has its final status."""
        return self.status.startswith("FINISHED")


class Jobs:
    """All jobs, by id."""

    def __init__(
        self, start_s: float = 60.0, max_jobs: int = 10_000, max_crashes: int = CRASHES_MAX, lost_s: float = 10.0
    ) -> None:
        self.start_s = start_s
        self.lost_s = lost_s
        self.max_jobs = max_jobs
        self.max_crashes = max_crashes
        #: jobs that were forgotten, and (from, to): jobs whose rounds another one begins with; for the journal
        self.gone: list[JobId] = []
        self.copied: list[tuple[JobId, JobId]] = []
        self.jobs: dict[JobId, Job] = {}
        self.dirty: dict[JobId, Job] = {}
        self._active: dict[JobId, Job] = {}  # those that have not ended
        self._tokens: dict[str, JobId] = {}

    def load(self, jobs: Iterable[Job], now: float) -> None:
        """Take journaled jobs in; a running one's process has ``lost_s`` to come back, as after any cut.

        One that was claimed just before and is still loading is given out twice then; the claim fences the first.
        """
        for job in jobs:
            self.jobs[job.id] = job
            self._tokens[job.token] = job.id
            if not job.ended:
                self._active[job.id] = job
            job.claim_until = now + self.lost_s

    def get(self, job: str) -> Job:
        """The job of this id.

        Raises:
            FaultError: ``unknown_job``.
        """
        found = self.jobs.get(JobId(job))
        if found is None:
            raise FaultError("unknown_job", f"no job {job!r} here: `fedloom job list` shows those that are")
        return found

    def active(self) -> Iterable[Job]:
        """Those that have not ended."""
        return self._active.values()

    def knows(self, token: str) -> bool:
        """Whether this token has submitted a job before."""
        return token in self._tokens

    def submit(self, message: SubmitJob, now: float) -> tuple[Job, bool]:
        """A new job, or the one that this token submitted before; and whether it is new.

        Raises:
            FaultError: ``job_exists`` (the wanted id is taken), ``job_id``, ``too_many``; ``unknown_job``,
                ``not_ended`` of the one to start with.
        """
        known = self._tokens.get(message.token)
        if known is not None:
            return self.jobs[known], False
        if not message.token:
            raise FaultError("token", "a submission needs a token, which makes its repeats harmless")
        job_id = message.job or JobId(f"{_slug(message.name)}-{hashlib.sha256(message.token.encode()).hexdigest()[:8]}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", job_id):
            raise FaultError("job_id", f"job id {job_id!r}; letters, digits, '.', '_' and '-' make one, at most 128")
        if job_id in self.jobs:
            raise FaultError("job_exists", f"job {job_id!r} was submitted before: choose another id, or none")
        if len(self._active) >= self.max_jobs:
            text = f"{self.max_jobs} jobs are here that have not ended (max_jobs): wait for some, or raise it"
            raise FaultError("too_many", text, bound="max_jobs")
        job = Job(job_id, message.token, message.name, message.archive, dict(message.meta), now)
        if message.start:
            self._begin_with(job, self.get(message.start))
        self.jobs[job_id] = job
        self._active[job_id] = job
        self._tokens[message.token] = job_id
        self._touch(job)
        return job, True

    def _begin_with(self, job: Job, before: Job) -> None:
        """Let a new job go on behind the last commit of one that has ended; its rounds are the new one's too."""
        if not before.ended:
            text = f"job {before.id} is {before.status}: it goes on by itself; abort it first, or wait for its end"
            raise FaultError("not_ended", text)
        job.commit, job.commits = before.commit, before.commits
        self.copied.append((before.id, job.id))

    def forget_oldest(self) -> list[Job]:
        """Where there are more jobs than ``max_jobs``, those that ended first are forgotten; returns them."""
        over = len(self.jobs) - self.max_jobs
        if over <= 0:
            return []
        ended = sorted((job for job in self.jobs.values() if job.ended), key=lambda job: job.ended_at or 0.0)
        for job in ended[:over]:
            del self.jobs[job.id]
            self._tokens.pop(job.token, None)
            self.dirty.pop(job.id, None)
            self.gone.append(job.id)
        return ended[:over]

    # ------------------------------------------------------------ claims

    def claim(self, node: str, boot: str, ref: int, now: float) -> Job | None:
        """Give the oldest job that has no process to this controller; None if there is none now."""
        for job in self._active.values():
            if self._claimable(job, now):
                job.claim += 1
                job.claimed_by = (node, boot, ref)
                job.status = "RUNNING"
                job.live, job.lapsed = False, False
                job.claim_until = now + self.start_s
                self._touch(job)
                return job
        return None

    def given(self, node: str, boot: str, ref: int) -> Job | None:
        """The job that this very request was given before: its answer was lost on the way."""
        return next(
            (
                j
                for j in self.jobs.values()
                if j.claimed_by == (node, boot, ref) and j.status == "RUNNING" and not j.lapsed
            ),
            None,
        )

    def _claimable(self, job: Job, now: float) -> bool:
        if job.status == "SUBMITTED":
            return True
        return job.status == "RUNNING" and job.lapsed and now >= job.available_at

    def lost(self, job_id: str, claim: int, text: str, now: float, *, stopped: bool = False) -> Job:
        """A controller says that its job process died: the fifth time since the last commit fails the job.

        With ``stopped`` its controller has ended it: that is no fault of the job's.

        Raises:
            FaultError: ``unknown_job``.
        """
        job = self.get(job_id)
        if job.ended or claim != job.claim or job.lapsed:
            return job
        job.crashes += not stopped
        job.lapsed, job.live = True, False
        self._touch(job)
        if stopped:
            job.available_at = now + _STOPPED_S  # its controller still has a claim open: its Bye comes first
        elif job.crashes >= self.max_crashes:
            at = "its first round" if job.commit is None else f"the round after {job.commit.round}"
            self.finish(job, "FINISHED:FAILED", f"its process died {job.crashes} times in {at}; the last: {text}", now)
        else:
            job.available_at = now + min(_RESTART_MAX_S, _RESTART_S * 2 ** (job.crashes - 1))
        return job

    def check(self, job_id: str, claim: int) -> Job:
        """The job, if this claim to it is the current one.

        Raises:
            FencedError: another process holds the job, or it has ended.
            FaultError: ``unknown_job``, ``unknown_claim``.
        """
        job = self.get(job_id)
        if claim < job.claim:
            raise FencedError("fenced", f"claim {claim} to job {job.id}: claim {job.claim} holds it now; stop")
        if claim > job.claim:
            raise FaultError("unknown_claim", f"claim {claim} to job {job.id} was never given; the last is {job.claim}")
        if job.ended:
            raise FencedError("fenced", f"job {job.id} is {job.status}: {job.reason or 'over'}; stop")
        return job

    def session_up(self, job_id: str, claim: int) -> Job:
        """The job process said Hello: the claim lives with its session.

        Raises:
            FencedError, FaultError: as `check`.
        """
        job = self.check(job_id, claim)
        job.live, job.lapsed = True, False
        return job

    def session_down(self, job_id: str, claim: int, now: float) -> None:
        """The job process's session ended."""
        job = self.jobs.get(JobId(job_id))
        if job is not None and job.claim == claim and job.live:
            job.live = False
            job.claim_until = now

    def controller_gone(self, node: str, now: float) -> None:
        """A controller is dead: its claims whose process never came lapse at once."""
        for job in self._active.values():
            if job.claimed_by[0] == node and not job.live:
                job.claim_until = min(job.claim_until, now)

    def tick(self, now: float) -> bool:
        """Let claims lapse; whether a job can be claimed now."""
        waiting = False
        for job in self._active.values():
            if job.status == "RUNNING" and not job.live and not job.lapsed and now >= job.claim_until:
                job.lapsed = True
            waiting = waiting or self._claimable(job, now)
        return waiting

    # ------------------------------------------------------------ progress

    def commit(self, message: Commit) -> tuple[Job, CommitRef | None, bool]:
        """Make a round the job's last one; returns the job, the commit before, and whether this one is new.

        Raises:
            FencedError, FaultError: as `check`; ``committed`` where the round is already another commit's.
        """
        job = self.check(message.job, message.claim)
        before = job.commit
        best = (message.best_model or message.model) if message.best else (before.best if before else None)
        new = CommitRef(
            message.round, message.model, message.state, best, message.record, message.workflow, message.first
        )
        if before is not None and message.round <= before.round:
            if message.round == before.round and replace(new, best=before.best) == before:
                return job, before, False
            raise FaultError(
                "committed", f"round {message.round} of job {job.id}: round {before.round} is committed already; go on"
            )
        job.commit = new
        job.commits += 1
        job.crashes = 0
        self._touch(job)
        return job, before, True

    def add_sites(self, job: Job, sites: Iterable[str]) -> None:
        """Remember the sites that had tasks of the job."""
        known = dict.fromkeys(job.sites)
        before = len(known)
        known.update(dict.fromkeys(sites))
        if len(known) != before:
            job.sites = tuple(known)
            self._touch(job)

    def refused(self, job: Job, round_: int, count: int) -> None:
        """So many results of a round were late, stale or not known."""
        job.late[str(round_)] = job.late.get(str(round_), 0) + count
        self._touch(job)

    def finish(self, job: Job, status: str, reason: str, now: float) -> None:
        """Give the job its final status."""
        job.status, job.reason, job.ended_at = status, reason[: 16 * 1024], now
        job.live, job.lapsed = False, False
        self._active.pop(job.id, None)
        self._touch(job)

    def _touch(self, job: Job) -> None:
        self.dirty[job.id] = job


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:48].lower() or "job"
