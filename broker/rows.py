"""Ledger and job objects as journal rows, and back."""

from __future__ import annotations

from typing import Any, cast

from ..serialization.codec import decode_fields, encode_fields, pack, unpack
from ..serialization.messages import CommitRef, DoneItem, GatherId, OpenGather, PayloadRef
from .gathers import FreshResult, Gather, PartialInfo, Result
from .jobs import Job

__all__ = ["ResultRow", "add_result", "gather", "gather_row", "item", "job", "job_row", "plain", "ref", "result_row"]

#: A gather's row names its sites, so it may be long; what came over the wire was bounded there.
_MAX_ROW_BYTES = 256 * 1024 * 1024


def plain(data: bytes) -> dict[str, Any]:
    """A map that was packed into a column."""
    return cast("dict[str, Any]", unpack(data, max_bytes=_MAX_ROW_BYTES))


def ref(data: bytes | None) -> PayloadRef | None:
    """A payload reference that was packed into a column."""
    return decode_fields(PayloadRef, plain(data)) if data else None


def _packed_ref(value: PayloadRef | None) -> bytes | None:
    return pack(encode_fields(value)) if value else None


def job_row(value: Job) -> bytes:
    """A job; what users gave is packed on its own, so that its depth is not the row's."""
    return pack(
        {
            "id": value.id,
            "token": value.token,
            "name": value.name,
            "archive": _packed_ref(value.archive),
            "meta": pack(value.meta),
            "submitted_at": value.submitted_at,
            "status": value.status,
            "reason": value.reason,
            "claim": value.claim,
            "claimed_by": list(value.claimed_by),
            "commit": pack(encode_fields(value.commit)) if value.commit else None,
            "commits": value.commits,
            "crashes": value.crashes,
            "ended_at": value.ended_at,
            "sites": list(value.sites),
            "late": value.late,
            "lapsed": value.lapsed,
        }
    )


def job(data: bytes) -> Job:
    """The job of a row."""
    row = plain(data)
    node, boot, request = row["claimed_by"]
    commit = row["commit"]
    row |= {
        "archive": ref(row["archive"]),
        "meta": plain(row["meta"]),
        "claimed_by": (node, boot, request),
        "commit": decode_fields(CommitRef, plain(commit)) if commit else None,
        "sites": tuple(row["sites"]),
    }
    return Job(**row)


def gather_row(value: Gather) -> bytes:
    """A gather without its tasks and results."""
    return pack(
        {
            "spec": pack(encode_fields(value.spec)),
            "digest": value.digest,
            "requested": list(value.requested),
            "opened_at": value.opened_at,
            "state": value.state,
            "reason": value.reason,
            "quorum_at": value.quorum_at,
            "checkpoint": _packed_ref(value.checkpoint),
            "covered": value.covered,
            "lost": value.lost,
            "blocked": value.blocked,
        }
    )


def gather(id_: GatherId, data: bytes, now: float) -> Gather:
    """The gather of a row; a clock that went back over the restart must not move its times into the future."""
    row = plain(data)
    row |= {
        "spec": decode_fields(OpenGather, plain(row["spec"])),
        "requested": tuple(row["requested"]),
        "opened_at": min(now, row["opened_at"]),
        "quorum_at": None if row["quorum_at"] is None else min(now, row["quorum_at"]),
        "checkpoint": ref(row["checkpoint"]),
    }
    return Gather(id_, **row)


#: Gather, index, the item packed, inline bytes, a partial's reference packed.
ResultRow = tuple[GatherId, int, bytes, bytes | None, bytes | None]


def result_row(fresh: FreshResult) -> ResultRow:
    """A result with its metadata and inline bytes; of a partial, the first has the partial's inline bytes."""
    return fresh.gather, fresh.index, pack(encode_fields(fresh.item)), fresh.inline, _packed_ref(fresh.partial)


def item(data: bytes) -> DoneItem:
    """The result of a row."""
    return decode_fields(DoneItem, plain(data))


def add_result(into: Gather, index: int, value: DoneItem, inline: bool, partial: PayloadRef | None) -> None:
    """Append a journaled result to its gather.

    Raises:
        ValueError: a result before it is missing.
    """
    if index != len(into.results):
        raise ValueError(f"result {len(into.results)} of gather {into.id} is missing")
    into.results.append(Result(value.task, value.attempt, value.site, value.payload, partial.id if partial else ""))
    if partial is None:
        return
    known = into.partials.get(partial.id)
    if known is None:
        into.partials[partial.id] = PartialInfo(partial, index, 1, inline)
    else:
        into.partials[partial.id] = PartialInfo(partial, known.first, known.count + 1, known.inline)
