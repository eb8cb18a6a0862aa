"""The writers, and the decorators: what scripts of the documents call."""

from __future__ import annotations

import importlib
import importlib.util

import fedloom.client as client
import numpy as np
import pytest
from fedloom.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from fedloom.executor import client_api as flare
from fedloom.executor.client_context import ClientError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model


def points(agent, until):
    """The points that were sent before a message of another kind, without their times."""
    out = []
    while (message := agent.heard.get(timeout=10))["op"] != until:
        out += [{k: v for k, v in p.items() if k not in ("at", "round")} for p in message["data"]["points"]]
    return out


def test_the_names_below_the_client_are_modules_of_their_own():
    assert client.SummaryWriter is SummaryWriter and client.MLflowWriter is MLflowWriter
    assert importlib.import_module("fedloom.client.tracking").WandBWriter is client.WandBWriter
    for name in ("lightning", "hf"):  # they can be imported without what they patch
        module = importlib.import_module(f"fedloom.client.{name}")
        assert module.is_running is client.is_running and module.FLModel is client.FLModel
        with pytest.raises(ClientError, match=r"rainer.* belongs here"):
            module.patch(object())
    with pytest.raises(ImportError):
        importlib.import_module("fedloom.client.nothing")
    assert importlib.util.find_spec("fedloom.client.channel") is None, "the executor's own modules are not below it"


def test_writers_before_init_say_so():
    flare.install(None)
    with pytest.raises(ClientError, match=r"flare.init\(\) first"):
        SummaryWriter().add_scalar("loss", 1.0)


def test_a_summary_writer(agent):
    agent.task()
    flare.install(agent.context())
    flare.receive()
    with SummaryWriter() as writer:
        writer.add_scalar("loss", np.float32(0.5), global_step=3)
        writer.add_scalar("loss", 0.25)  # no step: the reader counts, over restarts of the script too
        writer.add_scalars("acc", {"train": 0.5, "test": np.float64(0.25)}, 4)
        writer.add_text("note", "warm", 0)
        writer.add_scalar("loss", float("nan"), 5, phase="late")
    with pytest.raises(ClientError, match="a dict of names"):
        writer.add_scalars("acc", 0.5)
    flare.send(FLModel(metrics={"x": 1.0}))
    assert points(agent, "result") == [
        {"key": "loss", "value": 0.5, "type": "SCALAR", "global_step": 3},
        {"key": "loss", "value": 0.25, "type": "SCALAR"},
        {"key": "acc", "value": {"train": 0.5, "test": 0.25}, "type": "SCALARS", "global_step": 4},
        {"key": "note", "value": "warm", "type": "TEXT", "global_step": 0},
        {"key": "loss", "value": "nan", "type": "SCALAR", "global_step": 5, "phase": "late"},
    ]


def test_an_mlflow_and_a_wandb_writer(agent, tmp_path):
    agent.hold = True
    flare.install(agent.context())
    mlflow, wandb = MLflowWriter(), WandBWriter()
    mlflow.log_param("lr", 0.1)
    mlflow.log_params({"layers": [1, 2], "path": tmp_path, "n": np.int64(3)})
    mlflow.log_metric("loss", 0.5, step=1)
    mlflow.log_metrics({"a": 1.0}, 2)
    mlflow.log_text("a text", "notes/a.txt")
    mlflow.set_tag("who", "me")
    mlflow.set_tags({"a": 1})
    wandb.log({"loss": 0.5, "epoch": 1}, step=7)
    flare.shutdown()
    assert points(agent, "leaving") == [
        {"key": "lr", "value": 0.1, "type": "PARAMETER"},
        {"key": "params", "value": {"layers": "[1, 2]", "path": str(tmp_path), "n": 3}, "type": "PARAMETERS"},
        {"key": "loss", "value": 0.5, "type": "METRIC", "global_step": 1},
        {"key": "metrics", "value": {"a": 1.0}, "type": "METRICS", "global_step": 2},
        {"key": "notes/a.txt", "value": "a text", "type": "TEXT", "artifact": True},
        {"key": "who", "value": "me", "type": "TAG"},
        {"key": "tags", "value": {"a": "1"}, "type": "TAGS"},
        {"key": "metrics", "value": {"loss": 0.5, "epoch": 1}, "type": "METRICS", "global_step": 7},
    ]


# ---------------------------------------------------------------- decorators


def test_evaluate_then_train_is_one_result(agent):
    agent.task(value=1.0)
    agent.task(value=2.0, round=1)
    agent.task("validate", value=3.0, round=2)
    flare.install(agent.context())

    @client.train
    def train(input_model=None, lr=0.1):
        """Adds lr."""
        return FLModel(params={"w": input_model.params["w"] + np.float32(lr)})

    @client.evaluate
    def evaluate(input_model):
        return {"mean": float(input_model.params["w"].mean())}

    assert train.__name__ == "train" and train.__doc__ == "Adds lr."
    seen = []
    while flare.is_running():
        score = evaluate(None)
        if not flare.is_evaluate():
            train(input_model=None, lr=0.5)
        seen.append(score)
    results = [agent.heard.get(timeout=10) for _ in range(3)]
    assert seen == [{"mean": 1.0}, {"mean": 2.0}, {"mean": 3.0}]
    assert [result["meta"]["metrics"] for result in results] == seen
    assert [decode_model(result["data"]).params["w"][0] for result in results[:2]] == [1.5, 2.5]
    assert "params_type" not in results[2]["meta"]  # a task to validate is answered by evaluate alone
    with pytest.raises(ClientError, match="job was over"):
        train()


def test_scores_belong_to_their_task(agent):
    agent.task()
    agent.task(round=1)
    flare.install(agent.context())
    evaluate = client.evaluate(lambda model: np.float64(0.5))
    train = client.train(lambda model: FLModel(params=model.params))
    evaluate()
    flare.send(FLModel(params=flare.receive().params))  # by hand: the score is not for the next task
    train()
    first, second = (agent.heard.get(timeout=10) for _ in range(2))
    assert "metrics" not in first["meta"] and "metrics" not in second["meta"]


@pytest.mark.parametrize(
    ("decorate", "function", "words"),
    [
        (client.train, lambda model: None, "returned NoneType; an FLModel"),
        (client.train, lambda: FLModel(metrics={"a": 1.0}), "takes no argument"),
        (client.evaluate, lambda model: "good", "returned str; a dict of metrics"),
        (client.evaluate, lambda model: {}, "returned dict"),
    ],
)
def test_functions_that_do_not_fit(agent, decorate, function, words):
    agent.task()
    flare.install(agent.context())
    with pytest.raises(ClientError, match=words):
        decorate(function)()
