"""External commands that start several processes, and the seconds that a script is given to start and to end."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from fedloom.serialization.messages import Cancel, Event

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

#: Starts the script twice, as `torchrun` and `mpirun` do, and ends with the first bad end.
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
sys.exit(max(abs(process.wait()) for process in ranks))
"""

PASSIVE = """
import os, sys
import fedloom.client as flare

context = flare.init()
print("rank", os.environ["RANK"], flare.get_site_name(), flare.get_job_id(), flush=True)
if os.environ["RANK"] != "0":
    assert context is None
    try:
        flare.receive()
    except flare.ClientError as error:
        print("told:", error, flush=True)
    sys.exit(0)
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1, "n": model.params["n"]}))
"""

TORCHRUN = """
import torch
import torch.distributed as dist
import fedloom.client as flare

dist.init_process_group("gloo")
rank = dist.get_rank()
flare.init()
while True:
    box = [None]
    if rank == 0 and flare.is_running():
        box = [flare.receive().params]
    dist.broadcast_object_list(box)  # every rank gets the model, or the word that there is none
    if box[0] is None:
        break
    w = torch.as_tensor(box[0]["w"]) + rank + 1
    dist.all_reduce(w)
    if rank == 0:
        flare.log("summed", float(w[0, 0]))
        flare.send(flare.FLModel(params={"w": w.numpy(), "n": box[0]["n"]}))
dist.destroy_process_group()
"""


def test_rank_0_talks_and_the_others_know_where_they_are(broker, make_agent, make_job, weights, tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCHER)
    command = f"python3 {tmp_path / 'launch.py'} -u"
    archive = make_job({"client.py": PASSIVE}, launch_external_process=True, command=command)
    make_agent()
    for round in range(2):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(3.0), archive=archive)
        assert np.array_equal(broker.result(broker.done(f"a{round}")).params["w"], np.full((2, 3), 4.0, np.float32))
    broker.say(Cancel("job-1", ended=True))
    log = tmp_path / "work/logs/job-1/site-1.log"
    _until(lambda: "told:" in log.read_text())
    text = log.read_text()
    assert "rank 0 site-1 job-1" in text and "rank 1 site-1 job-1" in text
    assert "this is rank 1: only rank 0 talks" in text and "broadcast" in text


def test_torchrun_with_two_ranks(broker, make_agent, make_job, weights):
    pytest.importorskip("torch")
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    archive = make_job({"client.py": TORCHRUN}, launch_external_process=True, command=command)
    make_agent(env={"GLOO_SOCKET_IFNAME": "lo"})
    for round in range(2):
        broker.assign((f"a{round}", "site-1"), round=round, model=weights(1.0), archive=archive)
        # (1 + 1) + (1 + 2)
        assert np.array_equal(broker.result(broker.done(f"a{round}", timeout_s=120)).params["w"], np.full((2, 3), 5.0))
    assert broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "metric")[0].site == "site-1"


def test_an_external_script_that_never_calls_init_is_ended_in_time(broker, make_agent, make_job, weights):
    script = "import time\nprint('loading for ever', flush=True)\ntime.sleep(600)\n"
    archive = make_job({"client.py": script}, launch_external_process=True, launch_timeout=0.5)
    make_agent()
    started = time.monotonic()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    failed = broker.failed("a")
    assert time.monotonic() - started < 30
    assert "flare.init()" in failed.text and "0.5" in failed.text


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("shutdown_timeout", [0.0, 30.0])
def test_a_script_has_its_shutdown_timeout_to_end_by_itself(
    broker, make_agent, make_job, weights, tmp_path, shutdown_timeout, external
):
    """What it logs then is kept too. Without the time it is ended soon, whatever it does."""
    script = """
import os, time
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params))
open("over", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
flare.log("saved", 1.0)
flare.log("saved", 2.0)
open("saved", "w").close()
"""
    archive = make_job({"client.py": script}, launch_external_process=external, shutdown_timeout=shutdown_timeout)
    agent = make_agent(stop_grace_s=0.2)
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    broker.done("a")
    folder = tmp_path / "work/jobs/job-1/sites/site-1"
    broker.say(Cancel("job-1", ended=True))
    if shutdown_timeout:
        _until((folder / "over").exists)
        (folder / "go").touch()
        _until(lambda: len(_saved(broker)) == 2)
        assert _saved(broker) == [1.0, 2.0]
    _until(lambda: agent._worker.hosts.live == 0)
    assert not _saved(broker) or shutdown_timeout


def test_what_a_script_logs_while_its_executor_stops_is_kept(broker, make_agent, make_job, weights):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params))
for n in range(200):
    flare.log("saved", n)
"""
    archive = make_job({"client.py": script})
    agent = make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    broker.done("a")
    agent.stop(20.0)
    assert _saved(broker) == list(range(200))


def _saved(broker):
    events = [message for message, _ in list(broker.messages) if isinstance(message, Event)]
    return [point["value"] for event in events for _, point in event.data["sites"]["site-1"]]


def _until(true, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)
