from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import (
    CLIENT_CONFIG,
    SERVER_CONFIG,
    Component,
    ExecutorSpec,
    FilterSpec,
    JobSpec,
    check_job_name,
    check_site_name,
)

FEDAVG = Component("fedloom.controller.workflows.fedavg.FedAvg", {"num_rounds": 3, "min_clients": 2}, "controller")
SCRIPT = Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"})


def make(**changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "name": "digits",
        "workflows": (FEDAVG,),
        "executors": (ExecutorSpec(("*",), SCRIPT),),
        "min_clients": 2,
        "num_rounds": 3,
        "seed": 7,
    }
    return JobSpec(**(values | changes))


def written(tmp_path: Path, spec: JobSpec | None = None) -> Path:
    spec = spec or make()
    folder = tmp_path / "job"
    spec.write(folder)
    (spec.custom_dir(folder) / "client.py").write_text("")
    return folder


def test_round_trip(tmp_path: Path) -> None:
    spec = make(
        sites=("site-1", "site-2"),
        threads_per_task=2,
        components=(Component("a.B", {"x": [1.5]}, "selector"),),
        client_components=(Component("c.D"),),
        extra={"study": "s"},
        server_output=(FilterSpec((Component("a.F", {"x": 1}),), ("train",)),),
        client_output=(FilterSpec((Component("a.G"), Component("a.H")), ("*",), ("site-2",)),),
        mandatory_clients=("site-2",),
        resource_spec={"site-1": {"num_of_gpus": 1, "mem_per_gpu_in_GiB": 1.5}},
        server_extra={"yours": [1]},
        client_extra={"mine": 1},
    )
    folder = written(tmp_path, spec)
    assert JobSpec.load(folder) == spec
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format"] == "fedloom/1"
    assert meta["deploy_map"] == {"app": ["server", "site-1", "site-2"]}
    assert spec.component("selector") == spec.components[0]
    assert spec.component("other") is None


