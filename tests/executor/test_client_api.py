"""The Client API against an agent that is a few lines of the test."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from fedloom.executor import client_api as flare
from fedloom.executor.client_context import ClientError
from fedloom.executor.state import load_state
from fedloom.serialization.errors import PayloadError, ValuesError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model


def test_the_loop_of_the_documents(agent):
    agent.task(value=1.0, round=0)
    agent.task(value=2.0, round=1)
    context = agent.context()
    flare.install(context)
    assert flare.init() is context is flare.init(rank=0)
    assert flare.system_info() == {"site_name": "site-1", "job_id": "job-1"}
    assert (flare.get_site_name(), flare.get_job_id()) == ("site-1", "job-1")
    rounds = []
    while flare.is_running():
        assert flare.is_running()  # not answered yet: the same task
        model = flare.receive()
        assert flare.receive() is model and flare.is_train() and not flare.is_evaluate()
        assert model.total_rounds == 5 and model.start_round == 0 and model.meta == {"from": "server"}
        rounds.append((model.current_round, float(model.params["w"][0])))
        answer = FLModel(params={"w": model.params["w"] + 1}, metrics={"a": 1})
        flare.send(answer)
        assert answer.params is None and model.params is None
        result = agent.heard.get(timeout=10)
        assert result["op"] == "result" and result["meta"]["current_round"] == rounds[-1][0]
        assert decode_model(result["data"]).params["w"][0] == rounds[-1][1] + 1
    assert rounds == [(0, 1.0), (1, 2.0)]
    assert flare.receive() is None and not flare.is_running()


def test_send_can_leave_the_models_as_they_are(agent):
    agent.task()
    flare.install(agent.context())
    model = flare.receive()  # receive alone waits too
    answer = FLModel(params=model.params)
    flare.send(answer, clear_cache=False)
    assert answer.params is not None and model.params is not None
    with pytest.raises(ClientError, match="receive"):
        flare.send(answer)


def test_launch_once_false_is_one_task(agent):
    agent.task()
    agent.task(round=1)
    flare.install(agent.context(once=False))
    assert flare.is_running()
    flare.send(flare.receive())
    assert not flare.is_running()
    assert len(agent.tasks) == 1


def test_submit_model_has_no_params_and_evaluate_sends_metrics(agent):
    agent.task("submit_model", model=False)
    agent.task("validate", round=1)
    flare.install(agent.context())
    assert flare.is_running() and flare.is_submit_model() and flare.get_task_name() == "submit_model"
    assert flare.receive().params is None
    flare.send(FLModel(params={"w": np.zeros(2)}))
    assert flare.is_running() and flare.is_evaluate() and not flare.is_submit_model()
    flare.receive()
    flare.send(FLModel(metrics={"accuracy": np.float32(0.5)}))
    agent.heard.get(timeout=10)
    meta = agent.heard.get(timeout=10)["meta"]
    assert meta["metrics"] == {"accuracy": 0.5} and "params_type" not in meta


def test_a_full_result_becomes_a_diff_and_a_diff_stays_one(agent):
    for round in range(3):
        agent.task(value=3.0, round=round, transfer_type="DIFF")
    flare.install(agent.context())
    model = flare.receive()
    model.params["w"] *= 2  # in place: the difference is to what was received
    flare.send(FLModel(params=model.params))
    first = decode_model(agent.heard.get(timeout=10)["data"])
    assert first.params_type == "DIFF" and np.array_equal(first.params["w"], np.full(3, 3.0, np.float32))
    flare.receive()
    flare.send(FLModel(params_type="DIFF", params={"w": np.full(3, 0.25, np.float32)}))
    assert decode_model(agent.heard.get(timeout=10)["data"]).params["w"][0] == 0.25
    flare.receive()
    with pytest.raises(PayloadError, match=r"'other'.*not in the received model"):
        flare.send(FLModel(params={"other": np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (FLModel(), PayloadError, "neither params nor metrics"),
        ({"w": 1}, PayloadError, "returned dict"),
        (FLModel(params={"w": np.array([1.0, np.nan])}), ValuesError, "'w'.*NaN or Inf"),
        (FLModel(params={"w": np.array([np.inf], np.float16)}), ValuesError, "'w'"),
        (FLModel(params={"w": {"deep": None}}), PayloadError, "w.deep"),
        (FLModel(params={"w": "text"}), PayloadError, "'w'"),
        (FLModel(metrics={"x": object()}), PayloadError, "metrics"),
        (FLModel(metrics={"x": 1.0}, meta={"y": [0.0] * 10_000}), PayloadError, "bytes"),
    ],
)
def test_results_that_cannot_be_are_refused_where_they_are_made(agent, result, error, words):
    agent.task()
    flare.install(agent.context())
    flare.receive()
    with pytest.raises(error, match=words):
        flare.send(result)
    flare.send(FLModel(metrics={"fine": 1.0}))  # the task is still open


def test_state_belongs_to_a_task_and_goes_with_its_result(agent, tmp_path):
    agent.task()
    agent.task(round=1)
    agent.task(round=2)
    flare.install(agent.context())
    with pytest.raises(ClientError, match="belongs to a task"):
        flare.state()
    flare.receive()
    flare.state()["m"] = np.arange(3)
    assert flare.state()["m"][2] == 2
    flare.send(FLModel(metrics={"x": 1}))
    assert agent.heard.get(timeout=10)["wrote_state"]
    assert load_state(tmp_path / "t0.state")["m"].tolist() == [0, 1, 2]
    flare.receive()
    flare.send(FLModel(metrics={"x": 1}))
    assert not agent.heard.get(timeout=10)["wrote_state"] and not (tmp_path / "t1.state").exists()


def test_a_large_result_is_a_file(agent, tmp_path):
    agent.task()
    flare.install(agent.context())
    flare.receive()
    flare.send(FLModel(params={"w": np.arange(20_000.0)}))
    result = agent.heard.get(timeout=10)
    assert result["data"] is None and result["path"] == str(tmp_path / "t0.result")
    assert (tmp_path / "t0.result").stat().st_size == result["size"] and len(result["digest"]) == 64
    assert decode_model(tmp_path / "t0.result").params["w"][-1] == 19_999


def test_receive_with_a_timeout_and_shutdown(agent):
    agent.hold = True
    flare.install(agent.context())
    assert flare.receive(timeout=0.05) is None
    flare.shutdown()
    assert not flare.is_running()
    assert agent.heard.get(timeout=10)["op"] == "leaving"


def test_a_script_may_look_for_a_task_without_waiting(agent):
    flare.install(agent.context())
    agent.task()
    deadline = time.monotonic() + 10
    while (model := flare.receive(timeout=0)) is None:
        assert time.monotonic() < deadline
    assert model.params is not None


def test_log_and_config(agent):
    agent.task(config={"lr": 0.5})
    flare.install(agent.context(transfer_type="DIFF"))
    with pytest.raises(ClientError, match="is_running"):
        flare.get_task_name()
    flare.receive()
    flare.log("loss", np.float32(0.25), global_step=7)
    data = agent.heard.get(timeout=10)["data"]
    (point,) = data["points"]
    assert abs(point.pop("at") - time.time()) < 120
    assert point == {"key": "loss", "value": 0.25, "type": "SCALAR", "global_step": 7, "round": 0}
    with pytest.raises(ClientError, match=r"flare.log\('loss'\): object in a message"):
        flare.log("loss", object())
    with pytest.raises(ClientError, match="not one number"):
        flare.log("loss", np.zeros(3))
    with pytest.raises(ClientError, match="16384 are kept"):
        flare.log("text", "x" * 20_000, "TEXT")
    config = flare.get_config()
    assert config["lr"] == 0.5 and config["TASK_NAME"] == "train"
    assert (config["site_name"], config["job_id"]) == ("site-1", "job-1")
    assert config["TASK_EXCHANGE"] == {
        "train_with_eval": False,
        "exchange_format": "numpy",
        "transfer_type": "DIFF",
        "train_task_name": "train",
        "eval_task_name": "validate",
        "submit_model_task_name": "submit_model",
    }


def test_outside_a_run_it_says_so(monkeypatch):
    flare.install(None)
    monkeypatch.setattr(flare, "_passive_rank", "")
    for call in (flare.receive, flare.is_running, flare.system_info, flare.state, flare.is_train):
        with pytest.raises(ClientError, match=r"flare.init\(\) first"):
            call()
    with pytest.raises(ClientError, match=r"not part of a fedloom run.*fedloom sim"):
        flare.init()
    assert flare.init(rank="1") is None
    for call in (flare.receive, flare.is_running, flare.is_train, flare.get_config):
        with pytest.raises(ClientError, match=r"rank 1: only rank 0.*broadcast"):
            call()
    monkeypatch.setenv("FEDLOOM_SITE", "site-7")
    monkeypatch.setenv("FEDLOOM_JOB", "job-7")
    assert flare.system_info() == {"site_name": "site-7", "job_id": "job-7"}
    assert (flare.get_site_name(), flare.get_job_id()) == ("site-7", "job-7")
    monkeypatch.setattr(flare, "_passive_rank", "")
    monkeypatch.setenv("FEDLOOM_CHANNEL", "/nowhere/channel")
    monkeypatch.setenv("FEDLOOM_TOKEN", "x")
    with pytest.raises(ClientError, match="has ended"):
        flare.init()


@pytest.mark.process
def test_importing_the_client_imports_no_framework():
    code = "import sys, fedloom.client as c; assert 'torch' not in sys.modules and c.is_running"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("exchange_format", ["numpy", "pytorch"])
def test_bf16_comes_and_goes_as_it_is_whole_and_as_a_difference(agent, exchange_format):
    """Scripts of both formats; 1/3 in bf16 has 8 bits, and the difference is taken in bf16 too."""
    torch = pytest.importorskip("torch")
    third = torch.tensor([1 / 3, 2.0, -5.0]).to(torch.bfloat16)
    for transfer in ("FULL", "DIFF"):
        agent.task(params={"h": third}, transfer_type=transfer, exchange_format=exchange_format)
    flare.install(agent.context())
    for transfer in ("FULL", "DIFF"):
        assert flare.is_running()
        received = flare.receive().params["h"]
        assert type(received).__module__.split(".")[0] == {"numpy": "numpy", "pytorch": "torch"}[exchange_format]
        assert str(received.dtype).endswith("bfloat16")
        flare.send(FLModel(params={"h": received + received}))
        result = agent.heard.get(timeout=10)
        sent = decode_model(result["data"], framework="pytorch")
        assert result["meta"]["params_type"] == transfer and sent.params["h"].dtype == torch.bfloat16
        assert torch.equal(sent.params["h"], third + third if transfer == "FULL" else (third + third) - third)


@pytest.mark.parametrize("rounds", [0, 2])
def test_memory_is_given_back_after_so_many_results(agent, rounds):
    """A cycle that only the collector finds goes with the second result, and not with the first."""

    class Cycle:
        pass

    for round in range(2):
        agent.task(round=round)
    flare.install(agent.context(memory_gc_rounds=rounds, cuda_empty_cache=True))
    cycle = Cycle()
    cycle.itself = cycle
    alive = weakref.ref(cycle)
    del cycle
    gc.disable()
    try:
        flare.send(flare.receive())
        assert alive() is not None
        flare.send(flare.receive())
        assert (alive() is None) == (rounds == 2)
    finally:
        gc.enable()
