"""Evaluation as a recipe has it: what is refused at once, the matrix, and whole simulations of each kind of script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import (
    FedAvgRecipe,
    FedEvalRecipe,
    NumpyCrossSiteEvalRecipe,
    NumpyFedAvgRecipe,
    Run,
    SimEnv,
    add_cross_site_evaluation,
    add_final_global_evaluation,
)
from fedloom.recipe.matrix import matrix_of, shown, summary_of, tables
from fedloom.serialization.errors import GatherError, JobError, TaskError
from fedloom.serialization.jobspec import JobSpec

#: Answers all three kinds of tasks; its own model is what it trained last, and a score says who scored what.
CLIENT = """\
import sys
import fedloom.client as flare
import numpy as np

flare.init()
number = int(flare.get_site_name()[-1])
fail = sys.argv[1] if len(sys.argv) > 1 else ""
while flare.is_running():
    model = flare.receive()
    task = flare.get_task_name()
    if fail == f"{task}@{number}" or fail == task:
        raise ValueError(f"no {task} here")
    if flare.is_submit_model():
        assert model.params is None
        flare.send(flare.FLModel(params={"numpy_key": flare.state().get("own", np.full(2, 7.0))}))
    elif flare.is_evaluate():
        value = np.asarray(model.params["numpy_key"])
        flare.send(flare.FLModel(metrics={"score": float(value[0]) + 1000 * number}))
    else:
        own = np.asarray(model.params["numpy_key"]) + number
        flare.state()["own"] = own
        flare.send(flare.FLModel(params={"numpy_key": own}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
"""

FUNCTIONS = """\
import numpy as np
from fedloom.client import FLModel


def train(model, ctx):
    ctx.state["own"] = model.params["numpy_key"] + int(ctx.site[-1])
    return FLModel(params={"numpy_key": ctx.state["own"]})


def submit_model(model, ctx):
    return FLModel(params={"numpy_key": ctx.state["own"]})


def evaluate(model, ctx):
    return FLModel(metrics={"score": float(model.params["numpy_key"][0]) + 1000 * int(ctx.site[-1])})
"""

TRAINS = """\
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params))
"""

#: Two sites, one round from [1, 1]: own models 2 and 3, the server's 2.5.
EXPECTED = {
    f"site-{data}": {
        model: {"score": value + 1000.0 * data}
        for model, value in (("SRV_model", 2.5), ("site-1", 2.0), ("site-2", 3.0))
    }
    for data in (1, 2)
}


def numpy_recipe(here: Path, script: str = CLIENT, name: str = "client.py", **options: Any) -> NumpyFedAvgRecipe:
    (here / "client.py").write_text(script)
    defaults = {"model": np.ones(2), "min_clients": 2, "num_rounds": 1, "train_script": name}
    return NumpyFedAvgRecipe(**{**defaults, **options})


def simulate(recipe: Any, here: Path, threads: int | None = None) -> Run:
    return recipe.execute(SimEnv(num_clients=2, num_threads=threads, workspace_root=here / "ws", show_progress=False))


def workflows(recipe: Any) -> list[dict[str, Any]]:
    return [{"path": w.path.rpartition(".")[2], **w.args} for w in recipe.job.spec().workflows]


# ---------------------------------------------------------------- what is said at once


def test_arguments_of_the_workflows(here: Path) -> None:
    recipe = numpy_recipe(here)
    add_final_global_evaluation(recipe, participating_clients=["site-2"], validation_timeout=5)
    add_cross_site_evaluation(recipe)
    assert workflows(recipe)[1:] == [
        {"path": "GlobalModelEval", "validation_timeout": 5.0, "min_clients": 2, "participating_clients": ["site-2"]},
        {"path": "CrossSiteEval", "submit_model_timeout": 600.0, "validation_timeout": 6000.0, "min_clients": 2},
    ]
    loaded = JobSpec.load(recipe.export(here / "job"))
    for workflow in loaded.workflows[1:]:
        workflow.build()
    with pytest.raises(JobError, match="CrossSiteEval was added"):
        add_cross_site_evaluation(recipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_timeout": -1}, "validation_timeout=-1"),
        ({"submit_model_timeout": "long"}, "submit_model_timeout='long'"),
        ({"participating_clients": []}, "participating_clients"),
        ({"participating_clients": "site-1"}, "participating_clients"),
        ({"eval_function": "measure"}, r"client\.py has no function 'measure'"),
    ],
)
def test_values_that_are_not_allowed(here: Path, options: dict[str, Any], words: str) -> None:
    recipe = numpy_recipe(here, FUNCTIONS, "client.py:train")
    with pytest.raises(JobError, match=words):
        add_cross_site_evaluation(recipe, **options)
    assert len(recipe.job.workflows) == 1


def test_a_script_that_only_trains_is_told_what_to_add(here: Path) -> None:
    recipe = numpy_recipe(here, TRAINS)
    with pytest.raises(JobError) as told:
        add_cross_site_evaluation(recipe)
    assert str(told.value).startswith("client.py takes every task for training")
    assert "if flare.is_submit_model():" in str(told.value)
    assert "if flare.is_evaluate():" in str(told.value)
    with pytest.raises(JobError) as told:
        recipe.add_cse_validator_if_needed()
    assert "is_submit_model" not in str(told.value)
    assert len(recipe.job.workflows) == 1
    numpy_recipe(here).add_cse_validator_if_needed()
    helped = numpy_recipe(here, "import tasks\n" + TRAINS)  # the loop may stand in another module
    with pytest.raises(JobError):
        add_cross_site_evaluation(helped)
    (here / "tasks.py").write_text(CLIENT)
    add_cross_site_evaluation(numpy_recipe(here, "import tasks\n"))


def test_functions_for_each_task(here: Path) -> None:
    recipe = numpy_recipe(here, FUNCTIONS, "client.py:train")
    add_cross_site_evaluation(recipe)
    spec = recipe.job.spec()
    found = {task: spec.executor_for(task).args["function"] for task in ("train", "validate", "submit_model", "other")}
    assert found == {"train": "train", "validate": "evaluate", "submit_model": "submit_model", "other": "train"}
    (here / "score.py").write_text("def measure(model, ctx): ...\n")
    recipe = numpy_recipe(here)  # a script that trains and submits, a function that scores
    add_cross_site_evaluation(recipe, eval_function="score.py:measure")
    assert recipe.job.spec().executor_for("validate").args["task_script_path"] == "score.py"
    assert "score.py" in recipe.job.files
    with pytest.raises(JobError, match="no function 'submit_model' for task 'submit_model'"):
        add_cross_site_evaluation(
            numpy_recipe(here, FUNCTIONS.replace("def submit_model", "def own"), "client.py:train")
        )


def test_recipes_without_training(here: Path) -> None:
    (here / "client.py").write_text(CLIENT)
    np.save(here / "start.npy", np.ones(2, np.float32))
    with pytest.raises(JobError, match="no eval_script"):
        NumpyCrossSiteEvalRecipe()
    with pytest.raises(JobError, match="without model_dir"):
        NumpyCrossSiteEvalRecipe(eval_script="client.py", model_name={"a": "a.npy"})
    with pytest.raises(JobError, match=r"a\.txt"):
        NumpyCrossSiteEvalRecipe(eval_script="client.py", model_dir=".", model_name={"a": "a.txt"})
    with pytest.raises(JobError, match=r"server\.npy"):
        NumpyCrossSiteEvalRecipe(eval_script="client.py", model_dir=".")
    with pytest.raises(JobError, match="travels with a job ends in"):
        NumpyCrossSiteEvalRecipe(eval_script="client.py", model_dir=".", model_name={"a": "a.pt"})
    with pytest.raises(JobError, match="neither model nor eval_ckpt"):
        FedEvalRecipe(min_clients=1, eval_script="client.py")
    with pytest.raises(JobError, match=r"eval_ckpt='none\.npy' not found"):
        FedEvalRecipe(min_clients=1, eval_script="client.py", eval_ckpt="none.npy")
    recipe = FedEvalRecipe(min_clients=1, eval_script="client.py", eval_ckpt="start.npy", framework="numpy")
    assert workflows(recipe)[0]["initial_model"] == "initial_model.safetensors"
    sites = FedEvalRecipe(
        min_clients=1,
        eval_script="client.py",
        model={"numpy_key": np.ones(2)},
        per_site_config={"site-1": {"eval_args": "--big"}},
    )
    assert sites.job.spec().executors[1].component.args["task_script_args"] == "--big"


# ---------------------------------------------------------------- the matrix


def record(model: str, scores: dict[str, Any], owner: str = "", **more: Any) -> dict[str, Any]:
    failed = {"failed": more.pop("failed")} if "failed" in more else {}
    return {"evaluation": {"model": model, "owner": owner, **failed}, "scores": scores, "failures": [], **more}


def test_matrix_out_of_records() -> None:
    records = [
        {"round": 0, "metrics": {"accuracy": 0.5}},
        {"evaluation": {"sites": 3, "of": 4}},
        record("SRV_model", {"site-2": {"accuracy": 0.5, "n": 3}, "site-10": {"accuracy": 1.0}}),
        record(  # the same model at further sites
            "SRV_model",
            {"a": {"failed": {"code": "exception"}}},
            failures=[{"site": "a", "code": "exception", "text": "validate SRV_model: Traceback"}],
        ),
        record(
            "site-2",
            {},
            "site-2",
            failed={"code": "timeout"},
            failures=[{"site": "site-2", "code": "timeout", "text": "submit_model site-2: no answer"}],
        ),
        record("site-2", {}, "site-2", failed={"code": "timeout"}),
    ]
    matrix = matrix_of(records)
    lost = {"failed": {"code": "timeout", "text": "submit_model site-2: no answer"}}
    assert matrix == {
        "site-2": {"SRV_model": {"accuracy": 0.5, "n": 3}, "site-2": lost},
        "site-10": {"SRV_model": {"accuracy": 1.0}, "site-2": lost},
        "a": {
            "SRV_model": {"failed": {"code": "exception", "text": "validate SRV_model: Traceback"}},
            "site-2": lost,
        },
    }
    assert list(matrix) == ["site-2", "site-10", "a"]
    assert summary_of(matrix) == {
        "file": "cross_site_val/cross_val_results.json",
        "sites": 3,
        "models": ["SRV_model", "site-2"],
        "failed": 4,
        "mean": {"SRV_model": {"accuracy": 0.75, "n": 3.0}, "site-2": {}},
    }
    assert tables(matrix) == (
        "accuracy\n"
        "data \\ model  SRV_model  site-2\n"
        "site-2           0.5000  failed\n"
        "site-10          1.0000  failed\n"
        "a                failed  failed\n"
        "\n"
        "n\n"
        "data \\ model  SRV_model  site-2\n"
        "site-2                3  failed\n"
        "site-10                  failed\n"
        "a                failed  failed\n"
    )
    assert shown(matrix, "n").startswith("n\n")
    assert shown(matrix, "f1").startswith("accuracy\n")
    assert "accuracy" not in shown(matrix, "n")


def test_matrix_of_nothing() -> None:
    assert matrix_of([{"round": 0, "metrics": {}}]) == {}
    assert shown({}, "accuracy") == ""
    nobody = matrix_of([record("site-1", {}, "site-1", failed={"code": "x"})])
    assert nobody == {"site-1": {"site-1": {"failed": {"code": "x", "text": ""}}}}
    assert "failed" in tables(nobody)
    many = {f"site-{n}": {"SRV_model": {"a": 1.0}} for n in range(100)}
    assert shown(many, "a") == "", "a large one is only written"


# ---------------------------------------------------------------- whole simulations


@pytest.mark.process
@pytest.mark.parametrize(
    ("threads", "options"),
    [
        (2, {}),
        (1, {"launch_once": False, "params_transfer_type": "DIFF"}),
        (2, {"launch_external_process": True}),
    ],
    ids=["at once", "each task afresh", "external"],
)
def test_a_script(here: Path, threads: int, options: dict[str, Any]) -> None:
    recipe = numpy_recipe(here, **options)
    add_cross_site_evaluation(recipe)
    run = simulate(recipe, here, threads)
    assert run.get_status() == "FINISHED:COMPLETED"
    assert run.cross_site_results() == EXPECTED
    folder = run.get_result()
    assert json.loads((folder / "cross_site_val/cross_val_results.json").read_text()) == EXPECTED
    assert "1002.5000" in (folder / "cross_site_val/cross_val_results.txt").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["cross_site_val"]["mean"]["site-2"] == {"score": 1503.0}
    assert run.failures() == []


@pytest.mark.process
def test_functions(here: Path) -> None:
    recipe = numpy_recipe(here, FUNCTIONS, "client.py:train")
    add_cross_site_evaluation(recipe)
    assert simulate(recipe, here, 1).cross_site_results() == EXPECTED


@pytest.mark.process
def test_a_torch_script_and_its_exported_job(here: Path) -> None:
    import torch

    (here / "client.py").write_text(CLIENT.replace("np.asarray", "").replace("np.full(2, 7.0)", "None"))
    start = {"numpy_key": torch.ones(2, dtype=torch.bfloat16)}
    recipe = FedAvgRecipe(model=start, min_clients=2, num_rounds=1, train_script="client.py")
    add_cross_site_evaluation(recipe)
    folder = recipe.export(here / "job")
    from fedloom.recipe.simulate import SimOptions
    from fedloom.recipe.simulate import simulate as run_folder

    options = SimOptions(num_clients=2, workspace_root=here / "again", show_progress=False)
    result = run_folder(options, folder=folder)
    assert json.loads((result.result_dir / "cross_site_val/cross_val_results.json").read_text()) == EXPECTED


@pytest.mark.process
def test_a_site_that_cannot_score(here: Path, children: Any) -> None:
    (here / "client.py").write_text(CLIENT)
    (here / "job.py").write_text(
        "import numpy as np\n"
        "from fedloom.recipe import *\n"
        "recipe = NumpyFedAvgRecipe(model=np.ones(2), min_clients=2, num_rounds=1, train_script='client.py',"
        " train_args='validate@2')\n"
        "add_cross_site_evaluation(recipe)\n"
        "run = recipe.execute(SimEnv(num_clients=2))\n"
        "assert {f.site for f in run.failures()} == {'site-2'}\n"
    )
    code, _, err = children.fedloom_output("sim", here / "job.py", "-w", here / "ws", cwd=here, timeout_s=120)
    assert code == 1, err
    assert "ValueError: no validate here" in err
    assert "data \\ model" in err
    matrix = json.loads((here / "ws/fedavg/cross_site_val/cross_val_results.json").read_text())
    assert matrix["site-1"] == EXPECTED["site-1"]
    for entry in matrix["site-2"].values():
        assert entry["failed"]["code"] == "exception"
        assert 'raise ValueError(f"no {task} here")' in entry["failed"]["text"]
    children.gone()


@pytest.mark.process
@pytest.mark.parametrize("fail", ["submit_model@1", "validate"])
def test_what_cannot_be_had(here: Path, fail: str) -> None:
    recipe = numpy_recipe(here, train_args=fail)
    add_cross_site_evaluation(recipe)
    if fail == "validate":  # nobody has scored anything: an empty matrix is no success
        with pytest.raises((TaskError, GatherError), match="no validate here"):
            simulate(recipe, here)
        matrix = json.loads((here / "ws/fedavg/cross_site_val/cross_val_results.json").read_text())
        assert {entry["failed"]["code"] for row in matrix.values() for entry in row.values()} == {"exception"}
        assert len(matrix) == 2
        return
    run = simulate(recipe, here)
    matrix = run.cross_site_results()
    for site in ("site-1", "site-2"):
        assert matrix[site]["site-2"] == EXPECTED[site]["site-2"]
        assert "no submit_model here" in matrix[site]["site-1"]["failed"]["text"]
    assert [(f.site, f.code) for f in run.failures()] == [("site-1", "exception")]


@pytest.mark.process
def test_evaluation_alone(here: Path) -> None:
    (here / "client.py").write_text(CLIENT)
    (here / "models").mkdir()
    np.save(here / "models/old.npy", np.full(2, 40, np.float32))
    np.save(here / "absolute.npy", np.full(2, 50, np.float32))
    numpy_files = NumpyCrossSiteEvalRecipe(
        eval_script="client.py", initial_ckpt=here / "absolute.npy", model_dir="models", model_name={"old": "old.npy"}
    )
    matrix = simulate(numpy_files, here).cross_site_results()
    scores = {model: scores["score"] for model, scores in matrix["site-2"].items()}
    assert scores == {"SRV_model": 2050.0, "SRV_old": 2040.0, "site-1": 2007.0, "site-2": 2007.0}

    checkpoint = FedEvalRecipe(
        min_clients=2, eval_script="client.py", eval_ckpt=str(here / "absolute.npy"), framework="numpy"
    )
    run = simulate(checkpoint, here)
    assert run.cross_site_results() == {f"site-{n}": {"SRV_model": {"score": 50.0 + 1000 * n}} for n in (1, 2)}
    assert (run.get_result() / "model.safetensors").is_file()
