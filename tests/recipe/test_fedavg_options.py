"""The options of federated averaging: names, defaults, checks, and what each becomes in the job folder."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, Required, get_origin, get_type_hints

import numpy as np
import pytest
from fedloom.controller.aggregators import ModelAggregator, WeightedMean
from fedloom.recipe import FedAvgRecipe, NumpyFedAvgRecipe, notes
from fedloom.recipe.fedavg_options import GROUPS, FedAvgOptions
from fedloom.recipe.keywords import option_fields, required
from fedloom.recipe.naming import name_in, save_under_name
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import JobSpec


def recipe(**changes: Any) -> NumpyFedAvgRecipe:
    values: dict[str, Any] = {"model": [[1, 2, 3]], "min_clients": 2, "train_script": "client.py"}
    return NumpyFedAvgRecipe(**(values | changes))


def workflow(**changes: Any) -> dict[str, Any]:
    return recipe(**changes).job.workflows[0].args


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_said", set[str]())


# ---------------------------------------------------------------- names


def test_the_types_name_the_groups_options() -> None:
    fields = option_fields(GROUPS)
    assert set(FedAvgOptions.__annotations__) == set(fields)
    hints = get_type_hints(FedAvgOptions, include_extras=True)
    assert {name for name, hint in hints.items() if get_origin(hint) is Required} == {
        name for name, field in fields.items() if required(field)
    }


def test_help_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(FedAvgRecipe).parameters
    assert shown.keys() - inspect.signature(NumpyFedAvgRecipe).parameters.keys() == {"framework"}
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in shown.values())
    defaults = {name: parameter.default for name, parameter in shown.items()}
    documents: dict[str, Any] = {
        "name": "fedavg",
        "model": None,
        "initial_model": None,
        "initial_ckpt": None,
        "min_clients": inspect.Parameter.empty,
        "num_rounds": 2,
        "train_script": inspect.Parameter.empty,
        "train_args": "",
        "aggregator": None,
        "launch_external_process": False,
        "command": "python3 -u",
        "framework": "pytorch",
        "server_expected_format": "numpy",
        "params_transfer_type": "FULL",
        "model_persistor": None,
        "model_locator": None,
        "per_site_config": None,
        "launch_once": True,
        "launch_timeout": 300.0,
        "shutdown_timeout": 0.0,
        "key_metric": "accuracy",
        "key_metric_mode": None,
        "stop_cond": None,
        "patience": None,
        "best_model_filename": None,
        "save_filename": None,
        "exclude_vars": None,
        "aggregation_weights": None,
        "server_memory_gc_rounds": 0,
        "enable_tensor_disk_offload": False,
        "client_memory_gc_rounds": 0,
        "cuda_empty_cache": False,
    }
    assert {name: defaults[name] for name in documents} == documents

    class Mine(FedAvgRecipe):
        def __init__(self, hidden: int) -> None:
            super().__init__(min_clients=hidden, train_script="client.py")

    assert list(inspect.signature(Mine).parameters) == ["hidden"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_round": 3}, "NumpyFedAvgRecipe() got an unexpected keyword argument 'num_round'; did you mean 'num_rou"),
        ({"xyz": 3}, "'xyz'; its options are aggregation_weights, aggregator,"),
        ({"framework": "numpy"}, "unexpected keyword argument 'framework'"),
        ({"aggregation_weight": 0}, "'aggregation_weight'; did you mean 'aggregation_weights'?"),
    ],
)
def test_unknown_options_come_with_the_nearest(here: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        recipe(**options)
    assert text in str(caught.value)


def test_missing_options_are_named(here: Path) -> None:
    with pytest.raises(TypeError, match=r"FedAvgRecipe\(\) missing 2 .*: 'min_clients', 'train_script'"):
        FedAvgRecipe()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stop_cond": "accuracy>=80"}, "stop_cond='accuracy>=80'; 'METRIC OP NUMBER' with spaces"),
        ({"patience": 0}, "patience=0"),
        ({"key_metric_mode": "best"}, "key_metric_mode='best'"),
        ({"save_filename": "out/best.pt"}, "save_filename='out/best.pt'; a file name without a folder"),
        ({"best_model_filename": "model.pt"}, "best_model_filename='model.pt': model.safetensors is the global model"),
        ({"best_model_filename": ""}, "best_model_filename=''"),
        ({"server_memory_gc_rounds": -1}, "server_memory_gc_rounds=-1"),
        ({"client_memory_gc_rounds": True}, "client_memory_gc_rounds=True"),
        ({"cuda_empty_cache": 1}, "cuda_empty_cache=1; True or False"),
        ({"launch_once": "no"}, "launch_once='no'; True or False"),
        ({"aggregator_data_kind": "METRICS"}, "aggregator_data_kind='METRICS'"),
        ({"model_persistor": object()}, "models are kept by the broker"),
        ({"model_locator": "locator"}, "leave model_locator out"),
        ({"aggregation_weights": 3}, "aggregation_weights=3; a map of sites to factors"),
        ({"initial_ckpt": 3}, "initial_ckpt=3; the path of a checkpoint"),
        ({"train_script": "client.py:train", "client_memory_gc_rounds": 1}, "are for scripts"),
    ],
)
def test_what_is_not_allowed_is_said(here: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError) as caught:
        recipe(**changes)
    assert text in str(caught.value)


def test_early_ends_reach_the_workflow(here: Path) -> None:
    args = workflow(stop_cond="accuracy >= 80", patience=3, key_metric_mode="max")
    assert args["key_metric"] == "accuracy"
    assert (args["stop_cond"], args["patience"], args["key_metric_mode"]) == ("accuracy >= 80", 3, "max")
    # a condition names the key metric where nobody else does
    assert workflow(stop_cond="loss <= 0.1")["key_metric"] == "loss"
    assert workflow(stop_cond="loss <= 0.1", key_metric="accuracy")["key_metric"] == "accuracy"
    for name in ("stop_cond", "patience", "key_metric_mode", "best_model_filename", "initial_ckpt", "aggregator"):
        assert name not in workflow()


def test_file_names_keep_their_stem_and_say_so_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert workflow(save_filename="FL_global_model.pt")["best_model_filename"] == "FL_global_model.safetensors"
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert "save_filename='FL_global_model.pt'" in said
    assert "FL_global_model.safetensors" in said
    assert workflow(best_model_filename="v1.2.safetensors", save_filename="b.pt")["best_model_filename"] == (
        "v1.2.safetensors"
    )
    assert workflow(best_model_filename="v1.2")["best_model_filename"] == "v1.2.safetensors"


def test_memory_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(server_memory_gc_rounds=5, client_memory_gc_rounds=1, cuda_empty_cache=True)
    assert made.job.workflows[0].args["memory_gc_rounds"] == 5
    component = made.job.spec().executor_for("train")
    assert component.args["client_memory_gc_rounds"] == 1
    assert component.args["cuda_empty_cache"] is True
    component.build()
    assert capsys.readouterr().err == ""
    recipe(enable_tensor_disk_offload=True, cuda_empty_cache=True)
    said = capsys.readouterr().err
    assert "enable_tensor_disk_offload has nothing to turn on" in said
    assert "cuda_empty_cache=True does nothing alone" in said


# ---------------------------------------------------------------- sites of their own


def test_sites_of_their_own(here: Path) -> None:
    (here / "other.py").write_text("import extra\n")
    (here / "extra.py").write_text("")
    config: dict[str, Any] = {
        "site-1": {"train_args": "--lr 2", "launch_external_process": True, "command": "python3"},
        "site-2": {"train_script": "other.py", "framework": "pytorch", "shutdown_timeout": 3},
    }
    spec = JobSpec.load(recipe(train_args="--lr 1", per_site_config=config).export(here / "out"))
    args = [spec.executor_for("train", site).args for site in ("site-1", "site-2", "site-3")]
    assert [one["task_script_args"] for one in args] == ["--lr 2", "--lr 1", "--lr 1"]
    assert [one["task_script_path"] for one in args] == ["client.py", "other.py", "client.py"]
    assert [one["launch_external_process"] for one in args] == [True, False, False]
    assert [one["params_exchange_format"] for one in args] == ["numpy", "pytorch", "numpy"]
    assert [one["shutdown_timeout"] for one in args] == [0.0, 3.0, 0.0]
    assert (here / "out" / "app" / "custom" / "extra.py").is_file()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (["site-1"], "per_site_config=['site-1']; a map of site names"),
        ({"a/b": {}}, "site name"),
        ({"site-1": 3}, "per_site_config['site-1']=3; a map of options"),
        ({"site-1": {"train_arg": ""}}, "unknown option 'train_arg'; did you mean 'train_args'?"),
        ({"site-1": {"num_rounds": 3}}, "unknown option 'num_rounds'; allowed are client_memory_gc_rounds, command,"),
        ({"site-1": {"train_args": "'"}}, "per_site_config['site-1']: train_args"),
        ({"site-1": {"params_transfer_type": "DIFF"}}, "but the other sites send 'FULL'"),
        ({"site-1": {"train_script": "gone.py"}}, "'gone.py' not found"),
        ({"site-1": {"train_script": "client.py:nope"}}, "has no function 'nope'"),
    ],
)
def test_sites_that_are_wrong(here: Path, config: Any, text: str) -> None:
    with pytest.raises(JobError) as caught:
        recipe(per_site_config=config)
    assert text in str(caught.value)


def test_sites_are_set_once(here: Path) -> None:
    made = recipe()
    made.set_per_site_config({"site-1": {"train_args": "--x"}})
    with pytest.raises(JobError, match="was set already"):
        made.set_per_site_config({"site-2": {"train_args": "--x"}})


# ---------------------------------------------------------------- aggregators


AGGREGATOR = """
import numpy as np
from parts import middle

