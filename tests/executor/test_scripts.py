"""Scripts through the Client API in real host processes, driven by a fake broker."""

from __future__ import annotations

import os

import numpy as np
import psutil
import pytest
from fedloom.serialization.messages import Cancel, Event

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

LOOP = """
import os, sys, random
import fedloom.client as flare

flare.init()
count = 0
print("argv", sys.argv[1:])
while flare.is_running():
    model = flare.receive()
    assert flare.receive() is model
    count += 1
    params = {"w": model.params["w"] + 1, "n": model.params["n"]}
    answer = flare.FLModel(
        params=params,
        metrics={"count": count, "draw": random.random(), "pid": os.getpid()},
        meta={"NUM_STEPS_CURRENT_ROUND": 5},
    )
    print("round", model.current_round, "of", model.total_rounds, "at", flare.get_site_name(), flare.system_info())
    flare.send(answer)
    assert answer.params is None and model.params is None
print("loop over")
"""


def test_one_script_lives_over_all_rounds_and_waits_outside_a_slot(broker, make_agent, make_job, weights, tmp_path):
    archive = make_job({"client.py": LOOP}, task_script_args="--lr '0.1 x'")
    make_agent(sites=("site-1", "site-2"))  # capacity 1: the first site's script must not hold the slot while it waits
    items = []
    for round in range(2):
        broker.assign(
            (f"a{round}", "site-1"), (f"b{round}", "site-2"), round=round, model=weights(3.0), archive=archive
        )
        items.append([broker.done(f"a{round}"), broker.done(f"b{round}")])
    first, second = items[0][0], items[1][0]
    assert (first.meta["metrics"]["count"], second.meta["metrics"]["count"]) == (1, 2)
    assert first.meta["metrics"]["pid"] == second.meta["metrics"]["pid"] != items[0][1].meta["metrics"]["pid"]
    assert first.meta["meta"] == {"NUM_STEPS_CURRENT_ROUND": 5} and first.meta["params_type"] == "FULL"
    assert not first.restarted and not second.restarted and second.run_s >= 0
    result = broker.result(second)
    assert np.array_equal(result.params["w"], np.full((2, 3), 4.0, np.float32))
    assert result.params["n"].dtype == np.int64 and result.params["n"] == 7
    broker.say(Cancel("job-1", ended=True))
    log = tmp_path / "work" / "logs" / "job-1" / "site-1.log"
    _until(lambda: "loop over" in log.read_text())
    text = log.read_text()
    assert "argv ['--lr', '0.1 x']" in text
    assert "round 1 of 3 at site-1 {'site_name': 'site-1', 'job_id': 'job-1'}" in text
    _until(lambda: not (tmp_path / "work" / "jobs" / "job-1" / "code").exists())


def test_draws_depend_on_the_task_and_not_on_the_process(broker, make_agent, make_job, weights):
    make_agent(sites=("site-1", "site-2"))
    draws = {}
    for job, once in (("stays", True), ("afresh", False)):
        archive = make_job({"client.py": LOOP}, launch_once=once)
        for round in range(2):
            broker.assign(
                (f"{job}{round}", "site-1"), job=job, round=round, seed=9, model=weights(0.0), archive=archive
            )
            draws[job, round] = broker.done(f"{job}{round}").meta["metrics"]["draw"]
    assert draws["stays", 0] == draws["afresh", 0] and draws["stays", 1] == draws["afresh", 1]
    assert draws["stays", 0] != draws["stays", 1]


def test_launch_once_false_starts_the_script_for_each_task(broker, make_agent, make_job, weights):
    archive = make_job({"client.py": LOOP}, launch_once=False)
    make_agent()
    pids = []
    for round in range(2):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(3.0), archive=archive, settled=round)
        item = broker.done(f"a{round}")
        assert item.meta["metrics"]["count"] == 1 and not item.restarted
        pids.append(item.meta["metrics"]["pid"])
    assert pids[0] != pids[1]


def test_an_external_command_with_the_same_script(broker, make_agent, make_job, weights, tmp_path):
    archive = make_job({"client.py": LOOP}, launch_external_process=True, command="python3 -u")
    make_agent()
    for round in range(2):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(3.0), archive=archive)
        assert broker.done(f"a{round}").meta["metrics"]["count"] == round + 1
    broker.say(Cancel("job-1", ended=True))
    _until(lambda: "loop over" in (tmp_path / "work/logs/job-1/site-1.log").read_text())


