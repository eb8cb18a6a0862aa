"""What an executor leaves behind, and does not: after cancels, ends it missed, failed starts, and its own death."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fedloom.executor.agent import Agent, AgentConfig
from fedloom.executor.function import Executor
from fedloom.executor.hosts import HostRequest, SubprocessSpawner
from fedloom.executor.jobs import JobFolders
from fedloom.executor.lock import WorkspaceLock
from fedloom.executor.outbox import Outbox
from fedloom.serialization.errors import FaultError
from fedloom.serialization.messages import Cancel, Done, Event, Fail, Welcome
from fedloom.serialization.model import FLModel

pytestmark = pytest.mark.timeout(60)

LOOP = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params))
"""


def test_a_start_that_fails_lets_go_of_the_workspace(broker, tmp_path):
    (tmp_path / "outbox").write_text("a file where a folder belongs")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(OSError, match="outbox"):
            Agent(AgentConfig("fake", tmp_path, ("site-1",)), link_factory=broker.factory).start()
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    WorkspaceLock(tmp_path, "executor/site-1").close()


def test_two_executors_in_one_process_and_one_used_twice(broker, tmp_path):
    made = []
    for name in ("site-1", "site-2"):
        executor = Executor("fake", site=name, workspace=tmp_path / name, link_factory=broker.factory)
        executor.task("train")(lambda model, ctx: FLModel(params=model.params))
        made.append(executor.start())
    rival = Executor("fake", site="site-3", workspace=tmp_path / "site-1", link_factory=broker.factory)
    rival.task("train")(lambda model, ctx: FLModel(params=model.params))
    with pytest.raises(Exception, match="another executor works in"):
        rival.start()
    broker.refuse = FaultError("name_taken", "not yet")
    made[0].stop()
    with pytest.raises(FaultError):
        rival.start()
    broker.refuse = None
    rival.start()  # one that was refused may try again
    with pytest.raises(Exception, match="started already"):
        rival.start()
    for executor in (*made, rival, rival):
        executor.stop()
    assert not any(executor.running for executor in (*made, rival))


