"""Workers that fold their own results, and what is given to them at once."""

from __future__ import annotations

import numpy as np
import pytest
from fedloom.executor.pace import MOST, Pace
from fedloom.executor.prefold import Result
from fedloom.executor.shares import Shares
from fedloom.executor.slots import Slots
from fedloom.serialization.fold import Fold, FoldPlan
from fedloom.serialization.messages import Done, DoneItem, Fail
from fedloom.serialization.model import FLModel

pytestmark = pytest.mark.timeout(120)
BASE = {"w": np.linspace(-1, 1, 100_000, dtype=np.float32), "n": np.arange(3)}
SITES = tuple(f"site-{i}" for i in range(1, 25))


def result(task: str, gather: str = "g") -> Result:
    return Result("job", gather, DoneItem(task, 1, "site"), b"", 0, "")  # type: ignore[arg-type]


def test_quick_tasks_go_along_with_the_next_one_and_slow_ones_do_not():
    pace = Pace()
    assert pace.ahead("train", 1000, 2) == 0  # nothing is known yet
    pace.note("train", 0.001)
    assert pace.ahead("train", 1000, 2) == 30 and pace.ahead("train", 40, 2) == 10 and pace.ahead("other", 40, 2) == 0
    pace.note("train", 0.5)  # one that is slow counts in full
    assert pace.ahead("train", 1000, 2) == 0
    for _ in range(60):
        pace.note("train", 0.00001)
    assert pace.ahead("train", 10_000, 2) == MOST


def test_a_share_is_asked_for_once_and_begins_anew():
    shares = Shares(max_tasks=3, max_s=5.0)
    gather = ("job", "g")
    for task in "ab":
        shares.add("h1", gather, result(task), 0.0)
    shares.add("h2", gather, result("z"), 1.0)
    assert shares.due(1.0, {gather}) == [] and shares.next_due_s(1.0) == 4.0 and len(shares) == 3
    shares.add("h1", gather, result("c"), 1.0)
    assert [s.host for s in shares.due(1.0, {gather})] == ["h1"] and shares.due(1.0, {gather}) == []
    shares.add("h1", gather, result("d"), 1.0)  # folded before the worker heard of it, or behind
    found, whole = shares.take("h1", gather, [("a", 1), ("b", 1), ("c", 1)], 2.0)
    assert [r.item.task for r in found] == ["a", "b", "c"] and whole
    assert sorted(s.host for s in shares.due(2.0, set())) == ["h1", "h2"]  # nothing more to come
    shares.spoil("h2", gather, 2.0)
    assert shares.take("h2", gather, [("z", 1), ("gone", 1)], 2.0)[1] is False
    assert [r.item.task for r in shares.lost("h1")] == ["d"] and len(shares) == 0
    assert shares.take("h1", gather, [("d", 1)], 3.0) == ([], False)
    shares.add("h1", gather, result("e"), 3.0)
    assert [r.item.task for r in shares.drop_job("job")] == ["e"] and shares.next_due_s(3.0) == 3600.0


def test_what_follows_into_a_slot_frees_it_with_the_last():
    slots: Slots[str] = Slots(2)
    for key, lane in (("a", "1"), ("b", "2"), ("c", "3"), ("d", "3"), ("e", "4"), ("f", "5")):
        slots.push(key, lane)
    (_, first), (_, second) = slots.take()
    assert slots.follow(first, lambda key: True, 5) == ["c"]  # d waits for its site's other task
    assert slots.follow(second, lambda key: True, 5) == []
    slots.release("a")
    assert list(slots.take()) == [] and slots.running == 2  # c runs in a's slot now
    slots.release("c")
    assert [key for key, _ in slots.take()] == ["d"]
    assert slots.follow(first, lambda key: key == "e", 5) == ["e"]
    for key in "bde":
        slots.release(key)
    assert [key for key, _ in slots.take()] == ["f"] and slots.free == 1


SCRIPT = """
import os
import numpy as np
from fedloom.client import FLModel

def train(model, ctx):
    rng = np.random.default_rng(ctx.seed)
    if ctx.config.get("die") == ctx.site and not os.path.exists("dead"):
        open("dead", "w").close()
        os._exit(7)
    if ctx.config.get("mixed") == ctx.site:
        return FLModel(params=model.params, metrics={"pid": os.getpid()})
    w = model.params["w"]
    w += rng.normal(size=w.size).astype(np.float32)
    if ctx.config.get("bad") == ctx.site:
        w[7] = np.nan
    meta = {"NUM_STEPS_CURRENT_ROUND": int(ctx.site[5:])}
    return FLModel(params={"w": w, "n": model.params["n"]}, metrics={"pid": os.getpid()}, meta=meta)
"""