def test_diff_is_taken_on_the_site_even_if_the_received_arrays_were_changed_in_place(
    broker, make_agent, make_job, weights
):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    model.params["w"] += 2.5
    flare.send(flare.FLModel(params={"w": model.params["w"]}))
"""
    archive = make_job({"client.py": script}, params_transfer_type="DIFF")
    make_agent()
    broker.assign(("a", "site-1"), model=weights(3.0), archive=archive)
    item = broker.done("a")
    result = broker.result(item)
    assert item.meta["params_type"] == "DIFF" == result.params_type
    assert list(result.params) == ["w"] and np.array_equal(result.params["w"], np.full((2, 3), 2.5, np.float32))


def test_torch_in_and_out_keeps_bf16(broker, make_agent, make_job):
    torch = pytest.importorskip("torch")
    from fedloom.serialization.model import FLModel

    script = """
import torch
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    assert all(isinstance(v, torch.Tensor) for v in model.params.values())
    assert torch.get_num_threads() == 2
    flare.send(flare.FLModel(params={k: v * 2 for k, v in model.params.items()}))
"""
    archive = make_job({"client.py": script}, params_exchange_format="pytorch", threads_per_task=2)
    make_agent()
    big = torch.arange(40_000, dtype=torch.float32)  # over the inline size: goes as a file
    broker.assign(
        ("a", "site-1"), model=FLModel(params={"h": torch.ones(3, dtype=torch.bfloat16), "b": big}), archive=archive
    )
    item = broker.done("a")
    assert item.payload is not None and item.payload.id == "r-a.1" and item.inline_bytes == 0
    result = broker.result(item, "pytorch")
    assert result.params["h"].dtype == torch.bfloat16 and torch.equal(result.params["b"], big * 2)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (
            "model = flare.receive()\n    raise ValueError('my own mistake')",
            "exception",
            ["client.py", "my own mistake"],
        ),
        ("flare.receive()\n    break", "no_result", ["client.py", "without sending", "flare.send()"]),
        ("flare.receive()\n    sys.exit(5)", "exit", ["5"]),
    ],
)
def test_a_script_that_goes_wrong_is_a_clear_failure(
    broker, make_agent, make_job, weights, external, body, code, words
):
    script = f"import sys\nimport fedloom.client as flare\nflare.init()\nwhile flare.is_running():\n    {body}\n"
    archive = make_job({"client.py": script}, launch_external_process=external)
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    failed = broker.failed("a")
    assert failed.code == code and not failed.retryable and not failed.killed
    for word in words:
        assert word in failed.text
    assert "runpy" not in failed.text


def test_an_error_before_the_first_task_and_a_missing_script(broker, make_agent, make_job, weights):
    make_agent()
    archive = make_job({"client.py": "import no_such_module\n"})
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    assert "no_such_module" in broker.failed("a").text
    archive = make_job({"client.py": "import no_such_module\n"}, launch_external_process=True)
    broker.assign(("b", "site-1"), job="job-2", model=weights(1.0), archive=archive)
    failed = broker.failed("b")
    assert "no_such_module" in failed.text and not failed.retryable
    archive = make_job({"client.py": ""}, task_script_path="/nowhere/else.py")
    broker.assign(("c", "site-1"), job="job-3", model=weights(1.0), archive=archive)
    assert "/nowhere/else.py" in broker.failed("c").text
    archive = make_job({"client.py": ""}, launch_external_process=True, command="no-such-command -x")
    broker.assign(("d", "site-1"), job="job-4", model=weights(1.0), archive=archive)
    assert "no-such-command" in broker.failed("d").text


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("death", ["os._exit(7)", "os.kill(os.getpid(), 9)"])
def test_a_script_that_takes_its_process_down(broker, make_agent, make_job, weights, external, death):
    script = f"""
import os
import fedloom.client as flare
flare.init()
seen = 0
while flare.is_running():
    model = flare.receive()
    print("last words", flush=True)
    if model.current_round == 1 and not os.path.exists("died"):
        open("died", "w").close()
        {death}
    flare.send(flare.FLModel(params=model.params))
