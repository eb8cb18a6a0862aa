"""The giving side of an agent: a finished task's result goes to the broker, alone or folded together with others.

Runs in the agent's thread; folding in the one thread that folds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from ..serialization.envelope import Buffer
from ..serialization.errors import MixedError
from ..serialization.messages import DoneItem, PayloadId, PayloadRef, Progress
from .channel import Map
from .deliver import Delivery
from .desk import Desk
from .outbox import Held, Key
from .prefold import Batch, Batches, Result, fold_into
from .runs import Run
from .state import version_name

log = structlog.get_logger(__name__)

#: Results that wait to be folded or sent with others are told of this often, and at most so many at a time: 100 a
#: second. Where results come faster than that a batch is full, and on its way, within a few seconds anyway.
_NEWS_S = 0.2
_NEWS_AT_ONCE = 20


class Collector:
    """Results from the host's word until the broker's."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.delivery = Delivery(desk.link, desk.outbox, desk.submit, self._settled)
        self._batches = Batches(desk.config.partial_max_tasks, desk.config.partial_max_s)
        self._news: deque[Key] = deque()  # finished, in a batch, and the broker does not know
        self._news_at = 0.0
        # until settled: site, job, version written, the version it started from
        self._states: dict[Key, tuple[str, str, str, str]] = {
            held.key: (held.item.site, held.job, held.item.state, held.base) for held in desk.outbox
        }

    def next_due_s(self, now: float) -> float:
        """How long until a batch is old enough to leave, or something is to be told."""
        due = self._batches.next_due_s(now)
        return max(0.0, min(due, self._news_at - now) if self._news else due)

    def drop_job(self, job: str) -> None:
        """The job is over."""
        for result in self._batches.drop_job(job):
            self._forget(result)
        self.delivery.drop_job(job)

    def finished(self, run: Run, message: Map) -> None:
        """A task's result, as its host told it."""
        spec = run.spec
        assert spec is not None
        told: Any = message.get("data")
        data: bytes | None = told if isinstance(told, bytes) else None
        size, digest = int(message["size"]), str(message.get("digest", ""))
        version = version_name(*run.key) if message.get("wrote_state") else ""
        payload = (
            None if data is not None else PayloadRef(PayloadId(f"r-{run.item.task}.{run.item.attempt}"), size, digest)
        )
        item = DoneItem(
            task=run.item.task,
            attempt=run.item.attempt,
            site=run.item.site,
            payload=payload,
            inline_bytes=0 if data is None else len(data),
            meta=message.get("meta") or {},
            state=version,
            restarted=run.restarted,
            run_s=float(message.get("run_s", 0.0)),
        )
        self._states[run.key] = (run.item.site, run.job, version, run.item.state)
        result = Result(
            run.job,
            run.work.assign.gather,
            item,
            Path(spec.result_path) if data is None else data,
            size,
            digest,
            run.item.state,
        )
        self._desk.leave_slot(run)
        if run.work.plan is not None:
            run.stage = "folding"
            self._batch(run, result)
        else:
            run.stage = "storing"
            self._send_single(result, run.incoming)

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
        if not self._news:
            self._news_at = now + _NEWS_S
        self._news.append(run.key)
        if (waiting := batch.take_in(result)) is not None:
            self._desk.fold(
                lambda: fold_into(batch, waiting),
                lambda outcomes, error: self._folded(batch, waiting, outcomes, error),
            )

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
            self._give_back([*batch.results, *results], f"it could not be folded: {batch.spoiled}")
            batch.results.clear()
            return
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
        if not len(self._batches):
            return
        working = {gather for gather in self._batches.gathers() if self._goes_on(gather)}
        for batch in self._batches.due(now, working):
            if batch.alone is not None:
                self._send_single(batch.alone)
            elif batch.fold is not None:
                finish, digest = batch.fold.finish, self._desk.digest
                self._desk.fold(
                    lambda finish=finish, digest=digest: finish(digest),
                    lambda made, error, batch=batch: self._partial(batch, made, error),
                )

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
        bare = [replace(item, payload=None, inline_bytes=0) for item in items]
        self.delivery.add_partial(batch.gather[0], batch.gather[1], bare, ref, buffers)
        log.debug("partial_made", job=batch.gather[0], tasks=len(items), bytes=ref.size)
        for item in items:
            self._desk.close_run((item.task, item.attempt))

    def _settled(self, key: Key) -> None:
        """The broker has the result, or does not want it. Its site's versions stay, see `drop_old_states`."""
        self._desk.let_go(key)
        self._states.pop(key, None)

    def drop_old_states(self, job: str, sites: Iterable[str]) -> None:
        """An Assign has named the current version of these sites, and its attempts are here: remove what no attempt
        starts from or writes.

        A version that was settled after the Assign was sent is an attempt's still: the answer to its Done comes behind
        the Assign. One that was settled before is the named one, or older and replaced.
        """
        states = self._desk.states
        needed: dict[str, set[str]] = {site: set() for site in sites if states.has_any(site, job)}
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
        if result.item.state:
            self._desk.states.discard(result.item.site, result.job, result.item.state)

    @staticmethod
    def _unlink(result: Result) -> None:
        if isinstance(result.source, Path):
            result.source.unlink(missing_ok=True)
