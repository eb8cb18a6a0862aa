"""How much the spool may hold, and who may still put: uploads wait, nothing is dropped. Pure; times are arguments.

Counted are the payloads that have rows, and those that were admitted and are on their way. For each job that has a
model in the spool a reserve is kept that uploads can never take: two checkpoints (int64 sums, so twice a float32
model unless the job says more), or one beside the next model and state; and until it has them, what its commits keep
beside the last model: the best one, a state. So a full spool cannot deadlock a round: the job's process can always
store the checkpoint that frees the results which it covers. Room for the largest result is left to results alone:
else another job or a client could leave a running job none for a single one, and keep it so. A gather takes partials,
which are larger, only where there is room for one when it is opened; the room is kept until it is closed.

Uploads of a job that have to wait keep their turn: a later one comes in only where all before it would fit as well.
They are told to ask again the sooner the nearer their turn is, so that many who wait do not ask all the time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from ..serialization.errors import FaultError
from ..serialization.messages import JobId, PayloadId, PayloadRef, TaskId
from .bounds import Bounds
from .jobs import Job, Jobs
from .ledger import Ledger
from .payloads import PayloadTable

__all__ = ["RETRY_S", "Admission", "Needs", "Quota"]

#: What those are told to wait that have no turn.
RETRY_S = 1.0
#: What uploads are told to wait: the next one, each one further behind so much more, and at most so long, or a
#: hundredth of a second for each that waits.
_FIRST_RETRY_S = 0.1
_STEP_S = 0.02
_LAST_RETRY_S = 5.0
_SHARE_S = 0.01
#: A turn is kept for one that does not ask again for so long beyond twice what it was told.
_PATIENCE_S = 5.0
#: A checkpoint's size in models, where the job does not say it and none was seen.
_CHECKPOINT_MODELS = 2
_PARTIAL = "p-"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job's payloads weigh, as far as it is known."""

    model: int
    checkpoint: int = 0  # an aggregate of results: 8 bytes a number
    state: int = 0  # committed beside the model: float32 masters of one with 16-bit tensors
    rounds: int = 0  # 0: not known

    @staticmethod
    def of(meta: dict[str, object], model: int) -> Needs:
        """Of a submission's meta."""
        checkpoint, state, rounds = (
            value if isinstance(value := meta.get(key), int) and 0 <= value < 1 << 62 else 0
            for key in ("checkpoint_bytes", "state_bytes", "rounds")
        )
        return Needs(model, max(checkpoint, _CHECKPOINT_MODELS * model), state, rounds)

    @property
    def reserve(self) -> int:
        """What uploads can never take: a checkpoint beside the one before, or beside the next model and state."""
        return self.checkpoint + max(self.checkpoint, self.model + self.state)

    @property
    def round(self) -> int:
        """What a round needs to come to its end: its model, the best and the state before, the reserve, a result."""
        before = self.model + self.state if self.rounds != 1 else 0
        return self.model + before + self.reserve + self.model


@dataclass(slots=True)
class _Turn:
    """An upload that waits for room."""

    number: int
    size: int
    job: str
    task: str
    until: float  # when it counts as gone


@dataclass(frozen=True, slots=True)
class Admission:
    """A payload that may come and has no row yet."""

    payload: PayloadRef
    job: str
    task: str
    own: bool  # put by the job's process: it may use the job's reserve
    at: float