"""
    archive = make_job({"client.py": script}, launch_external_process=external)
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    assert not broker.done("a").restarted
    broker.assign(("b", "site-1"), round=1, model=weights(1.0), archive=archive, settled=1)
    failed = broker.failed("b")
    assert failed.retryable and failed.killed and failed.code == "killed"
    assert ("SIGKILL" if "kill" in death else "exit code 7") in failed.text and "last words" in failed.text
    broker.assign(("b", "site-1", 2), round=1, model=weights(1.0), archive=archive, settled=1)
    assert broker.done("b", 2).restarted  # memory that was not in the site state is gone, and it says so


def test_nan_is_refused_with_the_tensors_name(broker, make_agent, make_job, weights):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    model.params["w"][0, 0] = float("nan")
    flare.send(flare.FLModel(params=model.params))
"""
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=make_job({"client.py": script}))
    failed = broker.failed("a")
    assert "'w'" in failed.text and "NaN" in failed.text and not failed.retryable


def test_site_state_survives_the_script_and_starts_from_the_named_version(
    broker, make_agent, make_job, weights, tmp_path
):
    script = """
import os
import numpy as np
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    state = flare.state()
    before = state.get("rounds", [])
    state["rounds"] = [*before, model.current_round]
    state["momentum"] = state.get("momentum", np.zeros(4, np.float32)) + 1
    if model.current_round == 1 and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(1)
    metrics = {"seen": len(before), "momentum": float(state["momentum"][0])}
    flare.send(flare.FLModel(params=model.params, metrics=metrics))
"""
    archive = make_job({"client.py": script})
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    assert broker.done("a").state == "a.1"
    broker.assign(("b", "site-1"), round=1, model=weights(1.0), archive=archive, settled=1)
    assert broker.failed("b").killed
    broker.assign(("b", "site-1", 2), round=1, model=weights(1.0), archive=archive, settled=1)
    item = broker.done("b", 2)
    assert item.state == "b.2" and not item.restarted  # its memory is in the state
    assert item.meta["metrics"] == {"seen": 1, "momentum": 2.0}
    folder = tmp_path / "work/sites/site-1/state/job-1"
    _until(lambda: sorted(p.name for p in folder.iterdir()) == ["a.1", "b.2"])
    broker.assign(("c", "site-1"), round=2, model=weights(1.0), archive=archive, settled=2)
    assert broker.done("c").meta["metrics"] == {"seen": 2, "momentum": 3.0}
    _until(lambda: sorted(p.name for p in folder.iterdir()) == ["b.2", "c.1"])
    broker.versions["site-1"] = "gone.1"
    broker.assign(("d", "site-1"), round=3, model=weights(1.0), archive=archive, settled=3)
    assert broker.done("d").restarted
    event = broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "state_lost")[0]
    assert event.data["version"] == "gone.1" and event.site == "site-1"


@pytest.mark.parametrize("external", [False, True])
def test_a_stopped_agent_leaves_no_process_behind(broker, make_agent, make_job, weights, tmp_path, external):
    script = """
import subprocess, sys, time
import fedloom.client as flare
flare.init()
while flare.is_running():
    flare.receive()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("child", "w").write(str(child.pid))
    flare.log("started", 1.0)
    time.sleep(600)
"""
    archive = make_job({"client.py": script}, launch_external_process=external)
    agent = make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    event = broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "metric")[0]
    assert event.site == "site-1" and event.data["sites"]["site-1"][0][1]["key"] == "started"
    child = int((tmp_path / "work/jobs/job-1/sites/site-1/child").read_text())
    assert psutil.pid_exists(child)
    agent.stop()
    _until(lambda: not _alive(child))
    assert not [p.pid for p in psutil.Process().children(recursive=True) if _alive(p.pid) and _is_ours(p)]


def test_a_slots_environment_reaches_its_scripts(broker, make_agent, make_job, weights):
    script = """
import os
import fedloom.client as flare
flare.init()
while flare.is_running():
    m = flare.receive()
    flare.send(flare.FLModel(params=m.params, meta={"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "cwd": os.getcwd()}))
"""
    archive = make_job({"client.py": script})
    sites = tuple(f"site-{i}" for i in range(1, 5))
    make_agent(sites=sites, capacity=2, slot_envs=({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}))
    gpus = []
    for round in range(2):
        broker.assign(*[(f"t{round}-{s}", s) for s in sites], round=round, model=weights(1.0), archive=archive)
        gpus.append([broker.done(f"t{round}-{s}").meta["meta"]["gpu"] for s in sites])
    assert sorted(gpus[0]) == ["0", "0", "1", "1"] and gpus[0] == gpus[1]


