"""Evaluation over the real core: the whole matrix, resumed wherever the process dies; several workflows in a job."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fedloom.controller import job as job_process
from fedloom.controller.workflow import Workflow
from fedloom.controller.workflows.crosssite import MOST_HELD, CrossSiteEval, GlobalModelEval
from fedloom.controller.workflows.evalplan import EvalMemory, EvalPlan, in_order
from fedloom.controller.workflows.fedavg import FedAvg
from fedloom.serialization.errors import GatherError, JobError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

ROUNDS = 2


def number(site: str) -> int:
    return int(site.rpartition("-")[2])


def own_model(site: str) -> Any:
    return np.full(64, number(site) + 1, np.float32)


def score(site: str, params: Any) -> float:
    (array,) = params.values()
    return float(np.mean(array, dtype=np.float64)) + 100 * number(site)


def answering(f: Any, tools: Any, fails: Any = lambda task, site: None) -> Any:
    """Sites that train, submit their own model and score what they are given; ``fails`` has another answer."""

    def train(site: str, round: int, received: FLModel) -> Any:
        task = f.assign.name
        if (other := fails(task, site)) is not None:
            return other
        if task == "submit_model":
            assert received.params is None
            return FLModel(params={"w": own_model(site)})
        if task == "validate":
            return FLModel(metrics={"accuracy": score(site, received.params)})
        return tools.steady(site, round, received)

    f.train = train
    return f


def flows(f: Any, tools: Any, *extra: Any, **options: Any) -> list[Any]:
    """The components of a job: FedAvg, and what else it runs."""
    path = f.fed.app_dir / "initial.safetensors"
    if not path.exists():
        with path.open("wb") as file:
            encode_model(tools.model_of()).write_to(file)

    def fedavg() -> FedAvg:
        return FedAvg(num_rounds=ROUNDS, min_clients=3, initial_model=path.name)

    return [SimpleNamespace(path="FedAvg", build=fedavg), *(extra or [cross_site(**options)])]


def cross_site(**options: Any) -> Any:
    return SimpleNamespace(path="CrossSiteEval", build=lambda: CrossSiteEval(**options))


def run(f: Any, workflows: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The job process's own loop over the workflows."""
    f.fed.spec = replace(f.fed.spec, workflows=tuple(workflows))
    monkeypatch.setattr(job_process, "_prepare", lambda *args: f.fed)
    return job_process._run(f.link, f.inbox, f.claimed, f.world.store)


def records(f: Any) -> list[dict[str, Any]]:
    return [{"round": round_, **record} for _, round_, record in f.world.journal.records(f.fed.job, 0, 1000)]


def matrix(f: Any) -> dict[str, dict[str, Any]]:
    """{data site: {model: scores}} as the records have it."""
    out: dict[str, dict[str, Any]] = {}
    for record in records(f):
        for site, scores in record.get("scores", {}).items():
            out.setdefault(site, {})[record["evaluation"]["model"]] = scores
    return out


def test_whole_matrix_behind_training(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools)
    assert run(f, flows(f, tools), monkeypatch) == ("FINISHED:COMPLETED", "")
    found = matrix(f)
    assert list(found) == f.names
    commit = f.world.core.state.jobs.jobs[f.fed.job].commit
    for site, row in found.items():
        assert list(row) == ["SRV_model", "SRV_best_model", *f.names]
        for owner in f.names:
            assert row[owner] == {"accuracy": score(site, {"w": own_model(owner)})}
        assert row["SRV_model"] == {"accuracy": score(site, f.fed.model().params)}
    numbers = [record["round"] for record in records(f)]
    assert numbers == list(range(ROUNDS + 1 + 2 + len(f.names))), "the rounds count through both workflows"
    assert [record.get("workflow", 0) for record in records(f)] == [0] * ROUNDS + [1] * (len(numbers) - ROUNDS)
    assert commit.workflow == 1
    assert commit.first == ROUNDS
    assert commit.best is not None
    last = records(f)[-1]
    assert last["metrics"] == {
        "accuracy": pytest.approx(np.mean([score(s, {"w": own_model("site-2")}) for s in f.names]))
    }
    assert last["results"] == last["tasks"] == 3


