"""The Client API against an agent that is a few lines of the test."""

from __future__ import annotations

import queue
import subprocess
import sys

import numpy as np
import pytest
from fedloom.executor import client_api as flare
from fedloom.executor.channel import Channel, ChannelServer
from fedloom.executor.client_api import ClientContext, ClientError
from fedloom.executor.state import load_state
from fedloom.executor.taskio import TaskSpec
from fedloom.serialization.errors import PayloadError, ValuesError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model


class FakeAgent:
    """Hands out the tasks it is given, one for each ``waiting``, then stops."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.tasks: list[TaskSpec] = []
        self.heard: queue.Queue = queue.Queue()
        self.server = ChannelServer(self._hear)
        self.server.start()
        self.hold = False

    def _hear(self, connection, host, role, message):
        if message is None:
            return
        if message["op"] == "waiting":
            if self.tasks:
                self.server.send(connection, {"op": "task", "task": self.tasks.pop(0).to_map()})
            elif not self.hold:
                self.server.send(connection, {"op": "stop"})
        elif message["op"] != "hello":
            self.heard.put(message)
        self.connection = connection

    def context(self, **settings):
        channel = Channel.connect(self.server.environ("h"), "host")
        return ClientContext(channel, {"site": "site-1", "job": "job-1", **settings}, on_lost=lambda: None)

    def task(self, name="train", value=1.0, round=0, model=True, **fields):
        data = encode_model(FLModel(params={"w": np.full(3, value, np.float32)}, meta={"from": "server"})).tobytes()
        count = len(self.tasks) + round
        self.tasks.append(
            TaskSpec(
                task=f"t{count}",
                attempt=1,
                site="site-1",
                job="job-1",
                round=round,
                step=0,
                name=name,
                total_rounds=5,
                payload_bytes=data if model else None,
                result_path=str(self.tmp_path / f"t{count}.result"),
                state_out=str(self.tmp_path / f"t{count}.state"),
                **fields,
            )
        )


@pytest.fixture
def agent(tmp_path):
    agent = FakeAgent(tmp_path)
    yield agent
    context, _ = flare._context, flare.install(None)
    agent.server.close()
    if context is not None:
        context._reader.join(10)  # which closes its end


def test_the_loop_of_the_documents(agent):
    agent.task(value=1.0, round=0)
    agent.task(value=2.0, round=1)
    flare.install(agent.context())
    flare.init()
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


def test_log_and_config(agent):
    agent.task(config={"lr": 0.5})
    flare.install(agent.context(transfer_type="DIFF"))
    with pytest.raises(ClientError, match="is_running"):
        flare.get_task_name()
    flare.receive()
    flare.log("loss", np.float32(0.25), global_step=7)
    data = agent.heard.get(timeout=10)["data"]
    assert data == {"key": "loss", "value": 0.25, "type": "SCALAR", "global_step": 7, "round": 0}
    with pytest.raises(ClientError, match="finite"):
        flare.log("loss", float("nan"))
    config = flare.get_config()
    assert config["TASK_EXCHANGE"]["transfer_type"] == "DIFF" and config["lr"] == 0.5 and config["TASK_NAME"] == "train"


def test_outside_a_run_it_says_so(monkeypatch):
    flare.install(None)
    monkeypatch.setattr(flare, "_passive_rank", "")
    for call in (flare.receive, flare.is_running, flare.system_info, flare.state, flare.is_train):
        with pytest.raises(ClientError, match=r"flare.init\(\) first"):
            call()
    with pytest.raises(ClientError, match=r"not part of a fedloom run.*fedloom sim"):
        flare.init()
    flare.init(rank="1")
    with pytest.raises(ClientError, match="only rank 0"):
        flare.receive()
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
