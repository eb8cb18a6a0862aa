"""Answers to Ask: jobs, events, rounds and sites, a page at a time. Reads only."""

from __future__ import annotations

from typing import Any

from ..serialization.codec import pack
from ..serialization.errors import FaultError
from ..serialization.messages import Answer, Ask, PayloadRef
from .bounds import to_plain
from .figures import figures
from .jobs import Job
from .letters import letters
from .state import BrokerState

__all__ = ["answer"]

_BODY_BYTES = 48 * 1024
_PAGE_BYTES = 512 * 1024


def answer(state: BrokerState, message: Ask) -> tuple[Answer, bytes]:
    """The answer and its tail (the map as msgpack, where it does not fit into the body).

    Raises:
        FaultError: ``unknown_job``, ``unknown_question``.
    """
    match message.what:
        case "job" | "status":
            job = state.jobs.get(message.job)
            sites = {"sites": _bounded(job.sites)} if message.what == "job" else {}
            data = job_answer(job) | sites | {"gather": _open_gather(state, job)}
        case "jobs":
            data = _jobs(state, message)
        case "events":
            data = _events(state, message)
        case "rounds":
            data = _rounds(state, message)
        case "letters":
            data = _page("letters", letters(state, message), message.after)
        case "broker":
            data = _broker(state)
        case "spool":
            data = _spool(state)
        case "sites":
            data = _sites(state, message)
        case _:
            raise FaultError(
                "unknown_question",
                f"{message.what!r} is no question; ask for job, status, jobs, events, rounds, sites, letters, broker,"
                " spool, abort, retry or drop",
            )
    packed = pack(data)
    if len(packed) <= _BODY_BYTES:
        return Answer(message.ref, data), b""
    return Answer(message.ref), packed


def job_answer(job: Job) -> dict[str, Any]:
    """All about a job but its sites; ``round`` counts its commits, ``commit.round`` is the last one's number."""
    commit = job.commit
    return _summary(job) | {
        "reason": job.reason,
        "site_count": len(job.sites),
        "late": sum(job.late.values()),
        "claim": job.claim,
        "commit": None
        if commit is None
        else {
            "round": commit.round,
            "model": _ref(commit.model),
            "state": _ref(commit.state),
            "best": _ref(commit.best),
        },
        "archive": _ref(job.archive),
    }


def _open_gather(state: BrokerState, job: Job) -> dict[str, Any] | None:
    """The gather that is under way: ``done`` counts the results that came and those that only wait to be sent."""
    gather = next((g for g in reversed(state.ledger.gathers.values()) if g.job == job.id and g.live), None)
    if gather is None:
        return None
    return {
        "name": gather.spec.name,
        "round": gather.spec.round,
        "tasks": len(gather.tasks),
        "results": len(gather.results),
        "done": len(gather.results) + gather.arriving,
    }


def _summary(job: Job) -> dict[str, Any]:
    rounds = job.meta.get("num_rounds", job.meta.get("rounds", 0))
    return {
        "job_id": job.id,
        "name": job.name,
        "status": job.status,
        "round": job.commit.round + 1 if job.commit else 0,
        "rounds": rounds if isinstance(rounds, int) else 0,
        "submitted_at": job.submitted_at,
        "ended_at": job.ended_at,
    }


def _bounded(names: tuple[str, ...]) -> list[str]:
    """As many of the names as an answer holds."""
    out: list[str] = []
    used = 0
    for name in names:
        used += 4 * len(name) + 5
        if used > _PAGE_BYTES:
            break
        out.append(name)
    return out


def _ref(ref: PayloadRef | None) -> dict[str, Any] | None:
    return None if ref is None else {"id": ref.id, "size": ref.size, "digest": ref.digest, "type": ref.type}


def _page(key: str, rows: list[tuple[int, dict[str, Any]]], after: int) -> dict[str, Any]:
    """As many rows as one answer holds; ``next`` is where to go on (pass it as ``after``)."""
    out: list[dict[str, Any]] = []
    used = 0
    for at, row in rows:
        used += len(pack(row))
        if out and used > _PAGE_BYTES:
            break
        out.append(row)
        after = at
    return {key: out, "next": after}


def _broker(state: BrokerState) -> dict[str, Any]:
    """How full it is, and what it has counted since it was started."""
    return {
        "epoch": state.epoch,
        "spool": _spool(state),
        "sessions": len(state.sessions.by_id),
        "jobs": len(state.jobs.jobs),
        "gathers": len(state.ledger.gathers),
        "tasks": len(state.ledger.tasks),
        "bounds": to_plain(figures(state)),
        "counters": dict(state.counters),
    }


def _spool(state: BrokerState) -> dict[str, Any]:
    """How full the spool is; asked by each job's process, round for round."""
    quota = state.quota
    return {
        "quota_bytes": quota.total,
        "used_bytes": state.payloads.used_bytes,
        "coming_bytes": quota.used - state.payloads.used_bytes,
        "reserved_bytes": quota.reserved,
        "payloads": len(state.payloads.rows),
        "waits": quota.refused,
        "waiting": len(quota.turns),
    }


def _jobs(state: BrokerState, message: Ask) -> dict[str, Any]:
    jobs = list(state.jobs.jobs.values())
    rows = [(at + 1, _summary(job)) for at, job in enumerate(jobs)][message.after : message.after + message.limit]
    return _page("jobs", rows, message.after)


def _events(state: BrokerState, message: Ask) -> dict[str, Any]:
    state.jobs.get(message.job)
    rows = [
        (e.seq, {"seq": e.seq, "at": e.at, "kind": e.kind, "site": e.site, "text": e.text, "data": e.data})
        for e in state.journal.events(message.job, message.after, message.limit)
    ]
    return _page("events", rows, message.after)


def _rounds(state: BrokerState, message: Ask) -> dict[str, Any]:
    late = state.jobs.get(message.job).late
    rows = [
        (ordinal, {"round": round_, **record} | ({"late": late[str(round_)]} if str(round_) in late else {}))
        for ordinal, round_, record in state.journal.records(message.job, message.after, message.limit)
    ]
    return _page("rounds", rows, message.after)


def _sites(state: BrokerState, message: Ask) -> dict[str, Any]:
    names = sorted(set(state.sessions.by_site) | {site for job in state.jobs.jobs.values() for site in job.sites})
    rows: list[tuple[int, dict[str, Any]]] = []
    for at, name in enumerate(names[message.after : message.after + message.limit]):
        session = state.sessions.by_site.get(name)
        live = session is not None and session.lost_at is None
        rows.append((message.after + at + 1, {"name": name, "live": live, "node": session.node if session else ""}))
    return _page("sites", rows, message.after)
