"""Site states between the ledger and the agent's own files: crashes, cuts, repeats, late results, jobs that end.

One site-state rule, from two sides that hear of each other late: an attempt starts from the version of the site's last
settled task, and that version's file is there for it. Two gathers may be at work at once, so that two results of one
site wait for their Stored; a redo starts from where its first try had. The ledger, the outbox, the collector and the
store are real; the link is two queues, the script a rule.
"""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.ledger import Ledger, Limits
from fedloom.broker.settle import settle
from fedloom.executor.collector import Collector
from fedloom.executor.config import AgentConfig
from fedloom.executor.desk import Desk
from fedloom.executor.runs import Run, Work
from fedloom.executor.state import SiteState, load_state, version_name
from fedloom.executor.taskio import TaskSpec
from fedloom.serialization.messages import (
    Assign,
    AssignItem,
    Cancel,
    CloseRule,
    Done,
    Fail,
    GatherId,
    JobId,
    OpenGather,
    Stored,
    TaskRef,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from lengths import AS_FOUND, long, short

NODE, SITES = "e", ("a", "b")
SHORT, LONG = short(100, 60, phases=AS_FOUND), long(1200, 80, report_multiple_bugs=False)
NUMBER = st.integers(0, 63)


class Wire:
    """What a link is to the agent: messages to the broker wait here until they arrive, or are lost."""

    local = None
    state = "up"

    def __init__(self, out: deque[Any]) -> None:
        self.out = out

    def send(self, message: Any, tail: Any = b"") -> None:
        self.out.append((message, bytes(tail)))


class SiteStateMachine(RuleBasedStateMachine):
    """An executor that serves two sites, and the jobs that come one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Limits(retry_s=0.01), seed=1)
        self.now = 0.0
        self.number, self.round, self.step = 0, 0, 0
        self.to_broker: deque[Any] = deque()
        self.to_agent: deque[Any] = deque()
        self.written: dict[str, list[str]] = {}  # what each version holds: the tasks whose work is in it
        self.last: dict[str, str] = {}  # by site: the version of its last settled task
        self.last_step: dict[str, int] = {}  # by site: that task's step, counted over all rounds
        self.settled: set[str] = set()
        self.steps: dict[GatherId, int] = {}
        self.started: dict[tuple[int, str], str] = {}  # by step and site: the version that its last attempt was given
        self.named: dict[str, str] = {}  # by site: the version that its last Assign named
        self.desk: Desk | None = None
        self.start_agent()

    def teardown(self) -> None:
        self.agent.close()
        self.folder.cleanup()

    @property
    def job(self) -> JobId:
        return JobId(f"job-{self.number}")

    @property
    def agent(self) -> Desk:
        assert self.desk is not None
        return self.desk

    def start_agent(self) -> None:
        """A process for the executor: what it knows is what its folder holds."""
        if self.desk is not None:
            self.desk.close()
        self.to_broker.clear()
        self.desk = Desk(AgentConfig("", Path(self.folder.name), SITES, capacity=4), lambda call: call())
        self.desk.link = Wire(self.to_broker)  # pyright: ignore[reportAttributeAccessIssue]
        self.collector = Collector(self.desk)
        self.connect()

    def connect(self) -> None:
        """A new connection: what was under way on the old one is lost."""
        self.to_broker.clear()
        self.to_agent.clear()
        self.ledger.owner_up(NODE, SITES, 4, self.now)
        self.ledger.adopt(NODE, self.agent.held_refs(), self.now)
        self.cancels()
        for number in range(self.number):
            self.to_agent.append(Cancel(JobId(f"job-{number}"), ended=True))
        self.collector.delivery.repeat()

    def cancels(self) -> None:
        for _, job, ref in self.ledger.cancels:
            self.to_agent.append(Cancel(job, (ref,)))
        self.ledger.cancels.clear()

    # ------------------------------------------------------------ the broker

    @property
    def live(self) -> int:
        return sum(g.live for g in self.ledger.gathers.values())

    @property
    def redoing(self) -> bool:
        return any(g.live and g.spec.redo for g in self.ledger.gathers.values())

    def _open(self, step: int, sites: tuple[str, ...], deadline: bool, redo: int = 0) -> None:
        close = CloseRule(1, 30.0 if deadline else None, sites_s=1e6)
        spec = OpenGather(1, self.job, 1, self.round, step, "train", close, max_attempts=1000, lease_s=10.0, redo=redo)
        gather = self.ledger.open(spec, sites, self.now)
        self.steps[gather.id] = self.round * 100 + step

    @precondition(lambda self: self.live < 2 and not self.redoing)
    @rule(both=st.booleans(), deadline=st.booleans())
    def open(self, both: bool, deadline: bool) -> None:
        """The next step, beside the one before it or behind it; with a deadline it may close before its results are
        here.
        """
        self._open(self.step, SITES if both else SITES[:1], deadline)
        self.step += 1

    @precondition(lambda self: self.step and not self.live)
    @rule(deadline=st.booleans())
    def redo(self, deadline: bool) -> None:
        """The last step once more, at the sites that gave a result and were asked for nothing else since, nor beside
        it: a redo's version is kept until an Assign names another.
        """
        step = self.step - 1
        gather = next(g for g in self.ledger.gathers.values() if g.spec.step == step and not g.spec.redo)
        at = self.steps[gather.id]
        sites = [result.site for result in gather.results if self.named[result.site] == self.started[at, result.site]]
        tries = sum(g.spec.step == step for g in self.ledger.gathers.values())
        if sites and tries < 4:
            self._open(step, tuple(sorted(sites)), deadline, tries)

    @rule()
    def assign(self) -> None:
        for task in self.ledger.assign(NODE, 4, self.now) if NODE in self.ledger.owners else ():
            state, redo = self.ledger.site_state(self.job, task.site), self.ledger.gathers[task.gather].spec.redo
            at = (self.steps[task.gather], task.site)
            if redo:
                assert task.base == self.started[at], "it starts from where the first try had started"
            else:
                assert task.base == self.last.get(task.site, ""), "it starts from the version of the last settled task"
                self.started[at] = self.named[task.site] = task.base
            item = AssignItem(task.id, task.attempt, task.site, state=task.base, settled=state.settled)
            message = Assign(self.job, task.gather, self.round, 0, "train", (item,), lease_s=10.0, redo=redo)
            self.to_agent.append(message)

    @precondition(lambda self: self.to_broker)
    @rule(count=st.integers(1, 4), twice=st.booleans())
    def broker_hears(self, count: int, twice: bool) -> None:
        for _ in range(min(count, len(self.to_broker))):
            message, tail = self.to_broker.popleft()
            if not isinstance(message, Done):
                assert isinstance(message, Fail)
                self.ledger.fail(NODE, message, self.now)
                continue
            for _ in range(1 + twice):
                out = settle(self.ledger, NODE, message, tail, lambda ref: True, self.now)
                for ref in out.stored:
                    self.note(message, ref.task)
                self.to_agent.append(Stored(tasks=tuple(out.stored), refused=tuple(out.refused)))
        self.cancels()

    def note(self, done: Done, task: str) -> None:
        item = next(item for item in done.items if item.task == task)
        if task in self.settled or done.job != self.job:
            return
        self.settled.add(task)
        step = self.steps[done.gather]
        if self.ledger.gathers[done.gather].spec.redo and self.last_step.get(item.site, step) != step:
            return  # another task was settled behind the first try
        self.last[item.site] = item.state or self.last.get(item.site, "")
        self.last_step[item.site] = step

    @precondition(lambda self: self.step > 1 and not self.live)
    @rule()
    def commit(self) -> None:
        self.ledger.release(self.job, self.round)
        self.round, self.step = self.round + 1, 0
        self.cancels()

    @precondition(lambda self: self.round > 2)
    @rule()
    def end_job(self) -> None:
        """The job is over, also for an agent that has not heard of it."""
        self.ledger.forget_job(self.job)
        self.cancels()
        self.to_agent.append(Cancel(self.job, ended=True))
        for known in (self.last, self.last_step, self.named, self.started):
            known.clear()
        self.number, self.round, self.step = self.number + 1, 0, 0

    @rule(seconds=st.sampled_from([0.1, 1.0, 12.0, 40.0]), alive=st.sampled_from([True, True, True, False]))
    def wait(self, seconds: float, alive: bool) -> None:
        self.now += seconds
        if alive:
            self.ledger.renew(NODE, self.now)
        self.ledger.tick(self.now)
        self.cancels()

    # ------------------------------------------------------------ the executor

    @precondition(lambda self: self.to_agent)
    @rule(count=st.integers(1, 4))
    def agent_hears(self, count: int) -> None:
        for _ in range(min(count, len(self.to_agent))):
            match self.to_agent.popleft():
                case Assign() as message:
                    self.assigned(message)
                case Stored() as message:
                    self.collector.delivery.stored(message)
                case Cancel(tasks=tasks, ended=ended) as message:
                    for run in [run for run in self.agent.runs.values() if ended or run.ref in tasks]:
                        if run.job == message.job:
                            self.agent.end(run)
                    for ref in tasks:
                        self.collector.delivery.drop((ref.task, ref.attempt))
                    if ended:
                        self.collector.drop_job(message.job)
                        self.agent.states.forget(message.job, SITES)

    def assigned(self, message: Assign) -> None:
        """As the agent does it: an attempt at this task that it still works on was given up."""
        (item,) = message.items
        if (item.task, item.attempt) in self.agent.runs or (item.task, item.attempt) in self.collector.delivery:
            return
        for old in self.agent.attempts(item.task):
            self.agent.end(old)
        self.collector.delivery.drop_older((item.task, item.attempt))
        work = Work(message, open=1)
        self.agent.add(Run(work, item, "running"))
        if not message.redo:
            self.collector.drop_old_states(message.job, (item.site,))
            self.only_what_is_needed(message.job, item.site)
        self.ledger.accept(NODE, [TaskRef(item.task, item.attempt)], self.now)
        self.cancels()

    @precondition(lambda self: self.agent.runs)
    @rule(n=NUMBER, end=st.sampled_from(["result", "result", "result", "stateless", "dies", "fails", "written"]))
    def work(self, n: int, end: str) -> None:
        """A task runs: it finds its site's memory and leaves a new one, or not."""
        run = list(self.agent.runs.values())[n % len(self.agent.runs)]
        item, states = run.item, self.agent.states
        source = states.path(item.site, run.job, item.state) if item.state else None
        target = states.path(item.site, run.job, version_name(*run.key))
        if run.job == self.job and self.ledger.current(NODE, TaskRef(item.task, item.attempt)) is not None:
            assert source is None or source.is_file(), f"version {item.state} is gone: {self.files(item.site)}"
        if source is not None and not source.is_file():
            self.agent.fail(run, "state", "nothing to start from", retryable=True)
            return
        state = SiteState(source)
        if end != "stateless":
            state["tasks"] = [*state.get("tasks", []), item.task]
            self.written[target.name] = state["tasks"]
        wrote = state.save(target)
        path = str(self.agent.outbox.payload_path(*run.key))
        run.spec = TaskSpec(item.task, item.attempt, item.site, run.job, 0, 0, "train", result_path=path)
        if end in ("result", "stateless"):
            message = {"data": b"x", "size": 1, "wrote_state": wrote, "run_s": 0.0}
            self.collector.finished(run, message)
        elif end == "fails":
            self.agent.fail(run, "oom", "", retryable=True)
        elif end == "dies":
            self.start_agent()

    @rule(backwards=st.booleans())
    def send(self, backwards: bool) -> None:
        """What waits is said in the order of its finishing; after a restart in that of the files' names: any."""
        before = len(self.to_broker)
        self.collector.delivery.turn(1.0)
        said = [self.to_broker.pop() for _ in range(len(self.to_broker) - before)]
        self.to_broker.extend(said if backwards else reversed(said))

    @rule(what=st.sampled_from(["cut", "cut", "agent dies", "agent dies", "executor is dead"]))
    def trouble(self, what: str) -> None:
        """One rule of many: what is under way at every other step never arrives."""
        if what == "agent dies":
            self.start_agent()
            return
        if what == "executor is dead":  # so the broker believes; its next word is a Hello
            self.ledger.owner_gone(NODE, self.now)
        self.connect()

    @rule(stages=st.sampled_from([2, 3, 4, 5, 6, 6, 6]), beside=st.booleans(), newest=st.booleans())
    def go_on(self, stages: int, beside: bool, newest: bool) -> None:
        """The way that tasks go when nothing happens, or the first part of it."""
        for stage in range(stages):
            match stage:
                case 0 if self.live < 1 + beside and not self.redoing:
                    self.open(True, False)
                case 1:
                    self.assign()
                case 2:
                    self.agent_hears(len(self.to_agent))
                case 3:
                    for _ in range(min(1, len(self.agent.runs)) if newest else len(self.agent.runs)):
                        self.work(len(self.agent.runs) - 1, "result")
                    self.send(False)
                case 4:
                    self.broker_hears(len(self.to_broker), False)
                case 5:
                    self.agent_hears(len(self.to_agent))

    # ------------------------------------------------------------ what is true

    def files(self, site: str, job: str = "") -> set[str]:
        folder = self.agent.states.folder(site, job or self.job)
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def only_what_is_needed(self, job: JobId, site: str) -> None:
        """Behind an Assign there are no files but those that the attempts here start from or write."""
        ours = [(run.item.state, version_name(*run.key)) for run in self.agent.runs.values() if run.item.site == site]
        ours += [(held.base, held.item.state) for held in self.agent.outbox if held.item.site == site]
        assert self.files(site, job) <= {version for pair in ours for version in pair}, "old versions go"

    @invariant()
    def the_current_version_is_there(self) -> None:
        for site, version in self.last.items():
            assert self.ledger.site_state(self.job, site).version == version  # pyright: ignore[reportArgumentType]
            assert not version or version in self.files(site), f"{version} of {site} is current: {self.files(site)}"

    @invariant()
    def it_holds_what_was_settled(self) -> None:
        for site, version in self.last.items():
            if version:
                assert load_state(self.agent.states.path(site, self.job, version))["tasks"] == self.written[version]


def test_an_attempt_starts_from_the_last_settled_version() -> None:
    run_state_machine_as_test(SiteStateMachine, settings=SHORT)


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_an_attempt_starts_from_the_last_settled_version_for_long() -> None:
    run_state_machine_as_test(SiteStateMachine, settings=LONG)
