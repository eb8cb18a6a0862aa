from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from fedloom.executor import collector, prefold
from fedloom.executor.deliver import fit_items
from fedloom.executor.prefold import Batches, Result
from fedloom.serialization.codec import encode_fields, pack
from fedloom.serialization.errors import MixedError
from fedloom.serialization.fold import Fold, FoldPlan
from fedloom.serialization.messages import Cancel, Done, DoneItem, Fail, Ping, Progress, Refusal, Stored
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

pytestmark = pytest.mark.timeout(60)
BASE = {"w": np.linspace(-1, 1, 10_000, dtype=np.float32), "n": np.arange(3)}
SMALL = {"w": BASE["w"][:1000], "n": BASE["n"]}  # of such a model results are added in the functions' own threads


def result(task: str, gather: str = "g") -> Result:
    return Result("job", gather, DoneItem(task, 1, "site", meta={"m": 1}), b"x", 1, "")  # type: ignore[arg-type]


def test_a_batch_leaves_when_it_is_full_old_or_the_last():
    batches = Batches(max_tasks=3, max_s=5.0)
    gather = ("job", "g")
    first = batches.batch_for(gather, b"plan", 0.0)
    assert first.take_in(result("a")) is None and first.size == 1  # alone: not folded
    assert batches.due(1.0, {gather}) == [] and batches.next_due_s(1.0) == 4.0
    assert [r.item.task for r in first.take_in(result("b"))] == ["a", "b"]
    assert batches.batch_for(gather, b"plan", 1.0) is first
    assert [r.item.task for r in first.take_in(result("c"))] == ["c"] and first.size == 3
    assert batches.due(1.0, {gather}) == []  # full, but still being folded
    second = batches.batch_for(gather, b"plan", 1.0)
    assert second is not first
    second.take_in(result("d"))
    first.folding, first.results = 0, [result("a"), result("b"), result("c")]
    assert batches.due(1.0, {gather}) == [first] and len(batches) == 1
    assert batches.due(1.0, set()) == [second] and len(batches) == 0  # nothing more to come
    third = batches.batch_for(gather, b"plan", 2.0)
    third.take_in(result("e"))
    assert batches.due(6.9, {gather}) == [] and batches.due(7.0, {gather}) == [third]
    batches.batch_for(gather, b"plan", 2.0).take_in(result("f"))
    assert [r.item.task for r in batches.drop_job("job")] == ["f"] and len(batches) == 0
    with pytest.raises(ValueError, match="1 to 512"):
        Batches(max_tasks=513)


def test_a_partials_items_fit_one_message_whatever_their_meta():
    items = [DoneItem(f"{i:064}", 1, f"site-{i}", meta={"metrics": {"x": "y" * 500}}) for i in range(256)]  # type: ignore[arg-type]
    fitted = fit_items(items)
    assert [i.task for i in fitted] == [i.task for i in items]
    assert sum(len(pack(encode_fields(i))) for i in fitted) < 60_000
    assert fitted[0].meta and not fitted[-1].meta
    assert fit_items(items[:3]) == tuple(items[:3])


@pytest.fixture
def pool(broker, make_agent):
    """A pool of sites whose function adds site-dependent noise; ``fold_args`` for an Assign."""

    def make(sites: int = 12, bad: str = "", diff: str = "", base=BASE, **config):
        names = tuple(f"site-{i}" for i in range(1, sites + 1))

        def train(model, ctx):
            rng = np.random.default_rng(ctx.seed)
            if ctx.site == diff:
                return FLModel(params=model.params, params_type="DIFF", meta={"NUM_STEPS_CURRENT_ROUND": 1})
            w = model.params["w"] + rng.normal(size=model.params["w"].size).astype(np.float32)
            if ctx.site == bad:
                w = w[:10]
            return FLModel(
                params={"w": w, "n": model.params["n"]},
                metrics={"acc": rng.random()},
                meta={"NUM_STEPS_CURRENT_ROUND": int(ctx.site[5:])},
            )

        agent = make_agent({"train": train}, sites=names, pool="p", **config)
        plan = FoldPlan.first(base, tasks=sites)
        return agent, names, plan, {"partials": True, "fold": broker.add(plan.to_bytes(), "blob")}

    return make


