"""Start: replay the journal, then make rows and files agree. Files without rows go; what lost its file is healed."""

from __future__ import annotations

import structlog

from ..serialization.messages import PayloadId
from .gathers import Gather
from .jobs import Job
from .state import BrokerState

__all__ = ["recover"]

log = structlog.get_logger(__name__)


def recover(state: BrokerState, now: float) -> list[Job]:
    """Fill the empty tables from the journal.

    A result whose payload is gone is queued again; a gather whose own payload is gone waits until its controller puts
    it again; a job whose committed model or archive is gone fails, since nothing can bring it back.
    Returns those jobs: what only they needed is still held.

    Raises:
        StorageError: the journal cannot be read.
    """
    state.ledger.started_at = now
    state.journal.load(state.ledger, state.jobs, state.payloads, now)
    lost = {row.id for row in state.payloads.rows.values() if not state.spool.exists(row.id, row.size)}
    for payload in sorted(lost):
        holders = state.payloads.lose(payload)
        log.error("payload_lost", payload=payload, holders=sorted(holders))
    state.payloads.doomed.clear()
    for payload in state.payloads.unheld():
        state.payloads.hold(payload, "submit", now)
        state.payloads.release(payload, "submit")
    state.spool.sweep(state.payloads.rows.keys())
    failed: list[Job] = []
    if lost:
        for gather in list(state.ledger.gathers.values()):
            _heal(state, gather, lost, now)
        failed = _fail_jobs(state, lost, now)
    # results that came back as tasks, and what ended while no broker looked
    for gather in list(state.ledger.gathers.values()):
        state.ledger.check(gather, now)
    log.info(
        "journal_replayed",
        jobs=len(state.jobs.jobs),
        gathers=len(state.ledger.gathers),
        tasks=len(state.ledger.tasks),
        payloads=len(state.payloads.rows),
        lost=len(lost),
    )
    return failed


def _heal(state: BrokerState, gather: Gather, lost: set[PayloadId], now: float) -> None:
    if lost.intersection(gather.payload_ids()):
        gather.blocked = gather.lost = True
        state.ledger.dirty_gathers[gather.id] = gather
    checkpoint_lost = gather.checkpoint is not None and gather.checkpoint.id in lost
    gone: set[int] = set()
    for index, result in enumerate(gather.results):
        if index < gather.covered:
            if checkpoint_lost:
                gone.add(index)
            continue
        ref = gather.partials[result.partial].payload if result.partial else result.payload
        if ref is not None and ref.id in lost:
            gone.add(index)
    if gone:
        if checkpoint_lost:
            gather.checkpoint, gather.covered = None, 0
        state.ledger.lose_results(gather, gone, now)
        log.error("results_lost", gather=gather.id, results=len(gone))


def _fail_jobs(state: BrokerState, lost: set[PayloadId], now: float) -> list[Job]:
    failed: list[Job] = []
    for job in state.jobs.jobs.values():
        if job.ended:
            continue
        needed = [("archive", job.archive)]
        if job.commit is not None:
            needed += [(n, r) for n, r in (("model", job.commit.model), ("state", job.commit.state)) if r is not None]
        for what, ref in needed:
            if ref.id in lost:
                text = f"its {what} {ref.id} is gone from the broker's spool: the disk lost it, or somebody removed it"
                state.jobs.finish(job, "FINISHED:FAILED", text, now)
                failed.append(job)
                break
    return failed