def test_a_start_that_nobody_waits_for_any_more_is_undone(broker, tmp_path):
    gate, entered = threading.Event(), threading.Event()

    def slow(*args, **options):
        entered.set()
        assert gate.wait(20)
        return broker.factory(*args, **options)

    executor = Executor("fake", site="site-1", workspace=tmp_path, link_factory=slow)
    executor.task("train")(lambda model, ctx: FLModel(params=model.params))

    async def program():
        async def serve():
            async with executor:
                raise AssertionError("cancelled before")

        task = asyncio.create_task(serve())
        await asyncio.to_thread(entered.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()

    asyncio.run(program())
    _until(lambda: executor._agent is not None and executor._agent.ended)


def test_metrics_that_no_message_could_carry_fail_the_task(broker, make_agent, weights):
    def train(model, ctx):
        return FLModel(params=model.params, meta={"history": "x" * 40_000})

    make_agent({"train": train})
    broker.assign(("a", "site-1"), model=weights(1.0))
    assert "at most 32768 go along" in broker.failed("a").text


@pytest.mark.parametrize("where", ["assign", "begin", "finished"])
def test_an_error_of_our_own_fails_the_task_and_leaves_room_for_the_next(broker, make_agent, weights, where):
    agent = make_agent({"train": lambda model, ctx: FLModel(params=model.params)})
    owner, name = {
        "assign": (agent, "_assign"),
        "begin": (agent._worker._here, "begin"),
        "finished": (agent._collector, "finished"),
    }[where]
    right = getattr(owner, name)

    def wrong(*args):
        setattr(owner, name, right)
        raise RuntimeError("nobody thought of this")

    setattr(owner, name, wrong)
    broker.assign(("a", "site-1"), model=weights(1.0))
    failed = broker.failed("a")
    assert (failed.code, failed.retryable) == ("internal", True)
    assert "nobody thought of this" in failed.text
    broker.assign(("a", "site-1", 2), model=weights(1.0))
    assert broker.done("a", 2)


def test_what_a_function_raises_always_ends_its_task(broker, make_agent, weights):
    def train(model, ctx):
        if ctx.round == 0:
            ctx.log("loss", object())
        raise KeyboardInterrupt  # in a thread nobody else would hear of it

    make_agent({"train": train})
    broker.assign(("a", "site-1"), model=weights(1.0))
    assert "loss" in broker.failed("a").text
    broker.assign(("b", "site-1"), round=1, model=weights(1.0))
    assert "KeyboardInterrupt" in broker.failed("b").text
    assert not [m for m, _ in broker.messages if isinstance(m, Event)]


def test_a_result_that_comes_after_its_time_leaves_no_file(broker, make_agent, weights, tmp_path):
    go = threading.Event()

    def train(model, ctx):
        ctx.state["x"] = 1
        assert go.wait(20)
        import numpy as np

        return FLModel(params={"w": np.zeros(50_000, np.float32)})

    make_agent({"train": train})
    broker.assign(("a", "site-1"), model=weights(1.0), config={"run_s": 0.1})
    assert broker.failed("a").code == "timeout"
    go.set()
    _until(lambda: not _threads("fedloom-task-"))
    work = tmp_path / "work"
    _until(lambda: not list((work / "outbox").iterdir()) and not list((work / "sites").rglob("*.*")))


def test_a_payload_is_let_go_when_its_task_was_cancelled_on_the_way(broker, make_agent, tmp_path):
    import numpy as np

    gate, fetching = threading.Event(), threading.Event()
    agent = make_agent({"train": lambda model, ctx: FLModel(params=model.params)})
    fetch = broker.link.fetch

    def slow(ref, timeout_s=0, dest=None):
        fetching.set()
        assert gate.wait(20)
        return fetch(ref, timeout_s, dest)

    broker.link.fetch = slow
    broker.assign(("a", "site-1"), model=FLModel(params={"w": np.zeros(50_000, np.float32)}))
    assert fetching.wait(20)
    broker.say(Cancel("job-1", tuple(agent._desk.held_refs())))
    _until(lambda: not agent._desk.held_refs())
    gate.set()
    _until(lambda: agent._desk.cache.bytes > 0 and not agent._desk.cache._pins)


def test_what_cannot_be_fetched_is_a_try_that_counts(broker, make_agent, make_job, weights):
    make_agent()
    archive = make_job({"client.py": LOOP})
    broker.payloads.clear()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    assert broker.failed("a").retryable


def test_ended_jobs_leave_their_newest_logs_and_no_empty_folders(tmp_path):
    folders = JobFolders(tmp_path)
    for i in range(5):
        Path(folders.log_path(f"job-{i}", "site-1")).write_text("x")
        os.utime(tmp_path / "logs" / f"job-{i}" / "site-1.log", (i, i))
        (folders.folder(f"job-{i}") / "code").mkdir(parents=True)
        folders.site_folder(f"job-{i}", "site-1")
    (folders.site_folder("job-0", "site-2") / "best.pt").write_text("the user's own")
    assert sorted(folders.on_disk()) == [f"job-{i}" for i in range(5)]
    for i in range(5):
        folders.forget(f"job-{i}")
        folders.sweep(f"job-{i}", lambda last=i == 4: last)
    assert (tmp_path / "jobs" / "job-4").exists()  # the executor stops: it does not wait for this
    folders.sweep("job-4", lambda: False)
    folders.prune_logs(2)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["job-3", "job-4"]
    left = [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["best.pt"] and not (tmp_path / "jobs" / "job-1").exists()


def test_a_result_that_the_disk_refuses_is_not_half_kept(tmp_path, monkeypatch):
    from fedloom.executor.outbox import Held
    from fedloom.serialization.messages import DoneItem

    outbox = Outbox(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        outbox.add(Held("job", "g", DoneItem("a", 1, "site-1", inline_bytes=1), data=b"x"))  # type: ignore[arg-type]
    assert not len(outbox) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- with real processes


@pytest.mark.process
def test_a_jobs_end_that_was_missed_is_asked_for(broker, make_agent, make_job, weights, tmp_path):
    agent = make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=make_job({"client.py": LOOP}))
    broker.done("a")
    broker.say(Welcome("s", "e"))
    _until(lambda: broker.asked == ["job-1"])
    assert (tmp_path / "work/jobs/job-1/code").is_dir() and agent._worker.hosts.live == 1
    broker.statuses["job-1"] = "FINISHED:COMPLETED"
    broker.say(Welcome("s", "e"))
    _until(lambda: agent._worker.hosts.live == 0 and not (tmp_path / "work/jobs/job-1").exists())
    (tmp_path / "work/jobs/job-0/code").mkdir(parents=True)  # of a life before this one
    broker.statuses["job-0"] = "unknown"
    broker.say(Welcome("s", "e"))
    _until(lambda: not (tmp_path / "work/jobs/job-0").exists())


@pytest.mark.process
def test_a_cancelled_task_is_not_begun_again_when_its_host_ends(broker, make_agent, make_job, weights, tmp_path):
    script = """
import sys, time
import fedloom.client as flare
flare.init()
flare.receive()
flare.send(flare.FLModel(metrics={"x": 1}))
while not __import__("pathlib").Path("go").exists():
    time.sleep(0.01)
"""
    agent = make_agent()
    archive = make_job({"client.py": script})
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    broker.done("a")
    broker.assign(("b", "site-1"), round=1, model=weights(1.0), archive=archive)  # waits for the script's next turn
    _until(lambda: any(host.run is not None for host in agent._worker.hosts.hosts()))
    broker.say(Cancel("job-1", tuple(agent._desk.held_refs())))
    _until(lambda: not agent._desk.held_refs())
    (tmp_path / "work/jobs/job-1/sites/site-1/go").touch()
    _until(lambda: agent._worker.hosts.live == 0)
    agent.stop()
    assert not agent._desk.runs
    assert not [
        m for m, _ in broker.messages if isinstance(m, Fail) or (isinstance(m, Done) and m.items[0].task == "b")
    ]


@pytest.mark.process
def test_children_of_a_script_die_with_the_executor_whatever_kills_it(tmp_path):
    """A parent-death signal alone would reach the script and leave what it has started."""
    host = (
        "import os, subprocess, sys, time\n"
        "from fedloom.executor.lifeline import tie_group\n"
        "assert tie_group(int(os.environ['FEDLOOM_LIFELINE']))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "while True: pass\n"  # no signal handler of Python's would be in time
    )
    agent = (
        "import sys, threading, fedloom.executor.hosts as hosts\n"
        f"hosts._ENTRY = {host!r}\n"
        "for i in range(2):\n"
        f"    folder = {str(tmp_path)!r}\n"
        "    hosts.SubprocessSpawner().spawn(hosts.HostRequest({}, folder, f'{folder}/log{i}'))\n"
        "threading.Event().wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", agent])
    try:
        logs = [tmp_path / "log0", tmp_path / "log1"]
        _until(lambda: all(path.exists() and path.read_text().endswith("\n") for path in logs))
        pids = [int(pid) for path in logs for pid in path.read_text().split()]
        assert len(pids) == 4 and all(psutil.pid_exists(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()
    _until(lambda: all(_gone(pid) for pid in pids), 5.0)


@pytest.mark.process
def test_waiting_for_a_hosts_end_ends_its_children_too(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    request = HostRequest({}, str(tmp_path), str(tmp_path / "log"), argv=(sys.executable, "-c", code))
    process = SubprocessSpawner().spawn(request)
    assert process.wait(20) == 0
    pid = int((tmp_path / "log").read_text())
    _until(lambda: _gone(pid))


def _threads(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _until(true, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
