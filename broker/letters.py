"""Dead letters: tasks that were given up, for an operator to retry or to drop.

A letter is the event of the failure, and its number that event's. A later event of the same task takes it off the list:
the task was retried (it may fail again, which is another letter), or the letter was dropped. So an order is journaled
in one transaction with what it changes in the ledger, the list outlives the round and the job, and its bound is the
events' (``max_events``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import structlog

from ..serialization.errors import FaultError
from ..serialization.messages import Ask, JobId, TaskId
from .gathers import Task
from .journal import EventRow
from .state import BrokerState

__all__ = ["LETTER_KINDS", "letters", "order", "post"]

log = structlog.get_logger(__name__)

_FAILED = "task_failed"
#: The event that says that an order was carried out.
_DONE = {"retry": "task_retried", "drop": "letter_dropped"}
#: The kinds of events that letters are read off: nobody else may send such.
LETTER_KINDS = (_FAILED, *_DONE.values())


def post(state: BrokerState, task: Task, now: float) -> None:
    """Keep the event of a task that was given up."""
    gather = state.ledger.gathers.get(task.gather)
    if gather is None:
        return
    spec = gather.spec
    data = {
        "task": task.id,
        "code": task.code,
        "status": task.status,
        "tries": task.tries,
        "attempts": task.attempt,
        "round": spec.round,
        "step": spec.step,
        "name": spec.name,
    }
    state.event(gather.job, _FAILED, now, site=task.site, text=task.text, data=data)


def letters(state: BrokerState, message: Ask) -> list[tuple[int, dict[str, Any]]]:
    """A job's letters behind number ``after``, at most ``limit``, the oldest first.

    Raises:
        FaultError: ``unknown_job``.
    """
    job = state.jobs.get(message.job).id
    found: dict[TaskId, int] = {}
    for mark in _marks(state, job, message.after):
        found.pop(_task(mark), None)
        if mark.kind == _FAILED:
            found[_task(mark)] = mark.seq
    rows: list[tuple[int, dict[str, Any]]] = []
    for task, number in list(found.items())[: message.limit]:
        for event in state.journal.events(job, number - 1, 1):
            row = {"letter": number, "at": event.at, "site": event.site, "text": event.text, **event.data}
            rows.append((number, row | {"open": _open(state, task)}))
    return rows


def order(state: BrokerState, message: Ask, by: str, now: float) -> dict[str, Any]:
    """Retry or drop the letter whose number is ``after``; said again, it changes nothing.

    Raises:
        FaultError: ``unknown_job``, ``unknown_letter``, ``not_dead`` (something else became of it), ``step_closed``,
            ``ended``.
    """
    job, number = state.jobs.get(message.job), message.after
    marks = list(_marks(state, job.id, number - 1)) if number else []
    if not marks or (marks[0].seq, marks[0].kind) != (number, _FAILED):
        text = f"job {job.id} has no dead letter {number}; the oldest events go (max_events), letters among them"
        raise FaultError("unknown_letter", text)
    task, site, done = _task(marks[0]), marks[0].site, _DONE[message.what]
    since = next((mark for mark in marks[1:] if _task(mark) == task), None)
    if since is None:
        if message.what == "retry":
            if job.ended:
                text = (
                    f"job {job.id} has ended ({job.status}): fedloom job resume {job.id} goes on behind its last commit"
                )
                raise FaultError("ended", text)
            state.ledger.retry(task, now)
        state.event(job.id, done, now, site=site, text=f"by {by}", data={"task": task, "letter": number})
        log.info(done, job=job.id, site=site, task=task, by=by)
    elif since.kind != done:
        raise FaultError("not_dead", f"dead letter {number} of {site} is not listed any more: {since.kind}")
    return {"letter": number, "site": site, "task": task}


def _open(state: BrokerState, tid: TaskId) -> bool:
    """Whether a task that was given up may be retried: its step is open."""
    task = state.ledger.tasks.get(tid)
    return task is not None and task.given_up and state.ledger.gathers[task.gather].state == "open"


def _task(mark: EventRow) -> TaskId:
    return TaskId(str(mark.data.get("task", "")))


def _marks(state: BrokerState, job: JobId, after: int) -> Iterator[EventRow]:
    """The events that letters are made of, with those of this turn."""
    yield from state.journal.marks(job, LETTER_KINDS, after)
    for event in state.events:
        if event.job == job and event.seq > after and event.kind in LETTER_KINDS:
            yield event
