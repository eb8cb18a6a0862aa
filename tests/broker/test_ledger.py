"""The task machine alone: sampling, leases, backoff, and random histories against invariants and the journal."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.gathers import choose_sites, gather_id, spec_digest, task_id
from fedloom.broker.jobs import Jobs
from fedloom.broker.journal import Journal
from fedloom.broker.ledger import Ledger, Limits
from fedloom.broker.payloads import PayloadTable
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
    Site,
    TaskRef,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

JOB = JobId("job")


def spec(**fields: Any) -> OpenGather:
    values: dict[str, Any] = {"ref": 1, "job": JOB, "claim": 1, "round": 0, "step": 0, "name": "train"}
    rule_fields = {k: fields.pop(k) for k in ("min_clients", "deadline_s", "after_quorum_s", "sites_s") if k in fields}
    return OpenGather(**(values | {"rule": CloseRule(**rule_fields)} | fields))


def opened(ledger: Ledger, sites: list[str], now: float = 0.0, **fields: Any) -> Any:
    return ledger.open(spec(**fields), sites, now)


def done_of(gather: Any, task: Any, data: bytes = b"") -> Done:
    return Done(JOB, gather.id, (DoneItem(task.id, task.attempt, task.site, inline_bytes=len(data)),))


# ---------------------------------------------------------------- ids and sampling


def test_ids_depend_on_every_part_of_the_key() -> None:
    base = ("job", 1, 2, "train", "site-1", 0)
    others = [("j", 1, 2, "train", "site-1", 0), ("job", 2, 1, "train", "site-1", 0), ("job", 1, 2, "t", "site-1", 0)]
    others += [
        ("job", 1, 2, "train", "site-2", 0),
        ("job", 1, 2, "train", "site-1", 1),
        ("job1", "", 2, "train", "site-1", 0),
    ]
    ids = {task_id(*o) for o in [base, *others]}  # pyright: ignore[reportArgumentType]
    assert len(ids) == len(others) + 1 and all(len(i) == 32 for i in ids)
    assert task_id(*base) == task_id(*base)
    assert gather_id("job", 1, 2, "train") != gather_id("job", 1, 2, "train", 1)


def test_sampling_depends_on_seed_round_and_step_only() -> None:
    sites = [f"site-{i}" for i in range(100)]
    drawn = choose_sites(sites, 10, seed=7, round_=3, step=0)
    assert len(set(drawn)) == 10 and set(drawn) <= set(sites)
    assert choose_sites(reversed(sites), 10, seed=7, round_=3, step=0) == drawn
    assert choose_sites(sites, 10, seed=7, round_=4, step=0) != drawn
    assert choose_sites(sites, 10, seed=8, round_=3, step=0) != drawn
    assert choose_sites(sites, 10, seed=7, round_=3, step=1) != drawn
    assert choose_sites(sites, 0, 7, 3, 0) == choose_sites(sites, 200, 7, 3, 0) == sorted(sites)


def test_sampling_is_even() -> None:
    sites = [f"site-{i}" for i in range(20)]
    counts = dict.fromkeys(sites, 0)
    for round_ in range(2000):
        for site in choose_sites(sites, 5, 1, round_, 0):
            counts[site] += 1
    assert all(400 < n < 600 for n in counts.values()), "500 expected, six standard deviations are 116"


def test_specification_digest_ignores_what_a_reconnect_changes() -> None:
    one = spec_digest(spec(ref=1, claim=1, have=0), ["a"])
    assert spec_digest(spec(ref=9, claim=4, have=3), ["a"]) == one
    for other in (spec(seed=1), spec(min_clients=2), spec(config={"a": 1}), spec(partials=True), spec(sample=1)):
        assert spec_digest(other, ["a"]) != one
    assert spec_digest(spec(), ["b"]) != one


# ---------------------------------------------------------------- leases


def test_tasks_go_out_in_the_order_of_the_sites_within_the_room() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("pool", ["c", "a", "b"], 2, 0.0)
    opened(ledger, ["b", "c", "a"], min_clients=1)
    first = ledger.assign("pool", 10, 0.0)
    assert [t.site for t in first] == ["b", "c"]
    assert not ledger.assign("pool", 10, 0.0)


def test_backoff_grows_and_is_jittered() -> None:
    ledger = Ledger(Limits(retry_s=1.0), seed=3)
    ledger.owner_up("e", ["a"], 1, 0.0)
    gather = opened(ledger, ["a"], max_attempts=6, sites_s=1e6)
    now, pauses = 0.0, []
    for attempt in range(1, 6):
        (task,) = ledger.assign("e", 1, now)
        assert task.attempt == attempt
        ledger.accept("e", [task.ref], now)
        ledger.fail("e", Fail(task.id, attempt, "oom", retryable=True), now)
        pauses.append(task.ready_at - now)
        ledger.tick(now + pauses[-1] * 0.99)
        assert not ledger.assign("e", 1, now + pauses[-1] * 0.99)
        now += pauses[-1] + 0.001
        ledger.tick(now)
    assert all(0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(pauses))
    (task,) = ledger.assign("e", 1, now)
    ledger.fail("e", Fail(task.id, 6, "oom", "the last words", retryable=True), now)
    assert task.status == "dead" and task.code == "max_attempts" and gather.state == "failed"


def test_a_lease_that_has_ended_but_was_not_given_on_may_still_settle() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    gather = opened(ledger, ["a"], lease_s=10.0, sites_s=1e6)
    (task,) = ledger.assign("e", 1, 0.0)
    ledger.accept("e", [task.ref], 0.0)
    ledger.owner_gone("e", 50.0)
    assert task.status == "queued"
    out = settle(ledger, "e", done_of(gather, task), b"", lambda ref: True, 60.0)
    assert out.stored == [task.ref] and gather.state == "closed"


def test_an_owner_that_falls_silent_loses_its_leases() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    opened(ledger, ["a"], lease_s=10.0, sites_s=1e6)
    (task,) = ledger.assign("e", 1, 0.0)
    ledger.accept("e", [task.ref], 0.0)
    for now in range(1, 100):
        ledger.renew("e", float(now))
        ledger.tick(float(now))
    assert task.status == "leased"
    ledger.tick(108.9)
    assert task.status == "leased"
    ledger.tick(109.1)
    assert task.status == "queued" and task.tries == 1


def test_stale_accepts_are_cancelled() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    opened(ledger, ["a"])
    (task,) = ledger.assign("e", 1, 0.0)
    ledger.accept("e", [TaskRef(task.id, 9)], 0.0)
    assert ledger.cancels == [("e", JOB, TaskRef(task.id, 9))]


def test_a_site_that_returns_in_time_is_not_gone() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    gather = opened(ledger, ["a"], sites_s=20.0)
    ledger.owner_gone("e", 5.0)
    ledger.tick(24.0)
    ledger.owner_up("e", ["a"], 1, 24.5)
    ledger.tick(100.0)
    assert gather.state == "open"
    ledger.owner_gone("e", 100.0)
    ledger.tick(119.9)
    assert gather.state == "open"
    ledger.tick(120.1)
    assert gather.state == "failed" and gather.tasks[gather.failed[0]].code == "site_gone"


def test_a_gather_fails_as_soon_as_the_minimum_is_out_of_reach() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a", "b", "c"], 3, 0.0)
    gather = opened(ledger, ["a", "b", "c"], min_clients=2)
    tasks = ledger.assign("e", 3, 0.0)
    ledger.fail("e", Fail(tasks[0].id, 1, "user_code"), 0.0)
    assert gather.state == "open"
    ledger.fail("e", Fail(tasks[1].id, 1, "user_code"), 0.0)
    assert gather.state == "failed" and tasks[2].status == "cancelled"
    assert ledger.cancels == [("e", JOB, tasks[2].ref)]


def test_more_minimum_than_sites_fails_with_advice() -> None:
    gather = opened(Ledger(), ["a"], min_clients=2)
    assert gather.state == "failed" and "name more" in gather.reason


def test_limits() -> None:
    ledger = Ledger(Limits(max_tasks=2, max_gathers=2))
    with pytest.raises(FaultError, match="max_tasks"):
        opened(ledger, ["a", "b", "c"])
    with pytest.raises(FaultError, match="twice"):
        opened(ledger, ["a", "a"])
    opened(ledger, ["a"], step=0)
    opened(ledger, ["a"], step=1)
    with pytest.raises(FaultError, match="max_gathers"):
        opened(ledger, ["a"], step=2)
    with pytest.raises(NondeterministicError):
        opened(ledger, ["b"], step=0)


def test_a_done_whose_sizes_do_not_add_up_changes_nothing() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", ["a"], 1, 0.0)
    gather = opened(ledger, ["a"])
    (task,) = ledger.assign("e", 1, 0.0)
    for tail in (b"", b"abcd"):
        with pytest.raises(CodecError):
            settle(ledger, "e", done_of(gather, task, b"abc"), tail, lambda ref: True, 0.0)
    twice = Done(JOB, gather.id, done_of(gather, task).items * 2)
    with pytest.raises(CodecError, match="twice"):
        settle(ledger, "e", twice, b"", lambda ref: True, 0.0)
    assert gather.results == [] and task.status == "leased"


def test_free_slots_and_parked_tasks() -> None:
    ledger = Ledger(seed=1)
    ledger.owner_up("e", [f"s{i}" for i in range(8)], 4, 0.0)
    gather = opened(ledger, [f"s{i}" for i in range(8)], min_clients=8)
    tasks = ledger.assign("e", 10, 0.0)
    owner = ledger.owners["e"]
    assert len(tasks) == 4 and owner.room == 0
    owner.report(4)
    assert owner.room == 0, "it had not seen the tasks when it said that it is free"
    ledger.accept("e", [t.ref for t in tasks], 0.0)
    owner.report(1)
    assert owner.room == 1
    settle(ledger, "e", done_of(gather, tasks[0]), b"", lambda ref: True, 0.0)
    assert owner.room == 1, "the parked one was the one that is done"


# ---------------------------------------------------------------- random histories

SITES = ["a", "b", "c", "d"]
NODES = {"e1": ["a", "b", "c"], "e2": ["d"]}


class LedgerMachine(RuleBasedStateMachine):
    """Everything that can happen to two gathers, with crashes of the broker in between."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal.db"
        self.journal = Journal(self.path, "process")
        self.ledger = Ledger(Limits(retry_s=0.1), seed=1)
        self.jobs, self.payloads = Jobs(), PayloadTable()
        self.now = 1000.0
        self.held: dict[str, set[TaskRef]] = {node: set() for node in NODES}
        self.online: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.settled: dict[str, tuple[int, int]] = {}  # task: attempt, index; as acknowledged
        self.partials = 0

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    @initialize(minimum=st.integers(1, 3), partials=st.booleans())
    def open(self, minimum: int, partials: bool) -> None:
        for step in (0, 1):
            opened(self.ledger, SITES, self.now, step=step, min_clients=minimum, partials=partials, max_attempts=4,
                   sites_s=300.0, lease_s=10.0)  # fmt: skip
        self.commit()

    def commit(self) -> None:
        self.ledger.cancels.clear()
        self.ledger.bad_ends.clear()
        self.journal.save(self.ledger, self.jobs, self.payloads)

    @rule(node=st.sampled_from(sorted(NODES)), keep=st.booleans())
    def connect(self, node: str, keep: bool) -> None:
        if not keep:
            self.held[node].clear()
        self.ledger.owner_up(node, NODES[node], 4, self.now)
        self.ledger.adopt(node, sorted(self.held[node], key=lambda r: (r.task, r.attempt)), self.now)
        self.online.add(node)
        self.commit()

    @precondition(lambda self: self.online)
    @rule(data=st.data(), polite=st.booleans())
    def leave(self, data: st.DataObject, polite: bool) -> None:
        node = data.draw(st.sampled_from(sorted(self.online)))
        self.ledger.owner_gone(node, self.now, polite=polite)
        self.online.discard(node)
        self.commit()

    @rule(node=st.sampled_from(sorted(NODES)), accept=st.booleans(), late=st.booleans())
    def assign(self, node: str, accept: bool, late: bool) -> None:
        if late:  # leases end, and what was held is given out again to the same node
            self.now += 11.0
            self.ledger.tick(self.now)
            self.now += 1.0
            self.ledger.tick(self.now)
        if node not in self.online:
            self.connect(node, True)
        for task in self.ledger.assign(node, 3, self.now):
            assert task.attempt == self.attempts.get(task.id, 0) + 1, "each attempt is given out once"
            self.attempts[task.id] = task.attempt
            self.held[node].add(task.ref)
        if accept:
            self.ledger.accept(node, sorted(self.held[node], key=lambda r: r.task), self.now)
        self.commit()

    def draw_held(self, data: st.DataObject) -> tuple[str, TaskRef] | None:
        choices = sorted((n, r.task, r.attempt) for n in self.online for r in self.held[n])
        if not choices:
            return None
        node, task, attempt = data.draw(st.sampled_from(choices))
        return node, TaskRef(task, attempt)

    def acknowledged(self, stored: list[TaskRef]) -> None:
        for ref in stored:
            if ref.task not in self.settled:
                assert ref.attempt == self.attempts[ref.task], "only the current attempt settles a task"
            gather = self.ledger.gathers[self.ledger.tasks[ref.task].gather]
            index = next(i for i, r in enumerate(gather.results) if r.task == ref.task)
            before = self.settled.setdefault(ref.task, (ref.attempt, index))
            assert before == (ref.attempt, index), "one result a task, for ever, under one number"

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        drawn = self.draw_held(data)
        if drawn is None:
            return
        node, ref = drawn
        task = self.ledger.tasks[ref.task]
        done = Done(JOB, task.gather, (DoneItem(ref.task, ref.attempt, task.site, state=f"v{ref.attempt}"),))
        out = settle(self.ledger, node, done, b"", lambda payload: True, self.now)
        assert len(out.stored) + len(out.refused) == 1
        self.commit()
        self.acknowledged(out.stored)

    @rule(data=st.data())
    def partial(self, data: st.DataObject) -> None:
        drawn = self.draw_held(data)
        if drawn is None:
            return
        node, first = drawn
        gather = self.ledger.tasks[first.task].gather
        newest: dict[str, TaskRef] = {}
        for ref in sorted(self.held[node], key=lambda r: r.attempt):
            if self.ledger.tasks[ref.task].gather == gather:
                newest[ref.task] = ref
        self.partials += 1
        items = tuple(DoneItem(r.task, r.attempt, self.ledger.tasks[r.task].site) for r in newest.values())
        payload = PayloadRef(PayloadId(f"p-{self.partials}"), 10)
        out = settle(self.ledger, node, Done(JOB, gather, items, payload), b"", lambda p: True, self.now)
        assert not (out.stored and out.refused), "all or nothing"
        self.commit()
        self.acknowledged(out.stored)

    @rule(data=st.data(), retryable=st.booleans(), killed=st.booleans())
    def fail(self, data: st.DataObject, retryable: bool, killed: bool) -> None:
        drawn = self.draw_held(data)
        if drawn is not None:
            node, ref = drawn
            self.ledger.fail(node, Fail(ref.task, ref.attempt, "bad", "", retryable or killed, killed), self.now)
            self.commit()

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        gathers = self.ledger.gathers
        dead = [t for t in self.ledger.tasks.values() if t.given_up and gathers[t.gather].state == "open"]
        if dead:
            self.ledger.retry(data.draw(st.sampled_from(dead)).id, self.now)
            self.commit()

    @rule(seconds=st.sampled_from([0.1, 1.0, 11.0, 200.0]), alive=st.booleans())
    def wait(self, seconds: float, alive: bool) -> None:
        self.now += seconds
        if alive:
            for node in self.online:
                self.ledger.renew(node, self.now)
        self.ledger.tick(self.now)
        self.commit()

    @rule()
    def crash_of_the_broker(self) -> None:
        before = self.ledger
        self.journal.close()
        self.journal = Journal(self.path, "process")
        assert self.journal.check() == "ok"
        self.ledger, self.jobs, self.payloads = Ledger(Limits(retry_s=0.1), seed=1), Jobs(), PayloadTable()
        self.journal.load(self.ledger, self.jobs, self.payloads, self.now)
        self.online.clear()
        for gid, gather in before.gathers.items():
            again = self.ledger.gathers[gid]
            assert again.results == gather.results and again.partials == gather.partials
            assert (again.state, again.reason, again.quorum_at) == (gather.state, gather.reason, gather.quorum_at)
            assert set(again.failed) == {tid for tid in gather.failed if gather.tasks[tid].given_up}
            for tid, task in gather.tasks.items():
                copy = again.tasks[tid]
                assert (copy.status, copy.attempt, copy.owner, copy.tries, copy.killed, copy.base) == (
                    task.status, task.attempt, task.owner, task.tries, task.killed, task.base
                )  # fmt: skip
        assert self.ledger.site_states == before.site_states

    @invariant()
    def counts_agree(self) -> None:
        for gather in self.ledger.gathers.values():
            tasks = gather.tasks.values()
            assert gather.left == sum(not t.ended for t in tasks)
            assert len(gather.results) == sum(t.status == "done" for t in tasks)
            assert len({r.task for r in gather.results}) == len(gather.results)
            if not gather.live:
                assert gather.left == 0
            if gather.state == "closed":
                assert len(gather.results) >= gather.spec.rule.min_clients
        for task, (attempt, index) in self.settled.items():
            gather = self.ledger.gathers[self.ledger.tasks[task].gather]  # pyright: ignore[reportArgumentType]
            assert (gather.results[index].task, gather.results[index].attempt) == (task, attempt)

    @invariant()
    def owners_agree(self) -> None:
        for owner in self.ledger.owners.values():
            mine = {t.id for t in self.ledger.tasks.values() if t.status == "leased" and t.owner == owner.node}
            assert owner.leased == mine
            assert owner.unaccepted == sum(not self.ledger.tasks[t].accepted for t in mine)
            assert 0 <= owner.parked <= len(mine)

    @invariant()
    def leased_tasks_belong_to_their_sites_owner(self) -> None:
        for site, node in self.ledger.node_of.items():
            assert site in NODES[node] and node in self.ledger.owners
            assert Site(site) not in self.ledger.down_since


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
