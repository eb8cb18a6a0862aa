"""What the ledger must answer to results; the half of `ledger_model` that knows what a Done is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedloom.broker.gathers import task_id
from fedloom.serialization.messages import Done


@dataclass
class Answer:
    """What a Done is answered, and what becomes of its payloads."""

    stored: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    refused: list[tuple[str, int, str, bool]] = field(default_factory=list[tuple[str, int, str, bool]])
    kept: list[str] = field(default_factory=list[str])
    unused: list[str] = field(default_factory=list[str])


class Results:
    """Results into the model: one a task, from the current attempt alone, partials all or nothing."""

    job: str
    books: dict[str, Any]
    sites: dict[str, tuple[str, int, str, str]]
    tasks: Callable[[], dict[str, Any]]
    site: Callable[[str], tuple[str, int, str, str]]
    current: Callable[[str, str, int], Any]
    check: Callable[[Any, float], None]
    end: Callable[[Any, str], None]
    lose: Callable[..., None]

    def done(self, node: str, done: Done, has: Callable[[Any], bool], now: float) -> Answer:
        out, book = Answer(), self.books.get(done.gather)
        if book is None or done.job != self.job:
            for item in done.items:
                version, _, _, attempt = self.site(item.site) if done.job == self.job else ("", 0, "", "")
                if f"{item.task}.{item.attempt}" in (version, attempt):
                    out.stored.append((item.task, item.attempt))
                else:
                    out.refused.append((item.task, item.attempt, "closed", False))
                    out.unused += [item.payload.id] if item.payload else []
            out.unused += [done.partial.id] if done.partial and out.refused else []
        elif done.partial is not None:
            self._partial(book, node, done, has, now, out)
        else:
            for item in done.items:
                self._single(book, node, item, has, now, out)
        if book is not None:
            self.check(book, now)
        return out

    def _problem(self, book: Any, node: str, item: Any) -> str:
        task = self.tasks().get(item.task)
        if task is None or task.gather != book.id:
            return "unknown"
        if task.status == "done":
            return "late"
        if not book.live:
            return "closed"
        if task.ended:
            return "late"
        return "" if (task.attempt, task.owner) == (item.attempt, node) else "stale"

    def _single(self, book: Any, node: str, item: Any, has: Callable[[Any], bool], now: float, out: Answer) -> None:
        task, key = self.tasks().get(item.task), (item.task, item.attempt)
        if task is not None and task.status == "done" and (task.attempt, task.owner) == (item.attempt, node):
            out.stored.append(key)
            return
        code = self._problem(book, node, item)
        requeued = not code and item.payload is not None and not has(item.payload)
        if requeued and task is not None:
            code = "lost_payload"
            self.lose(task, now, counted=True, pause=None)
        if code or task is None:
            out.refused.append((*key, code, requeued))
            out.unused += [item.payload.id] if item.payload else []
            return
        self._settle(book, task, item, "")
        out.stored.append(key)
        out.kept += [item.payload.id] if item.payload else []

    def _partial(self, book: Any, node: str, done: Done, has: Callable[[Any], bool], now: float, out: Answer) -> None:
        partial, keys = done.partial, [(item.task, item.attempt) for item in done.items]
        assert partial is not None
        known = book.partials.get(partial.id)
        if known is not None and {r[:2] for r in book.results[known[0] : sum(known)]} == set(keys):
            out.stored += keys
            return
        codes = [self._problem(book, node, item) for item in done.items]
        refused = "conflict" if known or not book.spec.partials or not keys or any(codes) else ""
        if not refused and not done.partial_inline_bytes and not has(partial):
            refused = "lost_payload"
        if refused:
            for (tid, attempt), code in zip(keys, codes, strict=True):
                task = self.current(node, tid, attempt)
                if task is not None:
                    self.lose(task, now, counted=True, pause=None)
                out.refused.append((tid, attempt, code or refused, task is not None and not code))
            out.unused += [] if known else [partial.id]
            return
        book.partials[partial.id] = (len(book.results), len(keys))
        for item in done.items:
            self._settle(book, book.tasks[item.task], item, partial.id)
        out.stored += keys
        out.kept += [] if done.partial_inline_bytes else [partial.id]

    def _settle(self, book: Any, task: Any, item: Any, partial: str) -> None:
        book.results.append((task.id, item.attempt, partial))
        version, settled, last, _ = self.site(task.site)
        spec = book.spec
        first = task_id(spec.job, spec.round, spec.step, spec.name, task.site)
        behind = bool(spec.redo) and last not in ("", first)  # a redo after which the site has gone on
        moves = bool(item.state) and not behind
        last = last if spec.redo and not moves else first
        self.sites[task.site] = (item.state if moves else version, settled + 1, last, f"{task.id}.{item.attempt}")
        self.end(task, "done")
