"""Job folders that were written for NVFLARE: what they become, what is refused, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe.intake import job_folder
from fedloom.recipe.nvflare.folder import convert_folder, needs_conversion
from fedloom.recipe.nvflare.table import CROSS_SITE, FEDAVG, GLOBAL_EVAL, REFUSED, SCRIPT, TABLE, as_markdown
from fedloom.serialization.component import Component
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import JobSpec
from fedloom.serialization.payload import decode_model

APP = "nvflare.app_common."
SAG = {
    "id": "scatter_and_gather",
    "path": APP + "workflows.scatter_and_gather.ScatterAndGather",
    "args": {
        "min_clients": 2,
        "num_rounds": 3,
        "start_round": 0,
        "wait_time_after_min_received": 10,
        "aggregator_id": "aggregator",
        "persistor_id": "persistor",
        "shareable_generator_id": "shareable_generator",
        "train_task_name": "train",
        "train_timeout": 0,
    },
}
NP_PERSISTOR = {"id": "persistor", "path": APP + "np.np_model_persistor.NPModelPersistor"}
MEAN = {
    "id": "aggregator",
    "path": APP + "aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
    "args": {"expected_data_kind": "WEIGHTS", "aggregation_weights": {"site-1": 2.0}, "exclude_vars": "head"},
}
GENERATOR = {
    "id": "shareable_generator",
    "name": "FullModelShareableGenerator",
    "args": {},
}
TRAINER = {"tasks": ["train"], "executor": {"path": APP + "np.np_trainer.NPTrainer", "args": {"delta": 2}}}
API = APP + "executors.client_api_executor.ClientAPIExecutor"


def write(folder: Path, *, server: Any = None, client: Any = None, prefix: str = "config_fed", **meta: Any) -> Path:
    """A job of NVFLARE's; with ``meta`` none, its app alone."""
    (folder / "app" / "config").mkdir(parents=True)
    (folder / "app" / "custom").mkdir()
    base: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    server = base | {"workflows": [SAG], "components": [NP_PERSISTOR, MEAN, GENERATOR]} | (server or {})
    client = base | {"executors": [TRAINER], "components": []} | (client or {})
    for name, config in (("server", server), ("client", client)):
        (folder / "app" / "config" / f"{prefix}_{name}.json").write_text(json.dumps(config))
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def converted(folder: Path, tmp_path: Path, **environ: str) -> JobSpec:
    out = tmp_path / "converted"
    convert_folder(folder, out, environ)
    return JobSpec.load(out, {})


# ---------------------------------------------------------------- what they become


def test_the_hello_example_as_its_app_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "hello-numpy-sag")
    assert needs_conversion(folder / "app")
    spec = converted(folder / "app", tmp_path)
    assert (spec.name, spec.num_rounds, spec.sites, spec.min_clients) == ("hello-numpy-sag", 3, None, 1)
    assert spec.workflows == (
        Component(
            FEDAVG,
            {
                "num_rounds": 3,
                "min_clients": 2,
                "after_quorum_s": 10,
                "task": "train",
                "exclude_vars": "head",
                "aggregation_weights": {"site-1": 2.0},
                "initial_model": "initial_model.safetensors",
            },
            "scatter_and_gather",
        ),
    )
    assert spec.components == spec.client_components == ()
    model = decode_model(tmp_path / "converted" / "app" / "initial_model.safetensors").params
    assert model["numpy_key"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]] and model["numpy_key"].dtype == np.float32
    assert spec.executors[0].component.args == {"task_script_path": "np_trainer.py", "function": "train"}


