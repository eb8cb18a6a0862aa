"""Options of the FedAvg recipes, end to end: a job script, its client and its aggregator, as a user writes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.process

#: Adds --step to what it receives, or to zeros, and scores what it received.
CLIENT = """\
import argparse
import fedloom.client as flare
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--step", type=float, default=1.0)
args = parser.parse_args()
flare.init()
while flare.is_running():
    model = flare.receive()
    value = np.zeros(2, np.float32) if model.params is None else np.array(model.params["numpy_key"])
    print("received", None if model.params is None else value.tolist())
    flare.send(flare.FLModel(
        params={"numpy_key": value + np.float32(args.step)},
        metrics={"accuracy": float(value[0]), "loss": abs(float(value[0]) - 2)},
    ))
"""

TORCH_CLIENT = """\
import fedloom.client as flare
import torch
from net import Net

flare.init()
net = Net()
while flare.is_running():
    net.load_state_dict(flare.receive().params)
    with torch.no_grad():
        for value in net.parameters():
            value += 1
    flare.send(flare.FLModel(params=net.state_dict()))
"""

NET = """\
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
"""

AGGREGATOR = """\
from fedloom.client import FLModel

class Largest:
    '''The largest result; and who came, in which order.'''

    def __init__(self, factor=1.0):
        self.factor = factor

    def reset_stats(self):
        self.models = []

    def accept_model(self, model):
        self.models.append(model)
        return True

    def aggregate_model(self):
        print("order", [model.meta["client_name"] for model in self.models], flush=True)
        best = max(self.models, key=lambda model: model.params["numpy_key"][0])
        return FLModel(params={"numpy_key": best.params["numpy_key"] * self.factor})
"""

FUNCTION = """\
import fedloom.client as flare
import numpy as np

def train(model, ctx):
    assert {value.dtype for value in model.params.values()} == {np.dtype(np.float32)}
    own = np.random.default_rng(int(ctx.site[-1])).standard_normal(5000).astype(np.float32)
    return flare.FLModel(params={"w": model.params["w"] + own, "b": model.params["b"] + np.float32(1)})
"""

JOB = """\
import json
import sys
from fedloom.recipe import FedAvgRecipe, NumpyFedAvgRecipe, SimEnv
{imports}

