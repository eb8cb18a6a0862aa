"""A pool's results folded on the spot, so that hundreds of sites reach the controller as one partial.

`Batches` is the pure policy: which results stand together and when they leave. `PartialFold` does the adding; it runs
in the agent's one fold thread. The first result of a batch waits unfolded for a second one: alone it leaves as it is,
since a partial is twice its size.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..serialization import spans
from ..serialization.digest import digest_buffers
from ..serialization.envelope import Buffer
from ..serialization.errors import FedloomError
from ..serialization.fold import Fold, FoldPlan
from ..serialization.messages import DoneItem, PayloadId, PayloadRef

Gather = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished attempt before it is folded or sent.

    Attributes:
        source: the payload: its bytes, or its file.
        size: in bytes.
        digest: of the payload; "" where integrity is by size.
        base: the site-state version that the attempt started from.
    """

    job: str
    gather: str
    item: DoneItem
    source: bytes | Path
    size: int
    digest: str
    base: str = ""


class PartialFold:
    """One partial in the making. Not thread-safe: it belongs to the fold thread."""

    def __init__(self, plan: bytes) -> None:
        self._fold = Fold(FoldPlan.from_bytes(plan))

    def add(self, result: Result) -> None:
        """Fold one result in; a bad one leaves no trace.

        Raises:
            FoldError, PayloadError: what is wrong with it.
        """
        began = spans.start()
        self._fold.add(result.source, site=result.item.site, meta=result.item.meta)
        spans.end("fold", began, site=result.item.site, task=result.item.task)

    def finish(self, digest: bool = True) -> tuple[PayloadRef, list[Buffer]]:
        """The partial as a payload; without its digest where the broker goes by the size."""
        began = spans.start()
        buffers, size = self._fold.to_partial()
        ref = PayloadRef(PayloadId(f"p-{secrets.token_hex(16)}"), size, digest_buffers(buffers) if digest else "")
        spans.end("partial", began)
        return ref, list(buffers)


@dataclass(slots=True)
class Batch:
    """Results that will leave together."""

    gather: Gather
    plan: bytes
    opened_at: float
    alone: Result | None = None  # the first one, until there is a second
    results: list[Result] = field(default_factory=list[Result])  # folded
    folding: int = 0  # to be folded, not heard of yet
    waiting: list[Result] = field(default_factory=list[Result])  # of these, not handed to the fold thread yet
    busy: bool = False  # it folds some
    fold: PartialFold | None = None  # made and used by the fold thread
    spoiled: str = ""  # why nothing of it may be sent: its job is over, or folding failed halfway

    @property
    def size(self) -> int:
        """Results in it, with those still being folded."""
        return len(self.results) + self.folding + (self.alone is not None)

    def take_in(self, result: Result) -> list[Result] | None:
        """Add a result. Returns what is to be folded now, or None where it is alone."""
        assert not self.spoiled
        if self.alone is None and not self.results and not self.folding and self.fold is None:
            self.alone = result
            return None
        waiting = [result] if self.alone is None else [self.alone, result]
        self.alone = None
        self.folding += len(waiting)
        return waiting


class Batches:
    """The open batch of each gather, and when it leaves: full, old enough, or nothing more to come soon. Pure."""

    def __init__(self, max_tasks: int = 256, max_s: float = 5.0) -> None:
        if not 1 <= max_tasks <= 512:
            raise ValueError(f"partial_max_tasks={max_tasks}; 1 to 512")
        self._max_tasks = max_tasks
        self._max_s = max_s
        self._open: dict[Gather, Batch] = {}
        self._sealed: list[Batch] = []

    def __len__(self) -> int:
        return sum(batch.size for batch in (*self._open.values(), *self._sealed))

    def gathers(self) -> list[Gather]:
        """Those with a batch that takes more results."""
        return list(self._open)

    def batch_for(self, gather: Gather, plan: bytes, now: float) -> Batch:
        """Where the next result of this gather belongs."""
        batch = self._open.get(gather)
        if batch is None or batch.size >= self._max_tasks:
            if batch is not None:
                self._seal(batch)
            batch = self._open[gather] = Batch(gather, plan, now)
        return batch

    def spoil(self, batch: Batch, reason: str) -> None:
        """Nothing of this batch may be sent; the next result of its gather begins another."""
        batch.spoiled = batch.spoiled or reason
        if self._open.get(batch.gather) is batch:
            del self._open[batch.gather]
        self._sealed = [other for other in self._sealed if other is not batch]

    def due(self, now: float, working: Sequence[Gather] | set[Gather]) -> list[Batch]:
        """Batches to send now; they take no more results.

        Args:
            working: the gathers of which tasks are queued or running here.
        """
        for batch in list(self._open.values()):
            if batch.size >= self._max_tasks or now - batch.opened_at >= self._max_s or batch.gather not in working:
                self._seal(batch)
        ready = [batch for batch in self._sealed if not batch.folding]
        self._sealed = [batch for batch in self._sealed if batch.folding]
        return [batch for batch in ready if batch.size]

    def next_due_s(self, now: float) -> float:
        """How long until an open batch is old enough."""
        return min((batch.opened_at + self._max_s - now for batch in self._open.values()), default=3600.0)

    def drop_job(self, job: str) -> list[Result]:
        """The job is over: its results are wanted no more. Those that are just being folded are told of later."""
        gone = [batch for batch in (*self._open.values(), *self._sealed) if batch.gather[0] == job]
        for batch in gone:
            self.spoil(batch, "the job has ended")
        results = [result for batch in gone for result in (*batch.results, *([batch.alone] if batch.alone else []))]
        for batch in gone:
            batch.results, batch.alone = [], None
        return results

    def _seal(self, batch: Batch) -> None:
        del self._open[batch.gather]
        self._sealed.append(batch)


def fold_into(batch: Batch, waiting: Sequence[Result]) -> list[tuple[Result, Exception | None]]:
    """Add results to a batch, in the fold thread; what became of each.

    Any other error than a bad result's leaves the batch in a state that nobody knows: it is raised.
    """
    if batch.fold is None:
        batch.fold = PartialFold(batch.plan)
    out: list[tuple[Result, Exception | None]] = []
    for result in waiting:
        try:
            batch.fold.add(result)
        except (FedloomError, OSError) as error:
            out.append((result, error))
        else:
            out.append((result, None))
    return out
