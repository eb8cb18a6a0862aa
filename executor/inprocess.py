"""Tasks of functions that are embedded in this process: begun in its threads, and told of to the agent's thread.

Results of a small model are added where they were made (`workerfolds`), as in a worker process: of a pool's hundreds
none is encoded, and read again, to be added a few instructions later. To the `Collector` this process is a worker like
others, under a name of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import structlog

from ..serialization.codec import check_plain
from .channel import Map
from .context import TaskContext, TaskFunction
from .desk import Desk
from .embedded import Call, FunctionThreads
from .functions import run_task
from .runs import MAX_PLANS, Run
from .workerfolds import Made, WorkerFolds

log = structlog.get_logger(__name__)

#: This process, as the collector knows it among its workers; no host has an empty id.
HERE: Final = ""


class Told(Protocol):
    """The agent's side, in its thread."""

    def told(self, run: Run, message: Map) -> None:
        """Something about a running task."""
        ...

    def thrown_away(self, run: Run) -> None:
        """A task was wanted no more before it began."""
        ...

    def handed_over(self, worker: str, job: str, message: Map) -> None:
        """A partial."""
        ...


class InProcess:
    """The threads and folds of one agent's embedded functions. All but the calls' own work is in the agent's thread.

    Args:
        stopping: whether the agent is on its way out.
    """

    def __init__(self, desk: Desk, tell: Told, stopping: Callable[[], bool]) -> None:
        self._desk = desk
        self._tell = tell
        self._stopping = stopping
        self._threads = FunctionThreads(desk.config.capacity)
        self._folds = WorkerFolds()
        self._planned: dict[str, str] = {}  # gathers whose plan was handed on, by age, and their jobs
        self._answers: deque[tuple[Run, Map]] = deque()
        self._posted = False  # the agent's thread will look at the answers

    def begin(self, run: Run, function: TaskFunction) -> None:
        """Have a task that was described done by the next free thread."""
        spec = run.spec
        assert spec is not None
        folds = self._folds if spec.fold else None
        if folds is not None and spec.fold not in self._planned and run.work.plan is not None:
            self._planned[spec.fold] = run.job
            if len(self._planned) > MAX_PLANS:  # that one may have been dropped
                del self._planned[next(iter(self._planned))]
            folds.plan(spec.fold, run.work.plan)

        def report(op: str, data: dict[str, Any]) -> None:
            check_plain(data)  # in the caller's thread, who can do something about it
            self._desk.post(lambda: self._tell.told(run, {"op": op, **data}))

        def begins(context: TaskContext) -> None:
            run.context = context  # before the look: who cancels it writes first and looks then
            if run.cancelled or self._stopping():
                context.cancel()

        def work() -> None:
            if run.cancelled or self._stopping():  # while it waited for its turn
                self._desk.post(lambda: self._tell.thrown_away(run))
                return
            run.started_at = time.monotonic()
            answer = run_task(function, spec, report, begins, folds)
            self._answer(run, answer)
            if answer.get("folded"):
                self._folds.told(spec.fold)

        run.call = Call(run.item.site, work)
        self._threads.submit(run.call)

    def _answer(self, run: Run, answer: Map) -> None:
        """Tell the agent's thread, which hears of quick tasks several at a time."""
        self._answers.append((run, answer))
        if not self._posted:
            self._posted = True
            self._desk.post(self._look)

    def _look(self) -> None:
        self._posted = False  # first: what comes from here on is seen below, or posted anew
        while self._answers:
            run, answer = self._answers.popleft()
            with self._desk.answering(run):
                self._tell.told(run, answer)

    def give_up(self, call: Call) -> None:
        """Nobody waits for this call any more: another thread takes its place."""
        self._threads.give_up(call)

    def flush(self, job: str, gather: str, path: str, digest: bool) -> None:
        """Hand over what was folded of a gather: behind the answers of the tasks that it holds."""

        def over(made: Made | None, error: Exception | None) -> None:
            told: Map = {"gather": gather, "keys": []}
            if made is not None:
                told |= {"keys": made.keys, "id": made.id, "size": made.size, "digest": made.digest, "data": made.data}
            elif error is not None:
                log.error("partial_failed", job=job, error=repr(error))
            self._tell.handed_over(HERE, job, told)

        self._desk.fold(lambda: self._folds.take(gather, path, digest=digest), over)

    def forget(self, job: str) -> None:
        """The job is over: what was folded of it is nobody's."""
        for gather in [gather for gather, its in self._planned.items() if its == job]:
            del self._planned[gather]
            self._folds.drop(gather)

    def close(self) -> None:
        """Let the threads end, each after what it is at."""
        self._threads.close()
