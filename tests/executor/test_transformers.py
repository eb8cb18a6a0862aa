"""`patch(trainer)` with a real transformers.Trainer; skipped where the extra fedloom[transformers] is not installed."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from fedloom.executor import client_api as flare
from fedloom.executor.client_context import ClientError
from fedloom.serialization.payload import decode_model

transformers = pytest.importorskip("transformers", reason="the extra fedloom[transformers], which dev does not have")
pytest.importorskip("accelerate", reason="the extra fedloom[transformers], which dev does not have")
torch = importlib.import_module("torch")
patch = importlib.import_module("fedloom.client.hf").patch

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


class Net(torch.nn.Module):
    """A trained weight, whose gradient is 1, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.full((1,), 5.0), requires_grad=False)

    def forward(self, x, labels=None):
        return {"loss": self.w.sum() + 0 * x.sum(), "logits": x}


def make(tmp_path, **options):
    args = transformers.TrainingArguments(
        str(tmp_path / "hf"),
        use_cpu=True,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    data = [{"x": torch.zeros(1), "labels": torch.zeros(1)} for _ in range(3)]
    return transformers.Trainer(model=Net(), args=args, train_dataset=data, eval_dataset=data)


def results(agent, count):
    out, logged = [], []
    while len(out) < count:
        message = agent.heard.get(timeout=10)
        if message["op"] == "result":
            out.append(message)
        elif message["op"] == "event":
            logged += [point["key"] for point in message["data"]["points"]]
    return out, logged


def test_rounds_of_a_trainer(agent, tmp_path):
    for round in range(2):
        agent.task(params={"m.w": np.full(1, 10.0 * round, np.float32)}, round=round)
    agent.task("validate", params={"m.w": np.full(1, 7.0, np.float32)}, round=2)
    flare.install(agent.context())
    trainer = make(tmp_path)
    patch(trainer, params_scope="trainable", server_key_prefix="m.", local_epochs=2, stream_metrics=True)
    with pytest.raises(ClientError, match="patched already"):
        patch(trainer)
    while flare.is_running():
        trainer.evaluate()
        if flare.is_train():
            trainer.train()
    sent, logged = results(agent, 3)
    for round in range(2):
        params = decode_model(sent[round]["data"]).params
        assert list(params) == ["m.w"] and params["m.w"][0] == pytest.approx(10.0 * round - 6)
        assert sent[round]["meta"]["meta"] == {"NUM_STEPS_CURRENT_ROUND": 6}
        assert sent[round]["meta"]["metrics"] == {"eval_loss": 10.0 * round}
    assert sent[2]["meta"]["metrics"] == {"eval_loss": 7.0} and "params_type" not in sent[2]["meta"]
    assert logged.count("loss") == 12 and "eval_loss" in logged


def test_the_whole_model_in_so_many_steps_and_what_does_not_fit(agent, tmp_path):
    agent.task(params={"w": np.zeros(1, np.float32), "frozen": np.ones(1, np.float32)})
    agent.task(params={"w": np.zeros(1, np.float32)}, round=1)
    flare.install(agent.context())
    trainer = make(tmp_path)
    patch(trainer, local_steps=2, restore_state=False)
    trainer.train()
    (result,), _ = results(agent, 1)
    params = decode_model(result["data"]).params
    assert params["w"][0] == pytest.approx(-2.0) and params["frozen"][0] == 1.0
    assert flare.is_running()
    with pytest.raises(ClientError, match=r"1 tensors.*'frozen', which is not received: look at params_scope"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"params_scope": "half"}, "params_scope='half'"), ({"local_steps": 0}, "local_steps=0; a number above 0")],
)
def test_options_that_are_not_allowed(agent, tmp_path, options, words):
    flare.install(agent.context())
    with pytest.raises(ClientError, match=words):
        patch(make(tmp_path), **options)
    with pytest.raises(ClientError, match=r"a transformers.Trainer"):
        patch(object())
