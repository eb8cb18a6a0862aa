from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import FedAvgRecipe, NumpyFedAvgRecipe, TransferType
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import JobSpec

torch = pytest.importorskip("torch")


def numpy_recipe(**changes: Any) -> NumpyFedAvgRecipe:
    values: dict[str, Any] = {"model": [[1, 2, 3]], "min_clients": 2, "train_script": "client.py"}
    return NumpyFedAvgRecipe(**(values | changes))


class TestTorch:
    def test_a_module_its_code_and_its_settings(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "net.py").write_text(
            "import torch, netparts\nclass Net(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n"
            "        self.fc = torch.nn.Linear(3, 2)\n        self.bn = torch.nn.BatchNorm1d(2)\n"
        )
        (here / "netparts.py").write_text("")
        monkeypatch.syspath_prepend(str(here))
        net = __import__("net").Net()
        try:
            recipe = FedAvgRecipe(
                name="hello-pt",
                initial_model=net,
                min_clients=2,
                num_rounds=5,
                train_script="client.py",
                train_args="--lr 1 --data '/my data'",
                params_transfer_type="diff",
                launch_once=False,
                aggregation_weights={"site-1": 2},
                exclude_vars="bn",
                key_metric="f1",
                seed=3,
            )
        finally:
            del sys.modules["net"]
        spec = JobSpec.load(recipe.export(here / "out"))
        assert (spec.name, spec.min_clients, spec.num_rounds, spec.seed, spec.sites) == ("hello-pt", 2, 5, 3, None)
        assert spec.workflows[0].args == {
            "num_rounds": 5,
            "min_clients": 2,
            "initial_model": "initial_model.safetensors",
            "params_transfer_type": "DIFF",
            "key_metric": "f1",
            "aggregation_weights": {"site-1": 2.0},
            "exclude_vars": "bn",
        }
        assert spec.executor_for("train").args == {
            "task_script_path": "client.py",
            "task_script_args": "--lr 1 --data '/my data'",
            "launch_external_process": False,
            "command": "python3 -u",
            "launch_once": False,
            "launch_timeout": 300.0,
            "shutdown_timeout": 0.0,
            "params_exchange_format": "pytorch",
            "params_transfer_type": "DIFF",
        }
        names = sorted(path.name for path in (here / "out" / "app" / "custom").iterdir())
        assert names == ["client.py", "helper.py", "net.py", "netparts.py"]
        from safetensors.torch import load_file

        written = load_file(here / "out" / "app" / "initial_model.safetensors")
        assert written.keys() == net.state_dict().keys()
        for key, value in net.state_dict().items():
            assert torch.equal(written[key], value)
            assert written[key].dtype == value.dtype

    def test_a_map_of_tensors_and_a_class_path(self, here: Path) -> None:
        recipe = FedAvgRecipe(
            model={"w": torch.zeros(2, dtype=torch.bfloat16)}, min_clients=1, train_script="client.py"
        )
        assert recipe.job.params is not None
        assert recipe.job.params["w"].dtype == torch.bfloat16
        spec = {"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}}
        recipe = FedAvgRecipe(model=spec, min_clients=1, train_script="client.py")
        assert sorted(recipe.job.params or ()) == ["bias", "weight"]
        with pytest.raises(JobError, match="cannot be built"):
            FedAvgRecipe(model={"class_path": "torch.nn.Nope"}, min_clients=1, train_script="client.py")

    @pytest.mark.parametrize(
        ("model", "text"),
        [
            (torch.nn.Linear, "is a class; give an instance: model=Linear()"),
            ({}, "at least one tensor"),
            (3, "model is a int"),
            (torch.nn.ReLU(), "no parameters"),
        ],
    )
    def test_models_that_are_none(self, here: Path, model: Any, text: str) -> None:
        with pytest.raises(JobError) as caught:
            FedAvgRecipe(model=model, min_clients=1, train_script="client.py")
        assert text in str(caught.value)

    def test_model_wins_over_initial_model(self, here: Path) -> None:
        recipe = FedAvgRecipe(
            model={"a": torch.ones(1)}, initial_model={"b": torch.ones(1)}, min_clients=1, train_script="client.py"
        )
        assert list(recipe.job.params or ()) == ["a"]


class TestNumpy:
    def test_a_list_becomes_float32_under_numpy_key(self, here: Path) -> None:
        recipe = numpy_recipe(model=[[1, 2, 3], [4, 5, 6]], params_transfer_type=TransferType.DIFF, num_rounds=4)
        from safetensors.numpy import load_file

        folder = recipe.export(here / "out dir")
        written = load_file(folder / "app" / "initial_model.safetensors")
        assert list(written) == ["numpy_key"]
        assert written["numpy_key"].dtype == np.float32
        np.testing.assert_array_equal(written["numpy_key"], [[1, 2, 3], [4, 5, 6]])
        spec = JobSpec.load(folder)
        assert spec.name == "fedavg"
        assert spec.num_rounds == 4
        assert spec.executor_for("train").args["params_exchange_format"] == "numpy"
        assert spec.executor_for("train").args["params_transfer_type"] == "DIFF"

    @pytest.mark.parametrize(
        ("model", "dtype"),
        [
            (np.ones(2, np.float64), np.float64),
            (np.ones(2, np.float16), np.float16),
            (np.ones(2, np.int64), np.float32),
            ([1.5, 2], np.float32),
        ],
    )
    def test_dtypes(self, here: Path, model: Any, dtype: Any) -> None:
        params = numpy_recipe(model=model).job.params
        assert params is not None
        assert params["numpy_key"].dtype == dtype

    def test_a_map_keeps_its_names(self, here: Path) -> None:
        assert list(numpy_recipe(model={"coef": np.ones(2)}).job.params or ()) == ["coef"]

    @pytest.mark.parametrize("model", [{}, "x", [["a"]], [[1], [1, 2]], [], torch.nn.Linear(1, 1)])
    def test_models_that_are_none(self, here: Path, model: Any) -> None:
        with pytest.raises(JobError, match="model"):
            numpy_recipe(model=model)


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"min_clients": 0}, "min_clients=0"),
            ({"min_clients": True}, "min_clients=True"),
            ({"num_rounds": 0}, "num_rounds=0"),
            ({"name": "a/b"}, "job name"),
            ({"train_script": ""}, "train_script=''"),
            ({"train_script": "nope.py"}, "script 'nope.py' not found: looked for"),
            ({"train_script": "client.py:missing"}, "client.py has no function 'missing'; it has ['train']"),
            ({"train_script": "client.py:train", "train_args": "--x"}, "names a function"),
            ({"train_args": "'open"}, "closed quotes"),
            ({"command": " "}, "command is empty"),
            ({"shutdown_timeout": -1}, "shutdown_timeout=-1"),
            ({"params_transfer_type": "HALF"}, "allowed are 'FULL', 'DIFF'"),
            ({"server_expected_format": "keras"}, "server_expected_format='keras'"),
            ({"exclude_vars": "("}, "not a regular expression"),
            ({"aggregation_weights": {"site-1": 0}}, "aggregation_weights['site-1']=0"),
            ({"aggregation_weights": {"a/b": 1}}, "site name"),
            ({"sample": 1}, "sample=1 sites a round can never give min_clients=2"),
            ({"seed": -1}, "seed=-1"),
        ],
    )
    def test_what_is_not_allowed_is_said(self, here: Path, changes: dict[str, Any], text: str) -> None:
        with pytest.raises(JobError) as caught:
            numpy_recipe(**changes)
        assert text in str(caught.value)

    def test_the_documents_defaults_are_accepted(self, here: Path) -> None:
        numpy_recipe(
            initial_ckpt=None,
            aggregator=None,
            aggregator_data_kind="WEIGHTS",
            per_site_config=None,
            stop_cond=None,
            patience=None,
            save_filename="FL_global_model.pt",
            client_memory_gc_rounds=0,
            cuda_empty_cache=False,
            server_expected_format="numpy",
        )

    def test_a_function_task(self, here: Path) -> None:
        component = numpy_recipe(train_script="client.py:train").job.spec().executor_for("train")
        assert component.path.endswith("FunctionExecutor")
        assert component.args["function"] == "train"
        assert component.args["task_script_path"] == "client.py"

    def test_the_executor_takes_these_arguments(self, here: Path) -> None:
        for script in ("client.py", "client.py:train"):
            built = numpy_recipe(train_script=script).job.spec().executor_for("train").build()
            assert built.task_script_path == "client.py"