def test_sites_models_go_on_as_they_lie_in_the_spool(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools)
    f.singly = True
    seen: list[tuple[str, str]] = []
    plain = f.train

    def train(site: str, round: int, received: FLModel) -> Any:
        if f.assign.name == "validate":
            seen.append((site, f.assign.payload.id))
        return plain(site, round, received)

    f.train = train
    run(f, flows(f, tools), monkeypatch)
    own = [payload for _, payload in seen if payload.startswith("r-")]
    assert len(own) == 9
    assert len(set(own)) == 3
    assert not {ref.id for ref in f.link.puts} & set(own)
    left = set(f.world.core.state.payloads.rows)
    assert not left & set(own), "and are let go of once they were scored"


@pytest.mark.parametrize("dies_in", ["gather", "commit_state"])
@pytest.mark.parametrize(("round", "singly"), [*((round, True) for round in range(1, 6)), (3, False), (5, False)])
def test_another_process_goes_on(
    farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, round: int, dies_in: str, singly: bool
) -> None:
    f = answering(farm(), tools)
    f.singly = singly
    original = getattr(f.fed, dies_in)

    def dying(*args: Any, **options: Any) -> Any:
        got = original(*args, **options)
        if f.fed.workflow == 1 and options["round"] == round:
            raise KeyboardInterrupt
        return got

    setattr(f.fed, dies_in, dying)
    with pytest.raises(KeyboardInterrupt):
        run(f, flows(f, tools), monkeypatch)
    f.die()
    f.process()
    assert run(f, flows(f, tools), monkeypatch) == ("FINISHED:COMPLETED", "")
    calm = answering(farm(), tools)
    calm.singly = singly
    run(calm, flows(calm, tools), monkeypatch)
    assert matrix(f) == matrix(calm)
    assert sorted(f.calls) == sorted(calm.calls), "no site is asked twice"
    strip = ("seconds", "fold_seconds")
    plain = [[{k: v for k, v in record.items() if k not in strip} for record in records(each)] for each in (f, calm)]
    assert plain[0] == plain[1]


def test_dies_between_the_workflows(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools)
    with pytest.raises(KeyboardInterrupt):
        run(f, flows(f, tools, SimpleNamespace(path="x", build=_interrupt)), monkeypatch)
    f.die()
    f.process()
    assert run(f, flows(f, tools), monkeypatch) == ("FINISHED:COMPLETED", "")
    assert [record["round"] for record in records(f)] == list(range(ROUNDS + 6))
    assert sorted(c for c in f.calls if c[1] < ROUNDS) == sorted((s, r) for s in f.names for r in range(ROUNDS))


def _interrupt() -> Any:
    raise KeyboardInterrupt


# ---------------------------------------------------------------- several workflows


@pytest.mark.parametrize("dies_at", [None, (0, 1), (1, 0), (1, 1)])
def test_fedavg_twice(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, dies_at: tuple[int, int] | None) -> None:
    """The second one starts with the first one's model, at its own round 0, with none of the first one's memory."""
    f = answering(farm(), tools)
    fedavg = flows(f, tools)[0]
    seen: list[tuple[int, int, bool]] = []
    commit = f.fed.commit

    def watched(*args: Any, **options: Any) -> Any:
        got = commit(*args, **options)
        seen.append((f.fed.workflow, options["round"], bool(options["best"])))
        if dies_at == (f.fed.workflow, options["round"]):
            raise KeyboardInterrupt
        return got

    f.fed.commit = watched
    if dies_at is None:
        assert run(f, [fedavg, fedavg], monkeypatch) == ("FINISHED:COMPLETED", "")
        # the score of round 1 is of a trained model; that of the second workflow's round 0 starts a comparison anew
        assert seen == [(0, 0, False), (0, 1, True), (1, 0, False), (1, 1, True)]
    else:
        with pytest.raises(KeyboardInterrupt):
            run(f, [fedavg, fedavg], monkeypatch)
        f.die()
        f.process()
        assert run(f, [fedavg, fedavg], monkeypatch) == ("FINISHED:COMPLETED", "")
    assert [record["round"] for record in records(f)] == [0, 1, 2, 3]
    assert sorted(f.calls) == sorted((site, round) for site in f.names for round in range(4))
    value = tools.model_of()
    for round in range(4):
        results = [tools.steady(site, round, value) for site in f.names]
        total = sum(r.params["w"].astype(np.float64) * r.meta[tools.STEPS] for r in results)
        value = tools.model_of(total / 6)
    assert np.allclose(f.fed.model().params["w"], value.params["w"], atol=1e-5)


