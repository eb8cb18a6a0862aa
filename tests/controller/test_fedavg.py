"""FedAvg over the real core: rounds, resumption, the best model; and what `Federation` promises its workflows."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.controller import job as job_process
from fedloom.controller.mailbox import JobAborted
from fedloom.controller.workflow import Workflow
from fedloom.controller.workflows.fedavg import FedAvg
from fedloom.serialization.errors import FencedError, JobError, LinkError
from fedloom.serialization.messages import Ask, EndJob
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model


def workflow(f: Any, tools: Any, **options: Any) -> FedAvg:
    initial = options.pop("initial", None) or tools.model_of()
    path = f.fed.app_dir / "initial.safetensors"
    if not path.exists():
        with path.open("wb") as file:
            encode_model(initial).write_to(file)
    return FedAvg(**{"num_rounds": 3, "min_clients": 3, "initial_model": path.name, **options})


def committed(f: Any) -> tuple[int, bytes, bytes]:
    """The job's last commit: round, model's and best model's bytes."""
    commit = f.world.core.state.jobs.jobs[f.fed.job].commit
    read = f.world.core.state.spool.read
    return commit.round, read(commit.model.id, 1 << 20), read(commit.best.id, 1 << 20) if commit.best else b""


def test_three_rounds(farm: Any, tools: Any) -> None:
    f = farm()
    workflow(f, tools).run(f.fed)
    value = tools.model_of()
    for round in range(3):
        total = np.zeros(64)
        for site in f.names:
            result = tools.steady(site, round, value)
            total += result.params["w"].astype(np.float64) * float(Fraction(result.meta[tools.STEPS], 6))
        value = tools.model_of(total)
    assert committed(f)[0] == 2
    assert np.allclose(f.fed.model().params["w"], value.params["w"], atol=1e-6)
    records = f.world.journal.records(f.fed.job, 0, 10)
    assert [record["results"] for _, _, record in records] == [3, 3, 3]
    # the model that round 2 received was scored 2.0 there, better than 1.0 and 0.0: it is round 1's
    assert [record["best"] for _, _, record in records] == [False, True, True]
    _, last, best = committed(f)
    assert best != last
    assert len({ref.id for ref in f.link.puts}) == len(f.link.puts), "nothing is sent twice"


@pytest.mark.parametrize("dies_in", ["gather", "commit"])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_another_process_goes_on_with_the_same_bits(farm: Any, tools: Any, round: int, dies_in: str) -> None:
    calm = farm()
    workflow(calm, tools).run(calm.fed)
    f = farm()
    original = getattr(f.fed, dies_in)

    def dying(*args: Any, **options: Any) -> Any:
        got = original(*args, **options)
        if options["round"] == round:
            raise KeyboardInterrupt
        return got

    setattr(f.fed, dies_in, dying)
    with pytest.raises(KeyboardInterrupt):
        workflow(f, tools).run(f.fed)
    f.die()
    f.process()
    workflow(f, tools).run(f.fed)
    assert committed(f) == committed(calm)
    assert sorted(f.calls) == sorted((site, r) for site in f.names for r in range(3)), "no task is done twice"


def test_a_narrow_model_keeps_its_master_over_a_crash(farm: Any, tools: Any) -> None:
    initial = FLModel(params={"w": np.linspace(-1, 1, 64).astype(ml_dtypes.bfloat16)})

    def train(site: str, round: int, model: FLModel) -> FLModel:
        step = np.float32(2.0**-11)  # less than bf16 resolves at 1: only the float32 master can add it up
        return FLModel(params={"w": (model.params["w"].astype(np.float32) * (1 + step)).astype(ml_dtypes.bfloat16)})

    results: list[Any] = []
    for crash in (False, True):
        f = farm()
        f.train = train
        if crash:
            workflow(f, tools, num_rounds=2, initial=initial).run(f.fed)
            f.die()
            f.process()
        workflow(f, tools, num_rounds=4, initial=initial).run(f.fed)
        results.append((committed(f)[1], f.fed.state().params["master.w"].tobytes()))
    assert results[0] == results[1]


