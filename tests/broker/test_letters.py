"""Dead letters through the control core: what was given up is listed, retried while its step is open, or dropped."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Assign,
    Cancel,
    EndJob,
    Event,
    Fail,
    Fault,
    Packet,
    Receipt,
    Site,
    Stored,
    TaskRef,
)

SITES = ("site-1", "site-2", "site-3")


class Step:
    """A step of three sites that one result closes, at the latest when all have ended."""

    def __init__(self, world: Any, tools: Any, **fields: Any) -> None:
        self.world, self.tools = world, tools
        self.job = world.job()
        self.executors = {site: world.executor(site) for site in SITES}
        self.client = world.client()
        self.opening = tools.opening(self.job, sites=SITES, **({"min_clients": 1} | fields))
        self.job.send(*self.opening)
        self.tasks = {site: tools.work(executor)[0] for site, executor in self.executors.items()}

    def fail(self, site: str, text: str = "Traceback\nValueError: no data") -> None:
        ref = self.tasks[site][1]
        self.executors[site].send(Fail(ref.task, ref.attempt, "user_code", text))
        self.executors[site].one(Stored)

    def work(self, site: str) -> None:
        self.tasks[site] = self.tools.work(self.executors[site])[0]

    def ask(self, what: str, after: int = 0, limit: int = 1000) -> Any:
        """The answer's data, or the code of its fault."""
        self.client.send(Ask(self.client.ref(), what, self.job.hello.job, after, limit))
        faults = self.client.take(Fault)
        return faults[0].code if faults else self.client.one(Answer).data

    def letters(self) -> dict[str, dict[str, Any]]:
        return {letter["site"]: letter for letter in self.ask("letters")["letters"]}

    def restart(self) -> None:
        """The broker's process is killed; everybody comes back with what they hold."""
        self.world.restart()
        for site, executor in self.executors.items():
            executor.connect((self.tasks[site][1],))
        self.job.connect()
        self.job.send(*self.opening)
        self.client.connect()

    def told(self) -> list[str]:
        """The sites of the failures that the job's process was told of since."""
        return [failure.site for receipt in self.job.take(Receipt) for failure in receipt.failures]


@pytest.fixture
def step(world: Any, tools: Any) -> Step:
    return Step(world, tools)


def test_a_letter_says_what_was_given_up(step: Step) -> None:
    step.fail("site-2")
    assert step.ask("letters") == {
        "letters": [
            {
                "letter": 3, "at": step.world.now, "site": "site-2", "text": "Traceback\nValueError: no data",
                "task": step.tasks["site-2"][1].task, "code": "user_code", "status": "failed", "tries": 0,
                "attempts": 1, "round": 0, "step": 0, "name": "train", "open": True,
            }
        ],
        "next": 3,
    }  # fmt: skip
    assert step.ask("letters", after=3) == {"letters": [], "next": 3}


def test_what_is_retried_counts_again(step: Step, tools: Any) -> None:
    """Its failure was told; the attempt is a new one; the old one's words are of no account; the step waits for it."""
    step.fail("site-2")
    old = step.tasks["site-2"]
    assert step.told() == ["site-2"]
    assert step.ask("retry", step.letters()["site-2"]["letter"])["site"] == "site-2"
    assert step.letters() == {}
    step.work("site-2")
    assert step.tasks["site-2"][1].attempt == 2
    step.executors["site-2"].send(Fail(old[1].task, 1, "user_code", "said twice"))
    step.executors["site-2"].take(Stored)
    assert step.letters() == {}, "the failure of the first attempt is known"
    for site in ("site-1", "site-3"):
        tools.finish(step.executors[site], step.tasks[site])
    assert step.job.take(Receipt) == [], "it is open as long as it waits for the site"
    assert tools.finish(step.executors["site-2"], step.tasks["site-2"]).tasks
    assert [(r.state, r.results) for r in step.job.take(Receipt)] == [("closed", 3)]
    assert sorted(tools.indices(step.job)) == [0, 1, 2]


def test_a_letter_is_written_anew_when_its_task_fails_again(step: Step) -> None:
    step.fail("site-2")
    first = step.letters()["site-2"]["letter"]
    step.ask("retry", first)
    step.work("site-2")
    step.fail("site-2", "another reason")
    letter = step.letters()["site-2"]
    assert (letter["attempts"], letter["text"], letter["open"]) == (2, "another reason", True)
    assert step.told() == ["site-2", "site-2"]
    assert step.ask("retry", first) == {"letter": first, "site": "site-2", "task": letter["task"]}, "said twice"
    assert step.letters()["site-2"] == letter, "the second letter is another one"
    step.job.connect()
    step.job.send(*step.opening)
    assert set(step.told()) == {"site-2"}, "a process that comes later is told of what is failed now"


def test_a_process_that_comes_later_is_not_told_of_what_was_retried(step: Step, tools: Any) -> None:
    step.fail("site-2")
    step.fail("site-3")
    step.ask("retry", step.letters()["site-2"]["letter"])
    step.job.connect()
    step.job.take(Receipt)
    step.job.send(*step.opening)
    receipts = step.job.take(Receipt)
    assert [f.site for r in receipts for f in r.failures] == ["site-3"]
    step.work("site-2")
    for site in ("site-1", "site-2"):
        tools.finish(step.executors[site], step.tasks[site])
    assert [(r.state, r.results) for r in step.job.take(Receipt)] == [("closed", 2)]