def test_all_sites(tmp_path: Path) -> None:
    folder = written(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["deploy_map"] == {"app": ["@ALL"]}
    assert "sites" not in meta
    assert JobSpec.load(folder).sites is None


def test_executor_for_takes_exact_names_first() -> None:
    exact, pattern, rest = Component("a.Exact"), Component("a.Pattern"), Component("a.Rest")
    spec = make(
        executors=(ExecutorSpec(("*",), rest), ExecutorSpec(("eval*", "x"), pattern), ExecutorSpec(("train",), exact))
    )
    assert spec.executor_for("train") is exact
    assert spec.executor_for("evaluate") is rest  # the first pattern that fits
    assert spec.executor_for("x") is pattern
    with pytest.raises(JobError, match=r"no executor for task 'other'; it has some for: train"):
        make(executors=(ExecutorSpec(("train",), exact),)).executor_for("other")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"min_clients": 0}, "min_clients=0"),
        ({"min_clients": True}, "min_clients=True"),
        ({"num_rounds": 2.0}, "num_rounds=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"name": "a/b"}, "job name"),
        ({"name": ""}, "job name"),
        ({"name": ".hidden"}, "job name"),
        ({"workflows": ()}, "no workflow"),
        ({"executors": ()}, "no executor"),
        ({"sites": ("a", "a")}, "twice"),
        ({"sites": ("a/b", "c")}, "site name 'a/b'"),
        ({"sites": ("a",)}, "min_clients=2 but the job names only 1 sites"),
    ],
)
def test_values_that_are_not_allowed(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        make(**changes)


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        ("meta.json", {"format": "gone"}, "format None; this version of fedloom reads 'fedloom/1'"),
        ("meta.json", {"name": 3}, "name: int where text belongs"),
        ("meta.json", {"min_clients": "2"}, "min_clients='2'"),
        ("meta.json", {"deploy_map": {"a": ["@ALL"], "b": ["@ALL"]}}, "two apps to @ALL: 'a' and 'b'"),
        ("meta.json", {"deploy_map": {"a": ["server"], "b": ["server"]}}, "two apps to the server"),
        ("meta.json", {"deploy_map": {"app": []}}, "names nobody"),
        ("meta.json", {"deploy_map": {"app": ["@ALL"], "gone": ["site-1"]}}, "gone/config/config_fed_client.json is"),
        ("meta.json", {"deploy_map": {"..": ["@ALL"]}}, "app name '..'"),
        ("meta.json", {"sites": "site-1"}, "sites: str where a list belongs"),
        (f"app/{SERVER_CONFIG}", {"workflows": []}, "no workflow"),
        (f"app/{SERVER_CONFIG}", {"workflows": [{"path": "FedAvg"}]}, "must be 'module.Class'"),
        (f"app/{SERVER_CONFIG}", {"workflows": [{"path": "a.B", "arg": {}}]}, "unknown key 'arg'"),
        (f"app/{SERVER_CONFIG}", {"workflows": {}}, "workflows: dict where a list belongs"),
        (f"app/{CLIENT_CONFIG}", {"executors": [{"tasks": ["*"]}]}, "executor: NoneType where a map belongs"),
        (f"app/{CLIENT_CONFIG}", {"executors": [{"tasks": [1], "executor": {}}]}, "int where text belongs"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path: Path, file: str, changes: dict[str, Any], text: str) -> None:
    folder = written(tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(JobError) as caught:
        JobSpec.load(folder)
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        JobSpec.load(tmp_path / "nowhere")
    folder = written(tmp_path)
    (folder / "app" / CLIENT_CONFIG).unlink()
    with pytest.raises(JobError, match=r"config_fed_client.json is missing"):
        JobSpec.load(folder)
    folder = written(tmp_path)
    for text in ('{"name": "a", "name": "b"}', '{"seed": NaN}', "{", "[]", "[" * 100_000):
        (folder / "meta.json").write_text(text)
        with pytest.raises(JobError, match=r"meta\.json"):
            JobSpec.load(folder)


def test_files_that_the_config_names_must_be_there(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "app" / "custom" / "client.py").unlink()
    with pytest.raises(JobError, match=r"task_script_path 'client.py' is not in"):
        JobSpec.load(folder)
    spec = make(workflows=(Component("a.B", {"initial_model": "initial_model.safetensors"}),))
    folder = written(tmp_path, spec)
    with pytest.raises(JobError, match=r"initial_model 'initial_model.safetensors' is not in"):
        JobSpec.load(folder)
    spec = make(executors=(ExecutorSpec(("*",), Component("a.B", {"task_script_path": "/opt/train.py"})),))
    assert JobSpec.load(written(tmp_path, spec)) == spec


class TestBuild:
    def test_imports_and_builds_nested(self) -> None:
        nested = {"path": "fractions.Fraction", "args": {"numerator": 1, "denominator": 3}}
        plain = {"path": "torch.optim.SGD", "args": {"lr": 1.0}, "config_type": "dict"}
        built = Component("types.SimpleNamespace", {"inner": nested, "settings": plain, "many": [nested]}).build(size=2)
        assert str(built.inner) == "1/3"
        assert [str(item) for item in built.many] == ["1/3"]
        assert built.settings == {"path": "torch.optim.SGD", "args": {"lr": 1.0}}
        assert built.size == 2

    def test_errors_say_what_is_allowed(self) -> None:
        with pytest.raises(JobError, match="cannot be imported"):
            Component("no.such.module.Thing").build()
        with pytest.raises(JobError, match="has no 'Thing'"):
            Component("json.Thing").build()
        with pytest.raises(JobError, match=r"unexpected keyword argument 'nmae'; its arguments are: path, args, id"):
            Component("fedloom.serialization.jobspec.Component", {"path": "a.b", "nmae": 1}).build()


def test_names() -> None:
    assert check_site_name("hospital_A.1") == "hospital_A.1"
    assert check_job_name("my job é") == "my job é"
    for bad in ("", "-a", "a b", "a/b", "é", "a" * 129):
        with pytest.raises(JobError, match="site name"):
            check_site_name(bad)


def test_a_key_twice_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path)
    keys = ",".join(f'"k{number}":0' for number in range(200_000))
    (folder / "meta.json").write_text(f'{{{keys},"k199999":1}}')
    with pytest.raises(JobError, match="key 'k199999' twice"):
        JobSpec.load(folder)
