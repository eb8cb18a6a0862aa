"""Job folders in their several shapes: apps, older names, variables, filters, who works on what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedloom.serialization.component import KNOWN_NAMES, Component
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import ClientApp, ExecutorSpec, FilterSpec, JobSpec
from fedloom.serialization.jobvars import resolve_config, substitute

FEDAVG = {"path": "fedloom.controller.workflows.fedavg.FedAvg", "args": {"num_rounds": 2, "min_clients": 1}}


def script(**args: Any) -> dict[str, Any]:
    return {"path": "fedloom.executor.script.ScriptExecutor", "args": {"task_script_path": "client.py", **args}}


def app(folder: Path, *, server: Any = None, client: Any = None, prefix: str = "config_fed") -> None:
    """Write an app's configs: those that are given."""
    (folder / "config").mkdir(parents=True)
    (folder / "custom").mkdir()
    (folder / "custom" / "client.py").write_text("")
    if server is not None:
        (folder / "config" / f"{prefix}_server.json").write_text(json.dumps({"workflows": [FEDAVG]} | server))
    if client is not None:
        text = json.dumps({"executors": [{"executor": script()}]} | client)
        (folder / "config" / f"{prefix}_client.json").write_text(text)


def meta(folder: Path, **values: Any) -> Path:
    (folder / "meta.json").write_text(json.dumps({"format": "fedloom/1", "name": "job"} | values))
    return folder


def reloaded(spec: JobSpec, folder: Path, tmp_path: Path) -> JobSpec:
    """Written and read again, beside its code."""
    again = tmp_path / "again"
    spec.write(again)
    for custom in spec.custom_dirs(again):
        (custom / "client.py").write_text("")
    return JobSpec.load(again)


def test_server_and_clients_have_apps_of_their_own(tmp_path: Path) -> None:
    app(tmp_path / "app_server", server={})
    app(tmp_path / "app", client={})
    spec = JobSpec.load(meta(tmp_path, deploy_map={"app_server": ["server"], "app": ["@ALL"]}))
    assert (spec.app, spec.client_app, spec.sites, spec.site_apps) == ("app_server", "app", None, ())
    assert spec.app_dir(tmp_path) == tmp_path / "app_server"
    assert spec.custom_dir(tmp_path) == tmp_path / "app_server" / "custom"
    assert spec.custom_dir(tmp_path, "site-9") == tmp_path / "app" / "custom"
    assert spec.custom_dirs(tmp_path) == [tmp_path / "app_server" / "custom", tmp_path / "app" / "custom"]
    assert reloaded(spec, tmp_path, tmp_path) == spec


def test_sites_have_apps_of_their_own(tmp_path: Path) -> None:
    app(tmp_path / "app_server", server={})
    app(tmp_path / "app1", client={"executors": [{"executor": script(task_script_args="--one")}], "lr": 1})
    app(tmp_path / "app2", client={"executors": [{"executor": script(task_script_args="--two")}], "lr": 2})
    deploy = {"app_server": ["server"], "app1": ["site-1"], "app2": ["site-2", "site-3"]}
    spec = JobSpec.load(meta(tmp_path, deploy_map=deploy))
    assert spec.sites == ("site-1", "site-2", "site-3")
    assert spec.executor_for("train", "site-1").args["task_script_args"] == "--one"
    assert spec.executor_for("train", "site-3").args["task_script_args"] == "--two"
    assert [spec.client_app_of(site).config_of(site)["lr"] for site in spec.sites] == [1, 2, 2]
    assert spec.custom_dir(tmp_path, "site-2") == tmp_path / "app2" / "custom"
    with pytest.raises(JobError, match=r"no app for site 'site-4': name it in deploy_map"):
        spec.executor_for("train", "site-4")
    assert len(spec.all_executors) == 2
    assert reloaded(spec, tmp_path, tmp_path) == spec


def test_some_sites_differ_from_all_others(tmp_path: Path) -> None:
    app(tmp_path / "app", server={}, client={})
    app(tmp_path / "big", client={"executors": [{"executor": script(task_script_args="--big")}]})
    spec = JobSpec.load(meta(tmp_path, deploy_map={"app": ["server", "@ALL"], "big": ["site-2"]}))
    assert spec.sites is None
    assert spec.executor_for("train", "site-2").args == {"task_script_path": "client.py", "task_script_args": "--big"}
    assert spec.executor_for("train", "site-1").args == {"task_script_path": "client.py"}
    assert reloaded(spec, tmp_path, tmp_path) == spec


