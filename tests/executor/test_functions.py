"""Function tasks: embedded in this process, and in worker processes of a job."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from fedloom.executor.function import Executor
from fedloom.serialization.errors import FaultError, JobError
from fedloom.serialization.messages import Cancel, Event, Fault, Progress, TaskRef
from fedloom.serialization.model import FLModel

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def make_executor(broker, tmp_path):
    made = []

    def make(**options):
        options = {"site": "site-1", "workspace": tmp_path / "work", "link_factory": broker.factory} | options
        made.append(Executor("fake", **options))
        return made[-1]

    yield make
    for executor in made:
        executor.stop()


def test_a_function_trains_in_this_process_with_its_context(broker, make_executor, weights):
    executor = make_executor()
    seen = []

    @executor.task("train")
    def train(model, ctx):
        seen.append((threading.current_thread().name, ctx.site, ctx.job, ctx.round, ctx.config, ctx.seed))
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        ctx.log("loss", np.float32(0.5), step=3)
        ctx.progress(0.5, "half")
        return FLModel(
            params={"w": model.params["w"] * 2}, metrics={"n": ctx.state["n"]}, meta={"r": model.current_round}
        )

    with executor:
        assert executor.running
        for round in range(2):
            broker.assign((f"t{round}", "site-1"), round=round, model=weights(2.0), config={"lr": 0.1}, seed=4)
            item = broker.done(f"t{round}")
            assert item.meta["metrics"] == {"n": round + 1} and item.meta["meta"] == {"r": round}
            assert item.state == f"t{round}.1"
        assert np.array_equal(broker.result(item).params["w"], np.full((2, 3), 4.0, np.float32))
        event = broker.wait(lambda m, _: isinstance(m, Event))[0]
        ((number, point),) = event.data["sites"]["site-1"]
        assert number == event.data["first"] == 0 and abs(point.pop("at") - time.time()) < 120
        assert point == {"key": "loss", "value": 0.5, "type": "SCALAR", "round": 0, "global_step": 3}
        assert broker.wait(lambda m, _: isinstance(m, Progress))[0].note == "half"
    assert not executor.running and executor.wait(1)
    assert seen[0][0].startswith("fedloom-task") and seen[0][1:5] == ("site-1", "job-1", 0, {"lr": 0.1})
    assert seen[0][5] != seen[1][5]
    assert not [t for t in threading.enumerate() if t.name.startswith("fedloom-agent")]
    assert train(weights(1.0), seen and _context()).params["w"][0, 0] == 2.0  # the function stays the user's own


def test_a_function_without_a_second_parameter_gets_the_model_alone(broker, make_executor, weights):
    executor = make_executor()
    executor.task("train")(lambda model: FLModel(params={"w": model.params["w"] + 1}))
    with executor:
        broker.assign(("t", "site-1"), model=weights(2.0))
        assert np.all(broker.result(broker.done("t")).params["w"] == 3.0)


def _context():
    from fedloom.executor.context import TaskContext

    return TaskContext("s", "j", "train", 0, 1, 5)


def test_its_mistakes_are_told_with_the_users_own_frames_only(broker, make_executor, weights):
    executor = make_executor(capacity=2)

    @executor.task("train")
    def train(model, ctx):
        raise KeyError("no such thing")

    @executor.task("validate")
    def validate(model, ctx):
        return {"accuracy": 1.0}

    executor.start()
    broker.assign(("a", "site-1"), model=weights(2.0))
    failed = broker.failed("a")
    assert "no such thing" in failed.text and "test_functions.py" in failed.text and not failed.retryable
    assert "host.py" not in failed.text
    broker.assign(("b", "site-1"), name="validate", model=weights(2.0))
    assert "returned dict; an FLModel" in broker.failed("b").text
    broker.assign(("c", "site-1"), name="unheard_of", model=weights(2.0))
    assert "unheard_of" in broker.failed("c").text


def test_async_functions_wildcards_and_cancelling(broker, make_executor, weights):
    executor = make_executor(capacity=2, sites=("site-2",))
    begun = threading.Event()
    cancelled = threading.Event()

    @executor.task("*")
    async def anything(model, ctx):
        await asyncio.sleep(0)
        if ctx.site == "site-2":
            begun.set()
            for _ in range(1000):
                if ctx.cancelled:
                    cancelled.set()
                    break
                await asyncio.sleep(0.01)
        return FLModel(metrics={"site": 1.0})

    executor.start()
    broker.assign(("a", "site-1"), ("b", "site-2"), name="whatever", model=weights(2.0))
    assert broker.done("a").meta["metrics"] == {"site": 1.0}
    assert begun.wait(10)
    broker.say(Cancel("job-1", (TaskRef("b", 1),)))
    assert cancelled.wait(10)
    broker.assign(("c", "site-1"), name="whatever", model=weights(2.0))
    broker.done("c")
    assert "b" not in [i.task for m, _ in broker.messages for i in getattr(m, "items", ())]


def test_the_asyncio_face_and_a_fatal_fault(broker, make_executor):
    executor = make_executor()
    executor.task("train")(lambda model, ctx: model)

    async def main():
        async with executor:
            waiting = asyncio.create_task(executor.wait_async())
            await asyncio.sleep(0)
            broker.say(Fault("name_taken", "site-1 is served elsewhere", fatal=True))
            with pytest.raises(FaultError, match="served elsewhere"):
                await asyncio.wait_for(waiting, 20)

    asyncio.run(main())
    assert broker.link.closed.is_set()


def test_wrong_use_is_told_at_once(broker, make_executor, tmp_path):
    with pytest.raises(JobError, match="needs a site"):
        Executor("fake")
    with pytest.raises(JobError, match="site name"):
        Executor("fake", site="../etc")
    executor = make_executor()
    with pytest.raises(JobError, match="no task function"):
        executor.start()
    executor.task("train")(lambda model, ctx: model)
    with pytest.raises(JobError, match="already"):
        executor.task("train")
    broker.refuse = FaultError("name_taken", "site-1 is taken")
    with pytest.raises(FaultError, match="taken"):
        executor.start()
    broker.refuse = None
    executor.start()
    other = make_executor()
    other.task("train")(lambda model, ctx: model)
    with pytest.raises(JobError, match="another executor works in"):
        other.start()


@pytest.mark.process
def test_a_jobs_function_runs_in_worker_processes_for_any_site(broker, make_agent, make_job, weights, tmp_path):
    script = """
