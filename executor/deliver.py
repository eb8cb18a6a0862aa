"""Results on their way to the broker: uploaded, announced, repeated until stored.

Runs in the agent's thread; uploads run in the pool that `submit` gives. A result leaves the outbox when the broker has
committed it, or has said that it wants it no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from ..serialization import spans
from ..serialization.codec import encode_fields, pack
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FedloomError, LinkError
from ..serialization.messages import (
    INLINE_TOTAL_BYTES,
    Done,
    DoneItem,
    Fail,
    Message,
    PayloadRef,
    Stored,
    Welcome,
)
from .outbox import Held, Key, Outbox

log = structlog.get_logger(__name__)

#: A Done that nobody answered is said again after this; a reconnect repeats it at once.
REPEAT_S = 20.0
_RETRY_S = (0.5, 30.0)
#: The broker's word for an attempt that it wants no payload of any more.
_OVER = ("closed", "late", "stale")
_UPLOAD_S = 24 * 3600.0
#: Of the 64 KiB that Done's body may have.
_BODY_BYTES = 56 * 1024
#: Of an item's msgpack what is no text and no meta: its map, the keys that are always there, and three numbers.
_BARE_BYTES = 48
_TEXT_BYTES = 10
_FLAG_BYTES = 11
_META_KEY_BYTES = 5
_MAX_ITEMS = 512


class LinkLike(Protocol):
    """What the executor needs of a `broker.link.Link`."""

    local: Any

    @property
    def state(self) -> str: ...
    def next_ref(self) -> int: ...
    def request(self, message: Any, tail: Buffer = b"", timeout_s: float = 60.0) -> tuple[Message, Buffer]: ...
    def start(self, timeout_s: float = ...) -> Welcome: ...
    def send(self, message: Message, tail: Buffer = b"") -> None: ...
    def put(
        self,
        ref: PayloadRef,
        source: Sequence[Buffer] | Path,
        *,
        job: str = "",
        claim: int = 0,
        task: str = "",
        attempt: int = 0,
        timeout_s: float = 3600.0,
    ) -> PayloadRef: ...
    def put_local(self, ref: PayloadRef, name: str, *, timeout_s: float = 600.0, **owner: Any) -> PayloadRef: ...
    def fetch(self, ref: PayloadRef, timeout_s: float = 3600.0, dest: Path | None = None) -> Path | bytes: ...
    def close(self, reason: str = "") -> None: ...


@dataclass(slots=True)
class _Single:
    """A result of one attempt."""

    held: Held
    uploaded: bool
    busy: bool = False
    tries: int = 0
    next_at: float = 0.0
    said_at: float = 0.0


@dataclass(slots=True)
class _Partial:
    """Results that were folded into one payload."""

    job: str
    gather: str
    items: tuple[DoneItem, ...]
    ref: PayloadRef
    source: list[Buffer] | Path
    incoming: str  # the file's name in the broker's incoming folder, where it lies there
    uploaded: bool
    busy: bool = False
    tries: int = 0
    next_at: float = 0.0
    said_at: float = 0.0

    @property
    def keys(self) -> list[Key]:
        return [(item.task, item.attempt) for item in self.items]


Submit = Callable[[Callable[[], Any], Callable[[Any, Exception | None], None]], None]
#: The attempt is settled, or its result was not wanted.
Settled = Callable[[Key], None]


class Delivery:
    """All results of one agent that are not stored yet.

    Args:
        submit: runs its first argument in a thread and calls the second with the outcome in the agent's thread.
        settled: told of each attempt that left.
    """

    def __init__(self, link: LinkLike, outbox: Outbox, submit: Submit, settled: Settled) -> None:
        self._link = link
        self._outbox = outbox
        self._submit = submit
        self._settled = settled
        self._singles: dict[Key, _Single] = {held.key: _Single(held, held.item.payload is None) for held in outbox}
        self._partials: dict[str, _Partial] = {}
        self._partial_of: dict[Key, _Partial] = {}

    def __len__(self) -> int:
        return len(self._singles) + len(self._partials)

    def __contains__(self, key: Key) -> bool:
        return key in self._singles or key in self._partial_of

    @property
    def uploading(self) -> bool:
        """Whether there are results that could not be announced yet."""
        return not all(entry.uploaded for entry in (*self._singles.values(), *self._partials.values()))

    def add(self, held: Held) -> None:
        """A finished attempt's result, which is on disk from here on."""
        self._outbox.add(held)
        self._singles[held.key] = _Single(held, held.item.payload is None)

    def add_partial(
        self,
        job: str,
        gather: str,
        items: Sequence[DoneItem],
        ref: PayloadRef,
        source: list[Buffer] | Path,
        incoming: str = "",
    ) -> None:
        """Several attempts' results as one partial, in memory or a file: they are done again if this process dies."""
        small = ref.size <= INLINE_TOTAL_BYTES
        partial = self._partials[ref.id] = _Partial(job, gather, fit_items(items), ref, source, incoming, small)
        self._partial_of.update(dict.fromkeys(partial.keys, partial))

    def drop(self, key: Key) -> None:
        """This attempt's result is not wanted any more."""
        if key in self._singles:
            self._leave(key)

    def drop_older(self, key: Key) -> None:
        """The broker has assigned this attempt, and so given up those before it."""
        for attempt in range(1, key[1]):
            self.drop((key[0], attempt))

    def drop_job(self, job: str) -> None:
        """The job is over: nobody waits for its results."""
        for key in [key for key, single in self._singles.items() if single.held.job == job]:
            self._leave(key)
        for partial in [partial for partial in self._partials.values() if partial.job == job]:
            self._leave(partial.keys[0])

    def repeat(self) -> None:
        """The link is new: what was said on the old one may be lost."""
        for entry in (*self._singles.values(), *self._partials.values()):
            entry.said_at = entry.next_at = 0.0

    def stored(self, message: Stored) -> None:
        """The broker has committed these, and refused those."""
        refused = {(r.task, r.attempt): r for r in message.refused}
        for ref in message.tasks:
            self._leave((ref.task, ref.attempt))
        if message.tasks:
            log.debug("results_stored", tasks=[ref.task for ref in message.tasks])
        for key, refusal in refused.items():
            log.info("result_refused", task=key[0], attempt=key[1], code=refusal.code, reason=refusal.reason)
            self._leave(key)

    def _leave(self, key: Key) -> None:
        found = self._singles.pop(key, None)
        if found is not None:
            self._outbox.remove(key)
            self._settled(key)
            return
        partial = self._partial_of.get(key)
        if partial is not None:
            # all or nothing: one answer speaks for all of its tasks
            self._partials.pop(partial.ref.id, None)
            if isinstance(partial.source, Path):
                partial.source.unlink(missing_ok=True)
            for other in partial.keys:
                del self._partial_of[other]
                self._settled(other)

    # ------------------------------------------------------------ sending

    def turn(self, now: float) -> None:
        """Start the uploads that are due and announce what is up, in as few messages as fit."""
        ready: dict[tuple[str, str], list[_Single]] = {}
        for single in list(self._singles.values()):
            if not single.uploaded:
                self._upload(single, now)
            elif now - single.said_at >= REPEAT_S or single.said_at == 0.0:
                single.said_at = now
                ready.setdefault((single.held.job, single.held.gather), []).append(single)
        for (job, gather), singles in ready.items():
            for batch in _batches(singles):
                items = tuple(single.held.item for single in batch)
                tail = b"".join(single.held.data or b"" for single in batch)
                self._link.send(Done(job=_id(job), gather=_id(gather), items=items), tail)
        for partial in list(self._partials.values()):
            if not partial.uploaded:
                self._upload(partial, now)
            elif now - partial.said_at >= REPEAT_S or partial.said_at == 0.0:
                partial.said_at = now
                inline = partial.ref.size <= INLINE_TOTAL_BYTES
                done = Done(
                    job=_id(partial.job),
                    gather=_id(partial.gather),
                    items=partial.items,
                    partial=partial.ref,
                    partial_inline_bytes=partial.ref.size if inline else 0,
                )
                whole = b"" if not inline or isinstance(partial.source, Path) else b"".join(partial.source)
                self._link.send(done, whole)

    def _upload(self, entry: _Single | _Partial, now: float) -> None:
        if entry.busy or now < entry.next_at:
            return
        entry.busy = True

        def put() -> PayloadRef:
            if isinstance(entry, _Partial):
                if entry.incoming:
                    return self._link.put_local(entry.ref, entry.incoming, job=entry.job)
                return self._link.put(entry.ref, entry.source, job=entry.job, timeout_s=_UPLOAD_S)
            held, payload = entry.held, entry.held.item.payload
            assert payload is not None
            owner: dict[str, Any] = {"job": held.job, "task": held.item.task, "attempt": held.item.attempt}
            if held.incoming:
                return self._link.put_local(payload, held.incoming, **owner)
            return self._link.put(payload, Path(held.path), timeout_s=_UPLOAD_S, **owner)

        def timed() -> PayloadRef:
            began = spans.start()
            ref = put()
            spans.end("upload", began, task=entry.held.item.task if isinstance(entry, _Single) else "")
            return ref

        self._submit(timed, lambda ref, error: self._uploaded(entry, ref, error))

    def _uploaded(self, entry: _Single | _Partial, ref: PayloadRef | None, error: Exception | None) -> None:
        entry.busy = False
        if error is None:
            entry.uploaded = True
            if isinstance(entry, _Partial):
                entry.ref = ref or entry.ref
            return
        key = entry.held.key if isinstance(entry, _Single) else entry.keys[0]
        if key not in self:
            return  # it is not wanted any more
        lost = isinstance(error, OSError)
        if isinstance(error, FaultError) and error.code in _OVER:
            entry.uploaded = True  # it may be over because of this very result: the answer to its Done tells
            return
        if isinstance(error, FaultError) or lost or not isinstance(error, FedloomError):
            log.warning("result_not_taken", code=getattr(error, "code", type(error).__name__), reason=str(error))
            self._give_up(entry, str(error))
            return
        entry.tries += 1
        pause = min(_RETRY_S[1], _RETRY_S[0] * 2**entry.tries)
        entry.next_at = time.monotonic() + pause
        level = log.info if isinstance(error, LinkError) else log.warning
        level("result_upload_again", reason=str(error), after_s=pause)

    def _give_up(self, entry: _Single | _Partial, reason: str) -> None:
        """Its payload cannot be had any more or is not wanted: whatever of it is still ours is to be done again."""
        keys = entry.keys if isinstance(entry, _Partial) else [entry.held.key]
        for task, attempt in keys:  # not Decline, which may be repeated for ever: a try that counts
            self._link.send(Fail(_id(task), attempt, "not_taken", reason[:4000], retryable=True))
        self._leave(keys[0])