@pytest.fixture
def fleet(broker, make_agent, make_job):
    """A pool of 24 sites with two workers, and a round for it."""
    archive = make_job({"client.py": SCRIPT}, "fedloom.executor.script.FunctionExecutor", function="train")
    plan = FoldPlan.first(BASE, tasks=len(SITES))
    make_agent(sites=SITES, pool="p", capacity=2)

    def assign(attempt: int = 1, sites=SITES, round: int = 0, partials: bool = True, **config):
        fields = {"partials": True, "fold": broker.add(plan.to_bytes(), "blob")} if partials else {}
        tasks = [(f"t{round}-{site}", site, attempt) for site in sites]
        model = FLModel(params=BASE)
        broker.assign(*tasks, round=round, model=model, archive=archive, seed=5, config=config, **fields)

    return assign


def everything(broker, plan):
    fold = Fold(plan)
    for message, _ in broker.messages:
        if isinstance(message, Done):
            if message.partial is not None:
                fold.merge(broker.payloads[message.partial.id])
            else:
                for item in message.items:
                    fold.add(broker.payloads[item.payload.id], site=item.site, meta=item.meta)
    return fold


@pytest.mark.process
def test_workers_fold_what_they_make_to_the_same_bits(broker, fleet):
    plan = FoldPlan.first(BASE, tasks=len(SITES))
    fleet(partials=False)
    for site in SITES:
        broker.done(f"t0-{site}")
    apart = everything(broker, plan)
    broker.messages.clear()
    fleet(bad="site-5")
    pids = {broker.done(f"t0-{site}").meta["metrics"]["pid"] for site in SITES if site != "site-5"}
    assert "NaN" in broker.failed("t0-site-5").text
    dones = [m for m, _ in broker.messages if isinstance(m, Done)]
    assert len(pids) == 2 and all(m.partial is not None for m in dones) and len(dones) <= 4
    together = everything(broker, plan)
    assert together.count == 23 and apart.count == 24
    # site-5's is missing: its result in the first of the two is taken out, which is exact
    sent = next(key for key in broker.payloads if key.startswith("r-t0-site-5."))
    apart.remove(
        broker.payloads[sent], site="site-5", meta={"meta": {"NUM_STEPS_CURRENT_ROUND": 5}, "params_type": "FULL"}
    )
    assert together.finish(BASE).params["w"].tobytes() == apart.finish(BASE).params["w"].tobytes()


@pytest.mark.process
def test_a_worker_takes_what_it_has_folded_along_when_it_dies(broker, fleet):
    fleet(die="site-9")
    killed = broker.failed("t0-site-9")
    assert killed.killed and "exit code 7" in killed.text
    _until(lambda: len(_heard(broker)) >= len(SITES))
    lost = {m.task for m, _ in broker.messages if isinstance(m, Fail)}
    fails = [m for m, _ in broker.messages if isinstance(m, Fail)]
    assert all(m.retryable for m in fails) and len(lost) == len(fails)
    assert all("exit code 7" in m.text for m in fails)
    again = [site for site in SITES if f"t0-{site}" in lost]
    fleet(2, again, die="site-9")
    for site in again:
        broker.done(f"t0-{site}", 2)
    items = [(i.site, i.attempt) for m, _ in broker.messages if isinstance(m, Done) for i in m.items]
    assert sorted(site for site, _ in items) == sorted(SITES)
    assert everything(broker, FoldPlan.first(BASE, tasks=len(SITES))).count == len(SITES)


@pytest.mark.process
def test_a_result_that_does_not_go_with_the_others_goes_by_itself(broker, fleet):
    fleet(mixed="site-11")
    item = broker.done("t0-site-11")
    assert item.payload is not None  # singly: the controller sees which sites are on which side
    for site in SITES:
        broker.done(f"t0-{site}")
    singles = [m for m, _ in broker.messages if isinstance(m, Done) and m.partial is None]
    assert [i.site for m in singles for i in m.items] == ["site-11"]


def _heard(broker):
    done = {i.task for m, _ in broker.messages if isinstance(m, Done) for i in m.items}
    return done | {m.task for m, _ in broker.messages if isinstance(m, Fail)}


def _until(condition):
    import threading
    import time

    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