class TestFiles:
    def test_client_files_travel(self, here: Path) -> None:
        (here / "data").mkdir()
        (here / "data" / "a.csv").write_text("1")
        (here / "labels.txt").write_text("x")
        recipe = numpy_recipe()
        recipe.add_client_file("data")
        recipe.add_client_file(here / "labels.txt")
        custom = recipe.export(here / "out") / "app" / "custom"
        assert (custom / "data" / "a.csv").read_text() == "1"
        assert (custom / "labels.txt").read_text() == "x"
        with pytest.raises(JobError, match=r"'gone.csv' to take along not found"):
            recipe.add_client_file("gone.csv")

    def test_the_script_is_found_beside_the_job_script_before_here(
        self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path / "elsewhere"
        other.mkdir()
        (other / "client.py").write_text("wrong = 1")
        (other / "only_here.py").write_text("")
        monkeypatch.chdir(other)
        assert numpy_recipe().job.files["client.py"] == (here / "client.py").resolve()
        assert numpy_recipe(train_script="only_here.py").job.files["only_here.py"].parent == other.resolve()

    def test_export_replaces_a_job_and_nothing_else(self, here: Path) -> None:
        recipe = numpy_recipe()
        folder = recipe.export(here / "out")
        (folder / "app" / "custom" / "stale.py").write_text("")
        recipe.export(here / "out")
        assert not (folder / "app" / "custom" / "stale.py").exists()
        (here / "mine").mkdir()
        (here / "mine" / "thesis.txt").write_text("keep")
        with pytest.raises(JobError, match="holds something that is not a job"):
            recipe.export(here / "mine")
        assert (here / "mine" / "thesis.txt").read_text() == "keep"
        with pytest.raises(JobError, match="is a file"):
            recipe.export(here / "client.py")
