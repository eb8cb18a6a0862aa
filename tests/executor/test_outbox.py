from __future__ import annotations

import pytest
from fedloom.executor.outbox import Held, Outbox
from fedloom.executor.state import load_state
from fedloom.serialization.errors import FaultError, LinkError
from fedloom.serialization.messages import Done, DoneItem, PayloadRef, Refusal, Stored
from fedloom.serialization.model import FLModel


def inline(task="a"):
    return Held(
        "job", "g", DoneItem(task, 1, "site-1", inline_bytes=3, meta={"metrics": {"x": 1.5}}, run_s=2.0), data=b"abc"
    )


def filed(outbox, task="b", size=100):
    path = outbox.payload_path(task, 2)
    path.write_bytes(b"z" * size)
    item = DoneItem(task, 2, "site-1", payload=PayloadRef(f"r-{task}.2", size, "0" * 64), state="b.2")  # type: ignore[arg-type]
    return Held("job", "g", item, path=str(path), base="a.1")


def test_results_are_there_after_a_restart(tmp_path):
    outbox = Outbox(tmp_path)
    first, second = inline(), filed(outbox)
    outbox.add(first)
    outbox.add(second)
    again = Outbox(tmp_path)
    assert sorted(again, key=lambda h: h.key) == [first, second]
    assert again.get(("b", 2)).ref.attempt == 2 and ("a", 1) in again and len(again) == 2
    again.remove(("b", 2))
    again.remove(("a", 1))
    assert again.remove(("a", 1)) is None
    assert not list(tmp_path.iterdir())