def fold_all(broker, plan):
    """The round's model, as the controller makes it of whatever came."""
    fold = Fold(plan)
    for message, tail in broker.messages:
        if not isinstance(message, Done):
            continue
        if message.partial is not None:
            fold.merge(tail[: message.partial_inline_bytes] or broker.payloads[message.partial.id])
        else:
            for item in message.items:
                data, tail = (tail[: item.inline_bytes], tail[item.inline_bytes :])
                fold.add(data or broker.payloads[item.payload.id], site=item.site, meta=item.meta)
    fold.check()
    return fold


@pytest.mark.parametrize("base", [BASE, SMALL], ids=["large", "small"])
def test_a_pools_results_arrive_as_one_partial_with_the_same_bits(broker, pool, base):
    agent, names, plan, fields = pool(capacity=3, base=base)
    order = list(names)
    random.Random(1).shuffle(order)
    broker.assign(*[(f"t-{s}", s) for s in order], model=FLModel(params=base), seed=5, **fields)
    for site in names:
        item = broker.done(f"t-{site}")
        assert item.payload is None and item.meta["metrics"].keys() == {"acc"}
    dones = [m for m, _ in broker.messages if isinstance(m, Done)]
    in_partials = sum(len(m.items) for m in dones if m.partial is not None)
    assert in_partials == 12 and len(dones) <= 3
    together = fold_all(broker, plan).finish(base)
    _until(lambda: not agent._desk.held_refs())
    agent.stop()

    broker.messages.clear()
    agent, names, plan, fields = pool(capacity=1, base=base)
    del fields["partials"]
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=base), seed=5, **fields)
    for site in names:
        assert broker.done(f"t-{site}")
    singly = fold_all(broker, plan).finish(base)
    assert encode_model(together).digest() == encode_model(singly).digest()


def test_a_result_alone_leaves_as_it_is(broker, pool):
    _, _, _, fields = pool()
    broker.assign(("t", "site-4"), model=FLModel(params=BASE), **fields)
    item = broker.done("t")
    assert item.payload is not None and item.payload.id == "r-t.1"


@pytest.mark.parametrize("base", [BASE, SMALL], ids=["large", "small"])
def test_a_result_that_does_not_fit_fails_alone(broker, pool, base):
    _, names, plan, fields = pool(bad="site-3", capacity=2, base=base)
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=base), **fields)
    failed = broker.failed("t-site-3")
    assert failed.code == "bad_result" and "'w'" in failed.text and not failed.retryable
    for site in names:
        if site != "site-3":
            broker.done(f"t-{site}")
    fold = fold_all(broker, plan)
    assert fold.count == 11


def test_a_result_that_only_does_not_go_with_the_others_reaches_the_controller(broker, pool):
    """Which of them it is depends on who came first: no executor may choose, and the controller ends the job."""
    _, names, plan, fields = pool(diff="site-3", sites=4, capacity=1)
    order = ["site-1", "site-3", "site-2", "site-4"]
    broker.assign(*[(f"t-{s}", s) for s in order], model=FLModel(params=BASE), **fields)
    for site in names:
        broker.done(f"t-{site}")
    assert not [m for m, _ in broker.messages if isinstance(m, Fail)]
    with pytest.raises(MixedError, match="site-3"):
        fold_all(broker, plan)


def test_a_refused_partial_gives_all_of_its_tasks_back(broker, pool):
    broker.store = False
    agent, names, _, fields = pool(capacity=2, partial_max_tasks=12)
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=BASE), **fields)
    message = broker.wait(lambda m, _: isinstance(m, Done))[0]
    assert message.partial is not None
    assert {t.task for t in agent._desk.held_refs()} == {f"t-{s}" for s in names}
    refused = tuple(Refusal(i.task, i.attempt, "conflict", requeued=True) for i in message.items)
    broker.say(Stored(refused=refused))
    _until(lambda: not agent._desk.held_refs())
    broker.store = True
    broker.messages.clear()
    broker.assign(*[(f"t-{s}", s, 2) for s in names], model=FLModel(params=BASE), **fields)
    for site in names:
        broker.done(f"t-{site}", 2)