class Quota:
    """The spool's bytes; ``total`` 0 is no bound, as are 0 ``site_bytes`` of one site's results."""

    def __init__(
        self,
        total: int,
        payloads: PayloadTable,
        jobs: Jobs,
        ledger: Ledger,
        bounds: Bounds | None = None,
        *,
        site_bytes: int = 0,
        max_turns: int = 10_000,
    ) -> None:
        self.total = total
        self.site_bytes = site_bytes
        self.max_turns = max_turns
        self.bounds = bounds or Bounds()
        self.admitted: dict[PayloadId, Admission] = {}
        #: uploads that wait for room, in the order in which they asked first
        self.turns: OrderedDict[PayloadId, _Turn] = OrderedDict()
        self._number = 0
        self.refused = 0
        self._coming = 0
        self._payloads = payloads
        self._jobs = jobs
        self._ledger = ledger
        self._checkpoints: dict[JobId, int] = {}  # the largest seen

    @property
    def used(self) -> int:
        """Bytes that are here or may come."""
        return self._payloads.used_bytes + self._coming

    @property
    def reserved(self) -> int:
        """Bytes that are kept for the running jobs' checkpoints and next models."""
        return sum(self._reserve(job) for job in self._jobs.active())

    @property
    def result_bytes(self) -> int:
        """The largest result or partial that may come: room for it is kept from all that is none of a running job."""
        return max((self._result(job) for job in self._jobs.active() if job.status == "RUNNING"), default=0)

    @property
    def spare(self) -> int:
        """Bytes for what is not a running job's: what is left beside the reserves and the largest result."""
        return self.total - self.used - self.reserved - self.result_bytes

    def takes_partials(self, job: Job) -> bool:
        """Whether a gather that this job opens now may take partials: one fits in, whatever else comes."""
        partial = self._needs(job, self.model_bytes(job)).checkpoint
        return not self.total or self.spare >= max(0, partial - self.result_bytes)

    # ------------------------------------------------------------ admission

    def admit(self, ref: PayloadRef, now: float, *, job: str = "", task: str = "", own: bool = False) -> float | None:
        """Whether this payload may come: None yes, else the seconds after which to ask again.

        Raises:
            FaultError: ``quota``: it can never fit.
        """
        if ref.id in self.admitted:
            return None
        if task and self._site_full(ref, task):
            self._refused("site_bytes")  # it takes no turn: the others of its job need not wait for this site
            return RETRY_S
        if not self.total:
            if task and self.site_bytes:
                self._admit(Admission(ref, job, task, own, now))
            return None
        if own and ref.id.startswith(_PARTIAL):
            self._checkpoints[JobId(job)] = max(ref.size, self._checkpoints.get(JobId(job), 0))
        mine = self._jobs.jobs.get(JobId(job)) if own else None
        model = self.model_bytes(mine) if mine is not None else 0
        if mine is not None and not model and not ref.id.startswith(_PARTIAL):
            # its first model: the job starts to count, so its round must fit beside the others' reserves and results
            needs = Needs.of(mine.meta, ref.size)
            self.check_fit(mine.archive.size, needs)
            needed = needs.round + max(0, self.result_bytes - ref.size)
        else:
            needed = ref.size
        if ref.size > self.total:
            text = f"payload of {ref.size} bytes; the spool's quota is {self.total} (quota_bytes)"
            raise FaultError("quota", text, bound="quota_bytes")
        room = self.spare
        if job:
            room = self.total - self.used - sum(self._reserve(o) for o in self._jobs.active() if o is not mine)
        if mine is None and not self._is_next(ref, job, room, now):
            return self._wait(ref, now, job, task)
        if needed > room:
            if needed != ref.size and not self.result_bytes and not self._coming:
                raise FaultError(
                    "quota",
                    f"the job needs {needed} bytes in the spool; {self.used} of the quota of {self.total} are taken by"
                    " jobs that have ended: raise quota_bytes, or use another --store",
                    bound="quota_bytes",
                )
            self._refused("quota_bytes")
            return RETRY_S
        self._admit(Admission(ref, job, task, own, now))
        return None

    def check_fit(self, archive_bytes: int, needs: Needs) -> None:
        """A job with such a model must fit into the quota, were it alone.

        Raises:
            FaultError: ``quota``, with the figures.
        """
        needed = archive_bytes + needs.round
        if self.total and needed > self.total:
            raise FaultError(
                "quota",
                f"a job with a model of {needs.model} bytes needs {needed} in the spool: its archive of"
                f" {archive_bytes}, the models before and after a round, two checkpoints of {needs.checkpoint}, and a"
                f" result; the quota is {self.total}: raise quota_bytes",
                bound="quota_bytes",
            )

    def _admit(self, admission: Admission) -> None:
        self.turns.pop(admission.payload.id, None)
        self.admitted[admission.payload.id] = admission
        self._coming += admission.payload.size

    def _refused(self, bound: str) -> None:
        self.refused += 1
        self.bounds.reached(bound)

    # ------------------------------------------------------------ turns

    def _is_next(self, ref: PayloadRef, job: str, room: int, now: float) -> bool:
        """Whether there is room for this one behind all of its job that came before it and still wait."""
        needed = ref.size
        for payload, turn in list(self.turns.items()):
            if payload == ref.id or needed > room:
                break
            if turn.until < now:
                del self.turns[payload]
            elif turn.job == job:
                needed += turn.size
        return needed <= room

    def _wait(self, ref: PayloadRef, now: float, job: str, task: str) -> float:
        """Keep its turn; returns when to ask again."""
        self._refused("quota_bytes")
        turn = self.turns.get(ref.id)
        if turn is None:
            self._number += 1
            turn = _Turn(self._number, ref.size, job, task, 0.0)
            if len(self.turns) < self.max_turns:
                self.turns[ref.id] = turn
            else:
                self.bounds.reached("max_turns")
        first = next(iter(self.turns.values()), turn)
        behind = _FIRST_RETRY_S + _STEP_S * (turn.number - first.number)
        wait_s = min(behind, max(_LAST_RETRY_S, _SHARE_S * len(self.turns)))
        turn.until = now + 2 * wait_s + _PATIENCE_S
        return wait_s

    def _site_full(self, ref: PayloadRef, task: str) -> bool:
        """Whether the task's site has as much in the spool as one site may.

        Raises:
            FaultError: ``quota``: it can never fit.
        """
        known = self._ledger.tasks.get(TaskId(task))
        if not self.site_bytes or known is None:
            return False
        if ref.size > self.site_bytes:
            text = f"payload of {ref.size} bytes; a site may have {self.site_bytes} in the spool (site_bytes)"
            raise FaultError("quota", text, bound="site_bytes")
        return self.site_used(known.site) + ref.size > self.site_bytes

    def site_used(self, site: str) -> int:
        """The bytes of a site's results that are here, or may come."""
        rows, tasks = self._payloads.rows, self._ledger.tasks
        coming = (
            a.payload for a in self.admitted.values() if a.task and (t := tasks.get(TaskId(a.task))) and t.site == site
        )
        used = sum(ref.size for ref in coming)
        for gather in self._ledger.gathers.values():
            for result in gather.results:
                if result.site == site and result.payload is not None and result.payload.id in rows:
                    used += result.payload.size
        return used

    # ------------------------------------------------------------ what came of it

    def landed(self, payload: PayloadId) -> None:
        """It has its row, or will not come."""
        self.turns.pop(payload, None)
        known = self.admitted.pop(payload, None)
        if known is not None:
            self._coming -= known.payload.size

    def refuse(self, payload: PayloadId) -> None:
        """It will have no row: its file goes, where it is whole and its uploader has died before it could say so."""
        self.landed(payload)
        self._payloads.doom(payload)

    def forget(self, *, job: str = "", tasks: frozenset[TaskId] = frozenset()) -> list[PayloadId]:
        """What was on its way for this job, or for these tasks, is not wanted any more; the ids.

        A file that is whole already and has no row yet goes as well.
        """
        gone = [i for i, a in self.admitted.items() if (job and a.job == job and not a.task) or a.task in tasks]
        for payload in gone:
            self.refuse(payload)
        for payload in [i for i, t in self.turns.items() if (job and t.job == job) or t.task in tasks]:
            del self.turns[payload]
        return gone

    # ------------------------------------------------------------ reserves

    def model_bytes(self, job: Job) -> int:
        """The size of the job's model, as far as the broker has seen one; 0: it has not, and the job does not count."""
        sizes = [0]
        if job.commit is not None and job.commit.model is not None:
            sizes.append(job.commit.model.size)
        sizes += [g.spec.payload.size for g in self._ledger.gathers_of(job.id) if g.spec.payload is not None]
        sizes += [self._payloads.rows[i].size for i in self._payloads.held_by(f"put:{job.id}") if i[:2] != _PARTIAL]
        coming = [a.payload for a in self.admitted.values() if a.own and a.job == job.id]
        sizes += [ref.size for ref in coming if ref.id[:2] != _PARTIAL]
        return max(sizes)

    def _result(self, job: Job) -> int:
        """The largest that an executor may put for this job now."""
        model = self.model_bytes(job)
        partials = any(g.live and g.spec.partials for g in self._ledger.gathers_of(job.id))
        return max(model, self._needs(job, model).checkpoint if partials else 0)

    def _needs(self, job: Job, model: int) -> Needs:
        needs = Needs.of(job.meta, model)
        return replace(needs, checkpoint=max(needs.checkpoint, self._checkpoints.get(job.id, 0)))

    def _reserve(self, job: Job) -> int:
        """What is left of the job's reserve: its checkpoints and what it has put for its next commit are taken off."""
        if job.status != "RUNNING":
            return 0
        model = self.model_bytes(job)
        if not model:
            return 0
        needs = self._needs(job, model)
        gathers = self._ledger.gathers_of(job.id)
        holders = [f"put:{job.id}", *(f"checkpoint:{g.id}" for g in gathers)]
        models = {g.spec.payload.id: g.spec.payload.size for g in gathers if g.spec.payload}
        kept = {payload for holder in holders for payload in self._payloads.held_by(holder)}.difference(models)
        taken = sum(self._payloads.rows[payload].size for payload in kept if self._is_extra(payload))
        taken += sum(a.payload.size for a in self.admitted.values() if a.own and a.job == job.id)
        # beside the reserve: what the disk lost of the rounds' models comes again
        taken -= sum(size for payload, size in models.items() if payload not in self._payloads.rows)
        if not models and (job.commit is None or job.commit.model is None):
            taken -= model  # and of what the job has put, that is what its first round starts from
        return max(0, needs.reserve - taken) + self._to_come(job, needs)

    @staticmethod
    def _to_come(job: Job, needs: Needs) -> int:
        """What a later commit keeps beside its model: the best one before, and a state. Commits are not refused."""
        if needs.rounds == 1:
            return 0
        commit = job.commit
        best = commit is not None and commit.best is not None and commit.best != commit.model
        state = commit is not None and commit.state is not None
        return (0 if best else needs.model) + (0 if state else needs.state)

    def _is_extra(self, payload: PayloadId) -> bool:
        """Whether a payload is none of those that a round has anyway: the model it starts from, the last commit's."""
        return not any(h.startswith(("commit:", "best:", "gather:")) for h in self._payloads.holds.get(payload, ()))
