"""The ledger beside its model: what a machine has at hand, and what is true after each of its steps."""

from __future__ import annotations

from collections import deque
from typing import Any

from fedloom.broker.ledger import Ledger, Limits
from fedloom.broker.settle import settle
from fedloom.serialization.messages import (
    CloseRule,
    Done,
    GatherId,
    JobId,
    OpenGather,
    PayloadRef,
    Site,
    TaskRef,
)
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
)
from siblings import load

ledger_model = load(__file__, "ledger_model")

JOB = JobId("job")
LIMITS = Limits(max_tasks=4, max_gathers=3, retry_s=0.5)
#: The sites that a node may serve, by the choice of its start; two of a site at once are refused by the sessions.
NODES = {"e1": ("abc", "abcd"), "e2": ("cd", "d"), "e3": ("a", "bd")}
CAPACITY = {"e1": 3, "e2": 1, "e3": 2}
#: What is asked for: sites (none: those connected) and the rest of the specification.
SHAPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("abcd", {"rule": CloseRule(4, sites_s=40.0), "partials": True}),
    ("bca", {"rule": CloseRule(2, sites_s=30.0), "partials": True, "max_attempts": 2}),
    ("abd", {"rule": CloseRule(2, None, 5.0, 30.0), "partials": True}),
    ("dcba", {"rule": CloseRule(1, 25.0, None, 60.0), "partials": True}),
    ("", {"rule": CloseRule(2, None, None, 8.0), "sample": 3, "partials": True}),
    ("", {"rule": CloseRule(1, 6.0, 0.5, 20.0), "sample": 0, "partials": True}),
    ("abcd", {"rule": CloseRule(2, 60.0, 1.0, 30.0), "sample": 2, "max_attempts": 1, "partials": True}),
    ("abcd", {"rule": CloseRule(2, None, 9.0, 30.0, 0.5)}),
    ("ab", {"rule": CloseRule(3)}),
)
#: How a Done may be wrong.
TWISTS = ("", "", "", "", "stale", "node", "gather", "unknown", "job", "missing")
NUMBER = st.integers(0, 255)


def pick(items: Any, number: int) -> Any:
    """One of these; None of none."""
    items = list(items)
    return items[number % len(items)] if items else None


