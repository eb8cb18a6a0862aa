"""The ledger beside a model of it: everything that gathers, executors, results and time can do, in random order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fedloom.broker.gathers import gather_id
from fedloom.broker.ledger import Ledger
from fedloom.broker.settle import settle
from fedloom.serialization.errors import CodecError, FaultError, NondeterministicError
from fedloom.serialization.messages import (
    CloseRule,
    Done,
    DoneItem,
    Fail,
    JobId,
    OpenGather,
    PayloadId,
    PayloadRef,
    TaskId,
    TaskRef,
)
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from lengths import AS_FOUND, long, short
from siblings import load

machine = load(__file__, "ledger_machine")

JOB, LIMITS, SHAPES, NODES, CAPACITY = machine.JOB, machine.LIMITS, machine.SHAPES, machine.NODES, machine.CAPACITY
NUMBER, TWISTS, pick = machine.NUMBER, machine.TWISTS, machine.pick
SHORT, LONG = short(200, 60, phases=AS_FOUND), long(2500, 80, report_multiple_bugs=False)


class LedgerMachine(machine.Beside):
    """Some gathers of one job at a time."""

    @initialize(shape=st.integers(0, len(SHAPES) - 1), sites=st.integers(0, 1))
    def begin(self, shape: int, sites: int) -> None:
        """Histories in which nobody is there for long show little."""
        self.hello("e1", sites, "a", False)
        self.open(0, shape, 0)
        self.assign(0, 3, True)

    def busy(self, number: int) -> tuple[str, TaskRef] | None:
        """As `owned`; if nobody works on anything, somebody is given work first."""
        owned = self.owned(number)
        if owned is None or self.model.current(owned[0], owned[1].task, owned[1].attempt) is None:
            self.assign(number, 4, True)
            owned = self.owned(number)
        return owned

    # ------------------------------------------------------------ gathers

    @rule(step=st.integers(0, 3), shape=st.integers(0, len(SHAPES) - 1), redo=st.integers(0, 5))
    def open(self, step: int, shape: int, redo: int) -> None:
        spec, sites = self.opening(step, shape)
        first = self.model.books.get(gather_id(JOB, self.round, step, "train"))
        if redo == 5 and first is not None and first.named:
            spec, sites = replace(spec, redo=1), "".join(first.named)[:2]
        gid = gather_id(JOB, spec.round, spec.step, spec.name, spec.redo)
        known = self.model.books.get(gid)
        if known is not None:
            same = (known.spec, known.named) == (spec, tuple(sites))
            self.again(spec, tuple(sites), same=same)
        elif len(self.model.books) >= LIMITS.max_gathers:
            with pytest.raises(FaultError, match="max_gathers"):
                self.ledger.open(spec, sites, self.now)
        else:
            self.model.open(spec, tuple(sites), self.now)
            self.ledger.open(spec, sites, self.now)
            self.turn()

    def again(self, spec: OpenGather, sites: tuple[str, ...], *, same: bool) -> None:
        if same:
            self.model.books[gather_id(JOB, spec.round, spec.step, spec.name, spec.redo)].lost = False
            gather = self.ledger.open(replace(spec, ref=9, claim=7), sites, self.now)
            assert gather.id in self.model.books, "the recorded gather is the answer"
        else:
            with pytest.raises(NondeterministicError):
                self.ledger.open(spec, sites, self.now)
        self.turn()

    @precondition(lambda self: self.model.books)
    @rule(n=NUMBER, have=st.integers(0, 5), other=st.booleans())
    def open_again(self, n: int, have: int, other: bool) -> None:
        """The next process of the job asks for the same, or says that it has folded so many results already."""
        book = pick(self.opened(), n)
        if other:
            self.again(replace(book.spec, seed=99), book.named, same=False)
        elif have > len(book.results) or 0 < have < book.covered or (have and book.lost):
            with pytest.raises(FaultError, match="start"):
                self.ledger.open(replace(book.spec, have=have), book.named, self.now)
        else:
            self.again(replace(book.spec, have=have), book.named, same=True)

    @precondition(lambda self: self.model.books)
    @rule(n=NUMBER, chance=st.integers(0, 3))
    def close(self, n: int, chance: int) -> None:
        if chance == 0:
            gid = pick(self.opened(), n).id
            self.model.close(gid)
            assert self.ledger.close(gid) is self.ledger.gathers[gid]
            self.turn()

    @precondition(lambda self: any(book.results for book in self.model.books.values()))
    @rule(n=NUMBER, covered=st.integers(0, 5))
    def checkpoint(self, n: int, covered: int) -> None:
        book = pick([book for book in self.opened() if book.results], n)
        payload = PayloadRef(PayloadId(f"c-{len(self.here)}"), 9)
        if self.model.may_checkpoint(book.id, covered):
            self.ledger.set_checkpoint(book.id, payload, covered)
            book.covered = covered
        else:
            with pytest.raises(FaultError, match="covers"):
                self.ledger.set_checkpoint(book.id, payload, covered)
        self.turn()

    @rule(chance=st.integers(0, 5))
    def commit(self, chance: int) -> None:
        """A round is committed, with whatever still runs of it; the next one begins. Or the job ends."""
        if chance in (1, 2) and any(not book.live for book in self.opened()):
            self.model.release(self.round)
            self.ledger.release(JOB, self.round)
            self.round += 1
        elif chance == 0 and len(self.model.sites) > 2:
            self.model.release(None)
            self.model.sites.clear()
            self.ledger.forget_job(JOB)
            self.round += 1
        self.turn()

    # ------------------------------------------------------------ executors

    @rule(
        node=st.sampled_from(sorted(NODES)), sites=st.integers(0, 1), held=st.sampled_from("anns"), forged=st.booleans()
    )
    def hello(self, node: str, sites: int, held: str, forged: bool) -> None:
        """An executor comes, returns, or is another boot of its name: it holds all, none or some of its attempts."""
        names = frozenset(NODES[node][sites])
        for rival in [r for r, owner in self.model.owners.items() if r != node and owner.sites & names]:
            self.leave(rival, False)
        refs = {"a": self.held[node], "n": [], "s": self.held[node][::2]}[held]
        if held == "n":
            self.held[node] = []
        refs = [*refs, TaskRef(TaskId("f" * 32), 1)] if forged else list(refs)
        self.model.hello(node, names, CAPACITY[node], refs, self.now)
        self.ledger.owner_up(node, sorted(names), CAPACITY[node], self.now)
        self.ledger.adopt(node, refs, self.now)
        self.turn()

    @rule(node=st.sampled_from(sorted(NODES)), polite=st.booleans())
    def leave(self, node: str, polite: bool) -> None:
        if node in self.model.owners:
            self.model.gone(node, self.now, polite=polite)
            self.ledger.owner_gone(node, self.now, polite=polite)
            self.turn()

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, most=st.integers(1, 4), accept=st.sampled_from([True, True, False]))
    def assign(self, n: int, most: int, accept: bool) -> None:
        node = pick(self.model.owners, n)
        able, room = {t.id for t in self.model.assignable(node, self.now)}, self.model.room(node)
        given = self.ledger.assign(node, most, self.now)
        assert {t.id for t in given} <= able, "only what is queued, at rest and of its own sites"
        assert len(given) == max(0, min(most, room, len(able))), (
            "as many as it has room for, and nothing waits beside it"
        )
        for task in given:
            self.model.assigned(node, task.id, self.now)
            assert task.attempt == self.attempts.get(task.id, 0) + 1, "each attempt is given out once"
            self.attempts[task.id] = task.attempt
            self.held[node] = [*self.held[node][-11:], task.ref]
        if accept:
            refs = [task.ref for task in given]
            self.model.accept(node, refs, self.now)
            self.ledger.accept(node, refs, self.now)
        self.turn()

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, stale=st.integers(0, 3))
    def accept(self, n: int, stale: int) -> None:
        owned = self.owned(n, any_of=stale == 0)
        if owned is not None:
            self.model.accept(owned[0], [owned[1]], self.now)
            self.ledger.accept(owned[0], [owned[1]], self.now)
            self.turn()

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, pause=st.sampled_from([0.0, 2.0, 15.0]))
    def decline(self, n: int, pause: float) -> None:
        owned = self.owned(n)
        if owned is not None:
            self.model.decline(owned[0], [owned[1]], pause, self.now)
            self.ledger.decline(owned[0], [owned[1]], pause, self.now)
            self.turn()

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, free=st.integers(0, 4))
    def report(self, n: int, free: int) -> None:
        """A ping with the free slots, which renews the leases as all traffic does."""
        node = pick(self.model.owners, n)
        self.model.owners[node].seen = self.now
        self.model.report(node, free)
        self.ledger.renew(node, self.now)
        self.ledger.owners[node].report(free)

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, retryable=st.booleans(), killed=st.booleans(), stale=st.booleans())
    def fail(self, n: int, retryable: bool, killed: bool, stale: bool) -> None:
        owned = self.owned(n, any_of=True) if stale else self.busy(n)
        if owned is not None:
            node, ref = owned
            message = Fail(ref.task, ref.attempt, "bad", "", retryable or killed, killed)
            expected = self.model.fail(node, ref.task, ref.attempt, retryable or killed, killed, self.now)
            assert self.ledger.fail(node, message, self.now) == expected
            self.turn()

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, chance=st.integers(0, 5))
    def retry(self, n: int, chance: int) -> None:
        """An operator has mended what a task was given up for; or takes one for such that is not."""
        if not any(map(self.model.may_retry, self.model.tasks())):
            self.fail(n, False, False, False)
        tasks = self.model.tasks()
        tid = pick([tid for tid in tasks if self.model.may_retry(tid)] if chance else tasks, n)
        if tid is not None and self.model.may_retry(tid):
            self.model.retry(tid, self.now)
            self.ledger.retry(TaskId(tid), self.now)
        elif tid is not None:
            with pytest.raises(FaultError, match=r"closed|only what was given up"):
                self.ledger.retry(TaskId(tid), self.now)
        self.turn()

    # ------------------------------------------------------------ results

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, form=st.sampled_from(["bare", "state", "inline", "payload"]), twist=st.sampled_from(TWISTS))
    def done(self, n: int, form: str, twist: str) -> None:
        owned = self.busy(n)
        if owned is None:
            return
        node, ref = owned
        gather, job = self.gather_of(ref.task), JOB
        item = DoneItem(ref.task, ref.attempt, self.site_of(ref.task))
        if form == "state":
            item = replace(item, state=f"{ref.task}.{ref.attempt}")
        if form == "payload" or twist == "missing":
            item = replace(item, payload=PayloadRef(PayloadId(f"r-{ref.task}.{ref.attempt}"), 9))
        if form == "payload" and twist != "missing":
            assert item.payload is not None
            self.land(item.payload, ref.task)
        tail = b"abc" if form == "inline" and twist != "missing" else b""
        match twist:
            case "stale":
                item = replace(item, attempt=max(1, item.attempt - 1) if n % 2 else item.attempt + 1)
            case "node":
                node = pick([other for other in self.model.owners if other != node] or [node], n)
            case "gather":
                gather = pick([book.id for book in self.opened() if book.id != gather], n) or gather
            case "unknown":
                item = replace(item, task=TaskId("0" * 32))
            case "job":
                job = JobId("another")
        self.send(node, Done(job, gather, (replace(item, inline_bytes=len(tail)),)), tail)

    @precondition(lambda self: self.model.owners)
    @rule(
        n=NUMBER,
        several=st.sampled_from([False, False, True]),
        twist=st.sampled_from(["", "", "stale", "mixed", "missing", "twice"]),
    )
    def partial(self, n: int, several: bool, twist: str) -> None:
        """What an executor holds of a gather, as one result; or (several) as single results of one Done."""
        owned = self.busy(n)
        if owned is None:
            return
        node, first = owned
        gather = self.gather_of(first.task)
        newest = {
            r.task: r for r in sorted(self.held[node], key=lambda r: r.attempt) if self.gather_of(r.task) == gather
        }
        if twist != "stale":  # else with tasks that were given on or settled since
            newest = {t: r for t, r in newest.items() if self.model.current(node, t, r.attempt)} or newest
        if twist == "mixed":  # most are good, but one is somebody else's, settled, stale, of another gather or of none
            others = [t for t in self.ledger.tasks.values() if not self.model.current(node, t.id, t.attempt)]
            others.sort(key=lambda t: t.gather != gather)
            task = pick(others[:3], n)
            ref = TaskRef(TaskId("0" * 32), 1) if task is None else TaskRef(task.id, max(1, task.attempt))
            newest[ref.task] = ref
        items = tuple(
            DoneItem(r.task, r.attempt, self.site_of(r.task), state=f"{r.task}.{r.attempt}") for r in newest.values()
        )
        payload = PayloadRef(PayloadId(f"p-{min(newest, default='')}.{n}"), 10)
        if twist == "twice":
            with pytest.raises(CodecError, match="twice"):
                settle(self.ledger, node, Done(JOB, gather, items + items[:1]), b"", self.has, self.now)
            return
        if twist != "missing" and not several:
            self.land(payload, "")
        self.send(node, Done(JOB, gather, items, None if several else payload))

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER, lost=st.booleans())
    def good_partial(self, n: int, lost: bool) -> None:
        """Rules are drawn evenly: what matters most has three."""
        self.partial(n, False, "missing" if lost else "")

    @precondition(lambda self: self.model.owners)
    @rule(n=NUMBER)
    def bad_partial(self, n: int) -> None:
        self.partial(n, False, "mixed")

    @precondition(lambda self: self.said)
    @rule(n=NUMBER, other=st.booleans())
    def say_again(self, n: int, other: bool) -> None:
        """A Done comes a second time, from its sender or from somebody else."""
        node, done, tail = pick(self.said, n)
        self.send(pick(self.model.owners, n) or node if other else node, done, tail)

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 4.0, 11.0, 35.0]), alive=st.booleans())
    def wait(self, seconds: float, alive: bool) -> None:
        """Time passes, and the ledger is woken when it asked for it; the executors' traffic goes on, or not."""
        end = self.now + seconds
        for _ in range(1000):
            dues = [due for due in (self.ledger.next_at, self.model.next_at(self.now), end) if due is not None]
            self.now = max(self.now, min(dues))
            if alive:
                for node, owner in self.model.owners.items():
                    owner.seen = self.now
                    self.ledger.renew(node, self.now)
            self.ledger.tick(self.now)
            self.model.tick(self.now)
            self.turn()
            if self.now >= end:
                return
        raise AssertionError("the ledger's timers do not end")