def test_an_exported_recipe(tmp_path: Path) -> None:
    """As NumpyFedAvgRecipe with cross-site evaluation is exported there."""
    server = {
        "workflows": [
            {
                "id": "controller",
                "path": APP + "workflows.fedavg.FedAvg",
                "args": {
                    "aggregation_weights": {},
                    "num_clients": 2,
                    "num_rounds": 4,
                    "stop_cond": "loss <= 0.1",
                    "patience": 3,
                    "enable_tensor_disk_offload": False,
                },
            },
            {
                "id": "controller1",
                "path": APP + "workflows.cross_site_model_eval.CrossSiteModelEval",
                "args": {
                    "model_locator_id": "component",
                    "submit_model_timeout": 60,
                    "participating_clients": ["a", "b"],
                },
            },
            {
                "id": "controller2",
                "path": APP + "workflows.cross_site_model_eval.CrossSiteModelEval",
                "args": {"submit_model_task_name": "", "validation_timeout": 5},
            },
        ],
        "components": [
            {
                "id": "json_generator",
                "path": APP + "widgets.validation_json_generator.ValidationJsonGenerator",
                "args": {},
            },
            {
                "id": "model_selector",
                "path": APP + "widgets.intime_model_selector.IntimeModelSelector",
                "args": {"aggregation_weights": {}, "key_metric": "loss", "negate_key_metric": True},
            },
            NP_PERSISTOR | {"args": {"model": [[1, 2, 3]]}},
            {"id": "component", "path": APP + "np.np_model_locator.NPModelLocator", "args": {}},
            {"id": "mine", "path": "my_code.Thing", "args": {"x": 1}},
            {"id": "receiver", "path": "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver", "args": {}},
            {
                "id": "r2",
                "path": "nvflare.app_opt.tracking.mlflow.mlflow_receiver.MLflowReceiver",
                "args": {"tracking_uri": "file:///x", "kw_args": {"experiment_name": "e"}, "buffer_flush_time": 1},
            },
        ],
        "task_result_filters": [
            {"tasks": ["train"], "filters": [{"path": APP + "filters.ExcludeVars", "args": {"exclude_vars": ["b"]}}]}
        ],
        "own_setting": 3,
    }
    in_process = {"execution_mode": "in_process", "task_script_path": "client.py", "task_script_args": "--lr 1"}
    client = {
        "executors": [
            {"tasks": ["*"], "executor": {"path": API, "args": in_process | {"params_transfer_type": "DIFF"}}},
        ],
        "components": [
            {
                "id": "event_to_fed",
                "path": APP + "widgets.convert_to_fed_event.ConvertToFedEvent",
                "args": {"events_to_convert": ["analytix_log_stats"]},
            }
        ],
        "task_result_filters": [{"filters": [{"path": "my_code.MyFilter", "args": {}}]}],
    }
    meta = {"name": "np", "min_clients": 2, "mandatory_clients": ["a"], "deploy_map": {"app": ["@ALL"]}, "study": "s"}
    folder = write(tmp_path / "job", server=server, client=client, **meta)
    (folder / "app" / "custom" / "client.py").write_text("")
    spec = converted(folder, tmp_path)
    train, cross, ours = spec.workflows
    assert (train.path, cross.path, ours.path) == (FEDAVG, CROSS_SITE, GLOBAL_EVAL)
    assert train.args == {
        "num_rounds": 4,
        "min_clients": 2,
        "stop_cond": "loss <= 0.1",
        "patience": 3,
        "key_metric": "loss",
        "key_metric_mode": "min",
        "params_transfer_type": "DIFF",
        "initial_model": "initial_model.safetensors",
    }
    assert cross.args == {"submit_model_timeout": 60, "participating_clients": ["a", "b"]}
    assert ours.args == {"validation_timeout": 5}
    for workflow in spec.workflows:
        workflow.build()
    tracking = "fedloom.recipe.tracking."
    assert spec.components == (
        Component("my_code.Thing", {"x": 1}, "mine"),
        Component(tracking + "TensorBoard", {"tb_folder": "tb_events"}, "tracking_tensorboard"),
        Component(tracking + "MLflow", {"tracking_uri": "file:///x", "experiment_name": "e"}, "tracking_mlflow"),
    )
    assert spec.filters_for("server_input", "train")[0].args == {"exclude_vars": ["b"]}
    assert spec.filters_for("client_output", "x", "a")[0].path == "my_code.MyFilter"
    assert (spec.server_extra, spec.extra, spec.mandatory_clients) == ({"own_setting": 3}, {"study": "s"}, ("a",))
    assert spec.executor_for("train", "b") == Component(
        SCRIPT,
        {
            "task_script_path": "client.py",
            "task_script_args": "--lr 1",
            "params_transfer_type": "DIFF",
            "launch_external_process": False,
            "params_exchange_format": "numpy",
        },
    )
    spec.executor_for("train", "b").build()


def test_a_launcher_and_variables(tmp_path: Path) -> None:
    client = {
        "app_script": "train.py",
        "app_config": "--batch 4 --site '{SITE_NAME}'",
        "executors": [
            {
                "executor": {
                    "path": "nvflare.app_opt.pt.client_api_launcher_executor.PTClientAPILauncherExecutor",
                    "args": {
                        "launcher_id": "launcher",
                        "pipe_id": "pipe",
                        "heartbeat_timeout": 60,
                        "params_transfer_type": "DIFF",
                        "train_with_evaluation": True,
                    },
                }
            }
        ],
        "components": [
            {
                "id": "launcher",
                "path": APP + "launchers.subprocess_launcher.SubprocessLauncher",
                "args": {"script": "python3 -u custom/{app_script} {app_config}", "launch_once": True},
            },
            {
                "id": "pipe",
                "path": "nvflare.fuel.utils.pipe.cell_pipe.CellPipe",
                "args": {"mode": "PASSIVE", "site_name": "{SITE_NAME}", "root_url": "{ROOT_URL}"},
            },
        ],
    }
    folder = write(tmp_path / "job", client=client, name="pt", deploy_map={"app": ["server", "site-1", "site-2"]})
    (folder / "app" / "custom" / "other.py").write_text("")
    spec = converted(folder, tmp_path, FEDLOOM_APP_SCRIPT="other.py")
    assert spec.sites == ("site-1", "site-2")
    built = spec.executor_for("train", "site-1").build()
    assert (built.task_script_path, built.argv, built.command_argv) == (
        "other.py",
        ["--batch", "4", "--site", "{SITE_NAME}"],
        ["python3", "-u"],
    )
    assert built.launch_external_process and built.launch_once
    assert (built.params_exchange_format, built.params_transfer_type) == ("pytorch", "DIFF")


