"""A job's filters, settings and per-site executors at the sites: in scripts, functions, and embedded functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fedloom.executor.function import Executor
from fedloom.executor.taskio import TaskSpec, input_model, write_result
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.errors import ValuesError
from fedloom.serialization.jobspec import ClientApp, Component, ExecutorSpec, FilterSpec, JobSpec
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

pytestmark = pytest.mark.timeout(120)

EXCLUDE = "fedloom.serialization.filters.ExcludeVars"
SCRIPT = "fedloom.executor.script.ScriptExecutor"
FUNCTION = "fedloom.executor.script.FunctionExecutor"

MINE = """
from dataclasses import replace

class Scale:
    def __init__(self, by):
        self.by = by

    def process(self, model, context):
        if model.params is not None:
            for value in model.params.values():
                assert type(value).__module__ == "numpy"
                value *= self.by

class Where:
    def process(self, model, context):
        told = [context.point, context.task, context.round, context.site, context.seed > 0]
        return replace(model, meta={**model.meta, "where": told, "type": str(model.params_type)})

class Breaks:
    def process(self, model, context):
        return model.params["no such tensor"]
"""


def one_filter(name, tasks=("*",), sites=(), **args):
    path = name if "." in name else f"my_filters.{name}"
    return FilterSpec((Component(path, args),), tasks, sites)


@pytest.fixture
def send_job(broker, tmp_path):
    """Give the broker a job out of a spec's parts and the files of each app."""
    made = []

    def send(files, **parts):
        folder = tmp_path / f"given-{len(made)}"
        made.append(folder)
        spec = JobSpec("job", (Component("fedloom.controller.workflows.fedavg.FedAvg"),), **({"num_rounds": 3} | parts))
        spec.write(folder)
        for custom in spec.custom_dirs(folder):
            for name, text in files.items():
                (custom / name).write_text(text)
        return broker.add(pack_folder(folder), "blob")

    return send


# ---------------------------------------------------------------- around user code


def task(model, tmp_path, **values):
    data = bytes(encode_model(model).tobytes())
    told = {"task": "t", "attempt": 1, "site": "site-1", "job": "j", "round": 2, "step": 0, "name": "train", "seed": 5}
    return TaskSpec(**(told | {"payload_bytes": data, "result_path": str(tmp_path / "result")} | values))


def chain(**points):
    return {point: [{"path": path, "args": args} for path, args in found] for point, found in points.items()}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_filters.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_filters", raising=False)


def test_the_difference_is_taken_to_what_user_code_got_and_then_filtered(tmp_path, mine):
    filters = chain(
        client_input=[("my_filters.Scale", {"by": 3})],
        client_output=[("my_filters.Where", {}), (EXCLUDE, {"exclude_vars": ["b"]}), ("my_filters.Scale", {"by": 10})],
    )
    base = FLModel(params={"a": np.array([2.0], np.float32), "b": np.ones(1, np.float32)})
    spec = task(base, tmp_path, transfer_type="DIFF", filters=filters)
    for forget in (False, True):
        model = input_model(spec)
        assert model.params["a"].tolist() == [6.0]
        model.params["a"] += 1  # in place, as scripts do
        if forget:
            input_model(replace(spec, attempt=2))  # another task was here meanwhile: the base is made again
        sent = decode_model(write_result(FLModel(params=model.params), spec).data)
        assert sent.params_type == "DIFF" and sent.params["a"].tolist() == [10.0] and list(sent.params) == ["a"]
        assert sent.meta["where"] == ["client_output", "train", 2, "site-1", True] and sent.meta["type"] == "DIFF"
        assert model.params["a"].tolist() == [7.0], "what user code holds is not changed"