def test_its_tries_are_fresh(world: Any, tools: Any) -> None:
    step = Step(world, tools, max_attempts=2)
    for round_ in range(2):
        for _ in range(2):
            ref = step.tasks["site-2"][1]
            step.executors["site-2"].send(Fail(ref.task, ref.attempt, "oom", "no memory", retryable=True))
            world.pass_time(20)
            step.tasks["site-2"] = (tools.work(step.executors["site-2"]) or [step.tasks["site-2"]])[0]
        letter = step.letters()["site-2"]
        assert (letter["status"], letter["code"], letter["tries"]) == ("dead", "max_attempts", 2)
        assert letter["attempts"] == 2 * (round_ + 1)
        if round_ == 0:
            step.ask("retry", letter["letter"])
            step.work("site-2")


def test_a_site_that_was_gone_has_its_time_again(world: Any, tools: Any) -> None:
    step = Step(world, tools, sites_s=20.0)
    world.disconnect(step.executors["site-2"])
    world.pass_time(60)
    assert step.letters()["site-2"]["code"] == "site_gone"
    step.ask("retry", step.letters()["site-2"]["letter"])
    world.pass_time(19)
    assert step.letters() == {}
    world.pass_time(2)
    assert step.letters()["site-2"]["code"] == "site_gone"
    step.ask("retry", step.letters()["site-2"]["letter"])
    step.executors["site-2"].connect((step.tasks["site-2"][1],))
    stale = step.executors["site-2"].one(Cancel).tasks
    assert stale == (step.tasks["site-2"][1],), "what it held is not wanted any more"
    step.work("site-2")
    assert tools.finish(step.executors["site-2"], step.tasks["site-2"]).tasks


@pytest.mark.parametrize("what", ["retry", "drop"])
def test_an_order_outlives_the_broker_whole_or_not_at_all(step: Step, what: str, tools: Any) -> None:
    """What it changes and that it was given are one commit; said again after a restart it changes nothing."""
    step.fail("site-2")
    letter = step.letters()["site-2"]["letter"]
    order = Ask(step.client.ref(), what, step.job.hello.job, letter)
    step.world.core.handle(step.client.address, Packet(order), step.world.now)
    step.restart()
    assert step.letters()["site-2"]["open"], "it was not committed: the letter is there, and nothing was acknowledged"
    assert step.ask(what, letter)["letter"] == letter
    step.restart()
    assert step.ask(what, letter)["letter"] == letter
    assert step.letters() == {}
    given = step.executors["site-2"].take(Assign)
    assert [a.items[0].attempt for a in given[-1:]] == ([3] if what == "retry" else []), "2 was on its way"
    other = {"retry": "drop", "drop": "retry"}[what]
    assert step.ask(other, letter) == "not_dead"
    for site in ("site-1", "site-3"):
        tools.finish(step.executors[site], step.tasks[site])
    assert step.job.take(Receipt)[-1].state == ("open" if what == "retry" else "closed")


def test_what_is_refused(step: Step, tools: Any) -> None:
    step.fail("site-2")
    letter = step.letters()["site-2"]["letter"]
    assert step.ask("retry", 0) == step.ask("retry", 1) == step.ask("drop", 99) == "unknown_letter"
    step.job.send(Ask(90, "retry", step.job.hello.job, letter))
    assert step.job.one(Fault).code == "forbidden"
    for site in ("site-1", "site-3"):
        tools.finish(step.executors[site], step.tasks[site])
    assert not step.letters()["site-2"]["open"]
    assert step.ask("retry", letter) == "step_closed"
    step.job.send(EndJob(91, step.job.hello.job, 1, "FINISHED:FAILED", "no more"))
    assert step.ask("retry", letter) == "ended"
    assert step.letters()["site-2"]["letter"] == letter, "the list outlives the job"
    assert step.ask("drop", letter)["task"] == step.tasks["site-2"][1].task
    assert step.letters() == {}


@pytest.mark.parametrize("kind", ["task_failed", "task_retried", "letter_dropped"])
def test_nobody_else_writes_letters(step: Step, kind: str) -> None:
    step.fail("site-2")
    before = step.letters()
    data = {"task": step.tasks["site-2"][1].task}
    executor = step.executors["site-1"]
    executor.send(Event(step.job.hello.job, kind, Site("site-1"), data))
    assert executor.one(Fault).code == "forbidden"
    assert step.letters() == before


def test_pages(step: Step) -> None:
    for site in SITES[1:]:
        step.fail(site)
    first = step.ask("letters", limit=1)
    assert [letter["site"] for letter in first["letters"]] == ["site-2"]
    assert [letter["site"] for letter in step.ask("letters", first["next"], 1)["letters"]] == ["site-3"]


def test_the_last_word_of_a_dead_attempt_is_refused(world: Any, tools: Any) -> None:
    """A silent executor whose task was given up and retried is not taken for the new attempt's."""
    step = Step(world, tools, max_attempts=1, lease_s=5.0)
    held = step.tasks["site-2"]
    world.core.end_session(world.core.state.sessions.of(step.executors["site-2"].address), world.now, polite=False)
    world.turn()
    letter = step.letters()["site-2"]
    assert letter["code"] == "max_attempts"
    step.ask("retry", letter["letter"])
    step.executors["site-2"].connect((held[1],))
    assert step.executors["site-2"].one(Cancel).tasks == (TaskRef(held[1].task, 1),)
    assert tools.finish(step.executors["site-2"], held).refused[0].code == "stale"
