"""One gather, as the job process sees it: opened, its results in order, closed with an exact set."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog

from ..serialization.codec import pack
from ..serialization.envelope import Buffer
from ..serialization.errors import GatherError
from ..serialization.messages import Done, DoneItem, Failure, GatherId, OpenGather, PayloadRef, Receipt

if TYPE_CHECKING:
    from .federation import Federation

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What one Done brought: a single site's result, or a partial that stands for many.

    Attributes:
        start: the number of its first item in the gather; results are numbered in the order of their acceptance.
        items: one a task; for a partial all that it covers.
        payload: where the bytes are, or None with the bytes in ``inline``.
        follows: more items of the partial that the result before brought: its payload is not to be added again.
    """

    start: int
    items: tuple[DoneItem, ...]
    payload: PayloadRef | None
    inline: bytes = b""
    partial: bool = False
    follows: bool = False

    @property
    def site(self) -> str:
        """The site of a single result."""
        return self.items[0].site

    @property
    def meta(self) -> dict[str, Any]:
        """The plain side of a single result: params_type, metrics, meta."""
        return self.items[0].meta

    @property
    def size(self) -> int:
        """Bytes of its payload; none where it follows."""
        if self.follows:
            return 0
        return self.payload.size if self.payload else len(self.inline)


@dataclass(slots=True)
class GatherState:
    """What is known of a gather by now; `Gather` fills it."""

    state: str = "waiting"
    tasks: int = 0
    results: int | None = None  # known once closed
    reason: str = ""
    failures: dict[str, Failure] = field(default_factory=dict[str, Failure])
    cuts: int = 0  # how often the connection to the broker was lost and found while it was open


class Gather:
    """Iterate over it for the results, in the order of their acceptance, until the gather is closed.

    A replay after a crash yields the same results in the same order.
    """

    def __init__(self, federation: Federation, opening: OpenGather, sites: tuple[str, ...]) -> None:
        self.opening = opening
        self.id: GatherId = GatherId("")
        self.seen = GatherState()
        self.started_at = time.monotonic()
        self.site_list = sites
        self._federation = federation
        self._arrived: deque[Result] = deque()
        self._have = 0
        self._partial = ""  # the last result's, if it was one
        self._redos = 0

    # ------------------------------------------------------------ workflow side

    def __iter__(self) -> Iterator[Result]:
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            if self.complete and self.seen.state == "closed":
                return
            if self.seen.state == "failed":
                raise GatherError(self._why_failed())
            self._federation.mail.pump(self)

    def close(self) -> None:
        """Close now with the results that are there; the rest of the tasks are cancelled."""
        self._federation.close_gather(self)

    def redo(self, sites: Sequence[str], fold: PayloadRef | None, min_clients: int = 0) -> Gather:
        """The same tasks of these sites again, singly: their results were in partials that cannot be folded again.

        Args:
            sites: whose.
            fold: the plan by which they are added.
            min_clients: how many have to come; 0: all.
        """
        self._redos += 1
        log.info("gather_redo", round=self.opening.round, sites=len(sites))
        return self._federation.open(
            replace(
                self.opening,
                ref=0,
                redo=self._redos,
                fold=fold,
                partials=False,
                sample=0,
                rule=replace(self.opening.rule, min_clients=min_clients or len(sites)),
            ),
            tuple(sites),
        )

    @property
    def complete(self) -> bool:
        """Whether the broker has nothing more to tell: failed, or closed and all of its results are here."""
        seen = self.seen
        return seen.state == "failed" or (seen.state == "closed" and self._have >= (seen.results or 0))

    @property
    def failures(self) -> list[Failure]:
        """Tasks that ended without a result, with the reason: for user code its own traceback."""
        return list(self.seen.failures.values())

    # ------------------------------------------------------------ wire side

    def message(self) -> tuple[OpenGather, bytes]:
        """The opening, for the first time or again after a reconnect: results behind ``have`` are sent (again)."""
        tail = pack({"sites": list(self.site_list)}) if self.site_list else b""
        return replace(self.opening, have=self._have), tail

    def on_receipt(self, receipt: Receipt) -> None:
        """The broker's word on the gather's state."""
        self.id = receipt.gather
        seen = self.seen
        seen.state = receipt.state
        seen.tasks = receipt.tasks or seen.tasks
        seen.reason = receipt.reason
        if receipt.state == "closed":
            seen.results = receipt.results
        for failure in receipt.failures:
            if seen.failures.get(failure.task) != failure:  # not known, or retried and failed again
                seen.failures[failure.task] = failure
                said = {"round": self.opening.round, "site": failure.site, "code": failure.code, "text": failure.text}
                log.warning("task_failed", job=self.opening.job, **said)

    def on_done(self, done: Done, tail: Buffer) -> None:
        """Results from the broker; those known already (a repeat after a reconnect) are passed over.

        A partial of more items than a message holds comes in several: each names the same payload.
        """
        if done.partial is not None:
            if done.items and done.items[0].index == self._have:
                inline = bytes(tail) if done.partial_inline_bytes else b""
                follows = done.partial.id == self._partial
                payload = None if inline else done.partial
                self._take(Result(self._have, done.items, payload, inline, partial=True, follows=follows))
                self._partial = done.partial.id
            return
        offset = 0
        for item in done.items:
            inline = bytes(memoryview(tail)[offset : offset + item.inline_bytes])
            offset += item.inline_bytes
            if item.index == self._have:
                self._partial = ""
                self._take(Result(item.index, (item,), None if item.inline_bytes else item.payload, inline))

    def _take(self, result: Result) -> None:
        if self.seen.failures:  # it was given up, and retried since
            for item in result.items:
                self.seen.failures.pop(item.task, None)
        self._have += len(result.items)
        self._arrived.append(result)

    def _why_failed(self) -> str:
        first = next(iter(self.seen.failures.values()), None)
        where = f"round {self.opening.round}, {self.opening.name}: {self.seen.reason or 'too few results'}"
        return where if first is None else f"{where}\n{first.site}: {first.code}\n{first.text}"
