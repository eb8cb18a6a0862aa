"""What is left of a run that is ended before its job is: the results of the rounds that were committed till then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..serialization.errors import FedloomError, LinkError, ProcessError
from .pipeline import Pipeline

__all__ = ["RESUME_HINT", "Committed"]

RESUME_HINT = "to go on with it: the same command with --resume, or SimEnv(resume=True)"

#: Whoever presses Ctrl-C does not wait much longer than this and the processes' end.
KEEP_S = 1.0
#: How long the thread that writes may take to see that there is nobody to read from any more.
_LEAVE_S = 0.5


class Committed:
    """Writes a run's result folder before its processes are ended, in a thread of its own: so it is bounded in time."""

    def __init__(self, pipeline: Pipeline, workspace: Path) -> None:
        self._pipeline = pipeline
        self._workspace = workspace
        self._thread: threading.Thread | None = None
        self._rounds: int | None = None
        self._problem = f"not written within {KEEP_S:g} s"

    @contextmanager
    def kept(self, job_id: str, seen: Sequence[Any], unfinished: Callable[[], bool]) -> Generator[None]:
        """Whatever ends the job's run too early, keep its results first; a note of the error says where they are.

        ``seen`` are the rounds that the run has heard of till then: without any, there is nothing to be missed.
        ``unfinished``: whether another run can go on with the job.
        """
        try:
            yield
        except (KeyboardInterrupt, LinkError, ProcessError) as error:
            if words := self._keep(job_id, bool(seen)):
                error.add_note(words)
            if unfinished():
                error.add_note(RESUME_HINT)
            raise

    def _keep(self, job_id: str, some: bool) -> str:
        """What to tell about it; "" where no round was committed."""
        self._pipeline.stopping()
        lost = "the results of the committed rounds are not kept: "
        if not self._pipeline.answers:
            return lost + "the process that held them has died" if some else ""
        self._thread = threading.Thread(target=self._write, args=(job_id,), name="fedloom-sim-results", daemon=True)
        self._thread.start()
        self._thread.join(KEEP_S)
        if self._rounds is None:
            return lost + self._problem if some else ""
        return f"results of the committed rounds: {self._workspace}" if self._rounds else ""

    def _write(self, job_id: str) -> None:
        from ..recipe.client import JobClient
        from ..recipe.results import read_metrics, write_results

        deadline = time.monotonic() + KEEP_S
        try:
            # a link of its own: the run's may be closed by now, or was interrupted half-way through a request
            with JobClient(self._pipeline.endpoint, connect_s=KEEP_S, timeout_s=KEEP_S) as client:
                self._pipeline.end_work()  # no round is committed, and no model removed, while they are read
                write_results(client, job_id, self._workspace, logs=False)
            rounds = len(read_metrics(self._workspace))
        except (FedloomError, OSError) as error:
            self._problem = str(error)
            return
        if time.monotonic() < deadline:
            self._rounds = rounds

    def clear(self) -> None:
        """After the processes' end: remove what was written by half."""
        if self._thread is None:
            return
        self._thread.join(_LEAVE_S)
        for pattern in ("*.copy", "*.part"):
            for path in self._workspace.glob(pattern):
                with suppress(OSError):
                    path.unlink()