def test_entries_for_sites_go_first_and_exact_names_before_patterns() -> None:
    def of(name: str) -> Component:
        return Component("a.B", {"name": name})

    spec = JobSpec(
        "job",
        (Component("a.W"),),
        (
            ExecutorSpec(("*",), of("all")),
            ExecutorSpec(("validate",), of("all validate")),
            ExecutorSpec(("*",), of("one"), ("site-1",)),
            ExecutorSpec(("train",), of("one train"), ("site-1", "site-2")),
        ),
    )
    chosen = {
        (task, site): spec.executor_for(task, site).args["name"]
        for task in ("train", "validate")
        for site in ("", "site-1", "site-2", "site-3")
    }
    assert chosen == {
        ("train", ""): "all",
        ("train", "site-1"): "one train",
        ("train", "site-2"): "one train",
        ("train", "site-3"): "all",
        ("validate", ""): "all validate",
        ("validate", "site-1"): "one",
        ("validate", "site-2"): "all validate",
        ("validate", "site-3"): "all validate",
    }
    with pytest.raises(JobError, match="twice"):
        ExecutorSpec(("*",), of("x"), ("a", "a"))


def test_config_files_by_their_older_names(tmp_path: Path) -> None:
    app(tmp_path / "app", server={}, client={}, prefix="config")
    assert JobSpec.load(meta(tmp_path)).executors[0].tasks == ("*",)


def test_other_formats_are_named(tmp_path: Path) -> None:
    app(tmp_path / "app", server={})
    (tmp_path / "app" / "config" / "config_fed_client.conf").write_text("executors = []")
    with pytest.raises(JobError, match=r"config_fed_client.conf: configs are read as JSON"):
        JobSpec.load(meta(tmp_path))


def test_components_by_name(tmp_path: Path) -> None:
    server = {"workflows": [{"name": "FedAvg", "args": {"num_rounds": 1, "min_clients": 1}}]}
    app(tmp_path / "app", server=server, client={"executors": [{"executor": {"name": "ScriptExecutor", "args": {}}}]})
    spec = JobSpec.load(meta(tmp_path))
    assert spec.workflows[0].path == KNOWN_NAMES["FedAvg"]
    assert spec.executors[0].component.path == "fedloom.executor.script.ScriptExecutor"
    with pytest.raises(JobError, match=r"name 'FedAwg' is not known; known are CrossSiteEval, ExcludeVars, FedAvg"):
        Component.parse({"name": "FedAwg"}, "here")
    nested = Component("types.SimpleNamespace", {"one": {"name": "ExcludeVars", "args": {"exclude_vars": ["a"]}}})
    assert nested.build().one.exclude_vars == ["a"]
    assert Component("types.SimpleNamespace", {"one": {"name": "FedAvg"}}).build().one == {"name": "FedAvg"}


def test_every_known_name_is_there() -> None:
    for path in KNOWN_NAMES.values():
        assert callable(Component(path).load())


def test_mandatory_clients_and_resources(tmp_path: Path) -> None:
    app(tmp_path / "app", server={}, client={})
    wanted = {"site-1": {"num_of_gpus": 2, "mem_per_gpu_in_GiB": 0.5, "mine": "kept"}}
    spec = JobSpec.load(meta(tmp_path, mandatory_clients=["site-1"], resource_spec=wanted, study="s"))
    assert (spec.mandatory_clients, spec.resource_spec, spec.extra) == (("site-1",), wanted, {"study": "s"})
    assert reloaded(spec, tmp_path, tmp_path) == spec
    for values, text in [
        ({"mandatory_clients": "site-1"}, "mandatory_clients: str where a list belongs"),
        ({"mandatory_clients": ["a"], "sites": ["b"]}, "mandatory_clients: 'a' is not one of the job's sites"),
        ({"resource_spec": {"site-1": 2}}, "int where a map belongs"),
        ({"resource_spec": {"site-1": {"num_of_gpus": -1}}}, "num_of_gpus=-1"),
        ({"resource_spec": {"site-1": {"mem_per_gpu_in_GiB": "4"}}}, "mem_per_gpu_in_GiB='4'"),
    ]:
        with pytest.raises(JobError, match=text):
            JobSpec.load(meta(tmp_path, **values))