def test_torch_scripts_get_torch_and_filters_get_numpy(tmp_path, mine):
    torch = pytest.importorskip("torch")
    filters = chain(client_input=[("my_filters.Scale", {"by": 2})], client_output=[("my_filters.Scale", {"by": 2})])
    base = FLModel(params={"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)})
    spec = task(base, tmp_path, exchange_format="pytorch", filters=filters)
    model = input_model(spec)
    assert model.params["w"].dtype == torch.bfloat16 and model.params["w"].tolist() == [2.0, 2.0]
    assert isinstance(model.params["n"], torch.Tensor) and int(model.params["n"]) == 6
    sent = decode_model(bytearray(write_result(FLModel(params=model.params), spec).data), framework="pytorch")
    assert sent.params["w"].dtype == torch.bfloat16 and sent.params["w"].tolist() == [4.0, 4.0]
    assert model.params["w"].tolist() == [2.0, 2.0]


def test_a_filter_cannot_send_what_user_code_may_not(tmp_path, mine):
    filters = chain(client_output=[("my_filters.Scale", {"by": float("inf")})])
    spec = task(FLModel(params={"a": np.ones(1)}), tmp_path, filters=filters)
    with pytest.raises(ValuesError, match="tensor 'a'"):
        write_result(FLModel(params={"a": np.ones(1)}), spec)


# ---------------------------------------------------------------- embedded


def test_fedlooms_filters_work_in_embedded_functions_and_a_jobs_own_do_not(broker, tmp_path, weights, send_job):
    executor = Executor("fake", site="site-1", workspace=tmp_path / "work", link_factory=broker.factory)
    seen = []

    @executor.task("train")
    def train(model, ctx):
        seen.append((sorted(model.params), ctx.config))
        return FLModel(params=model.params)

    executors = (ExecutorSpec(("*",), Component(SCRIPT, {"task_script_path": "client.py"})),)
    fine = send_job(
        {"client.py": ""},
        executors=executors,
        client_input=(one_filter(EXCLUDE, exclude_vars="n"),),
        client_extra={"lr": 1, "site_config": {"site-1": {"lr": 2}}},
    )
    own = send_job(
        {"client.py": "", "my_filters.py": "raise SystemExit('imported into somebody else\\'s program')"},
        executors=executors,
        client_output=(one_filter("Scale", by=2),),
    )
    with executor:
        broker.assign(("a", "site-1"), model=weights(1.0), archive=fine)
        assert sorted(broker.result(broker.done("a")).params) == ["w"]
        assert seen == [(["w"], {"lr": 2})]
        broker.assign(("b", "site-1"), model=weights(1.0), archive=own, job="job-2")
        text = broker.failed("b").text
        assert "filter 'my_filters.Scale' is the job's own code, which does not run within this program" in text
    assert len(seen) == 1


# ---------------------------------------------------------------- hosts

CLIENT = """
import sys
import fedloom.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    config = flare.get_config()
    told = {"argv": sys.argv[1:], "lr": config.get("lr"), "site": config["site_name"]}
    flare.send(flare.FLModel(params=model.params, meta=told))
"""

FUNCTIONS = """
from fedloom.client import FLModel

def fit(model, ctx):
    return FLModel(params=model.params, meta={"lr": ctx.config.get("lr"), "a": ctx.config.get("a")})
"""


@pytest.mark.process
def test_sites_have_scripts_filters_and_settings_of_their_own(broker, make_agent, weights, send_job, tmp_path):
    archive = send_job(
        {"client.py": CLIENT, "other.py": CLIENT, "my_filters.py": MINE},
        executors=(
            ExecutorSpec(
                ("*",), Component(SCRIPT, {"task_script_path": "client.py", "task_script_args": "{SITE_NAME}"})
            ),
            ExecutorSpec(
                ("*",),
                Component(SCRIPT, {"task_script_path": "other.py", "launch_external_process": True}),
                ("site-2",),
            ),
        ),
        client_input=(one_filter("Scale", by=2),),
        client_output=(one_filter("Scale", ("train",), ("site-2",), by=5), one_filter("Where", ("validate",))),
        client_extra={"lr": 0.1, "site_config": {"site-2": {"lr": "{JOB_ID}"}}},
    )
    make_agent(sites=("site-1", "site-2"), capacity=2)
    broker.assign(("a", "site-1"), ("b", "site-2"), model=weights(1.0), archive=archive)
    one, two = broker.done("a"), broker.done("b")
    assert one.meta["meta"] == {"argv": ["site-1"], "lr": 0.1, "site": "site-1"}
    assert two.meta["meta"] == {"argv": [], "lr": "job-1", "site": "site-2"}
    assert [broker.result(item).params["w"][0, 0] for item in (one, two)] == [2.0, 10.0]
    broker.assign(("v", "site-1"), name="validate", round=1, model=weights(1.0), archive=archive)
    assert broker.done("v").meta["meta"]["where"] == ["client_output", "validate", 1, "site-1", True]


@pytest.mark.process
def test_function_workers_filter_and_name_the_filter_that_fails(broker, make_agent, weights, send_job):
    archive = send_job(
        {"client.py": FUNCTIONS, "my_filters.py": MINE},
        executors=(ExecutorSpec(("*",), Component(FUNCTION, {"task_script_path": "client.py", "function": "fit"})),),
        client_input=(one_filter("Scale", by=2), one_filter("Breaks", ("validate",))),
        client_output=(one_filter(EXCLUDE, exclude_vars=["n"]),),
        client_extra={"lr": 1, "a": 1},
    )
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive, config={"a": 2})
    done = broker.done("a")
    assert done.meta["meta"] == {"lr": 1, "a": 2}, "what the workflow says goes first"
    assert {name: value.flat[0] for name, value in broker.result(done).params.items()} == {"w": 2.0}
    broker.assign(("v", "site-1"), name="validate", round=1, model=weights(1.0), archive=archive)
    text = broker.failed("v").text
    assert "KeyError: 'no such tensor'" in text and "client_input filter my_filters.Breaks" in text
    assert 'return model.params["no such tensor"]' in text


@pytest.mark.process
def test_a_site_runs_its_own_app_and_the_others_are_told_what_is_missing(broker, make_agent, weights, send_job):
    def of(name):
        return (ExecutorSpec(("train",), Component(FUNCTION, {"task_script_path": f"{name}.py", "function": "fit"})),)

    archive = send_job(
        {"one.py": FUNCTIONS, "two.py": FUNCTIONS.replace('ctx.config.get("lr")', '"two"')},
        sites=("site-1", "site-2"),
        site_apps=(ClientApp("app1", ("site-1",), of("one")), ClientApp("app2", ("site-2",), of("two"))),
    )
    make_agent(sites=("site-1", "site-2", "site-3"), capacity=3)
    broker.assign(("a", "site-1"), ("b", "site-2"), ("c", "site-3"), model=weights(1.0), archive=archive)
    assert broker.done("a").meta["meta"]["lr"] is None
    assert broker.done("b").meta["meta"]["lr"] == "two"
    assert "no app for site 'site-3'" in broker.failed("c").text