def _id(text: str) -> Any:
    return text  # the ids are NewTypes of str; records from disk hold plain texts


def _batches(singles: Sequence[_Single]) -> list[list[_Single]]:
    """Groups whose items fit one body and whose inline results fit one tail."""
    out: list[list[_Single]] = []
    body = tail = 0
    for single in singles:
        size = len(pack(encode_fields(single.held.item)))
        data = len(single.held.data or b"")
        if not out or body + size > _BODY_BYTES or tail + data > INLINE_TOTAL_BYTES or len(out[-1]) >= _MAX_ITEMS:
            out.append([])
            body = tail = 0
        out[-1].append(single)
        body += size
        tail += data
    return out


def fit_items(items: Sequence[DoneItem]) -> tuple[DoneItem, ...]:
    """The items of a partial in one body: what does not fit loses its meta, whose sums the partial carries anyway."""
    metas = [len(pack(item.meta)) + _META_KEY_BYTES if item.meta else 0 for item in items]
    left = _BODY_BYTES - sum(map(_bare_bytes, items))
    if left >= sum(metas):
        return tuple(items)
    out: list[DoneItem] = []
    for item, size in zip(items, metas, strict=True):
        keep = size <= left
        left -= size if keep else 0
        out.append(item if keep else replace(item, meta={}))
    return tuple(out)


def _bare_bytes(item: DoneItem) -> int:
    """The most bytes that an item of a partial has without its meta: reckoned, since to encode each would cost more."""
    texts = len(item.task) + len(item.site.encode()) + (len(item.state) + _TEXT_BYTES if item.state else 0)
    return _BARE_BYTES + texts + (_FLAG_BYTES if item.restarted else 0)
