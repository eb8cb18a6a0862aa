"""Results into the ledger: one a task for ever, only from the current attempt, partials all or nothing. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..serialization.errors import CodecError
from ..serialization.messages import Done, DoneItem, PayloadId, PayloadRef, Refusal, TaskRef
from .gathers import FreshResult, Gather, PartialInfo, Result, Task, task_id
from .ledger import Ledger, SiteState

__all__ = ["Settlement", "settle"]


@dataclass(slots=True)
class Settlement:
    """What became of a Done."""

    stored: list[TaskRef] = field(default_factory=list[TaskRef])
    refused: list[Refusal] = field(default_factory=list[Refusal])
    kept: list[PayloadId] = field(default_factory=list[PayloadId])  # payloads that belong to the gather from now on
    unused: list[PayloadId] = field(default_factory=list[PayloadId])  # payloads of what was refused


def settle(
    ledger: Ledger, node: str, done: Done, tail: bytes, has_payload: Callable[[PayloadRef], bool], now: float
) -> Settlement:
    """Settle the items of a Done from an executor's node; a repeated Done gets the same answer again.

    Raises:
        CodecError: the inline sizes do not add up to the tail, or a task is named twice.
    """
    inline = _split_tail(done, tail)
    if len({item.task for item in done.items}) != len(done.items):
        raise CodecError("Done names a task twice")
    out = Settlement()
    gather = ledger.gathers.get(done.gather)
    if gather is None or gather.job != done.job:
        for item in done.items:
            state = ledger.site_state(done.job, item.site)
            if f"{item.task}.{item.attempt}" in (state.attempt, state.version):
                out.stored.append(TaskRef(item.task, item.attempt))  # it was settled; its Stored was lost on the way
                continue
            out.refused.append(Refusal(item.task, item.attempt, "closed", "its round is over"))
            _drop(out, item.payload)
        if out.refused:
            _drop(out, done.partial)
    elif done.partial is not None:
        _settle_partial(ledger, gather, node, done, done.partial, tail, has_payload, now, out)
    else:
        for item, data in zip(done.items, inline, strict=True):
            _settle_one(ledger, gather, node, item, data, has_payload, now, out)
    if gather is not None:
        ledger.check(gather, now)
    return out


def _split_tail(done: Done, tail: bytes) -> list[bytes | None]:
    sizes = [item.inline_bytes for item in done.items]
    if sum(sizes) + done.partial_inline_bytes != len(tail):
        raise CodecError(
            f"Done's inline sizes sum to {sum(sizes) + done.partial_inline_bytes}, its tail has {len(tail)}"
        )
    if done.partial is not None and any(sizes):
        raise CodecError("items of a partial have no bytes of their own")
    out: list[bytes | None] = []
    at = 0
    for size in sizes:
        out.append(tail[at : at + size] if size else None)
        at += size
    return out


def _problem(gather: Gather, task: Task | None, node: str, item: DoneItem) -> Refusal | None:
    """Why this attempt may not settle its task."""
    if task is None or task.gather != gather.id:
        return Refusal(item.task, item.attempt, "unknown", f"gather {gather.id} has no such task")
    if task.status == "done":
        return Refusal(item.task, item.attempt, "late", f"attempt {task.attempt} has settled it")
    if not gather.live:
        return Refusal(item.task, item.attempt, "closed", f"the gather is {gather.state}")
    if task.ended:
        return Refusal(item.task, item.attempt, "late", f"the task is {task.status}: {task.code}")
    if item.attempt != task.attempt or node != task.owner:
        return Refusal(item.task, item.attempt, "stale", f"attempt {task.attempt} of {task.owner} is the current one")
    return None


def _settle_one(
    ledger: Ledger,
    gather: Gather,
    node: str,
    item: DoneItem,
    data: bytes | None,
    has_payload: Callable[[PayloadRef], bool],
    now: float,
    out: Settlement,
) -> None:
    task = ledger.tasks.get(item.task)
    ref = TaskRef(item.task, item.attempt)
    if task is not None and task.status == "done" and task.attempt == item.attempt and task.owner == node:
        out.stored.append(ref)  # repeated: its Stored was lost on the way
        return
    problem = _problem(gather, task, node, item)
    if problem is None and item.payload is not None and not has_payload(item.payload):
        ledger.requeue(node, ref, "lost_payload", "the broker does not have the result's payload", now)
        problem = Refusal(item.task, item.attempt, "lost_payload", "put it first", requeued=True)
    if problem is not None or task is None:
        assert problem is not None
        out.refused.append(problem)
        _drop(out, item.payload)
        return
    _accept(ledger, gather, task, item, Result(task.id, item.attempt, task.site, item.payload), data)
    out.stored.append(ref)
    if item.payload is not None:
        out.kept.append(item.payload.id)


def _accept(
    ledger: Ledger,
    gather: Gather,
    task: Task,
    item: DoneItem,
    result: Result,
    data: bytes | None,
    partial: PayloadRef | None = None,
) -> None:
    index = len(gather.results)
    gather.results.append(result)
    item = item.numbered(task.site, index)
    ledger.fresh.append(FreshResult(gather.id, index, item, data, partial))
    key = (gather.job, task.site)
    state = ledger.site_state(*key)
    # a redo starts from an old version: what it writes is current only if nothing was settled behind the original
    spec = gather.spec
    first = task_id(spec.job, spec.round, spec.step, spec.name, task.site) if spec.redo else task.id
    moves = bool(item.state) and (not spec.redo or state.last in ("", first))
    last = state.last if spec.redo and not moves else first
    attempt = f"{task.id}.{item.attempt}"
    ledger.site_states[key] = SiteState(item.state if moves else state.version, state.settled + 1, last, attempt)
    ledger.dirty_sites.add(key)
    ledger.end_task(gather, task, "done")


def _settle_partial(
    ledger: Ledger,
    gather: Gather,
    node: str,
    done: Done,
    partial: PayloadRef,
    tail: bytes,
    has_payload: Callable[[PayloadRef], bool],
    now: float,
    out: Settlement,
) -> None:
    """All or nothing: one conflict refuses the whole partial; what the executor still owns of it is queued again."""
    refs = [TaskRef(item.task, item.attempt) for item in done.items]
    known = gather.partials.get(partial.id)
    if known is not None:
        mine = {(r.task, r.attempt) for r in gather.results[known.first : known.first + known.count]}
        if mine == {(r.task, r.attempt) for r in refs}:
            out.stored.extend(refs)
            return
    problems = [_problem(gather, ledger.tasks.get(item.task), node, item) for item in done.items]
    reason = ""
    if known is not None:
        reason = "another partial of this id is here"
    elif not gather.spec.partials:
        reason = "this gather takes no partials"
    elif not done.items:
        reason = "a partial of no tasks"
    elif any(problems):
        first = next(p for p in problems if p is not None)
        reason = f"{sum(p is not None for p in problems)} of its tasks conflict, as {first.task}: {first.code}"
    code = "conflict"
    if not reason and not done.partial_inline_bytes and not has_payload(partial):
        code, reason = "lost_payload", "the broker does not have the partial's payload"
    if reason:
        for item, ref, problem in zip(done.items, refs, problems, strict=True):
            requeued = ledger.requeue(node, ref, code, "", now)
            out.refused.append(problem or Refusal(item.task, item.attempt, code, reason, requeued))
        if known is None:
            _drop(out, partial)
        return
    first = len(gather.results)
    for item in done.items:
        task = ledger.tasks[item.task]
        inline = tail if done.partial_inline_bytes and len(gather.results) == first else None
        result = Result(task.id, item.attempt, task.site, partial=partial.id)
        _accept(ledger, gather, task, item, result, inline, partial)
    gather.partials[partial.id] = PartialInfo(partial, first, len(done.items), bool(done.partial_inline_bytes))
    out.stored.extend(refs)
    if not done.partial_inline_bytes:
        out.kept.append(partial.id)


def _drop(out: Settlement, payload: PayloadRef | None) -> None:
    if payload is not None:
        out.unused.append(payload.id)
