"""What the ledger must do, with plain dicts and scans where it has indexes, queues and timers.

The machines in `test_ledger_machine` and `test_journal_machine` do everything twice, here and there, and compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedloom.broker.gathers import choose_sites, gather_id, task_id
from fedloom.serialization.messages import CloseRule, OpenGather, TaskRef
from siblings import load

settle_model = load(__file__, "settle_model")

ENDED = ("done", "failed", "cancelled", "dead")
KILLED_DEAD = 3


@dataclass
class Piece:
    """A task."""

    id: str
    gather: str
    site: str
    ordinal: int
    status: str = "queued"
    attempt: int = 0
    owner: str = ""
    tries: int = 0
    killed: int = 0
    base: str = ""
    counted: bool = False  # the current attempt is among the tries
    unclaimed: bool = False  # leased before the broker's restart, and its owner was not heard of since
    accepted: bool = False
    until: float = 0.0
    ready_at: float = 0.0
    backoff: tuple[float, float] | None = None  # `ready_at` was drawn by the ledger from within these

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass
class Book:
    """A gather."""

    id: str
    spec: OpenGather
    named: tuple[str, ...]
    opened_at: float
    state: str = "waiting"
    quorum_at: float | None = None
    covered: int = 0
    lost: bool = False  # the disk lost results: whoever has some must start over
    tasks: dict[str, Piece] = field(default_factory=dict[str, Piece])
    results: list[tuple[str, int, str]] = field(default_factory=list[tuple[str, int, str]])  # task, attempt, partial
    partials: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])  # first, count

    @property
    def rule(self) -> CloseRule:
        return self.spec.rule

    @property
    def live(self) -> bool:
        return self.state in ("waiting", "open")

    @property
    def left(self) -> int:
        return sum(not task.ended for task in self.tasks.values())


@dataclass
class Worker:
    """An executor that is connected."""

    sites: frozenset[str]
    capacity: int
    seen: float
    parked: int = 0


class Model(settle_model.Results):
    """The ledger of one job."""

    def __init__(self, job: str, retry_s: float) -> None:
        self.job = job
        self.retry_s = retry_s
        self.books: dict[str, Book] = {}
        self.owners: dict[str, Worker] = {}
        self.down: dict[str, float] = {}
        self.sites: dict[str, tuple[str, int, str, str]] = {}  # version, settled, last task, its attempt
        self.cancels: set[tuple[str, str, int]] = set()
        self.started_at = 0.0

    # ------------------------------------------------------------ looking things up

    def tasks(self) -> dict[str, Piece]:
        return {tid: task for book in self.books.values() for tid, task in book.tasks.items()}

    def serving(self, site: str) -> str:
        return next((node for node, owner in self.owners.items() if site in owner.sites), "")

    def leased_by(self, node: str) -> list[Piece]:
        mine = [t for t in self.tasks().values() if t.status == "leased" and t.owner == node]
        return sorted(mine, key=lambda t: (t.gather, t.ordinal))

    def room(self, node: str) -> int:
        owner = self.owners[node]
        return owner.capacity - (len(self.leased_by(node)) - owner.parked)

    def current(self, node: str, tid: str, attempt: int) -> Piece | None:
        task = self.tasks().get(tid)
        return task if task and not task.ended and (task.attempt, task.owner) == (attempt, node) else None

    def site(self, site: str) -> tuple[str, int, str, str]:
        return self.sites.get(site, ("", 0, "", ""))

    def assignable(self, node: str, now: float) -> list[Piece]:
        sites = self.owners[node].sites
        return [t for t in self.tasks().values() if t.status == "queued" and t.ready_at <= now and t.site in sites]

    # ------------------------------------------------------------ gathers

    def open(self, spec: OpenGather, sites: tuple[str, ...], now: float) -> Book:
        gid = gather_id(spec.job, spec.round, spec.step, spec.name, spec.redo)
        book = self.books[gid] = Book(gid, spec, sites, now)
        if sites:
            self._start(book, choose_sites(sites, spec.sample, spec.seed, spec.round, spec.step), now)
        else:
            self._try_start(book, now)
        return book

    def _try_start(self, book: Book, now: float) -> None:
        served = [site for owner in self.owners.values() for site in owner.sites]
        least, late = book.rule.min_clients, now >= book.opened_at + book.rule.sites_s
        if len(served) >= (least if late else max(least, book.spec.sample)):
            spec = book.spec
            self._start(book, choose_sites(served, spec.sample, spec.seed, spec.round, spec.step), now)
        elif late:
            self._finish(book, "failed")

    def _start(self, book: Book, drawn: Iterable[str], now: float) -> None:
        spec, book.state = book.spec, "open"
        drawn = list(drawn)
        order = [site for site in book.named if site in drawn] if len(drawn) == len(book.named) else drawn
        for ordinal, site in enumerate(order):
            tid = task_id(spec.job, spec.round, spec.step, spec.name, site, spec.redo)
            book.tasks[tid] = Piece(tid, book.id, site, ordinal)
            if spec.redo:
                first = self.tasks().get(task_id(spec.job, spec.round, spec.step, spec.name, site))
                book.tasks[tid].base = first.base if first else self.site(site)[0]
            if not self.serving(site):
                self.down.setdefault(site, now)
        self.check(book, now)

    def check(self, book: Book, now: float) -> None:
        if book.state != "open":
            return
        rule, got, left = book.rule, len(book.results), book.left
        enough = got >= rule.min_clients
        if got + left < rule.min_clients or left == 0:
            self._finish(book, "closed" if enough else "failed")
            return
        if enough and book.quorum_at is None:
            book.quorum_at = now
        waited = enough and now >= self._waits_until(book)
        over = rule.deadline_s is not None and now >= book.opened_at + rule.deadline_s
        if waited or over:
            self._finish(book, "closed" if enough else "failed")

    def _waits_until(self, book: Book) -> float:
        rule, quorum_at = book.rule, book.quorum_at
        if quorum_at is None:
            return math.inf
        extra_s = math.inf if rule.after_quorum_s is None else rule.after_quorum_s
        if rule.straggler_patience is not None:
            extra_s = min(extra_s, rule.straggler_patience * (quorum_at - book.opened_at))
        return quorum_at + extra_s

    def _finish(self, book: Book, state: str) -> None:
        book.state = state
        for task in book.tasks.values():
            if not task.ended:
                if task.status == "leased":
                    self.cancels.add((task.owner, task.id, task.attempt))
                self.end(task, "cancelled")

    def close(self, gid: str) -> None:
        book = self.books[gid]
        if book.live:
            self._finish(book, "closed" if len(book.results) >= book.rule.min_clients else "failed")

    def may_retry(self, tid: str) -> bool:
        task = self.tasks()[tid]
        return task.status in ("failed", "dead") and self.books[task.gather].state == "open"

    def retry(self, tid: str, now: float) -> None:
        task = self.tasks()[tid]
        task.status, task.owner, task.tries, task.killed = "queued", "", 0, 0
        task.counted, task.ready_at = False, 0.0
        if not self.serving(task.site):
            self.down[task.site] = now

    def may_checkpoint(self, gid: str, covered: int) -> bool:
        book = self.books[gid]
        inside = any(first < covered < first + count for first, count in book.partials.values())
        return book.covered <= covered <= len(book.results) and not inside

    def release(self, up_to_round: int | None) -> None:
        for gid, book in list(self.books.items()):
            if up_to_round is None or book.spec.round <= up_to_round:
                if book.live:
                    self._finish(book, "failed")
                del self.books[gid]

    def lose_results(self, gid: str, gone: set[int], now: float) -> None:
        """The disk has lost these results."""
        book = self.books[gid]
        lost = [result for index, result in enumerate(book.results) if index in gone]
        book.results = [result for index, result in enumerate(book.results) if index not in gone]
        names = [partial for _, _, partial in book.results]
        book.partials = {p: (names.index(p), names.count(p)) for p in dict.fromkeys(names) if p}
        book.state, book.quorum_at, book.lost = "open", None, True
        for tid, _, _ in lost:
            task = book.tasks[tid]
            task.status, task.owner = "queued", ""
            if not self.serving(task.site):
                self.down.setdefault(task.site, now)
        self.check(book, now)

    # ------------------------------------------------------------ executors

    def hello(self, node: str, sites: frozenset[str], capacity: int, held: list[TaskRef], now: float) -> None:
        before = self.owners.get(node)
        for site in before.sites - sites if before else ():
            self.down[site] = now
        self.owners[node] = Worker(sites, capacity, now)
        for site in sites:
            self.down.pop(site, None)
        for book in list(self.books.values()):
            if book.state == "waiting":
                self._try_start(book, now)
        kept: set[str] = set()
        for ref in held:
            task = self.tasks().get(ref.task)
            if self.current(node, ref.task, ref.attempt) is not None and task is not None:
                kept.add(task.id)
                if task.status == "queued":
                    self._lease(task, node, now)
                task.accepted = True
            elif not self._is_settled(sites, ref):
                self.cancels.add((node, ref.task, ref.attempt))
        for task in self.leased_by(node):
            if task.id not in kept:
                self.lose(task, now, counted=task.accepted and not task.unclaimed, pause=None)
            task.unclaimed = False

    def _is_settled(self, sites: frozenset[str], ref: TaskRef) -> bool:
        """Whether the attempt's result is in, be it that its gather is over: it was only not heard that it is."""
        task, name = self.tasks().get(ref.task), f"{ref.task}.{ref.attempt}"
        if task is not None:
            return task.status == "done" and task.attempt == ref.attempt
        return any(name in (self.site(site)[0], self.site(site)[3]) for site in sites)

    def gone(self, node: str, now: float, *, polite: bool) -> None:
        mine = self.leased_by(node)
        for site in self.owners.pop(node).sites:
            self.down[site] = now
        for task in mine:
            self.lose(task, now, counted=not polite, pause=None)

    def assigned(self, node: str, tid: str, now: float) -> None:
        task = self.tasks()[tid]
        spec = self.books[task.gather].spec
        task.attempt += 1
        task.counted = False
        if not spec.redo:
            task.base = self.site(task.site)[0]
        self._lease(task, node, now)
        task.accepted = False

    def accept(self, node: str, refs: Iterable[TaskRef], now: float) -> None:
        for ref in refs:
            task = self.current(node, ref.task, ref.attempt)
            if task is None:
                self.cancels.add((node, ref.task, ref.attempt))
                continue
            if task.status == "queued":
                self._lease(task, node, now)
            task.accepted = True

    def decline(self, node: str, refs: Iterable[TaskRef], pause: float, now: float) -> None:
        for ref in refs:
            task = self.current(node, ref.task, ref.attempt)
            if task is not None and task.status == "leased":
                self.lose(task, now, counted=False, pause=max(0.05, pause))

    def report(self, node: str, free: int) -> None:
        owner, mine = self.owners[node], self.leased_by(node)
        accepted = sum(task.accepted for task in mine)
        owner.parked = max(0, min(accepted, accepted - (owner.capacity - min(free, owner.capacity))))

    def fail(self, node: str, tid: str, attempt: int, retryable: bool, killed: bool, now: float) -> bool:
        task = self.current(node, tid, attempt)
        if task is None:
            return False
        task.killed += killed
        if task.killed >= KILLED_DEAD:
            self.end(task, "dead")
            self.check(self.books[task.gather], now)
        elif retryable:
            self.lose(task, now, counted=True, pause=0.0)
            if not task.ended:
                task.owner = ""  # given up by its own word: nothing of it counts a second time
        else:
            self.end(task, "failed")
            self.check(self.books[task.gather], now)
        return True

    def _lease(self, task: Piece, node: str, now: float) -> None:
        task.status, task.owner, task.unclaimed = "leased", node, False
        task.until = now + self.books[task.gather].spec.lease_s

    def _unlease(self, task: Piece) -> None:
        owner = self.owners.get(task.owner)
        if owner is not None and task.status == "leased":
            owner.parked = max(0, owner.parked - 1)

    def end(self, task: Piece, status: str) -> None:
        self._unlease(task)
        task.status = status

    def lose(self, task: Piece, now: float, *, counted: bool, pause: float | None) -> None:
        if task.ended:
            return
        book = self.books[task.gather]
        self._unlease(task)
        task.status, task.accepted = "queued", False
        if counted:
            task.tries += not task.counted
            task.counted = True
            if task.tries >= book.spec.max_attempts:
                self.end(task, "dead")
                self.check(book, now)
            elif pause == 0.0 or (pause is None and task.tries > 1):
                middle = min(60.0, self.retry_s * 2 ** min(task.tries - 1, 10))
                task.backoff = (now + middle / 2, now + middle * 1.5)
        elif pause:
            task.ready_at = now + pause

    # ------------------------------------------------------------ time

    def _events(self) -> Iterable[tuple[float, str, str]]:
        """All that time alone will do, in the ledger's order."""
        for book in self.books.values():
            rule = book.rule
            if book.state == "waiting":
                yield book.opened_at + rule.sites_s, "gather", book.id
            if book.live and rule.deadline_s is not None:
                yield book.opened_at + rule.deadline_s, "gather", book.id
            if book.live and (until := self._waits_until(book)) < math.inf:
                yield until, "gather", book.id
            for task in book.tasks.values():
                if task.ended:
                    continue
                if not self.serving(task.site):
                    yield max(self.down[task.site], book.opened_at, self.started_at) + rule.sites_s, "gone", task.id
                if task.status == "leased":
                    yield self.lease_end(task), "lease", task.id

    def lease_end(self, task: Piece) -> float:
        owner = self.owners.get(task.owner)
        if owner is None or not task.accepted:
            return task.until
        return max(task.until, owner.seen + self.books[task.gather].spec.lease_s)

    def next_at(self, now: float) -> float | None:
        backoffs = [t.ready_at for t in self.tasks().values() if t.status == "queued" and t.ready_at > now]
        return min([when for when, _, _ in self._events()] + backoffs, default=None)

    def tick(self, now: float) -> None:
        """Everything due; the ledger's clock comes by at each such time."""
        while due := min((event for event in self._events() if event[0] <= now), default=None):
            _, kind, key = due
            task = self.tasks().get(key)
            if kind == "gather":
                self._gather_due(self.books[key], now)
            elif kind == "gone" and task is not None:
                self.end(task, "dead")
                self.check(self.books[task.gather], now)
            elif task is not None:
                counted = task.accepted or task.owner not in self.owners
                self.lose(task, now, counted=counted, pause=None)

    def _gather_due(self, book: Book, now: float) -> None:
        deadline = book.rule.deadline_s
        if book.state == "open":
            self.check(book, now)
        elif deadline is not None and now >= book.opened_at + deadline:
            self._finish(book, "failed")
        else:
            self._try_start(book, now)

    def restart(self, now: float) -> None:
        """The broker starts from what it has saved: no connections, leases begin anew, backoffs are over."""
        self.owners.clear()
        self.cancels.clear()
        self.down.clear()
        self.started_at = now
        for task in self.tasks().values():
            task.until, task.ready_at, task.counted = now + self.books[task.gather].spec.lease_s, 0.0, False
            task.accepted = task.unclaimed = task.status == "leased"
            if not task.ended:
                self.down[task.site] = now
        for book in self.books.values():
            book.opened_at = min(now, book.opened_at)
            book.quorum_at = None if book.quorum_at is None else min(now, book.quorum_at)