class Median:
    def __init__(self, trim=0, names=None):
        self.trim, self.names = trim, names
        self.models = []
    def accept_model(self, model):
        self.models.append(model)
        return True
    def aggregate_model(self):
        return middle(self.models)
    def reset_stats(self):
        self.models = []

class Half:
    def accept_model(self, model): ...

class Forgets(Median):
    def __init__(self, trim=0, rate=0.1):
        super().__init__(trim)
"""


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (here / "mine.py").write_text(AGGREGATOR)
    (here / "parts.py").write_text("def middle(models): return models[0]\n")
    monkeypatch.syspath_prepend(str(here))
    yield __import__("mine")
    for name in ("mine", "parts"):
        sys.modules.pop(name, None)


def test_an_aggregator_travels_with_its_arguments_and_sources(here: Path, mine: Any) -> None:
    made = recipe(aggregator=mine.Median(trim=2), server_expected_format="pytorch")
    args = made.job.workflows[0].args
    assert args["aggregator"] == {"path": "mine.Median", "args": {"trim": 2}}
    assert args["aggregator_format"] == "pytorch"
    custom = made.export(here / "out") / "app" / "custom"
    assert {"client.py", "helper.py", "mine.py", "parts.py"} == {path.name for path in custom.iterdir()}
    built = JobSpec.load(here / "out").workflows[0].build()
    assert built.aggregator.trim == 2
    by_path = recipe(aggregator={"class_path": "mine.Median", "args": {"trim": 1}}).job
    assert by_path.workflows[0].args["aggregator"] == {"path": "mine.Median", "args": {"trim": 1}}
    assert "mine.py" in by_path.files


def test_fedlooms_own_aggregators_travel_too(here: Path) -> None:
    assert workflow(exact=False)["exact"] is False and "exact" not in workflow()
    args = workflow(aggregator=WeightedMean(exclude_vars="bn", aggregation_weights={"site-1": 2.0}))
    assert args["aggregator"]["args"] == {"aggregation_weights": {"site-1": 2.0}, "exclude_vars": "bn"}


def test_a_codec_reaches_the_sites_and_the_mean(here: Path) -> None:
    made = recipe(codec="int8").job.spec()
    assert made.executor_for("train").args["codec"] == made.workflows[0].args["codec"] == "int8"
    recipe(codec="int8").export(here / "out")
    assert JobSpec.load(here / "out").workflows[0].build().aggregator.plan({"w": np.ones(3)}, tasks=1).codec == "int8"
    assert "codec" not in recipe().job.spec().executor_for("train").args | workflow()
    for wrong, text in (
        ({"codec": "zip"}, "codec='zip'; allowed are None, 'fp16', 'bf16', 'int8'"),
        ({"codec": "fp16", "aggregator": WeightedMean()}, "codec is an option of the weighted mean"),
        ({"per_site_config": {"site-1": {"codec": "fp16"}}}, "unknown option 'codec'"),
    ):
        with pytest.raises(JobError, match=text):
            recipe(**wrong)


class Here(ModelAggregator):
    """Stands in this file."""

    def accept_model(self, model: Any) -> bool:
        return True

    def aggregate_model(self) -> Any:
        return None

    def reset_stats(self) -> None: ...


def test_aggregators_that_cannot_be_used(here: Path, mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, text in (
        (mine.Median, "aggregator=Median is a class; give an object of it: Median()"),
        (mine.Half(), "mine.Half has not all of accept_model(), aggregate_model() and reset_stats()"),
        (mine.Forgets(rate=0.5), "keeps no attribute 'rate'"),
        (3, "aggregator is a int"),
        (mine.Median(trim=object()), "which a job's configuration cannot hold"),
        ({"class_path": "mine.Gone"}, "has no 'Gone'"),
    ):
        with pytest.raises(JobError) as caught:
            recipe(aggregator=given)
        assert text in str(caught.value)
    for name, value in (("aggregation_weights", {"site-1": 2}), ("exclude_vars", "bn"), ("exact", False)):
        with pytest.raises(JobError, match=f"{name} is an option of the weighted mean"):
            recipe(aggregator=mine.Median(), **{name: value})
    monkeypatch.setattr(Here, "__module__", "__main__")
    with pytest.raises(JobError, match="class Here stands in the job script, which nothing imports"):
        recipe(aggregator=Here())


# ---------------------------------------------------------------- what the result folder has


def test_the_best_model_under_the_users_name(tmp_path: Path) -> None:
    records = [{"round": 0, "best_model_filename": "mine.safetensors"}, {"round": 1}]
    save_under_name(tmp_path, records)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.safetensors").write_bytes(b"last")
    save_under_name(tmp_path, records)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"last"
    (tmp_path / "best_model.safetensors").write_bytes(b"best")
    save_under_name(tmp_path, records)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"best"
    assert (tmp_path / "model.safetensors").read_bytes() == b"last"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "name", [None, 3, "", "../x.safetensors", "/x.safetensors", "summary.json", "model.safetensors", "a\n.safetensors"]
)
def test_names_that_a_record_may_not_have(tmp_path: Path, name: Any) -> None:
    (tmp_path / "best_model.safetensors").write_bytes(b"best")
    assert name_in([{"best_model_filename": name}]) is None
    save_under_name(tmp_path, [{"best_model_filename": name}])
    assert [path.name for path in tmp_path.iterdir()] == ["best_model.safetensors"]


def test_no_model_is_no_file(here: Path) -> None:
    for made in (recipe(model=None), FedAvgRecipe(min_clients=2, train_script="client.py")):
        assert "initial_model" not in made.job.workflows[0].args
        folder = made.export(here / made.name)
        assert not (folder / "app" / "initial_model.safetensors").exists()
        assert json.loads((folder / "meta.json").read_text())["min_clients"] == 2


def test_both_of_the_models_names(here: Path) -> None:
    params = recipe(model=None, initial_model=[1.0]).job.params
    assert params is not None
    assert np.array_equal(params["numpy_key"], [1.0])