import os, random
import numpy as np
from fedloom.client import FLModel
print("imported")

def fit(model, ctx):
    print("fit", ctx.site, os.path.basename(os.getcwd()))
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    if ctx.config.get("fail") == ctx.site:
        raise RuntimeError("on purpose")
    if ctx.config.get("die") == ctx.site:
        os._exit(3)
    return FLModel(params=model.params, metrics={"pid": os.getpid(), "n": ctx.state["n"], "draw": np.random.random()})
"""
    archive = make_job({"client.py": script}, "fedloom.executor.script.FunctionExecutor", function="fit")
    sites = tuple(f"site-{i}" for i in range(1, 6))
    make_agent(sites=sites, pool="p", capacity=2)
    pids, draws = set(), set()
    for round in range(2):
        broker.assign(*[(f"{s}-{round}", s) for s in sites], round=round, model=weights(1.0), archive=archive)
        for site in sites:
            metrics = broker.done(f"{site}-{round}").meta["metrics"]
            assert metrics["n"] == round + 1
            pids.add(metrics["pid"])
            draws.add(metrics["draw"])
    assert len(pids) == 2 and len(draws) == 10
    log = (tmp_path / "work/logs/job-1/site-3.log").read_text()
    assert log.count("fit site-3 site-3") == 2
    broker.assign(("x", "site-1"), round=2, model=weights(1.0), archive=archive, config={"fail": "site-1"})
    assert "on purpose" in broker.failed("x").text
    broker.assign(("y", "site-2"), round=3, model=weights(1.0), archive=archive, config={"die": "site-2"})
    failed = broker.failed("y")
    assert failed.killed and "exit code 3" in failed.text and failed.text.count("fit site-2 site-2") == 1
    broker.assign(("y", "site-2", 2), round=3, model=weights(1.0), archive=archive)
    assert broker.done("y", 2).meta["metrics"]["n"] == 3


@pytest.mark.process
def test_a_function_that_cannot_be_imported(broker, make_agent, make_job, weights):
    make_agent()
    kind = "fedloom.executor.script.FunctionExecutor"
    broker.assign(("a", "site-1"), model=weights(1.0), archive=make_job({"client.py": "1/0"}, kind, function="fit"))
    assert "ZeroDivisionError" in broker.failed("a").text
    archive = make_job({"client.py": "x = 1"}, kind, function="fit")
    broker.assign(("b", "site-1"), job="job-2", model=weights(1.0), archive=archive)
    assert "no function 'fit'" in broker.failed("b").text