def test_half_of_a_result_is_none(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add(inline("whole"))
    outbox.add(filed(outbox, "cut"))
    outbox.payload_path("cut", 2).write_bytes(b"z" * 99)
    outbox.add(filed(outbox, "lost"))
    outbox.payload_path("lost", 2).unlink()
    outbox.payload_path("unfinished", 1).write_bytes(b"zz")
    (tmp_path / "damaged.1.result").write_bytes(b"\x81\xa3job")
    assert [held.item.task for held in Outbox(tmp_path)] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["whole.1.result"]


# ---------------------------------------------------------------- through the agent


@pytest.fixture
def trained(broker, make_agent, tmp_path):
    """An agent whose function returns a result of a given size."""

    def make(size=10, **config):
        import numpy as np

        def train(model, ctx):
            ctx.state["n"] = ctx.state.get("n", 0) + 1
            return FLModel(params={"w": np.zeros(size)})

        return make_agent({"train": train}, **config)

    return make


def test_a_result_is_announced_again_until_it_is_stored(broker, trained, weights):
    broker.store = False
    agent = trained()
    broker.assign(("a", "site-1"), model=weights(1.0))
    item = broker.done("a")
    assert [(t.task, t.attempt) for t in agent._desk.held_refs()] == [("a", 1)]
    broker.messages.clear()
    broker.link.start()  # a reconnect: the same session goes on
    assert broker.hellos[-1] == [("a", 1)]
    assert broker.done("a") == item
    broker.say(Stored(tasks=(agent._desk.held_refs()[0],)))
    _until(lambda: not agent._desk.held_refs() and not len(agent._desk.outbox))


def test_a_restarted_executor_says_what_it_holds_and_sends_it(broker, trained, weights, tmp_path):
    broker.store = False
    broker.put_errors = [LinkError("cut")] * 50
    agent = trained(size=50_000)
    broker.assign(("a", "site-1"), model=weights(1.0))
    _until(lambda: len(agent._desk.outbox) == 1 and len(broker.put_errors) < 50)
    agent.stop()
    assert not [m for m, _ in broker.messages if isinstance(m, Done)]
    broker.put_errors = []
    broker.store = True
    again = trained()
    assert broker.hellos[-1] == [("a", 1)]
    item = broker.done("a")
    assert item.state == "a.1" and broker.result(item).params["w"].size == 50_000
    assert broker.puts == [("r-a.1", {"job": "job-1", "task": "a", "attempt": 1, "timeout_s": 86400.0})]
    _until(lambda: not again._desk.held_refs())
    assert not list((tmp_path / "work/outbox").iterdir())
    assert [p.name for p in (tmp_path / "work/sites/site-1/state/job-1").iterdir()] == ["a.1"]


def test_a_refused_result_leaves_no_trace(broker, trained, weights, tmp_path):
    broker.store = False
    agent = trained()
    broker.assign(("a", "site-1"), model=weights(1.0))
    broker.done("a")
    broker.say(Stored(refused=(Refusal("a", 1, "closed", "too late"),)))  # type: ignore[arg-type]
    _until(lambda: not agent._desk.held_refs())
    broker.assign(("b", "site-1"), model=weights(1.0))
    broker.done("b")
    assert _versions(tmp_path) == {"b.1": {"n": 1}}


def test_the_current_version_outlives_what_comes_late_to_its_agent(broker, trained, weights, tmp_path):
    """Its result is stored, nobody hears of it, and a new process asks with the upload whether it is wanted."""
    broker.store = False
    agent = trained(size=50_000)
    broker.assign(("a", "site-1"), model=weights(1.0))
    broker.done("a")
    agent.stop()
    broker.messages.clear()
    broker.put_errors = [FaultError("closed", "task a is over")]
    again = trained(size=50_000)
    broker.done("a")  # whether it was this result that ended the task is said to its Done alone
    broker.store = True
    broker.say(Stored(refused=(Refusal("a", 1, "late", ""),)))  # type: ignore[arg-type]
    _until(lambda: not again._desk.held_refs())
    broker.versions["site-1"] = "a.1"
    broker.assign(("b", "site-1"), model=weights(1.0))
    broker.done("b")
    assert _versions(tmp_path) == {"a.1": {"n": 1}, "b.1": {"n": 2}}


def test_two_results_of_a_site_may_be_stored_in_any_order(broker, trained, weights, tmp_path):
    broker.store = False
    agent = trained(capacity=2)
    for task in ("a", "b"):
        broker.assign((task, "site-1"), model=weights(1.0))
        broker.done(task)
    refs = sorted(agent._desk.held_refs(), key=lambda ref: ref.task)
    broker.say(Stored(tasks=(refs[1],)))
    broker.say(Stored(tasks=(refs[0],)))
    _until(lambda: not agent._desk.held_refs())
    broker.store = True
    broker.versions["site-1"] = "b.1"
    broker.assign(("c", "site-1"), model=weights(1.0))
    broker.done("c")
    assert _versions(tmp_path) == {"b.1": {"n": 1}, "c.1": {"n": 2}}


def test_a_redo_starts_from_an_older_version_and_leaves_the_current_one(broker, trained, weights, tmp_path):
    trained()
    for task in ("a", "b"):
        broker.assign((task, "site-1"), model=weights(1.0))
        broker.done(task)
    broker.versions["site-1"] = "a.1"
    broker.assign(("b-again", "site-1"), model=weights(1.0), redo=1)
    broker.done("b-again")
    assert _versions(tmp_path) == {"a.1": {"n": 1}, "b.1": {"n": 2}, "b-again.1": {"n": 2}}
    broker.assign(("c", "site-1"), model=weights(1.0))
    broker.done("c")
    assert _versions(tmp_path) == {"b-again.1": {"n": 2}, "c.1": {"n": 3}}


def test_a_payload_that_the_broker_does_not_take_is_given_back(broker, trained, weights):
    broker.put_errors = [FaultError("quota", "no room")]
    agent = trained(size=50_000)
    broker.assign(("a", "site-1"), model=weights(1.0))
    failed = broker.failed("a")
    assert failed.retryable and failed.code == "not_taken" and "no room" in failed.text  # a try that counts
    _until(lambda: not agent._desk.held_refs() and not len(agent._desk.outbox))


def test_a_co_located_result_is_written_where_the_broker_wants_it(broker, trained, weights, tmp_path):
    class Local:
        def incoming_path(self, name):
            return tmp_path / "incoming" / name

    (tmp_path / "incoming").mkdir()
    broker.local = Local()
    trained(size=50_000)
    broker.assign(("a", "site-1"), model=weights(1.0))
    item = broker.done("a")
    assert broker.result(item).params["w"].size == 50_000
    assert broker.puts[0][1] == {"job": "job-1", "task": "a", "attempt": 1}


def _versions(tmp_path) -> dict[str, dict[str, int]]:
    return {path.name: load_state(path) for path in (tmp_path / "work/sites/site-1/state/job-1").iterdir()}


def _until(true, timeout_s: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)
