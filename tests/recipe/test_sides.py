"""What server and sites do not share: files, settings and filters, as recipes add them, and as they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv
from fedloom.recipe.job import Job
from fedloom.serialization.component import Component
from fedloom.serialization.errors import JobError
from fedloom.serialization.filters import ExcludeVars
from fedloom.serialization.jobspec import JobSpec
from fedloom.serialization.payload import decode_model

EXCLUDE = "fedloom.serialization.filters.ExcludeVars"


MINE = """import helper

class Mine:
    def __init__(self, by):
        self.by = by

    def process(self, model, context):
        return model
"""


def recipe(**changes: Any) -> NumpyFedAvgRecipe:
    values: dict[str, Any] = {"name": "sides", "model": [1.0], "min_clients": 2, "train_script": "client.py"}
    return NumpyFedAvgRecipe(**(values | changes))


def module(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> Any:
    (here / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, name, raising=False)
    __import__(name)
    return sys.modules[name]


def test_one_app_as_long_as_all_is_shared(here: Path) -> None:
    one = recipe()
    one.job.add_file("helper.py")
    one.add_server_config({"mine": 1})
    one.add_client_config({"lr": 0.5})
    one.add_client_config({"lr": 0.1}, clients=["site-2"])
    folder = one.export(here / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["app", "meta.json"]
    spec = JobSpec.load(folder)
    assert spec.server_extra == {"mine": 1}
    assert [spec.client_app_of(site).config_of(site)["lr"] for site in ("site-1", "site-2")] == [0.5, 0.1]


def test_files_for_one_side_and_for_some_sites(here: Path) -> None:
    (here / "data").mkdir()
    (here / "data" / "a.csv").write_text("a")
    for name in ("secret.txt", "all.txt", "two.txt"):
        (here / name).write_text(name)
    one = recipe()
    one.add_server_file("secret.txt")
    one.add_client_file("all.txt")
    one.add_client_file(here / "two.txt", clients=["site-2"])
    one.add_client_file("data", clients=["site-2", "site-3"])
    folder = one.export(here / "out")
    custom = {
        app.name: sorted(str(f.relative_to(app / "custom")) for f in (app / "custom").rglob("*") if f.is_file())
        for app in folder.iterdir()
        if app.is_dir()
    }
    assert custom == {
        "app_server": ["client.py", "helper.py", "secret.txt"],
        "app": ["all.txt", "client.py", "helper.py"],
        "app_site-2": ["all.txt", "client.py", "data/a.csv", "helper.py", "two.txt"],
        "app_site-3": ["all.txt", "client.py", "data/a.csv", "helper.py"],
    }
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["deploy_map"] == {
        "app_server": ["server"],
        "app": ["@ALL"],
        "app_site-2": ["site-2"],
        "app_site-3": ["site-3"],
    }
    assert (folder / "app_server" / "initial_model.safetensors").is_file()
    spec = JobSpec.load(folder)
    assert spec == one.job.spec()
    again = here / "again"
    spec.write(again)
    assert (again / "app_site-3" / "config" / "config_fed_client.json").is_file()


def test_wrong_files_and_settings(here: Path) -> None:
    one = recipe()
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "client.py").write_text("other = 1\n")
    one.add_client_file(here / "elsewhere" / "client.py")
    with pytest.raises(JobError, match=r"would both be 'client.py' in the job: rename one"):
        one.export(here / "out")
    one = recipe()
    for call, text in [
        (lambda: one.add_server_file("gone.txt"), r"file 'gone.txt' to take along not found"),
        (lambda: one.add_client_file("helper.py", clients="site-1"), r"clients='site-1'; a list of client names"),
        (lambda: one.add_client_file("helper.py", clients=[]), r"clients=\[\]; a list of client names"),
        (lambda: one.add_client_file("helper.py", clients=["a/b"]), r"site name 'a/b'"),
        (lambda: one.add_client_config({"executors": []}), r"key 'executors' is the job's own"),
        (lambda: one.add_server_config({"x": {1, 2}}), r"'x' cannot be written"),
        (lambda: one.add_server_config({"x": float("nan")}), r"'x' cannot be written"),
    ]:
        with pytest.raises(JobError, match=text):
            call()


def test_filters_travel_with_their_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(here, monkeypatch, "my_side_filters", MINE)
    one = recipe()
    one.add_client_output_filter(ExcludeVars(["a"]), tasks=["train"])
    one.add_client_output_filter(made.Mine(2), clients=["site-2"])
    one.add_client_input_filter({"class_path": "my_side_filters.Mine", "args": {"by": 3}})
    one.add_server_output_filter(ExcludeVars("b"))
    one.add_server_input_filter(ExcludeVars("c"), tasks=["train", "val*"])
    folder = one.export(here / "out")
    assert (folder / "app" / "custom" / "my_side_filters.py").is_file()
    spec = JobSpec.load(folder)
    mine = Component("my_side_filters.Mine", {"by": 2})
    assert spec.filters_for("client_output", "train", "site-2") == (Component(EXCLUDE, {"exclude_vars": ["a"]}), mine)
    assert spec.filters_for("client_output", "validate", "site-2") == (mine,)
    assert spec.filters_for("client_output", "validate", "site-1") == ()
    assert [one.args for one in spec.filters_for("client_input", "x", "site-9")] == [{"by": 3}]
    assert [one.args for one in spec.filters_for("server_output", "x")] == [{"exclude_vars": "b"}]
    assert [one.args for one in spec.filters_for("server_input", "validate")] == [{"exclude_vars": "c"}]
    for wrong, words in [
        (object(), "filter is a object"),
        (ExcludeVars, "is a class; give an object"),
        (made.helper, "filter is a module|no process|class"),
        ({"class_path": "json.JSONDecoder"}, r"JSONDecoder has no process\(model, context\)"),
    ]:
        with pytest.raises(JobError, match=words):
            one.add_server_input_filter(wrong)
    with pytest.raises(JobError, match=r"tasks='train'; a list of task names"):
        one.add_server_input_filter(ExcludeVars("a"), tasks="train")


def test_mandatory_clients_of_a_simulation(here: Path, launcher: Any) -> None:
    job = Job("must", mandatory_clients=["site-3"], resource_spec={"site-1": {"num_of_gpus": 1}})
    job.add_workflow("fedloom.controller.workflows.fedavg.FedAvg", {"num_rounds": 1, "min_clients": 1})
    job.add_executor(
        Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": job.add_code("client.py")})
    )
    with pytest.raises(JobError, match=r"client 'site-3'.*mandatory_clients"):
        SimEnv(num_clients=2).deploy(job)
    SimEnv(num_clients=3).deploy(job)
    assert launcher.jobs[0].mandatory_clients == ("site-3",)
    assert launcher.jobs[0].resource_spec == {"site-1": {"num_of_gpus": 1}}


CLIENT = """
from pathlib import Path
import numpy as np
import fedloom.client as flare

