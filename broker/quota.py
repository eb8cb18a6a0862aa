"""How much the spool may hold, and who may still put: uploads wait, nothing is dropped. Pure; times are arguments.

Counted are the payloads that have rows, and those that were admitted and are on their way. For each job that has a
model in the spool a reserve is kept that uploads can never take: two checkpoints (int64 sums, so twice a float32
model until a larger one was seen) and the next model. So a full spool cannot deadlock a round: the job's process can
always store the checkpoint that frees the results which it covers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..serialization.errors import FaultError
from ..serialization.messages import JobId, PayloadId, PayloadRef, TaskId
from .jobs import Job, Jobs
from .ledger import Ledger
from .payloads import PayloadTable

__all__ = ["RETRY_S", "Admission", "Quota"]

#: What refused senders are told to wait.
RETRY_S = 1.0
#: A checkpoint's size in models, as long as none was seen.
_CHECKPOINT_MODELS = 2
#: What a round needs beside the reserve: the model, the best one, a checkpoint's worth of results and the next of them.
_ROUND_MODELS = 7
#: That and the reserve: two checkpoints and the next model.
_MODELS = _ROUND_MODELS + 2 * _CHECKPOINT_MODELS + 1
_PARTIAL = "p-"


@dataclass(frozen=True, slots=True)
class Admission:
    """A payload that may come and has no row yet."""

    payload: PayloadRef
    job: str
    task: str
    own: bool  # put by the job's process: it may use the job's reserve
    at: float


class Quota:
    """The spool's bytes; ``total`` 0 is no bound."""

    def __init__(self, total: int, payloads: PayloadTable, jobs: Jobs, ledger: Ledger) -> None:
        self.total = total
        self.admitted: dict[PayloadId, Admission] = {}
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

    # ------------------------------------------------------------ admission

    def admit(self, ref: PayloadRef, now: float, *, job: str = "", task: str = "", own: bool = False) -> float | None:
        """Whether this payload may come: None yes, else the seconds after which to ask again.

        Raises:
            FaultError: ``quota``: it can never fit.
        """
        if not self.total or ref.id in self.admitted:
            return None
        if own and ref.id.startswith(_PARTIAL):
            self._checkpoints[JobId(job)] = max(ref.size, self._checkpoints.get(JobId(job), 0))
        mine = self._jobs.jobs.get(JobId(job)) if own else None
        model = self.model_bytes(mine) if mine is not None else 0
        if mine is not None and not model and not ref.id.startswith(_PARTIAL):
            # its first model: the job starts to count, so its reserve must fit beside those of the others
            self.check_fit(mine.archive.size, ref.size)
            needed = self.needed(0, ref.size)
        else:
            needed = ref.size
        if ref.size > self.total:
            raise FaultError("quota", f"payload of {ref.size} bytes; the spool's quota is {self.total} (quota_bytes)")
        others = sum(self._reserve(other) for other in self._jobs.active() if other is not mine)
        if self.used + needed + others > self.total:
            if needed != ref.size and not others and not self._coming:
                raise FaultError(
                    "quota",
                    f"the job needs {needed} bytes in the spool; {self.used} of the quota of {self.total} are taken by"
                    " jobs that have ended: raise quota_bytes, or use another --store",
                )
            self.refused += 1
            return RETRY_S
        self.admitted[ref.id] = Admission(ref, job, task, own, now)
        self._coming += ref.size
        return None

    def check_fit(self, archive_bytes: int, model_bytes: int) -> None:
        """A job with such a model must fit into the quota, were it alone.

        Raises:
            FaultError: ``quota``, with the figures.
        """
        needed = self.needed(archive_bytes, model_bytes)
        if self.total and needed > self.total:
            raise FaultError(
                "quota",
                f"a job with a model of {model_bytes} bytes needs {needed} in the spool (its archive of"
                f" {archive_bytes}, and {_MODELS} times the model: the models before and after a round, two"
                f" checkpoints, and results); the quota is {self.total}: raise quota_bytes",
            )

    @staticmethod
    def needed(archive_bytes: int, model_bytes: int) -> int:
        """What a job with such a model needs to come to its end."""
        return archive_bytes + _MODELS * model_bytes

    def landed(self, payload: PayloadId) -> None:
        """It has its row, or will not come."""
        known = self.admitted.pop(payload, None)
        if known is not None:
            self._coming -= known.payload.size

    def forget(self, *, job: str = "", tasks: frozenset[TaskId] = frozenset()) -> list[PayloadId]:
        """What was on its way for this job, or for these tasks, is not wanted any more; the ids."""
        gone = [i for i, a in self.admitted.items() if (job and a.job == job and not a.task) or a.task in tasks]
        for payload in gone:
            self.landed(payload)
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

    def _reserve(self, job: Job) -> int:
        """What is left of the job's reserve: its checkpoints and what it has put for its next commit are taken off."""
        if job.status != "RUNNING":
            return 0
        model = self.model_bytes(job)
        if not model:
            return 0
        checkpoint = max(_CHECKPOINT_MODELS * model, self._checkpoints.get(job.id, 0))
        holders = [f"put:{job.id}", *(f"checkpoint:{g.id}" for g in self._ledger.gathers_of(job.id))]
        kept = {payload for holder in holders for payload in self._payloads.held_by(holder)}
        taken = sum(self._payloads.rows[payload].size for payload in kept if self._is_extra(payload))
        taken += sum(a.payload.size for a in self.admitted.values() if a.own and a.job == job.id)
        return max(0, 2 * checkpoint + model - taken)

    def _is_extra(self, payload: PayloadId) -> bool:
        """Whether a payload is none of those that a round has anyway: the model it starts from, the last commit's."""
        return not any(h.startswith(("commit:", "best:", "gather:")) for h in self._payloads.holds.get(payload, ()))