recipe = {recipe}(name="job", min_clients=2, {options})
run = recipe.execute(SimEnv(num_clients=2, workspace_root="runs"))
print("status:", run.get_status())
"""

Execute = Callable[..., Path]


@pytest.fixture
def execute(children: Any, workspace: Path) -> Execute:
    """Run a job script with these options: its result folder. What it said is in the file ``stderr``."""

    def run(options: str, *, recipe: str = "NumpyFedAvgRecipe", imports: str = "", client: str = CLIENT) -> Path:
        (workspace / "client.py").write_text(client)
        options = options if "train_script" in options else f'train_script="client.py", {options}'
        (workspace / "job.py").write_text(JOB.format(options=options, recipe=recipe, imports=imports))
        code, out, err = children.output([sys.executable, "job.py"], 240, cwd=workspace)
        assert code == 0, out + err
        assert "FINISHED:COMPLETED" in out
        (workspace / "stderr").write_text(err)
        children.gone()
        return workspace / "runs" / "job"

    return run


def rounds(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]


def summary(result: Path) -> dict[str, Any]:
    return json.loads((result / "summary.json").read_text())


def value(result: Path, name: str = "model") -> float:
    return float(load_file(result / f"{name}.safetensors")["numpy_key"][0])


def test_a_stop_condition_from_a_checkpoint_and_a_site_of_its_own(execute: Execute, workspace: Path) -> None:
    np.save(workspace / "start.npy", np.array([0.5, 7]))
    result = execute(
        'num_rounds=9, initial_ckpt="start.npy", stop_cond="accuracy >= 4", save_filename="FL_global_model.pt",'
        ' per_site_config={"site-2": {"train_args": "--step 3"}}'
    )
    assert [record["metrics"]["accuracy"] for record in rounds(result)] == [0.5, 2.5, 4.5]
    assert summary(result)["stopped_early"] == "stop_cond accuracy >= 4: the model of round 1 has accuracy = 4.5"
    assert summary(result)["metrics"]["accuracy"] == 4.5  # of the very model that is there
    assert value(result) == value(result, "best_model") == value(result, "FL_global_model") == 4.5
    assert load_file(result / "model.safetensors")["numpy_key"].dtype == np.float64
    said = (workspace / "stderr").read_text()
    assert said.count("save_filename='FL_global_model.pt'") == 1
    assert "FL_global_model.safetensors" in said


def test_patience_from_an_absolute_checkpoint(execute: Execute, workspace: Path) -> None:
    np.savez(workspace / "start.npz", numpy_key=np.array([0, 7], np.float64))
    result = execute(
        f"num_rounds=9, model=[1, 1], initial_ckpt={str(workspace / 'start.npz')!r}, patience=2,"
        ' key_metric="loss", key_metric_mode="min", server_memory_gc_rounds=1'
    )
    assert [record["metrics"]["loss"] for record in rounds(result)] == [2, 1, 0, 1, 2]
    assert rounds(result)[-1]["stopped_early"] == "patience 2: no loss better than 0"
    assert (value(result), value(result, "best_model")) == (5, 2)
    assert load_file(result / "model.safetensors")["numpy_key"].dtype == np.float32


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_without_a_model(execute: Execute, workspace: Path, transfer: str) -> None:
    result = execute(f'num_rounds=2, params_transfer_type="{transfer}"')
    assert value(result) == 2
    for site in ("site-1", "site-2"):
        log = (result / "logs" / f"{site}.log").read_text()
        assert log.index("received None") < log.index("received [1.0, 1.0]")


def test_an_aggregator_of_the_users(execute: Execute, workspace: Path) -> None:
    (workspace / "mine.py").write_text(AGGREGATOR)
    save_file({"numpy_key": np.ones(2, np.float32)}, workspace / "start.safetensors")
    result = execute(
        'num_rounds=2, initial_ckpt="start.safetensors", aggregator=Largest(factor=2),'
        ' per_site_config={"site-1": {"train_args": "--step 5"}}',
        imports="from mine import Largest",
    )
    assert value(result) == ((1 + 5) * 2 + 5) * 2
    assert (result / "job" / "app" / "custom" / "mine.py").is_file()


def test_a_torch_checkpoint(execute: Execute, workspace: Path) -> None:
    torch = pytest.importorskip("torch")
    start = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([5.0])}
    torch.save({"model": start, "train_conf": {"lr": 1}}, workspace / "start.pt")
    (workspace / "net.py").write_text(NET)
    result = execute(
        'num_rounds=1, model=Net(), initial_ckpt="start.pt"',
        recipe="FedAvgRecipe",
        imports="from net import Net",
        client=TORCH_CLIENT,
    )
    made = load_file(result / "model.safetensors")
    assert {name: array.ravel().tolist() for name, array in made.items()} == {"weight": [4, 5], "bias": [6]}


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_results_that_travel_in_a_codec(execute: Execute, workspace: Path, codec: str) -> None:
    result = execute(
        'num_rounds=2, model={"w": np.zeros(5000, np.float32), "b": np.zeros(2, np.float32)}, codec='
        f'{codec!r}, params_transfer_type="DIFF", train_script="client.py:train"',
        imports="import numpy as np",
        client=FUNCTION,
    )
    own = [np.random.default_rng(site).standard_normal(5000).astype(np.float32) for site in (1, 2)]
    came = [decode_model(encode_model(FLModel(params={"w": value}), codec=codec).tobytes()).params for value in own]
    made, expected = load_file(result / "model.safetensors"), 2 * np.mean([value["w"] for value in came], axis=0)
    assert made["b"].tolist() == [2, 2]
    # the second round's difference is taken from other values: alike but for a rounding
    assert float(np.abs(made["w"] - expected).max()) < {"fp16": 2e-3, "bf16": 2e-2, "int8": 3e-2}[codec]
    assert not np.allclose(made["w"], 2 * np.mean(own, axis=0), rtol=0, atol=1e-7)