flare.init()
beside = sorted(path.name for path in Path(__file__).parent.glob("*.txt"))
while flare.is_running():
    model = flare.receive()
    value = model.params["numpy_key"] + flare.get_config().get("step", 1)
    print("beside", beside)
    flare.send(flare.FLModel(params={"numpy_key": value, "extra": np.ones(2)}, metrics={"files": len(beside)}))
"""
TWICE = """
class Twice:
    def process(self, model, context):
        for value in model.params.values():
            value *= 2
"""
SERVER = """
from pathlib import Path
from fedloom.controller.workflows.fedavg import FedAvg

class Checked(FedAvg):
    def run(self, fed):
        beside = sorted(path.name for path in Path(__file__).parent.glob("*.txt"))
        assert beside == ["secret.txt"], beside
        assert fed.config["depth"] == 3 and self.task == "train"
        super().run(fed)
"""
JOB = """
import sys
from fedloom.recipe import ExchangeFormat, NumpyFedAvgRecipe, SimEnv
from fedloom.serialization.filters import ExcludeVars
from twice import Twice

options = {"min_clients": 3, "num_rounds": 2, "train_script": "client.py", "seed": 3}
recipe = NumpyFedAvgRecipe(name="sides", model=[1.0, 2.0], **options)
recipe.add_server_file("secret.txt")
recipe.add_client_file("all.txt")
recipe.add_client_file("two.txt", clients=["site-2"])
recipe.add_server_config({"depth": 3})
recipe.add_client_config({"step": 10}, clients=["site-3"])
recipe.add_client_output_filter(ExcludeVars(["extra"]))
recipe.add_server_output_filter(Twice(), tasks=["train"])
recipe.add_client_input_filter(Twice(), clients=["site-1"])
recipe.add_server_input_filter(Twice())
job = recipe.job
workflow = job.workflows[0]
job.workflows[0] = type(workflow)("checked.Checked", workflow.args, workflow.id)
job.add_code("checked.py")
recipe.export("exported")
recipe.execute(SimEnv(num_clients=3, workspace_root="direct"))
"""


@pytest.mark.process
@pytest.mark.timeout(180)
def test_a_job_exported_and_run_again_gives_the_same_bits(tmp_path: Path) -> None:
    """With files, settings and filters for each side; the values are those of the filters, by hand."""
    files = {"client.py": CLIENT, "twice.py": TWICE, "checked.py": SERVER, "job.py": JOB}
    for name, text in (files | {"secret.txt": "s", "all.txt": "a", "two.txt": "t"}).items():
        (tmp_path / name).write_text(text)

    def run(*command: str) -> None:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr

    run("job.py")
    run("-m", "fedloom", "sim", "exported", "-w", "again", "-n", "3")
    direct, again = tmp_path / "direct" / "sides", tmp_path / "again" / "sides"
    model = decode_model(direct / "model.safetensors").params
    assert list(model) == ["numpy_key"]
    value = [1.0, 2.0]
    for _ in range(2):
        sent = [2 * x for x in value]
        results = [[2 * (factor * x + step) for x in sent] for factor, step in ((2, 1), (1, 1), (1, 10))]
        value = [sum(parts) / 3 for parts in zip(*results, strict=True)]
    assert model["numpy_key"].tolist() == pytest.approx(value)
    assert (direct / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    for where in (direct, again):
        assert "beside ['all.txt']" in (where / "logs" / "site-1.log").read_text()
        assert "beside ['all.txt', 'two.txt']" in (where / "logs" / "site-2.log").read_text()
        assert (where / "job" / "app_site-2" / "custom" / "two.txt").is_file()