def test_bad_options() -> None:
    for options in ({"num_rounds": 0}, {"min_clients": 0}, {"params_transfer_type": "HALF"}):
        with pytest.raises(JobError):
            FedAvg(**{"num_rounds": 1, "min_clients": 1, **options})


def test_no_initial_model(farm: Any) -> None:
    f = farm()
    with pytest.raises(JobError, match="no initial model"):
        f.fed.model()
    with pytest.raises(JobError, match=r"missing\.safetensors"):
        f.fed.model("missing.safetensors")


# ---------------------------------------------------------------- federation


def test_a_model_changed_in_place_is_another_payload(farm: Any, tools: Any) -> None:
    f = farm()
    model = tools.model_of()
    first = f.fed.put_model(model)
    assert f.fed.put_model(model) == first
    assert len(f.link.puts) == 1
    model.params["w"][0] = 77
    assert f.fed.put_model(model) != first
    f.fed.commit(model, round=0)
    assert f.fed.model().params["w"][0] == 77


def test_what_a_commit_lets_go_is_put_again(farm: Any, tools: Any) -> None:
    f = farm()
    old = tools.model_of()
    f.fed.put_model(old)
    f.fed.commit(tools.model_of(np.ones(3)), round=0)
    assert f.fed.commit(old, round=1)
    assert len(f.link.puts) == 3


def test_abort_and_fence(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = lambda site, round, model: ValueError()
    client = f.world.client()
    f.events = [lambda: client.send(Ask(client.ref(), "abort", f.fed.job))]
    with pytest.raises(JobAborted):
        list(f.fed.gather("train", tools.model_of(), round=0))
    with pytest.raises(FencedError):
        f.fed.commit(tools.model_of(), round=0)


def test_closed_link_ends_the_wait(farm: Any, tools: Any) -> None:
    f = farm()
    gather = f.fed.gather("train", tools.model_of(), round=0)
    f.executors.clear()
    f.link.close()
    f.inbox.get = lambda timeout_s: None
    with pytest.raises(LinkError, match="round 0, train"):
        list(gather)


# ---------------------------------------------------------------- the job's own process


class Flow:
    """Stands for a component that builds a workflow."""

    path = "x.Y"

    def __init__(self, run: Any) -> None:
        self._run = run

    def build(self) -> Any:
        outer = self._run

        class Made(Workflow):
            def run(self, fed: Any) -> None:
                outer(fed)

        return Made()


def end_of(f: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[str, str]:
    f.fed.spec = SimpleNamespace(workflows=(Flow(run),))
    monkeypatch.setattr(job_process, "_prepare", lambda *args: f.fed)
    return job_process._run(f.link, f.inbox, f.claimed, f.world.store)


def raising(error: BaseException) -> Any:
    def run(fed: Any) -> None:
        raise error

    return run


def test_how_a_job_ends(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = farm()
    assert end_of(f, monkeypatch, lambda fed: None) == ("FINISHED:COMPLETED", "")
    assert end_of(f, monkeypatch, raising(JobError("what to do"))) == ("FINISHED:FAILED", "what to do")
    for error in (ZeroDivisionError("mine"), SystemExit(0)):
        status, text = end_of(f, monkeypatch, raising(error))
        assert status == "FINISHED:FAILED"
        assert type(error).__name__ in text
        assert "raising" in text or "run" in text
    status, text = end_of(f, monkeypatch, raising(ValueError("\udcff" * 100_000)))
    f.link.request(EndJob(f.link.next_ref(), f.fed.job, f.fed.claim, status, text))
    assert f.world.core.state.jobs.jobs[f.fed.job].status == "FINISHED:FAILED"
    for error in (LinkError("gone"), FencedError("fenced", "other")):
        with pytest.raises(type(error)):
            end_of(f, monkeypatch, raising(error))
    f.link.fatal = FencedError("gone", "no broker")
    with pytest.raises(LinkError):
        end_of(f, monkeypatch, raising(JobError("no broker")))