def test_filters_by_task_and_site(tmp_path: Path) -> None:
    filters = [
        {"tasks": ["train"], "filters": [{"name": "ExcludeVars", "args": {"exclude_vars": "a"}}]},
        {"tasks": ["tr*"], "filters": [{"path": "my.F"}], "sites": ["site-2"]},
    ]
    app(tmp_path / "app", server={"task_result_filters": filters[:1]}, client={"task_result_filters": filters})
    spec = JobSpec.load(meta(tmp_path))
    paths = {
        (task, site): [one.path.rpartition(".")[2] for one in spec.filters_for("client_output", task, site)]
        for task in ("train", "validate")
        for site in ("site-1", "site-2")
    }
    assert paths == {
        ("train", "site-1"): ["ExcludeVars"],
        ("train", "site-2"): ["ExcludeVars", "F"],
        ("validate", "site-1"): [],
        ("validate", "site-2"): [],
    }
    assert len(spec.filters_for("server_input", "train")) == 1
    assert spec.filters_for("server_output", "train") == () == spec.filters_for("client_input", "train", "site-1")
    assert reloaded(spec, tmp_path, tmp_path) == spec


# ---------------------------------------------------------------- variables


def test_variables_of_a_config(tmp_path: Path) -> None:
    client = {
        "root": "/data",
        "here": "{root}/mine",
        "rounds": 3,
        "fast": True,
        "executors": [
            {
                "executor": script(
                    task_script_args="--data {here} -r {rounds} {SITE_NAME} {unknown}", launch_once="{fast}"
                )
            }
        ],
        "more": {"n": "{rounds}", "list": ["{fast}"]},
    }
    app(tmp_path / "app", server={}, client=client)
    environ = {"FEDLOOM_ROOT": "/mnt", "FEDLOOM_ROUNDS": "5", "FEDLOOM_UNKNOWN": "no"}
    spec = JobSpec.load(meta(tmp_path), environ)
    args = spec.executors[0].component.args
    assert args["task_script_args"] == "--data /mnt/mine -r 5 {SITE_NAME} {unknown}"
    assert args["launch_once"] is True
    assert spec.client_extra == {
        "root": "/mnt",
        "here": "/mnt/mine",
        "rounds": 5,
        "fast": True,
        "more": {"n": 5, "list": [True]},
    }
    assert reloaded(spec, tmp_path, tmp_path) == spec
    filled = substitute(args["task_script_args"], {"SITE_NAME": "site-1"}, "x")
    assert filled == "--data /mnt/mine -r 5 site-1 {unknown}"


def test_variables_that_are_wrong() -> None:
    with pytest.raises(JobError, match=r"c.json: variable 'b' stands for itself"):
        resolve_config({"a": "{b}", "b": "{a}"}, {}, "c.json")
    with pytest.raises(JobError, match=r"FEDLOOM_N='many' in the environment; a int belongs there"):
        resolve_config({"n": 3}, {"FEDLOOM_N": "many"}, "c.json")
    bomb: dict[str, Any] = {f"v{n}": f"{{v{n + 1}}}" * 1000 for n in range(6)} | {"v6": "x" * 1000}
    with pytest.raises(JobError, match="is over 4194304 bytes"):
        resolve_config(bomb, {}, "c.json")


def test_site_config() -> None:
    one = ClientApp(
        "app", (), (ExecutorSpec(("*",), Component("a.B")),), extra={"lr": 1, "site_config": {"b": {"lr": 2}}}
    )
    assert (one.config_of("a"), one.config_of("b")) == ({"lr": 1}, {"lr": 2})
    with pytest.raises(JobError, match="no executor: no site could work"):
        ClientApp("app")
    assert FilterSpec((), ("v*",)).applies("validate", "") and not FilterSpec((), ("*",), ("a",)).applies("x", "b")
