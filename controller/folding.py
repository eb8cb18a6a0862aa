"""Folding a gather's results out of the spool: each once, with checkpoints, and again where scales were not good."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from ..serialization import spans
from ..serialization.errors import (
    FaultError,
    FedloomError,
    FencedError,
    FoldError,
    GatherError,
    JobError,
    LinkError,
    MixedError,
    PayloadError,
    WireError,
)
from ..serialization.faultpoints import fault_point
from ..serialization.feeder import Feeder
from ..serialization.fold import Good
from ..serialization.header import header_bytes_needed, read_header
from ..serialization.messages import Failure, PayloadRef
from .aggregators.base import Aggregate
from .collecting import RoomWatch
from .federation import Federation
from .gather import Gather, Result
from .records import RoundRecord

log = structlog.get_logger(__name__)

#: Payload bytes between checkpoints of a round, where the broker names no quota; never less than four models.
CHECKPOINT_BYTES = 1 << 30
_MODELS_A_CHECKPOINT = 4
#: A round's results may take this part of the spool, so that a few jobs beside each other do not fill it.
_QUOTA_SHARE = 8
#: The spool is not asked for its room as long as a round's results take less: in a small round every question shows.
_ALWAYS_ROOM = 64 * 1024
_MAX_REFOLDS = 4
_SHOWN = 8


class Folding:
    """One round's fold.

    A result whose tensors do not fit the model, that holds NaN or Inf, or whose weight is no positive number is refused
    and listed as its site's failure; the round goes on if enough others are good. A partial that cannot be added is
    left out, and its sites are asked once more, singly. Results that do not go together are everybody's error.
    """

    def __init__(
        self,
        fed: Federation,
        gather: Gather,
        aggregate: Aggregate,
        record: RoundRecord,
        *,
        checkpoint_bytes: int | None = None,
        collected: Sequence[Result] | None = None,
    ) -> None:
        """``collected``: what a gather that is closed has brought, in any order, of what is to be folded."""
        self.aggregate = aggregate
        self.refused: list[Failure] = []
        self._fed = fed
        self._gather = gather
        self._record = record
        self._collected = collected
        self._results: list[Result] = []
        self._bad: list[Result] = []  # what partials brought that could not be added
        self._redone: list[Result] = []  # and their sites' results, singly
        self._counts = self._tasks = 0  # results in the sums, and tasks that they are of
        self._covered = 0
        self._since_checkpoint = 0
        self._exact = aggregate.plan.exact  # float sums have no checkpoints, and take a result whole
        self._room = RoomWatch()
        self._wanted_bytes = checkpoint_bytes
        self._limit_bytes = 0  # of results between checkpoints, once it is known

    def run(self) -> Aggregate:
        """Fold the gather's results as they arrive; the aggregate can be finished when this returns.

        Raises:
            GatherError: fewer good results than ``min_clients``.
            MixedError: weights missing from some results, FULL among DIFF results.
            FoldError: partials that stand for more results than their tasks.
        """
        self._fed.mail.on_quiet = self._quiet
        try:
            self._fold_all()
        finally:
            self._fed.mail.on_quiet = None
        self._redo_bad()
        wanted = self._gather.opening.rule.min_clients
        if self.aggregate.count < wanted:
            first = f"\n{self.refused[0].site}: {self.refused[0].text}" if self.refused else ""
            raise GatherError(
                f"round {self._gather.opening.round}: {self.aggregate.count} good results of {wanted}{first}"
            )
        check_mandatory(self._fed, self._gather, self._results)
        return self._rescaled()

    def _fold_all(self) -> None:
        for result in self._gather if self._collected is None else self._collected:
            if not result.follows:
                self._maybe_checkpoint()
            self._results.append(result)
            self._room.moved()
            if self._take(result):
                self._record.add(result)
            self._since_checkpoint += result.size
            fault_point("job.after_fold")
            if not result.partial:
                self._maybe_checkpoint()  # behind a partial more of it may follow, and all of it is in already

    def _quiet(self) -> None:
        """No result has come for a while: it may be that uploads wait for the room that a checkpoint would give."""
        if not self._exact and self._room.stuck(self._fed.spool().waiting, time.monotonic()):
            raise JobError(
                f"round {self._gather.opening.round}: the broker's spool has no room for all of its results, and with"
                " exact=False no checkpoint can free any: use exact=True, sample fewer sites, or give it a larger quota"
            )
        if not (self._exact and self._since_checkpoint and not self._bad and self._gather.seen.state == "open"):
            return
        if self._fed.spool().waiting:
            try:
                self._checkpoint()
            except FencedError:
                raise
            except FaultError as error:  # within a partial of which more is to be told: the next wait tries again
                log.info("checkpoint_refused", round=self._gather.opening.round, reason=str(error))

    def _take(self, result: Result) -> bool:
        """Whether the result is in; what follows of a partial is where its beginning is."""
        if not result.follows:
            before = self.aggregate.count
            taken = self._add(self.aggregate, result)
            self._counts += self.aggregate.count - before
        else:
            last = self._bad[-1] if self._bad else None
            taken = last is None or last.start + len(last.items) != result.start
            if not taken:
                self._bad.append(result)
        self._tasks += len(result.items) if taken else 0
        return taken

    def _redo_bad(self) -> None:
        """The results of partials that could not be added, once more and singly; what does not come is a failure."""
        round_ = self._gather.opening.round
        if self._counts > self._tasks:  # fewer: a checkpoint covers refused results too
            # nothing says which of several partials it was; what is in the sums is not what was accepted
            raise FoldError(f"partials of round {round_} hold {self._counts} results, of {self._tasks} tasks")
        sites = sorted({item.site for result in self._bad for item in result.items})
        if not sites:
            return
        self._record.redone += len(sites)
        again = self._gather.redo(sites, self._gather.opening.fold, min_clients=1)
        try:
            for result in again:
                if self._add(self.aggregate, result):
                    self._record.add(result)
                    self._redone.append(result)
        except GatherError as error:
            log.warning("redo_failed", round=round_, sites=len(sites), reason=str(error))
        self._gather.seen.failures |= again.seen.failures

    def _refuse(self, result: Result, error: Exception) -> None:
        round_, item = self._gather.opening.round, result.items[0]
        if result.partial:
            sites = ", ".join(i.site for i in result.items[:_SHOWN])
            log.warning("partial_refused", round=round_, sites=sites, results=len(result.items), reason=str(error))
            text = f"round {round_}: a partial of {sites} and others cannot be added, and is done again singly: {error}"
            self._fed.event("partial_refused", text, site=item.site)
            self._bad.append(result)
            return
        log.warning("result_refused", round=round_, site=item.site, reason=str(error))
        refusal = Failure(item.task, item.site, "refused", str(error))
        self.refused.append(refusal)
        self._gather.seen.failures[item.task] = refusal

    def _add(self, fold: Aggregate, result: Result) -> bool:
        """Whether the result is in; a bad one is listed and leaves no trace."""
        started, began = time.monotonic(), spans.start()
        try:
            if result.partial:
                fold.merge(self._source(result))
            else:
                self._add_single(fold, result)
        except MixedError:
            raise  # which of them is found depends on the order of arrival, so they end the job
        except (FoldError, WireError, PayloadError) as error:
            self._refuse(result, error)
            return False
        finally:
            self._record.fold_s += time.monotonic() - started
            item = result.items[0]
            spans.end("fold", began, round=self._gather.opening.round, site=item.site, task=item.task)
        return True

    def _add_single(self, fold: Aggregate, result: Result) -> None:
        result = self._fed.filters.incoming(self._gather, result)
        ref = result.payload
        if ref is None:
            fold.add(result.inline or None, site=result.site, meta=result.meta)
            return
        local = self._fed.payloads.local_path(ref) if self._exact else self._fed.fetch(ref)
        if local is not None:
            fold.add(local, site=result.site, meta=result.meta)
            return
        intake = _Intake(ref.size, lambda header: fold.begin(header, site=result.site, meta=result.meta))
        try:
            self._stream(ref, intake)
        except FoldError:
            undo = intake.feeder.undo() if intake.feeder is not None and not intake.feeder.closed else None
            if undo is not None:
                self._stream(ref, _Intake(ref.size, lambda header: undo))
            raise

    def _stream(self, ref: PayloadRef, intake: _Intake) -> None:
        """The payload's bytes into the intake.

        Raises:
            LinkError: they did not come, or came damaged, which is not the site's doing: half of them are in the fold,
                and whoever takes the job next begins anew.
        """
        try:
            self._fed.link.stream(ref, intake.feed)
        except FencedError:
            raise
        except (PayloadError, FaultError) as error:
            if error is intake.wrong:
                raise
            raise LinkError(f"payload {ref.id} did not arrive: {error}") from error
        intake.finish()

    def _source(self, result: Result) -> Path | bytes:
        return result.inline if result.payload is None else self._fed.fetch(result.payload)

    def _maybe_checkpoint(self) -> None:
        """The aggregate as a payload, when much has come since the last; then what it holds may go from the spool."""
        if self._collected is not None or not self._exact:
            return  # a checkpoint stands for the first results by their numbers, and these come in another order
        if self._bad or self._since_checkpoint <= min(self._wanted_bytes or _ALWAYS_ROOM, _ALWAYS_ROOM):
            return  # a replay must find the bad ones again
        if self._since_checkpoint > (self._limit_bytes or self._find_limit()):
            self._checkpoint()

    def _find_limit(self) -> int:
        opened = self._gather.opening.payload
        model_bytes = opened.size if opened else 0
        spool = self._fed.spool()
        share = spool.quota_bytes // _QUOTA_SHARE or CHECKPOINT_BYTES
        limit = self._wanted_bytes or max(share, _MODELS_A_CHECKPOINT * model_bytes)
        if spool.quota_bytes:  # before the last of the room is taken: what comes next would have to wait
            limit = min(limit, spool.room_bytes + self._since_checkpoint - model_bytes)
        self._limit_bytes = max(1, limit)
        return self._limit_bytes

    def _checkpoint(self) -> None:
        began = spans.start()
        covered = self._results[-1].start + len(self._results[-1].items)
        buffers, size = self.aggregate.to_partial()
        ref = self._fed.payloads.partial(buffers, size)
        fault_point("job.before_checkpoint")
        self._fed.checkpoint(self._gather, ref, covered)
        spans.end("checkpoint", began, round=self._gather.opening.round)
        log.info("checkpoint", round=self._gather.opening.round, covered=covered, size=size)
        self._covered = covered
        self._since_checkpoint = 0

    def _rescaled(self) -> Aggregate:
        """Fold again as long as the scales were not good for the closed set; decided on its exact totals alone."""
        singly: list[Result] = []
        for _ in range(_MAX_REFOLDS):
            verdict = self.aggregate.check()
            if isinstance(verdict, Good):
                return self.aggregate
            self._record.refolds += 1
            refused = {failure.task for failure in self.refused}
            bad = {result.start for result in self._bad}
            good = [r for r in self._results if r.start not in bad]
            again = [r for r in good if not r.partial and r.start >= self._covered] + self._redone + singly
            lost = [r for r in good if r.partial or r.start < self._covered] if not singly else []
            fold = self.aggregate.again(verdict.plan)
            for result in again:
                if result.items[0].task not in refused:
                    self._add(fold, result)
            sites = sorted(item.site for r in lost for item in r.items if item.task not in refused)
            if sites:
                self._record.redone += len(sites)
                for result in self._gather.redo(sites, self._fed.put_blob(verdict.plan.to_bytes())):
                    self._add(fold, result)
                    singly.append(result)
            self.aggregate = fold
        raise FoldError(f"round {self._gather.opening.round}: no scale was good after {_MAX_REFOLDS} folds")


def check_mandatory(fed: Federation, gather: Gather, results: Sequence[Result]) -> None:
    """The sites that the job cannot do without have their results in; of a sample, those that were drawn.

    Raises:
        GatherError: one has not.
    """
    wanted = fed.spec.mandatory_clients
    if not wanted:
        return
    failed = {str(failure.site): failure for failure in gather.failures}
    folded = {str(item.site) for result in results for item in result.items} - failed.keys()
    drawn = bool(gather.opening.sample)
    for site in wanted:
        if site in folded or (drawn and site not in failed):
            continue
        failure = failed.get(site)
        why = f": {failure.code}\n{failure.text}" if failure is not None else ": it was not asked, or did not answer"
        raise GatherError(f"round {gather.opening.round}: mandatory client {site!r} gave no result{why}")


class _Intake:
    """A payload's chunks in order, into a feeder that begins once the header is whole."""

    def __init__(self, size: int, begin: Callable[[Any], Feeder]) -> None:
        self.feeder: Feeder | None = None
        self.wrong: FedloomError | None = None  # what is the matter with the bytes themselves
        self._size = size
        self._begin = begin
        self._head = bytearray()
        self._data_start = 0

    def feed(self, offset: int, data: memoryview) -> None:
        """A chunk at this place of the payload."""
        try:
            self._feed(offset, data)
        except FedloomError as error:
            self.wrong = error
            raise

    def _feed(self, offset: int, data: memoryview) -> None:
        if self.feeder is not None:
            self.feeder.feed(offset - self._data_start, data)
            return
        self._head += data
        if len(self._head) < 8 or len(self._head) < header_bytes_needed(self._head[:8]):
            return
        header = read_header(self._head, self._size)
        self._data_start = header.data_start
        self.feeder = self._begin(header)
        rest = memoryview(self._head)[header.data_start :]
        if len(rest):
            self.feeder.feed(0, rest)

    def finish(self) -> None:
        """All chunks were there."""
        if self.feeder is None:
            raise PayloadError(f"a payload of {self._size} bytes ends within its header")
        self.feeder.finish()
