"""Filters at the server, and mandatory clients, over the real core."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.controller.filters import ServerFilters, filled
from fedloom.controller.workflows.fedavg import FedAvg
from fedloom.serialization.component import Component
from fedloom.serialization.errors import GatherError, JobError
from fedloom.serialization.jobspec import FilterSpec, JobSpec
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

FILTERS = """
from dataclasses import replace
import numpy as np

class Noise:
    def process(self, model, context):
        draws = np.random.default_rng(context.seed)
        for value in model.params.values():
            value += draws.standard_normal(value.shape).astype(value.dtype)

class Tenth:
    def process(self, model, context):
        assert context.site.startswith("site-") and context.point == "server_input"
        return replace(model, params={k: v / 10 for k, v in model.params.items()}, metrics={"accuracy": 0.5})

class Breaks:
    def process(self, model, context):
        raise LookupError("no key for " + context.site)
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "server_side_filters.py").write_text(FILTERS)
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("server_side_filters", None)


def one_filter(name: str, *tasks: str) -> tuple[FilterSpec, ...]:
    path = name if "." in name else f"server_side_filters.{name}"
    args = {"exclude_vars": "w"} if path.endswith("ExcludeVars") else {}
    return (FilterSpec((Component(path, args),), tasks or ("*",)),)


def give(f: Any, **parts: Any) -> None:
    """A job with these parts, from here on and in processes to come."""
    f.fed.spec = replace(f.fed.spec, **parts)
    f.fed.filters = ServerFilters(f.fed, f.fed.spec)


def workflow(f: Any, tools: Any, **options: Any) -> FedAvg:
    path = f.fed.app_dir / "initial.safetensors"
    with path.open("wb") as file:
        encode_model(tools.model_of()).write_to(file)
    return FedAvg(**{"num_rounds": 2, "min_clients": 3, "initial_model": path.name, **options})


def bits(f: Any) -> bytes:
    commit = f.world.core.state.jobs.jobs[f.fed.job].commit
    return f.world.core.state.spool.read(commit.model.id, 1 << 20)


def test_what_is_sent_is_filtered_once_and_the_global_model_is_not_changed(farm: Any, tools: Any) -> None:
    f = farm()
    got: list[Any] = []

    def train(site: str, round: int, received: FLModel) -> FLModel:
        got.append(np.array(received.params["w"]))
        return FLModel(params={"w": np.zeros(64, np.float32)})

    f.train = train
    give(f, server_output=one_filter("Noise", "train"))
    workflow(f, tools, exclude_vars="w").run(f.fed)  # so that the global model stays the initial one
    assert np.array_equal(f.fed.model().params["w"], np.array(tools.BASE, np.float32))
    assert len(got) == 6 and all(np.array_equal(one, got[0]) for one in got[:3]), "one payload for all"
    assert not np.array_equal(got[0], np.array(tools.BASE, np.float32))
    assert not np.array_equal(got[0], got[3]), "another round, other noise"


@pytest.mark.parametrize("singly", [False, True])
def test_results_are_filtered_before_they_are_folded(farm: Any, tools: Any, singly: bool) -> None:
    f = farm(pool=True)
    f.singly = singly
    f.train = lambda site, round, received: FLModel(
        params={"w": np.full(64, 20.0, np.float32)}, metrics={"accuracy": 9}
    )
    give(f, server_input=one_filter("Tenth"))
    opened: list[Any] = []
    gather = f.fed.gather
    f.fed.gather = lambda *args, **options: opened.append(gather(*args, **options)) or opened[-1]
    workflow(f, tools, num_rounds=1).run(f.fed)
    assert np.array_equal(f.fed.model().params["w"], np.full(64, 2.0, np.float32))
    assert not opened[0].opening.partials, "a pool folds nothing that is still to be filtered"
    [(_, _, record)] = f.world.journal.records(f.fed.job, 0, 10)
    assert record["metrics"] == {"accuracy": 0.5}
    # without filters the pool may fold
    calm = farm(pool=True)
    gathered = calm.fed.gather("train", tools.model_of(), round=0, partials=True)
    assert gathered.opening.partials


def test_another_process_sends_and_folds_the_same_bits(farm: Any, tools: Any) -> None:
    parts = {"server_output": one_filter("Noise"), "server_input": one_filter("Noise")}
    calm = farm()
    give(calm, **parts)
    workflow(calm, tools).run(calm.fed)
    f = farm()
    give(f, **parts)
    original = f.fed.gather

    def dying(*args: Any, **options: Any) -> Any:
        gather = original(*args, **options)
        if options["round"] == 1:
            raise KeyboardInterrupt
        return gather

    f.fed.gather = dying
    with pytest.raises(KeyboardInterrupt):
        workflow(f, tools).run(f.fed)
    f.die()
    f.process()
    give(f, **parts)
    workflow(f, tools).run(f.fed)
    assert bits(f) == bits(calm)


def test_a_filter_that_fails_ends_the_job_with_its_name(farm: Any, tools: Any) -> None:
    for point, who in (("server_output", "server"), ("server_input", "site-")):
        f = farm()
        give(f, **{point: one_filter("Breaks")})
        with pytest.raises(JobError) as caught:
            workflow(f, tools).run(f.fed)
        text = str(caught.value)
        assert f"{point} filters (server_side_filters.Breaks) of task 'train', round 0" in text
        assert f"LookupError: no key for {who}" in text and "in process" in text


def test_a_mandatory_client_that_fails(farm: Any, tools: Any) -> None:
    f = farm()
    steady = f.train
    f.train = lambda site, round, received: (
        RuntimeError("no data") if site == "site-1" and round == 1 else steady(site, round, received)
    )
    give(f, mandatory_clients=("site-1",))
    with pytest.raises(GatherError, match=r"round 1: mandatory client 'site-1' gave no result: user_error\nno data"):
        workflow(f, tools, min_clients=2).run(f.fed)
    other = farm()
    other.train = f.train
    give(other, mandatory_clients=("site-0", "site-2"))
    workflow(other, tools, min_clients=2).run(other.fed)


def test_a_mandatory_client_that_was_not_asked(farm: Any, tools: Any) -> None:
    f = farm()
    give(f, sites=None, mandatory_clients=("site-7",))
    with pytest.raises(GatherError, match=r"mandatory client 'site-7' gave no result: it was not asked"):
        workflow(f, tools).run(f.fed)


def test_run_variables_at_the_server(tmp_path: Path) -> None:
    component = Component("a.B", {"x": "{SITE_NAME}/{JOB_ID}", "deep": [{"y": "{WORKSPACE}"}]})
    spec = JobSpec("job", (component,), _executors(), components=(component,), server_input=(FilterSpec((component,)),))
    found = filled(replace(spec, server_extra={"z": "{JOB_ID}"}), "job-1", tmp_path)
    args = {"x": "server/job-1", "deep": [{"y": str(tmp_path)}]}
    assert found.workflows[0].args == found.components[0].args == found.server_input[0].filters[0].args == args
    assert found.server_extra == {"z": "job-1"}


def _executors() -> Any:
    from fedloom.serialization.jobspec import ExecutorSpec

    return (ExecutorSpec(("*",), Component("a.B")),)