class Beside(RuleBasedStateMachine):
    """A ledger, its model, and what was promised to others; the rules are in `test_ledger_machine`."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(LIMITS, seed=1)
        self.model = ledger_model.Model(JOB, LIMITS.retry_s)
        self.now = 1000.0
        self.round = 0
        #: what executors were told to do, whatever became of it since
        self.held: dict[str, list[TaskRef]] = {node: [] for node in NODES}
        self.said: deque[tuple[str, Done, bytes]] = deque(maxlen=6)
        self.here: set[str] = set()  # payloads
        #: promises: the result that was acknowledged, and the results of a closed gather
        self.stored: dict[str, tuple[str, int, int]] = {}  # task: gather, attempt, index
        self.closed: dict[str, list[Any]] = {}
        self.attempts: dict[str, int] = {}
        self.restarts = 0  # of the broker; what it does not journal may cost an attempt one more try

    # ------------------------------------------------------------ between machine and ledger

    def turn(self) -> None:
        """After each change: what the ledger drew by lot goes into the model, what it tells others is compared."""
        for tid, task in self.model.tasks().items():
            if task.backoff is not None:
                least, most = task.backoff
                task.ready_at = self.ledger.tasks[tid].ready_at
                assert least - 1e-6 <= task.ready_at <= most + 1e-6, f"a pause out of [{least}, {most}]"
                task.backoff = None
        told = {(node, ref.task, ref.attempt) for node, _, ref in self.ledger.cancels}
        assert told == self.model.cancels
        self.ledger.cancels.clear()
        self.model.cancels.clear()
        self.ledger.bad_ends.clear()

    def has(self, ref: PayloadRef) -> bool:
        """Whether the payload is in the spool."""
        return ref.id in self.here

    def land(self, ref: PayloadRef, task: str) -> None:
        """The payload has come, for this task or (none) as a partial."""
        self.here.add(ref.id)

    def used(self, done: Done, kept: list[str], unused: list[str]) -> None:
        """What became of a Done's payloads."""

    def opening(self, step: int, shape: int) -> tuple[OpenGather, str]:
        sites, fields = SHAPES[shape % len(SHAPES)]
        return OpenGather(1, JOB, 1, self.round, step % 4, "train", lease_s=10.0, **fields), sites

    def opened(self) -> list[Any]:
        return list(self.model.books.values())

    def owned(self, number: int, *, any_of: bool = False) -> tuple[str, TaskRef] | None:
        """An attempt that an executor holds; one that is current, unless ``any_of``."""
        refs = [(node, ref) for node in NODES if node in self.model.owners for ref in self.held[node]]
        if not any_of:
            refs = [(n, r) for n, r in refs if self.model.current(n, r.task, r.attempt)] or refs
        return pick(refs, number)

    def gather_of(self, tid: str) -> GatherId:
        task = self.model.tasks().get(tid)
        return task.gather if task else GatherId("g" * 32)

    def site_of(self, tid: str) -> Site:
        task = self.model.tasks().get(tid)
        return Site(task.site if task else "a")

    def send(self, node: str, done: Done, tail: bytes = b"") -> None:
        """A Done, and all that must come of it."""
        expected = self.model.done(node, done, self.has, self.now)
        out = settle(self.ledger, node, done, tail, self.has, self.now)
        assert [(ref.task, ref.attempt) for ref in out.stored] == expected.stored
        assert [(r.task, r.attempt, r.code, r.requeued) for r in out.refused] == expected.refused
        assert (sorted(out.kept), sorted(out.unused)) == (sorted(expected.kept), sorted(expected.unused))
        whole = not (out.stored and out.refused) or done.partial is None or done.gather not in self.ledger.gathers
        assert whole, "a partial is settled all or nothing"
        for ref in out.stored:
            gather = self.ledger.gathers.get(done.gather)
            if gather is not None and done.job == JOB and ref.task in gather.tasks:
                index = next(i for i, r in enumerate(gather.results) if r.task == ref.task)
                promise = (gather.id, ref.attempt, index)
                assert self.stored.setdefault(ref.task, promise) == promise, "one result a task, for ever"
        self.said.append((node, done, tail))
        self.used(done, [*out.kept], [*out.unused])
        self.turn()

    # ------------------------------------------------------------ what is true at any time

    @invariant()
    def ledger_and_model_agree(self) -> None:
        assert set(self.ledger.gathers) == set(self.model.books)
        assert set(self.ledger.tasks) == set(self.model.tasks())
        for gid, book in self.model.books.items():
            gather = self.ledger.gathers[gid]
            assert (gather.state, gather.quorum_at, gather.covered) == (book.state, book.quorum_at, book.covered)
            assert [(r.task, r.attempt, r.partial) for r in gather.results] == book.results
            assert {name: (info.first, info.count) for name, info in gather.partials.items()} == book.partials
            assert gather.left == book.left and list(gather.tasks) == list(book.tasks)
            given_up = {t.id for t in book.tasks.values() if t.status in ("failed", "dead")}
            assert {tid for tid in gather.failed if gather.tasks[tid].given_up} == given_up
            for tid, task in book.tasks.items():
                real = self.ledger.tasks[tid]
                assert real is gather.tasks[tid]
                seen = (real.status, real.attempt, real.owner, real.tries, real.killed, real.base, real.site)
                assert seen == (task.status, task.attempt, task.owner, task.tries, task.killed, task.base, task.site)
                assert real.accepted == task.accepted or task.status != "leased"
        states = {key[1]: (s.version, s.settled, s.last, s.attempt) for key, s in self.ledger.site_states.items()}
        assert states == self.model.sites

    @invariant()
    def executors_have_what_they_announced(self) -> None:
        assert set(self.ledger.owners) == set(self.model.owners)
        for node, owner in self.ledger.owners.items():
            mine = self.model.leased_by(node)
            assert owner.leased == {task.id for task in mine}
            assert owner.unaccepted == sum(not task.accepted for task in mine)
            assert (owner.parked, owner.room) == (self.model.owners[node].parked, self.model.room(node))
        served = {site: node for node, owner in self.model.owners.items() for site in owner.sites}
        assert self.ledger.node_of == served

    @invariant()
    def promises_are_kept(self) -> None:
        seen: set[tuple[Any, ...]] = set()
        for gid, gather in self.ledger.gathers.items():
            for result in gather.results:
                key = (gather.spec.round, gather.spec.step, gather.spec.redo, result.site)
                assert key not in seen, "a site is in a step's results 0 or 1 times"
                seen.add(key)
            if gather.state == "closed":
                assert self.closed.setdefault(gid, list(gather.results)) == gather.results, "its set is fixed"
                assert len(gather.results) >= gather.spec.rule.min_clients
            for task in gather.tasks.values():
                assert task.tries <= task.attempt + self.restarts, "an attempt is lost or failed once"
                assert (task.tries < gather.spec.max_attempts and task.killed < 3) or task.ended
        for tid, (gid, attempt, index) in self.stored.items():
            if gid in self.ledger.gathers:
                result = self.ledger.gathers[gid].results[index]
                assert (result.task, result.attempt) == (tid, attempt), "what was acknowledged is there"

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        due = self.model.next_at(self.now)
        assert due is None or (self.ledger.next_at is not None and self.ledger.next_at <= max(due, self.now))
        for task in self.model.tasks().values():
            node = self.model.serving(task.site)
            if task.status == "queued" and node and task.ready_at <= self.now:
                ready = task.id in self.ledger.owners[node].ready and node in self.ledger.eager
                timed = any(kind == "ready" and key == task.id for _, kind, key in self.ledger.timers)
                assert ready or timed, f"{task} waits, and nobody knows"
