"""The giving side of an agent: a finished task's result goes to the broker, alone or folded together with others.

Runs in the agent's thread; folding in the one thread that folds.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from ..serialization import spans
from ..serialization.envelope import Buffer
from ..serialization.errors import MixedError
from ..serialization.messages import DoneItem, PayloadId, PayloadRef, Progress
from .channel import Map
from .deliver import Delivery
from .desk import Desk
from .outbox import Held, Key
from .prefold import Batch, Batches, Gather, Result, fold_into
from .runs import Run
from .shares import Share, Shares
from .state import version_name

log = structlog.get_logger(__name__)

#: Results that wait to be folded or sent with others are told of this often, and at most so many at a time: 100 a
#: second. Where results come faster than that a batch is full, and on its way, within a few seconds anyway.
_NEWS_S = 0.2
_NEWS_AT_ONCE = 20


class Workers(Protocol):
    """What asks worker processes for what they have folded."""

    def flush(self, id: str, gather: Gather, path: str, digest: bool) -> bool: ...


class Collector:
    """Results from the host's word until the broker's."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.delivery = Delivery(desk.link, desk.outbox, desk.submit, self._settled)
        self._batches = Batches(desk.config.partial_max_tasks, desk.config.partial_max_s)
        self._shares = Shares(desk.config.partial_max_tasks, desk.config.partial_max_s)
        self.workers: Workers | None = None
        self._news: deque[Key] = deque()  # finished, in a batch, and the broker does not know
        self._news_at = 0.0
        # until settled: site, job, version written, the version it started from
        self._asked: dict[tuple[str, str], tuple[Path, str]] = {}  # by worker and gather: where its partial is to be
        self._states: dict[Key, tuple[str, str, str, str]] = {
            held.key: (held.item.site, held.job, held.item.state, held.base) for held in desk.outbox
        }
        self._since: dict[Key, tuple[float, str]] = {}  # until settled, where a profile is taken: when it came, site

    def next_due_s(self, now: float) -> float:
        """How long until a batch is old enough to leave, or something is to be told."""
        due = min(self._batches.next_due_s(now), self._shares.next_due_s(now))
        return max(0.0, min(due, self._news_at - now) if self._news else due)

    def drop_job(self, job: str) -> None:
        """The job is over."""
        for result in (*self._batches.drop_job(job), *self._shares.drop_job(job)):
            self._forget(result)
        self.delivery.drop_job(job)

    def finished(self, run: Run, message: Map) -> None:
        """A task's result, as its host told it."""
        result = self._result(run, message)
        self._desk.leave_slot(run)
        if run.work.plan is not None and not run.work.in_workers:
            run.stage = "folding"
            self._batch(run, result)
        else:
            run.stage = "storing"
            self._send_single(result, run.incoming)

    def folded(self, run: Run, run_s: float, wrote_state: bool, meta: Map, worker: str, now: float) -> None:
        """A task's result, which its worker has folded and keeps until it is asked for it."""
        if run.key not in self._desk.runs:
            self._shares.spoil(worker, run.gather, now)
            return
        # also of an attempt that is wanted no more: it is in the sums
        result = self._described(run, None, b"", meta, wrote_state, run_s)
        self._desk.leave_slot(run)
        run.stage = "folding"
        self._shares.add(worker, run.gather, result, now)
        self._hold_news(run.key, now)

    def _result(self, run: Run, message: Map) -> Result:
        assert run.spec is not None
        told: Any = message.get("data")
        source: bytes | Path = told if isinstance(told, bytes) else Path(run.spec.result_path)
        ref = PayloadRef(
            PayloadId(f"r-{run.item.task}.{run.item.attempt}"), int(message["size"]), str(message.get("digest", ""))
        )
        run_s = float(message.get("run_s", 0.0))
        return self._described(run, ref, source, message.get("meta") or {}, bool(message.get("wrote_state")), run_s)

    def _described(
        self, run: Run, ref: PayloadRef | None, source: bytes | Path, meta: Map, wrote_state: bool, run_s: float
    ) -> Result:
        version = version_name(*run.key) if wrote_state else ""
        inline = isinstance(source, bytes)
        item = DoneItem(
            task=run.item.task,
            attempt=run.item.attempt,
            site=run.item.site,
            payload=None if inline else ref,
            inline_bytes=len(source) if inline else 0,
            meta=meta,
            state=version,
            restarted=run.restarted,
            run_s=run_s,
        )
        self._states[run.key] = (run.item.site, run.job, version, run.item.state)
        if came := spans.start():
            self._since[run.key] = (came, run.item.site)
        size, digest = (ref.size, ref.digest) if ref is not None else (0, "")
        return Result(run.job, run.work.assign.gather, item, source, size, digest, run.item.state)

    def _send_single(self, result: Result, incoming: str = "") -> None:
        data, path = (result.source, "") if isinstance(result.source, bytes) else (None, str(result.source))
        held = Held(
            result.job,
            result.gather,
            result.item,
            data=data,
            path=path,
            incoming=incoming if path else "",
            base=result.base,
        )
        key = held.key
        try:
            self.delivery.add(held)
        except OSError as error:
            if (run := self._desk.runs.get(key)) is not None:
                self._desk.fail(run, "site_disk", f"the result cannot be kept: {error}", retryable=True)
            return
        self._desk.close_run(key)

    def _batch(self, run: Run, result: Result) -> None:
        assert run.work.plan is not None
        now = time.monotonic()
        batch = self._batches.batch_for(run.gather, run.work.plan, now)
        self._hold_news(run.key, now)
        if (waiting := batch.take_in(result)) is not None:
            batch.waiting += waiting
            if not batch.busy:
                self._fold(batch)

    def _fold(self, batch: Batch) -> None:
        """Have what waits added; what comes meanwhile goes together after it."""
        waiting, batch.waiting = batch.waiting, []
        batch.busy = bool(waiting)
        if waiting:
            self._desk.fold(
                lambda: fold_into(batch, waiting),
                lambda outcomes, error: self._folded(batch, waiting, outcomes, error),
            )

    def _hold_news(self, key: Key, now: float) -> None:
        if not self._news:
            self._news_at = now + _NEWS_S
        self._news.append(key)

    def _folded(
        self,
        batch: Batch,
        results: list[Result],
        outcomes: list[tuple[Result, Exception | None]] | None,
        error: Exception | None,
    ) -> None:
        batch.folding -= len(results)
        if outcomes is None and not batch.spoiled:
            log.error("fold_failed", job=batch.gather[0], tasks=len(batch.results) + len(results), error=repr(error))
            self._batches.spoil(batch, repr(error))
        if batch.spoiled:
            batch.folding -= len(batch.waiting)
            lost = [*batch.results, *results, *batch.waiting]
            batch.results, batch.waiting = [], []
            self._give_back(lost, f"it could not be folded: {batch.spoiled}")
            return
        self._fold(batch)
        for result, wrong in outcomes or ():
            if wrong is None:
                batch.results.append(result)
                self._unlink(result)
                continue
            run = self._desk.runs.get((result.item.task, result.item.attempt))
            if isinstance(wrong, MixedError) and run is not None:
                # good by itself: which of a round's results does not go with the others depends on who came first, so
                # it goes on alone, and the controller sees all of them
                run.stage = "storing"
                self._send_single(result)
                continue
            self._discard(result)
            if run is not None:
                self._desk.fail(run, "bad_result", f"the result of {run.spec} cannot be folded: {wrong}")

    def turn(self, now: float) -> None:
        """Send what is due."""
        if self._news and now >= self._news_at:
            self._tell_news(now)
        self._close_batches(now)
        self.delivery.turn(now)

    def _tell_news(self, now: float) -> None:
        """Let the broker count results that are here and will come with others."""
        told = 0
        while self._news and told < _NEWS_AT_ONCE:
            key = self._news.popleft()
            run = self._desk.runs.get(key)
            if run is not None and run.stage == "folding":
                self._desk.link.send(Progress(run.item.task, run.item.attempt, 1.0))
                told += 1
        self._news_at = now + _NEWS_S

    def _close_batches(self, now: float) -> None:
        if not len(self._batches) and not len(self._shares):
            return
        open_ = {*self._batches.gathers(), *self._shares.gathers()}
        working = {gather for gather in open_ if self._goes_on(gather)}
        for share in self._shares.due(now, working):
            self._ask(share)
        for batch in self._batches.due(now, working):
            if batch.alone is not None:
                self._send_single(batch.alone)
            elif batch.fold is not None:
                finish, digest = batch.fold.finish, self._desk.digest
                self._desk.fold(
                    lambda finish=finish, digest=digest: finish(digest),
                    lambda made, error, batch=batch: self._partial(batch, made, error),
                )

    def _ask(self, share: Share) -> None:
        """Have a worker hand over what it has folded."""
        assert self.workers is not None
        name = f"x-{secrets.token_hex(16)}"
        local = self._desk.link.local
        path = self._desk.outbox.partial_path(name) if local is None else local.incoming_path(name)
        self._asked[share.host, share.gather[1]] = (path, name if local is not None else "")
        if not self.workers.flush(share.host, share.gather, str(path), self._desk.digest):
            log.debug("worker_not_reached", host=share.host)  # its end is on its way

    def handed_over(self, worker: str, job: str, message: Map) -> None:
        """A worker's partial, as it told it."""
        gather = (job, str(message["gather"]))
        keys = [(str(task), int(attempt)) for task, attempt in message["keys"]]
        path, incoming = self._asked.pop((worker, gather[1]), (None, ""))
        if not keys:  # nothing of what it told of is there
            self._give_back(self._shares.drop(worker, gather), "its worker has lost it")
            return
        results, whole = self._shares.take(worker, gather, keys, time.monotonic())
        wrong = str(message.get("error", "")) or ("" if whole else "it holds a result that is wanted no more")
        if wrong:
            if path is not None:
                path.unlink(missing_ok=True)
            self._give_back(results, wrong)
            return
        data: Any = message.get("data")
        ref = PayloadRef(PayloadId(str(message["id"])), int(message["size"]), str(message["digest"]))
        source: list[Buffer] | Path | None = [data] if isinstance(data, bytes) else path
        assert source is not None
        self._leave_together(gather, results, ref, source, incoming)

    def worker_lost(self, worker: str, why: str) -> None:
        """A worker is gone, and with it what it had folded."""
        for place in [place for place in self._asked if place[0] == worker]:
            self._asked.pop(place)[0].unlink(missing_ok=True)
        self._give_back(self._shares.lost(worker), why)

    def _goes_on(self, gather: tuple[str, str]) -> bool:
        """Whether more results of this gather come soon; the youngest tasks, which are asked first, know best."""
        runs = reversed(self._desk.runs.values())
        return any(run.gather == gather and run.stage in ("preparing", "waiting", "running") for run in runs)

    def _partial(self, batch: Batch, made: tuple[PayloadRef, list[Buffer]] | None, error: Exception | None) -> None:
        items = [result.item for result in batch.results]
        if made is None or error is not None:
            log.error("partial_failed", job=batch.gather[0], tasks=len(items), error=repr(error))
            self._give_back(batch.results, f"the partial could not be made: {error}")
            return
        ref, buffers = made
        self._leave_together(batch.gather, batch.results, ref, buffers)

    def _leave_together(
        self,
        gather: Gather,
        results: Sequence[Result],
        ref: PayloadRef,
        source: list[Buffer] | Path,
        incoming: str = "",
    ) -> None:
        items = [_bare(result.item) for result in results]
        self.delivery.add_partial(gather[0], gather[1], items, ref, source, incoming)
        log.debug("partial_made", job=gather[0], tasks=len(items), bytes=ref.size)
        for item in items:
            self._desk.close_run((item.task, item.attempt))

    def _settled(self, key: Key) -> None:
        """The broker has the result, or does not want it. Its site's versions stay, see `drop_old_states`."""
        self._desk.let_go(key)
        self._states.pop(key, None)
        if self._since:
            came, site = self._since.pop(key, (0.0, ""))
            spans.end("store", came, site=site, task=key[0])

    def drop_old_states(self, job: str, sites: Iterable[str]) -> None:
        """An Assign has named the current version of these sites, and its attempts are here: remove what no attempt
        starts from or writes.

        A version that was settled after the Assign was sent is an attempt's still: the answer to its Done comes behind
        the Assign. One that was settled before is the named one, or older and replaced.
        """
        states = self._desk.states
        needed: dict[str, set[str]] = {site: set() for site in states.with_any(sites, job)}
        if not needed:
            return
        for site, of_job, written, base in self._states.values():
            if of_job == job and site in needed:
                needed[site] |= {written, base}
        for run in self._desk.runs.values():  # its own may be written, and not told of yet
            if run.job == job and run.item.site in needed:
                needed[run.item.site] |= {run.item.state, version_name(*run.key)}
        for site, versions in needed.items():
            states.keep_only(site, job, versions)

    def _give_back(self, results: list[Result], reason: str) -> None:
        """These are lost without their code's fault: they are to be done again, but not for ever."""
        for result in results:
            run = self._desk.runs.get((result.item.task, result.item.attempt))
            if run is not None and run.job not in self._desk.ended_jobs:
                self._desk.fail(run, "site_error", f"the result of {run.spec} is lost: {reason}", retryable=True)
            self._forget(result)

    def _forget(self, result: Result) -> None:
        self._discard(result)
        self._desk.close_run((result.item.task, result.item.attempt))
        self._desk.let_go((result.item.task, result.item.attempt))

    def _discard(self, result: Result) -> None:
        self._unlink(result)
        self._states.pop((result.item.task, result.item.attempt), None)
        self._since.pop((result.item.task, result.item.attempt), None)
        if result.item.state:
            self._desk.states.discard(result.item.site, result.job, result.item.state)

    @staticmethod
    def _unlink(result: Result) -> None:
        if isinstance(result.source, Path):
            result.source.unlink(missing_ok=True)


def _bare(item: DoneItem) -> DoneItem:
    """As it is told of with others: the payload is theirs together."""
    return replace(item, payload=None, inline_bytes=0) if item.payload is not None or item.inline_bytes else item