def test_cancelled_script_goes_on_and_its_result_is_thrown_away(broker, make_agent, make_job, weights):
    script = """
import time, os
import fedloom.client as flare
flare.init()
n = 0
while flare.is_running():
    m = flare.receive()
    n += 1
    flare.log("begun", n)
    while m.current_round == 0 and not os.path.exists("go"):
        time.sleep(0.02)
    flare.send(flare.FLModel(params=m.params, metrics={"n": n}))
"""
    archive = make_job({"client.py": script})
    agent = make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    broker.wait(lambda m, _: isinstance(m, Event))
    broker.say(Cancel("job-1", (type(agent._desk.held_refs()[0])("a", 1),)))
    broker.assign(("b", "site-1"), round=1, model=weights(1.0), archive=archive)
    (agent.config.workspace / "jobs/job-1/sites/site-1/go").touch()
    assert broker.done("b").meta["metrics"] == {"n": 2}
    assert not [m for m, _ in broker.messages if getattr(m, "items", None) and m.items[0].task == "a"]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _is_ours(process: psutil.Process) -> bool:
    try:
        return "fedloom" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _until(true, timeout_s: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)


def test_a_script_that_fails_behind_its_send_is_seen_and_started_anew(broker, make_agent, make_job, weights):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    m = flare.receive()
    flare.send(flare.FLModel(params=m.params, metrics={"round": m.current_round}))
    raise RuntimeError("too late")
"""
    archive = make_job({"client.py": script})
    make_agent()
    for round in range(2):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(1.0), archive=archive, settled=round)
        assert broker.done(f"a{round}").meta["metrics"] == {"round": round}
    event = broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "script_error")[0]
    assert "too late" in event.data["text"] and event.site == "site-1"
    second = broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "script_error" and m.data["round"] == 1)[0]
    assert event.data["round"] == 0 and "Traceback" in second.data["text"]


def test_a_script_that_fails_when_the_agent_stops_is_seen(broker, make_agent, make_job, weights):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    m = flare.receive()
    if m is None:
        break
    flare.send(flare.FLModel(params=m.params, metrics={"round": m.current_round}))
raise RuntimeError("behind the loop")
"""
    archive = make_job({"client.py": script})
    agent = make_agent()
    broker.assign(("a", "site-1"), round=0, model=weights(1.0), archive=archive)
    broker.done("a")
    agent.stop(10.0)
    event = broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "script_error")[0]
    assert "behind the loop" in event.data["text"] and event.site == "site-1"


def test_a_script_without_a_loop_serves_one_task_a_start(broker, make_agent, make_job, weights):
    script = """
import fedloom.client as flare
flare.init()
m = flare.receive()
flare.send(flare.FLModel(params=m.params, metrics={"round": m.current_round}))
"""
    archive = make_job({"client.py": script})
    make_agent()
    for round in range(3):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(1.0), archive=archive, settled=round)
        item = broker.done(f"a{round}")
        assert item.meta["metrics"] == {"round": round} and not item.restarted


def test_parked_scripts_are_bounded(broker, make_agent, make_job, weights):
    sites = tuple(f"site-{i}" for i in range(1, 5))
    archive = make_job({"client.py": LOOP})
    agent = make_agent(sites=sites, max_parked=2)
    for round in range(2):
        broker.assign(
            *[(f"{s}-{round}", s) for s in sites], round=round, model=weights(0.0), archive=archive, settled=round
        )
        items = [broker.done(f"{s}-{round}") for s in sites]
    _until(lambda: agent._worker.hosts.live <= 2)
    assert [i.meta["metrics"]["count"] for i in items].count(1) >= 2
    assert [i.restarted for i in items] == [i.meta["metrics"]["count"] == 1 for i in items]


def test_run_s_bounds_a_task_where_the_user_says_so(broker, make_agent, make_job, weights):
    script = """
import time
import fedloom.client as flare
flare.init()
while flare.is_running():
    m = flare.receive()
    print("slow", flush=True)
    time.sleep(600)
"""
    make_agent()
    archive = make_job({"client.py": script})
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive, config={"run_s": 0.5})
    failed = broker.failed("a")
    assert failed.code == "timeout" and failed.retryable and "run_s=0.5" in failed.text and "slow" in failed.text
