"""A run: a job that was handed to an environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..serialization.errors import JobError
from .failures import SiteFailure

COMPLETED = "FINISHED:COMPLETED"
ABORTED = "FINISHED:ABORTED"
FAILED = "FINISHED:FAILED"
STATUSES = ("SUBMITTED", "RUNNING", COMPLETED, ABORTED, FAILED)


class RunBackend(Protocol):
    """How a run is asked, and told, where it runs."""

    def status(self) -> tuple[str, str]:
        """The status and, where it failed, the reason."""
        ...

    def wait(self, timeout_s: float | None) -> str:
        """The status once the job has ended; LinkTimeout where it does not in time."""
        ...

    def result(self, timeout_s: float | None) -> Path:
        """The result folder of a job that has ended."""
        ...

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the rounds so far."""
        ...

    def failures(self) -> list[SiteFailure]:
        """The sites that failed so far."""
        ...

    def abort(self) -> None:
        """End the job."""
        ...


class Run:
    """A job that runs or has run.

    >>> run = recipe.execute(SimEnv(num_clients=8))
    >>> run.get_status(), run.get_result()
    ('FINISHED:COMPLETED', PosixPath('fedloom-workspace/fedavg'))
    """

    def __init__(self, job_id: str, backend: RunBackend) -> None:
        self._job_id = job_id
        self._backend = backend

    def get_job_id(self) -> str:
        """The job's id."""
        return self._job_id

    def get_status(self) -> str:
        """SUBMITTED, RUNNING, FINISHED:COMPLETED, FINISHED:ABORTED or FINISHED:FAILED.

        Raises:
            LinkError: the broker cannot be reached.
        """
        return self._backend.status()[0]

    def get_reason(self) -> str:
        """Why the job failed or was aborted; "" otherwise."""
        return self._backend.status()[1]

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the end of the job, at most ``timeout`` seconds, and return its status.

        Raises:
            LinkTimeout: it did not end in time.
        """
        return self._backend.wait(_seconds(timeout))

    def get_result(self, timeout: float | None = None, clean_up: bool = True) -> Path:
        """Wait for the end of the job and return its result folder: the model, metrics.jsonl, summary.json, logs.

        Args:
            timeout: seconds; None or 0 waits as long as it takes.
            clean_up: accepted; a run leaves nothing behind that would need it.

        Raises:
            LinkTimeout: it did not end in time.
        """
        return self._backend.result(_seconds(timeout or None))

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the committed rounds, as metrics.jsonl holds them."""
        return self._backend.metrics()

    def cross_site_results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The matrix of the job's evaluations so far: data site, then model, then metric; {} where there was none.

        An entry that failed is ``{"failed": {"code": ..., "text": ...}}``.
        """
        from .matrix import matrix_of

        return matrix_of(self._backend.metrics())

    def failures(self) -> list[SiteFailure]:
        """The sites that failed: what ended the job, if one did, then those that its rounds went on without.

        A job whose rounds have ``min_clients`` results completes in spite of them.

        Raises:
            LinkError: the broker cannot be reached.
        """
        return self._backend.failures()

    def abort(self) -> None:
        """End the job now; nothing happens if it has ended."""
        self._backend.abort()

    def __repr__(self) -> str:
        return f"Run(job_id={self._job_id!r})"


def _seconds(timeout: float | None) -> float | None:
    if timeout is not None and not timeout >= 0:
        raise JobError(f"timeout={timeout!r}; seconds of at least 0 belong here, or None")
    return timeout
