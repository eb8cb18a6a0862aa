"""`patch(trainer)` with a real Lightning trainer; skipped where the extra fedloom[lightning] is not installed."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from fedloom.executor import client_api as flare
from fedloom.executor.client_context import ClientError
from fedloom.serialization.payload import decode_model

pl = pytest.importorskip("lightning.pytorch", reason="the extra fedloom[lightning], which dev does not have")
torch = importlib.import_module("torch")
patch = importlib.import_module("fedloom.client.lightning").patch

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


class Net(pl.LightningModule):
    """One weight; its gradient is 1, so that a step of SGD with momentum is easy to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.epochs = []
        self.__fl_meta__ = {"who": "me"}

    def training_step(self, batch, index):
        return self.w.sum()

    def on_train_epoch_start(self):
        self.epochs.append(self.current_epoch)

    def validation_step(self, batch, index):
        self.log("mine", self.w.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.5)


def trainer(**limits):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **limits)


def batches(count=3):
    return torch.utils.data.DataLoader(torch.zeros(count, 1), batch_size=1)


@pytest.mark.parametrize("restore_state", [True, False])
def test_each_round_trains_what_was_received_as_long_as_the_first(agent, restore_state):
    for round in range(3):
        agent.task(params={"w": np.full(1, 10.0 * round, np.float32)}, round=round)
    agent.task("validate", params={"w": np.full(1, 7.0, np.float32)}, round=3)
    flare.install(agent.context())
    net, run = Net(), trainer(max_epochs=2)
    patch(run, restore_state=restore_state)
    with pytest.raises(ClientError, match="patched already"):
        patch(run)
    while flare.is_running():
        run.validate(net, batches(), verbose=False)
        if flare.is_train():
            run.fit(net, batches(), batches())
    results = [agent.heard.get(timeout=10) for _ in range(4)]
    assert len(net.epochs) == 6
    velocity = 0.0
    for round in range(3):
        velocity = velocity if restore_state else 0.0
        w = 10.0 * round
        for _ in range(6):
            velocity = 0.5 * velocity + 1
            w -= velocity
        meta = results[round]["meta"]
        assert decode_model(results[round]["data"]).params["w"][0] == pytest.approx(w)
        assert meta["meta"] == {"NUM_STEPS_CURRENT_ROUND": 6, "who": "me"}
        assert meta["metrics"] == {"mine": 10.0 * round}, "of the received model, not of the trained one"
    assert results[3]["meta"]["metrics"] == {"mine": 7.0} and "params_type" not in results[3]["meta"]


def test_max_steps_and_what_does_not_fit(agent):
    for round in range(2):
        agent.task(params={"w": np.zeros(1, np.float32)}, round=round)
    agent.task("submit_model", model=False, round=2)
    flare.install(agent.context())
    net, run = Net(), trainer(max_epochs=-1, max_steps=4)
    patch(run)
    for _ in range(2):
        run.fit(net, batches())  # waits for its task itself
        assert agent.heard.get(timeout=10)["meta"]["meta"]["NUM_STEPS_CURRENT_ROUND"] == 4
    assert flare.is_running()
    with pytest.raises(ClientError, match=r"is_submit_model\(\) first"):
        run.fit(net, batches())
    with pytest.raises(ClientError, match="a Trainer of lightning"):
        patch(object())