def test_sites_are_told_the_workflows_own_rounds(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools)
    told: list[tuple[int, Any]] = []
    plain = f.train

    def train(site: str, round: int, received: FLModel) -> Any:
        told.append((round, f.assign.config.get("first_round", 0)))
        return plain(site, round, received)

    f.train = train
    fedavg = flows(f, tools)[0]
    run(f, [fedavg, fedavg], monkeypatch)
    assert {(round, round - first) for round, first in told} == {(0, 0), (1, 1), (2, 0), (3, 1)}


def test_a_workflow_without_commits_keeps_its_gathers_apart(
    farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = answering(farm(), tools)

    class Ask(Workflow):
        def run(self, fed: Any) -> None:
            assert len(list(fed.gather("validate", tools.model_of(), round=0))) == 3

    ask = SimpleNamespace(path="Ask", build=Ask)
    assert run(f, [ask, ask, flows(f, tools)[0]], monkeypatch) == ("FINISHED:COMPLETED", "")
    assert sorted(f.calls) == sorted((site, round) for site in f.names for round in range(2 + ROUNDS))


# ---------------------------------------------------------------- failures


def test_a_site_that_fails_to_score(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ValueError("Traceback: no data here")
    f = answering(farm(), tools, lambda task, site: broken if (task, site) == ("validate", "site-1") else None)
    assert run(f, flows(f, tools), monkeypatch)[0] == "FINISHED:COMPLETED"
    found = matrix(f)
    assert set(found["site-1"]) == {"SRV_model", "SRV_best_model", *f.names}
    assert all(entry == {"failed": {"code": "user_error"}} for entry in found["site-1"].values())
    assert all("accuracy" in entry for site in ("site-0", "site-2") for entry in found[site].values())
    failures = [failure for record in records(f) for failure in record["failures"]]
    assert len(failures) == 5
    assert {failure["site"] for failure in failures} == {"site-1"}
    assert failures[0]["text"] == "validate SRV_model: Traceback: no data here"


def test_a_site_that_submits_nothing(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, Any] = {"site-0": ValueError("boom"), "site-1": FLModel(metrics={"x": 1.0})}
    f = answering(farm(), tools, lambda task, site: wrong.get(site) if task == "submit_model" else None)
    assert run(f, flows(f, tools), monkeypatch)[0] == "FINISHED:COMPLETED"
    by_model = {record["evaluation"]["model"]: record for record in records(f) if "scores" in record}
    assert by_model["site-0"]["evaluation"]["failed"] == {"code": "user_error"}
    assert by_model["site-1"]["evaluation"]["failed"] == {"code": "no_model"}
    assert "submit_model site-1" in by_model["site-1"]["failures"][0]["text"]
    assert by_model["site-0"]["scores"] == {}
    assert len(by_model["site-2"]["scores"]) == 3


def test_an_answer_without_metrics(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trains = FLModel(params={"w": np.ones(64, np.float32)})
    f = answering(farm(), tools, lambda task, site: trains if (task, site) == ("validate", "site-2") else None)
    assert run(f, flows(f, tools), monkeypatch)[0] == "FINISHED:COMPLETED"
    assert matrix(f)["site-2"]["SRV_model"] == {"failed": {"code": "no_metrics"}}


def test_nothing_scored_is_a_failed_job(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools, lambda task, site: ValueError("Traceback: boom") if task != "train" else None)
    status, reason = run(f, flows(f, tools), monkeypatch)
    assert status == "FINISHED:FAILED"
    assert reason.startswith(f"round {ROUNDS + 1}, validate: no site has scored any model\nsite-")
    assert reason.endswith("user_error\nTraceback: boom")
    assert len(matrix(f)) == 3, "the matrix says of each entry that it failed"


def test_a_site_that_is_silent(farm: Any, tools: Any) -> None:
    f = answering(farm(), tools)
    f.executors = [executor for executor in f.executors if "site-1" not in executor.sites]  # it is up, and says nothing
    (f.fed.app_dir / "m.npy").write_bytes(_npy(np.ones(64, np.float32)))
    GlobalModelEval(models={"m": "m.npy"}, validation_timeout=3).run(f.fed)
    record = records(f)[1]
    assert record["scores"]["site-1"] == {"failed": {"code": "timeout"}}
    assert record["failures"] == [{"site": "site-1", "code": "timeout", "text": "validate SRV_m: no answer within 3 s"}]
    assert record["results"] == 2


def _npy(array: Any) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_models_out_of_files(farm: Any, tools: Any) -> None:
    f = farm()
    (f.fed.app_dir / "custom").mkdir()
    for name, place in (("a", "a.npy"), ("b", "custom/b.npy")):
        (f.fed.app_dir / place).write_bytes(_npy(np.full(3, ord(name), np.float32)))
    f.train = lambda site, round, model: FLModel(metrics={"mean": float(model.params["numpy_key"].mean())})
    GlobalModelEval(models={"b": "b.npy", "a": "a.npy"}).run(f.fed)
    assert matrix(f) == {site: {"SRV_a": {"mean": 97.0}, "SRV_b": {"mean": 98.0}} for site in f.names}


def test_no_model_at_all(farm: Any) -> None:
    with pytest.raises(JobError, match="no model to evaluate"):
        GlobalModelEval().run(farm().fed)


@pytest.mark.parametrize(
    ("file", "why"), [("m.pt", "travels with a job ends in"), ("../m.npy", "leads out of the job's folder")]
)
def test_a_job_carries_no_files_of_torch_and_none_of_its_neighbours(farm: Any, file: str, why: str) -> None:
    f = farm()
    (f.fed.app_dir / file).write_bytes(_npy(np.ones(3, np.float32)))
    with pytest.raises(JobError, match=why):
        GlobalModelEval(models={"m": file}).run(f.fed)


def test_scores_too_large_for_a_record_are_not_cut(farm: Any, tools: Any) -> None:
    f = farm()
    (f.fed.app_dir / "m.npy").write_bytes(_npy(np.ones(3, np.float32)))
    f.train = lambda site, round, model: FLModel(metrics={f"metric-{n:040}": 0.5 for n in range(400)})
    with pytest.raises(JobError, match="sites_at_once"):
        GlobalModelEval(models={"m": "m.npy"}).run(f.fed)
    f.die()
    f.process()
    f.fed.commit_ref = None
    g = farm()
    g.train = f.train
    (g.fed.app_dir / "m.npy").write_bytes(_npy(np.ones(3, np.float32)))
    GlobalModelEval(models={"m": "m.npy"}, sites_at_once=1).run(g.fed)
    assert [len(record["scores"]) for record in records(g)[1:]] == [1, 1, 1]


def test_metrics_that_are_not_finite_are_shown(farm: Any) -> None:
    f = farm()
    (f.fed.app_dir / "m.npy").write_bytes(_npy(np.ones(3, np.float32)))
    f.train = lambda site, round, model: FLModel(metrics={"loss": float("nan" if site == "site-0" else "2")})
    GlobalModelEval(models={"m": "m.npy"}).run(f.fed)
    assert matrix(f)["site-0"]["SRV_m"] == {"loss": "nan"}
    assert records(f)[1]["metrics"] == {"loss": 2.0}


# ---------------------------------------------------------------- the plan


def test_the_plan_covers_everything_once() -> None:
    for sites, models, batch, at_once in ((5, 2, 2, 2), (1, 0, 1, 1), (7, 1, 16, 100), (4, 0, 3, 3)):
        names = tuple(f"site-{n}" for n in range(sites))
        plan = EvalPlan(names, tuple((f"m{n}", f"{n}.npy") for n in range(models)), names, batch, at_once)
        steps = list(plan.steps())
        assert [step.round for step in steps] == list(range(1, plan.rounds))
        pairs = [(step.model, site) for step in steps for site in step.sites]
        assert len(pairs) == len(set(pairs)) == (models + sites) * sites
        for step in steps:
            if step.owner:
                last = max(other.round for other in steps if other.owner in step.batch)
                assert step.held == last, "its models are kept until all of them were scored"
                assert len(step.batch) <= batch
        assert EvalMemory.of(EvalMemory(plan, 3, "x").encode()).plan == plan


def test_a_small_spool_holds_few_models(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    size = encode_model(tools.model_of()).size
    for room, batch in ((0, MOST_HELD), (5 * size, 2), (10, 1)):
        f = answering(farm(), tools)
        monkeypatch.setattr(f.fed, "spool", lambda room=room: SimpleNamespace(quota_bytes=room, room_bytes=room))
        gather = f.fed.gather

        def watched(name: str, *args: Any, gather: Any = gather, **options: Any) -> Any:
            if name == "submit_model":
                asked.append(options["sites"])
            return gather(name, *args, **options)

        f.fed.gather = watched
        assert run(f, flows(f, tools), monkeypatch)[0] == "FINISHED:COMPLETED"
        assert asked == [tuple(f.names[at : at + batch]) for at in range(0, 3, batch)]
        assert len(matrix(f)["site-0"]) == 5
        asked.clear()


def test_names() -> None:
    assert in_order(["site-10", "b", "site-2", "site-2"]) == ("b", "site-2", "site-10")
    with pytest.raises(JobError, match="SRV_model"):
        EvalPlan(("SRV_model",), (("model", "x"),), ("SRV_model",))
    with pytest.raises(JobError, match="one name"):
        EvalPlan(("a",), (("model", "x"), ("model", "y")))


def test_bad_options() -> None:
    for options in (
        {"validation_timeout": -1},
        {"submit_model_timeout": float("nan")},
        {"participating_clients": []},
        {"participating_clients": ["a", "a"]},
        {"participating_clients": ["../x"]},
        {"sites_at_once": 0},
    ):
        with pytest.raises(JobError):
            CrossSiteEval(**options)


def test_sites_that_are_not_named_are_waited_for(farm: Any, tools: Any) -> None:
    f = answering(farm(), tools)
    f.fed._sites = ()
    assert f.fed.sites(3) == tuple(f.names)
    # a fourth one comes while it waits
    f.events = [lambda: f.executors.append(f.world.executor("site-3"))]
    assert f.fed.sites(4, 30.0) == (*f.names, "site-3")
    with pytest.raises(GatherError, match=r"of 5 sites connected within 0\.2 s"):
        f.fed.sites(5, 0.2)


def test_behind_a_training_that_stops_early(farm: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = answering(farm(), tools)
    training = flows(f, tools)[0].build().initial_model

    def fedavg() -> FedAvg:
        return FedAvg(num_rounds=5, min_clients=3, initial_model=training, stop_cond="accuracy >= 1")

    job = [SimpleNamespace(path="FedAvg", build=fedavg), cross_site()]
    with pytest.raises(KeyboardInterrupt):
        run(f, [job[0], SimpleNamespace(path="x", build=_interrupt)], monkeypatch)
    f.die()
    f.process()
    assert run(f, job, monkeypatch) == ("FINISHED:COMPLETED", "")
    assert [record.get("workflow", 0) for record in records(f)] == [0] * 2 + [1] * 6
    assert max(round for site, round in f.calls if site == "site-0") == 7, "no third round was trained"