def test_a_torch_model_is_built_from_the_jobs_own_code(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    persistor = "nvflare.app_opt.pt.file_model_persistor.PTFileModelPersistor"
    for number, model in enumerate(({"path": "net.Net", "args": {"size": 3}}, "model")):
        server = {
            "components": [
                {"id": "persistor", "path": persistor, "args": {"model": model}},
                {"id": "model", "path": "net.Net", "args": {"size": 3}},
            ]
        }
        folder = write(tmp_path / f"job{number}", server=server, name="pt")
        (folder / "app" / "custom" / "net.py").write_text(
            "from torch import nn\n\n\nclass Net(nn.Linear):\n"
            "    def __init__(self, size):\n        super().__init__(size, 1)\n"
        )
        convert_folder(folder, tmp_path / f"out{number}")
        params = decode_model(tmp_path / f"out{number}" / "app" / "initial_model.safetensors").params
        assert {name: value.shape for name, value in params.items()} == {"weight": (1, 3), "bias": (1,)}
    assert "net" not in sys.modules


def test_apps_for_server_and_sites(tmp_path: Path) -> None:
    folder = write(tmp_path / "job", name="two", deploy_map={"app": ["server", "site-1"], "app2": ["site-2"]})
    write(tmp_path / "other", client={"executors": [TRAINER | {"tasks": ["tr*"]}]})
    (tmp_path / "other" / "app").rename(folder / "app2")
    spec = converted(folder, tmp_path)
    assert [(app.name, app.sites, app.executors[0].tasks) for app in spec.apps] == [
        ("app", ("site-1",), ("train",)),
        ("app2", ("site-2",), ("tr*",)),
    ]


def test_an_app_of_fedlooms_alone(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedloom.recipe import NumpyFedAvgRecipe
    from fedloom.serialization.filters import ExcludeVars

    recipe = NumpyFedAvgRecipe(name="own", model=[1.0], min_clients=1, num_rounds=4, train_script="client.py")
    recipe.add_client_output_filter(ExcludeVars("x"))
    folder = recipe.export(here / "own")
    config = folder / "app" / "config" / "config_fed_server.json"
    config.write_text(config.read_text().replace(f'"path": "{FEDAVG}"', '"name": "FedAvg"'))
    spec = JobSpec.load(folder)
    with job_folder(folder) as same:
        assert same == folder
    with job_folder(folder / "app") as alone:
        assert JobSpec.load(alone) == spec
    assert capsys.readouterr().err == "", "nothing was mapped"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("server", "client", "text"),
    [
        ({"workflows": [{"path": APP + "workflows.scaffold.Scaffold"}]}, {}, "Scaffold has no equivalent in"),
        ({"workflows": [SAG | {"args": {"num_rounds": 1, "start_round": 4}}]}, {}, "start_round=4 has no equivalent"),
        ({"workflows": [SAG | {"args": {"num_rounds": "three"}}]}, {}, "='three'; a whole number"),
        ({"workflows": [SAG | {"args": {"num_rondes": 1}}]}, {}, "argument 'num_rondes' has no equivalent"),
        ({"workflows": [SAG, {"path": APP + "x.NoSuchThing"}]}, {}, "NoSuchThing has no equivalent in fedloom"),
        ({"components": [MEAN | {"args": {"weigh_by_local_iter": False}}]}, {}, "results are weighted by their steps"),
        ({"components": [{"id": "x", "path": APP + "widgets.Intime_model_selector.IntimeModelSelektor"}]}, {},
         "the nearest name that has one is IntimeModelSelector"),
        ({}, {"executors": [{"executor": {"path": "trainer.MyTrainer"}}]}, "trainer.MyTrainer is a class built on"),
        ({}, {"executors": [{"executor": {"path": API, "args": {"execution_mode": "attach"}}}]},
         "execution_mode='attach'"),
        ({}, {"executors": [{"executor": {"name": "PTClientAPILauncherExecutor", "args": {}}}]},
         "without a SubprocessLauncher"),
        ({}, {"task_result_filters": [{"filters": [{"name": "SVTPrivacy"}]}]}, "SVTPrivacy has no equivalent"),
        ({}, {"task_result_filters": [{"filters": [SAG]}]}, "ScatterAndGather is no filter"),
        ({}, {"executors": [{"executor": SAG}]}, "ScatterAndGather is no executor"),
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_named(tmp_path: Path, server: Any, client: Any, text: str) -> None:
    folder = write(tmp_path / "job", server=server, client=client, name="x")
    with pytest.raises(JobError) as caught:
        convert_folder(folder, tmp_path / "out", {})
    assert text in str(caught.value) and str(folder) in str(caught.value)


def test_arguments_may_be_null(tmp_path: Path) -> None:
    folder = write(tmp_path / "job", server={"workflows": [SAG | {"args": None}]}, name="x")
    assert converted(folder, tmp_path).workflows[0].args["num_rounds"] == 5


def test_folders_that_are_not_jobs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not needs_conversion(tmp_path / "empty")
    with pytest.raises(JobError, match=r"meta.json is missing"), job_folder(tmp_path / "empty") as folder:
        JobSpec.load(folder)
    folder = write(tmp_path / "job", name="x", deploy_map={"app": ["@ALL"], "gone": ["site-1"]})
    with pytest.raises(JobError, match="deploy_map names app 'gone', and there is no folder"):
        convert_folder(folder, tmp_path / "out")


# ---------------------------------------------------------------- the table


def test_the_table_in_the_docs_is_the_codes(repo: Path) -> None:
    assert as_markdown() in (repo / "docs" / "guides" / "job-folders.md").read_text()


def test_the_tables_arguments_are_those_of_fedlooms_classes() -> None:
    import inspect

    assert not TABLE.keys() & REFUSED.keys()
    for name, row in TABLE.items():
        if row.ours.startswith("fedloom.") and name not in ("NPTrainer", "MLflowReceiver"):
            known = inspect.signature(Component(row.ours).load()).parameters
            assert set(row.args.values()) <= known.keys(), name
        assert not set(row.args) & {*row.unneeded, *row.only}, name


# ---------------------------------------------------------------- they run


CLIENT = """
import sys
import fedloom.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"mean": float(model.params["numpy_key"].mean())}))
        continue
    if flare.is_submit_model():
        flare.send(flare.FLModel(params=last))
        continue
    last = {"numpy_key": model.params["numpy_key"] + float(sys.argv[2])}
    flare.send(flare.FLModel(params=dict(last), metrics={"mean": float(model.params["numpy_key"].mean())}))
"""


@pytest.mark.process
@pytest.mark.timeout(180)
def test_the_hello_example_runs_and_says_what_was_mapped(tmp_path: Path) -> None:
    write(tmp_path / "hello-numpy-sag", prefix="config")
    command = [sys.executable, "-m", "fedloom", "sim", "hello-numpy-sag/app", "-w", "out", "-n", "6", "-t", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "read as NVFLARE's" in line]
    assert "ScatterAndGather -> FedAvg" in line and "NPTrainer -> FunctionExecutor" in line
    result = tmp_path / "out" / "hello-numpy-sag"
    expected = np.arange(1, 10, dtype=np.float32).reshape(3, 3) + 3 * 2
    np.testing.assert_array_equal(decode_model(result / "model.safetensors").params["numpy_key"], expected)
    assert JobSpec.load(result / "job").workflows[0].path == FEDAVG, "the job as it ran"


@pytest.mark.process
@pytest.mark.timeout(180)
def test_a_folder_with_scripts_and_evaluation_runs(tmp_path: Path) -> None:
    server = {
        "workflows": [
            {"id": "c", "path": APP + "workflows.fedavg.FedAvg", "args": {"num_clients": 2, "num_rounds": 2}},
            {"id": "d", "path": APP + "workflows.cross_site_model_eval.CrossSiteModelEval", "args": {}},
        ],
        "components": [NP_PERSISTOR | {"args": {"model": [1, 2]}}],
    }
    args = {"task_script_path": "client.py", "task_script_args": "--add {amount}", "execution_mode": "in_process"}
    client = {"amount": 3, "executors": [{"tasks": ["*"], "executor": {"path": API, "args": args}}]}
    folder = write(tmp_path / "job", server=server, client=client, name="cse", deploy_map={"app": ["@ALL"]})
    (folder / "app" / "custom" / "client.py").write_text(CLIENT)
    command = [sys.executable, "-m", "fedloom", "sim", "job", "-w", "out", "-n", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = tmp_path / "out" / "cse"
    assert decode_model(result / "model.safetensors").params["numpy_key"].tolist() == [7.0, 8.0]
    [found] = list(result.rglob("cross_val_results.json"))
    text = found.read_text()
    assert "SRV_" in text and "site-2" in text
