"""A gather over the real control core: each result once and in order, whatever is lost, repeated or cut in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fedloom.serialization.errors import GatherError, LinkError, NondeterministicError
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.messages import Answer, Ask, CloseRule, Done, Receipt

ALL = CloseRule(min_clients=3)


def test_results_come_in_the_order_of_their_acceptance(farm: Any, tools: Any) -> None:
    f = farm()
    f.order = -1
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=ALL)
    results = list(gather)
    assert [r.site for r in results] == ["site-2", "site-1", "site-0"]
    assert [r.start for r in results] == [0, 1, 2]
    assert all(r.inline and r.payload is None and not r.follows for r in results)
    assert [r.meta["meta"][tools.STEPS] for r in results] == [3, 2, 1]
    assert gather.seen.results == gather.seen.tasks == 3
    assert gather.complete
    assert gather.failures == []
    assert list(gather) == [], "it is over"


@pytest.mark.parametrize("when", range(6))
def test_a_cut_repeats_nothing_and_loses_nothing(farm: Any, tools: Any, when: int) -> None:
    f = farm()
    seen: list[str] = []
    f.events = [lambda: None] * when + [f.cut, f.cut]
    for result in f.fed.gather("train", tools.model_of(), round=0, rule=ALL):
        seen.append(result.site)
        if len(seen) == when:
            f.cut()
    assert sorted(seen) == f.names
    assert len(f.calls) == 3


def test_results_that_are_lost_behind_the_closing_receipt_are_asked_for(farm: Any, tools: Any) -> None:
    """A second process is told `closed` first. What was on its way is lost in a cut: the gather is not complete."""
    f = farm()
    assert len(list(f.fed.gather("train", tools.model_of(), round=0, rule=ALL))) == 3
    f.die()
    fed = f.process()
    gather = fed.gather("train", tools.model_of(), round=0, rule=ALL)
    first = next(got for got in iter(lambda: f.inbox.get(1), None) if isinstance(got[0], Receipt))
    assert first[0].state == "closed"
    gather.on_receipt(first[0])
    while f.inbox._queue.qsize():  # as if they had been in the connection's buffers
        f.inbox.get(1)
    assert not gather.complete
    assert fed.gather("evaluate", tools.model_of(), round=0, rule=ALL).id == ""
    f.events = [f.cut]
    assert [r.start for r in gather] == [0, 1, 2]


def test_a_full_inbox_asks_again(farm: Any, tools: Any) -> None:
    f = farm(sites=12, inbox_bytes=2000)
    assert sorted(r.site for r in f.fed.gather("train", tools.model_of(), round=0)) == sorted(f.names)
    f.die()
    assert len(list(f.process().gather("train", tools.model_of(), round=0))) == 12


@pytest.mark.parametrize("cut", [False, True])
def test_a_partial_of_many_items_is_one_payload(farm: Any, tools: Any, cut: bool) -> None:
    """It comes in several messages that name the same payload: it must not be added for each."""
    f = farm(sites=300, pool=True)
    plan = FoldPlan.first(tools.model_of().params, tasks=300)
    f.partial = plan
    blob = f.fed.put_blob(plan.to_bytes())
    gather = f.fed.gather("train", tools.model_of(), round=0, fold=blob, partials=True)
    if cut:
        f.events = [lambda: None, f.cut]
    results = list(gather)
    assert [len(r.items) for r in results] == [256, 44]
    assert [r.follows for r in results] == [False, True]
    assert [r.start for r in results] == [0, 256]
    assert all(r.partial for r in results)
    assert results[0].size > 0
    assert results[1].size == 0


def test_failures_are_told_once(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = lambda site, round, model: (
        RuntimeError("no data here") if site == "site-1" else tools.steady(site, round, model)
    )
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=CloseRule(min_clients=2))
    f.events = [lambda: None, f.cut]
    assert {r.site for r in gather} == {"site-0", "site-2"}
    (failure,) = gather.failures
    assert (failure.site, failure.code, failure.text) == ("site-1", "user_error", "no data here")


@pytest.mark.parametrize("again", [False, True])
def test_a_site_that_is_retried_is_no_failure_any_more(farm: Any, tools: Any, again: bool) -> None:
    f = farm()
    tried: list[str] = []

    def train(site: str, round: int, model: Any) -> Any:
        tried.append(site)
        count = tried.count("site-1")
        return (
            RuntimeError(f"no data, {count}")
            if site == "site-1" and count <= 1 + again
            else tools.steady(site, round, model)
        )

    def retry() -> None:
        client = f.world.client()
        client.send(Ask(1, "letters", f.fed.job))
        (letter,) = client.one(Answer).data["letters"]
        client.send(Ask(2, "retry", f.fed.job, letter["letter"]))
        assert client.one(Answer).data["site"] == "site-1"

    f.train = train
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=CloseRule(min_clients=1))
    f.events = [lambda: f.work(f.executors[1]), retry, *[lambda: f.work(f.executors[1])] * again]
    seen = [result.site for result in gather]
    assert sorted(seen) == (["site-0", "site-2"] if again else f.names)
    assert [failure.text for failure in gather.failures] == (["no data, 2"] if again else [])


def test_too_few_results(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = lambda site, round, model: RuntimeError("no data here")
    with pytest.raises(GatherError, match="no data here") as caught:
        list(f.fed.gather("train", tools.model_of(), round=4, rule=ALL))
    assert "round 4, train" in str(caught.value)
    f.die()
    with pytest.raises(GatherError, match="no data here"):
        list(f.process().gather("train", tools.model_of(), round=4, rule=ALL))


def test_close_early(farm: Any, tools: Any) -> None:
    f = farm()
    f.executors[2:] = []  # site-2 never works
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=CloseRule(min_clients=1))
    got = []
    for result in gather:
        got.append(result.site)
        if len(got) == 2:
            gather.close()
    assert got == ["site-0", "site-1"]
    assert gather.seen.state == "closed"


def test_close_before_anything_came(farm: Any, tools: Any) -> None:
    f = farm()
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=CloseRule(deadline_s=1000))
    f.inbox._queue.__init__()  # pyright: ignore  # its Receipt is lost
    f.events = [f.cut]
    gather.close()
    assert gather.seen.state in ("closed", "failed")


def test_another_specification_is_nondeterministic(farm: Any, tools: Any) -> None:
    f = farm()
    list(f.fed.gather("train", tools.model_of(), round=0))
    with pytest.raises(NondeterministicError, match="another specification"):
        list(f.fed.gather("train", tools.model_of(np.ones(3)), round=0))


def test_a_process_that_knows_more_than_the_broker_must_end(farm: Any, tools: Any) -> None:
    f = farm()
    gather = f.fed.gather("train", tools.model_of(), round=0)
    gather._have = 7
    f.events = [f.cut]
    with pytest.raises(LinkError, match="must end"):
        list(gather)


def test_done_without_items_is_passed_over(farm: Any, tools: Any) -> None:
    f = farm()
    gather = f.fed.gather("train", tools.model_of(), round=0)
    gather.on_done(Done(f.fed.job, gather.id, ()), b"")
    gather.on_done(Done(f.fed.job, gather.id, (), partial=f.fed.put_blob(b"x")), b"")
    assert len(list(gather)) == 3