def test_batches_are_bounded_and_room_is_told_at_once(broker, pool):
    agent, names, _, fields = pool(sites=40, capacity=4, partial_max_tasks=8, queue_ahead=8)
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=BASE), **fields)
    for site in names:
        broker.done(f"t-{site}")
    sizes = [len(m.items) for m, _ in broker.messages if isinstance(m, Done)]
    assert sum(sizes) == 40 and max(sizes) == 8
    assert [m for m, _ in broker.messages if isinstance(m, Ping) and m.free > 0]
    assert agent._desk.free == agent.config.announced == 12


def test_an_idle_pool_does_not_wait_for_the_clock(broker, pool):
    import time

    _, names, _, fields = pool(partial_max_s=1000.0)
    started = time.monotonic()
    broker.assign(*[(f"t-{s}", s) for s in names[:3]], model=FLModel(params=BASE), **fields)
    broker.done("t-site-1")
    assert time.monotonic() - started < 20


def test_results_that_wait_in_a_batch_are_told_of_and_those_that_leave_soon_are_not(broker, make_agent, monkeypatch):
    monkeypatch.setattr(collector, "_NEWS_AT_ONCE", 2)
    gate = threading.Event()
    sites = tuple(f"site-{i}" for i in range(1, 7))

    def train(model, ctx):
        assert ctx.round == 0 or ctx.site != sites[-1] or gate.wait(20)
        return FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1})

    make_agent({"train": train}, sites=sites, pool="p", capacity=6)
    fields = {"partials": True, "fold": broker.add(FoldPlan.first(BASE, tasks=6).to_bytes(), "blob")}
    for round in range(2):
        broker.assign(*((f"{round}{site}", site) for site in sites), round=round, model=FLModel(params=BASE), **fields)
        if round == 0:
            broker.done("0site-6")
    _until(lambda: sum(isinstance(m, Progress) for m, _ in broker.messages) == 5)
    gate.set()
    broker.done("1site-6")
    told = [m for m, _ in broker.messages if isinstance(m, Progress)]
    assert {m.task for m in told} == {f"1{site}" for site in sites[:-1]} and {m.done for m in told} == {1.0}


def test_a_job_that_ends_while_its_results_are_folded_leaves_nothing(broker, pool, monkeypatch):
    gate, folding = threading.Event(), threading.Event()
    add = prefold.PartialFold.add

    def slow(self, result):
        folding.set()
        assert gate.wait(20)
        add(self, result)

    monkeypatch.setattr(prefold.PartialFold, "add", slow)
    agent, names, _, fields = pool(sites=4, capacity=4)
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=BASE), **fields)
    assert folding.wait(20)
    broker.say(Cancel("job-1", ended=True))
    gate.set()
    _until(lambda: not agent._desk.held_refs() and not agent._desk.runs and not agent._desk.cache._pins)
    assert not [m for m, _ in broker.messages if isinstance(m, Done | Fail)]
    assert not list((agent.config.workspace / "outbox").iterdir())


def test_a_fold_that_breaks_sends_nothing_of_its_batch(broker, pool, monkeypatch):
    """What such a fold holds nobody knows: a result that is reported lost must not be in it all the same."""
    add, calls = prefold.PartialFold.add, []

    def breaks(self, result):
        calls.append(result.item.task)
        if len(calls) == 2:
            raise ZeroDivisionError("a bug")
        add(self, result)

    monkeypatch.setattr(prefold.PartialFold, "add", breaks)
    agent, names, plan, fields = pool(sites=4, capacity=1)
    broker.assign(*[(f"t-{s}", s) for s in names], model=FLModel(params=BASE), **fields)
    _until(lambda: len(calls) > 1 and not agent._desk.held_refs())
    failed = [m for m, _ in broker.messages if isinstance(m, Fail)]
    assert {"t-site-1", "t-site-2"} <= {m.task for m in failed}  # and those that were on their way into it
    assert all(m.retryable and "a bug" in m.text for m in failed)
    assert fold_all(broker, plan).count == 4 - len(failed)


def _until(true, timeout_s: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)