def test_the_ledger_is_what_its_model_is() -> None:
    run_state_machine_as_test(LedgerMachine, settings=SHORT)


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_the_ledger_is_what_its_model_is_for_long() -> None:
    run_state_machine_as_test(LedgerMachine, settings=LONG)


# ---------------------------------------------------------------- what the machines have found


def one_task(**fields: Any) -> tuple[Ledger, Any]:
    """A ledger with a task that its executor works on."""
    ledger = Ledger(LIMITS, seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    ledger.open(OpenGather(1, JOB, 1, 0, 0, "train", CloseRule(sites_s=1e6), lease_s=10.0, **fields), ["a"], 0.0)
    (task,) = ledger.assign("e", 1, 0.0)
    ledger.accept("e", [task.ref], 0.0)
    return ledger, task


def test_an_attempt_whose_executor_is_cut_off_again_and_again_is_one_try() -> None:
    ledger, task = one_task(max_attempts=3)
    for n in range(1, 10):
        ledger.owner_gone("e", 100.0 * n)
        ledger.owner_up("e", ["a"], 1, 100.0 * n + 1)
        ledger.adopt("e", [task.ref], 100.0 * n + 1)
        assert (task.status, task.attempt, task.tries) == ("leased", 1, 1), "it goes on with its work"


def test_a_failure_that_is_told_twice_counts_once() -> None:
    ledger, task = one_task(max_attempts=3)
    fail = Fail(task.id, 1, "oom", retryable=True, killed=True)
    assert [ledger.fail("e", fail, 1.0) for _ in range(4)] == [True, False, False, False]
    assert (task.status, task.tries, task.killed) == ("queued", 1, 1)


def test_a_result_is_known_by_its_state_when_the_site_has_settled_others_since() -> None:
    ledger, task = one_task()
    version = f"{task.id}.1"
    done = Done(JOB, task.gather, (DoneItem(task.id, 1, task.site, state=version),))
    settle(ledger, "e", done, b"", lambda ref: True, 1.0)
    second = ledger.open(OpenGather(1, JOB, 1, 0, 1, "validate", CloseRule()), ["a"], 1.0)
    (other,) = ledger.assign("e", 1, 1.0)
    settle(ledger, "e", Done(JOB, second.id, (DoneItem(other.id, 1, other.site),)), b"", lambda ref: True, 1.0)
    ledger.release(JOB, 0)
    assert ledger.site_state(JOB, task.site).version == version
    again = settle(ledger, "e", done, b"", lambda ref: True, 2.0)
    assert again.stored == [TaskRef(task.id, 1)], "refused, it would take the site's current version with it"
