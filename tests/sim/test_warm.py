"""The warm process with real forks: what a process gets, what is said of its end, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fedloom.serialization.errors import ProcessError
from fedloom.sim import preload
from fedloom.sim.forkserver.client import ForkedProcess, WarmClient
from fedloom.sim.forkserver.warm import THREAD_ENV, Warm
from fedloom.sim.preload import end_early, load_early, modules_for, start_early, start_warm, take_warm, warmed

pytestmark = pytest.mark.process

PROBE = """
import json, os, subprocess, sys, threading, time
IMPORTED_IN = os.getpid()
time.sleep(0.3)  # an import that a fork must not repeat

def report(**extra):
    import zmq
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    print(json.dumps({
        "imported_in": IMPORTED_IN, "parent": os.getppid(), "pid": os.getpid(), "group": os.getpgid(0), "extra": extra,
        "cwd": os.getcwd(), "env": dict(os.environ), "main": getattr(sys.modules["__main__"], "__file__", None),
        "threads": len(os.listdir("/proc/self/task")), "parent_threads": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "links": links, "modules": sorted(sys.modules), "argv": sys.argv, "zmq": zmq.Context._instance is None,
    }))

def fail(): raise RuntimeError("broken on purpose")
def leave(code): sys.exit(code)
def give(code): return code
def die(): os.kill(os.getpid(), 9)
def sleep(): time.sleep(300)

def family(path):
    child = subprocess.Popen(["sleep", "300"])
    with open(path + ".part", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(path + ".part", path)
    time.sleep(300)

def orphan(path):
    child = subprocess.Popen(["sleep", "300"])
    with open(path, "w") as file:
        file.write(str(child.pid))

def late(path):
    import atexit
    def work():
        time.sleep(0.2)
        with open(path, "a") as file:
            file.write("thread ")
    atexit.register(lambda: open(path, "a").write("exit"))
    threading.Thread(target=work).start()
"""


@pytest.fixture(scope="module")
def probe_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "probe.py").write_text(PROBE)
    (folder / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(300,), daemon=True).start()\n"
    )
    (folder / "broken.py").write_text("raise ValueError('no')\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    yield folder
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def warm(probe_path: Path) -> Iterator[Warm]:
    warm = warmed(start_warm(["probe"]), ["broken"])
    yield warm
    warm.close()


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        threading.Event().wait(0.02)
    return true()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def report(process: ForkedProcess) -> dict[str, object]:
    import json

    assert process.wait(20) == 0, Path(process.log_path).read_text()
    return json.loads(Path(process.log_path).read_text())


def test_a_process_gets_what_was_asked_and_nothing_of_the_server(warm: Warm, tmp_path: Path) -> None:
    log = tmp_path / "with space.log"
    process = warm.fork(
        "probe",
        "probe:report",
        {"numbers": [1, 2.5], "text": "ä"},
        env={"FEDLOOM_TEST": "one"},
        unset=["HOME"],
        cwd=tmp_path,
        log_path=log,
    )
    seen = report(process)
    assert seen["extra"] == {"numbers": [1, 2.5], "text": "ä"}
    assert seen["cwd"] == str(tmp_path)
    env = seen["env"]
    assert isinstance(env, dict)
    assert env["FEDLOOM_TEST"] == "one"
    assert "HOME" not in env
    assert {name: env[name] for name in THREAD_ENV} == dict.fromkeys(THREAD_ENV, "1")
    assert seen["parent"] == warm.process.pid
    assert seen["pid"] == seen["group"] == process.pid
    assert seen["imported_in"] == warm.process.pid, "the module was loaded before the fork, not after it"
    assert seen["threads"] == seen["parent_threads"] == 1
    assert seen["zmq"] is True
    assert seen["main"] is None
    links = seen["links"]
    assert isinstance(links, list)
    assert not [link for link in links if "socket" in link or "pipe" in link or "epoll" in link]
    assert str(log) in links


def test_the_users_script_is_never_run_again(probe_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "job without guard.py"
    script.write_text(
        textwrap.dedent("""
        print("once", flush=True)
        from fedloom.sim.preload import start_warm, warmed
        warm = warmed(start_warm(["probe"]), [])
        for _ in range(3):
            assert warm.fork("x", "probe:give", {"code": 0}).wait(10) == 0
        warm.close()
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


@pytest.mark.parametrize(
    ("target", "args", "status", "said"),
    [
        ("probe:give", {"code": 0}, 0, ""),
        ("probe:give", {"code": 7}, 7, ""),
        ("probe:leave", {"code": 9}, 9, ""),
        ("probe:leave", {"code": "a reason"}, 1, "a reason"),
        ("probe:leave", {"code": None}, 0, ""),
        ("probe:fail", {}, 1, "RuntimeError: broken on purpose"),
        ("probe:missing", {}, 1, "has no attribute 'missing'"),
        ("no_such_module:main", {}, 1, "No module named 'no_such_module'"),
        ("probe:give", {"wrong": 1}, 1, "unexpected keyword argument"),
        ("probe:die", {}, -signal.SIGKILL, ""),
    ],
)
def test_exit_codes(warm: Warm, tmp_path: Path, target: str, args: dict[str, object], status: int, said: str) -> None:
    process = warm.fork("x", target, args, log_path=tmp_path / "log")
    assert process.wait(20) == status == process.poll()
    assert said in (tmp_path / "log").read_text()


def test_a_process_ends_as_an_interpreter_does(warm: Warm, tmp_path: Path) -> None:
    path = tmp_path / "late"
    assert warm.fork("x", "probe:late", {"path": str(path)}).wait(20) == 0
    assert path.read_text() == "thread exit"


def test_commands(warm: Warm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["/bin/sh", "-c", "echo $FEDLOOM_TEST $PWD; exit 7"]
    process = warm.fork("x", argv=command, env={"FEDLOOM_TEST": "one"}, cwd=tmp_path, log_path=log)
    assert process.wait(20) == 7
    assert log.read_text() == f"one {tmp_path}\n"
    process = warm.fork("x", argv=["/no/such/command"], log_path=log)
    assert process.wait(20) == 127
    assert "cannot run '/no/such/command'" in log.read_text()


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"target": "probe:give", "cwd": "/no/such/folder"}, "/no/such/folder"),
        ({"target": "probe:give", "log_path": "/no/such/folder/log"}, "/no/such/folder/log"),
        ({"target": "probe"}, "module:function"),
        ({}, "module:function"),
        ({"target": "probe:give", "argv": ["ls"]}, "one of the two"),
    ],
)
def test_requests_that_are_refused(warm: Warm, wrong: dict[str, object], seen: str) -> None:
    with pytest.raises(ProcessError, match="cannot start 'x'") as error:
        warm.fork("x", **wrong)  # pyright: ignore[reportArgumentType]
    assert seen in str(error.value)


def test_signals_reach_a_process_as_usual(warm: Warm) -> None:
    process = warm.fork("x", "probe:sleep")
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    process = warm.fork("x", "probe:sleep")
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    process.kill()  # harmless


def test_what_a_process_started_goes_with_it(warm: Warm, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    process = warm.fork("x", "probe:family", {"path": str(path)})
    assert until(path.exists)
    parent, child = map(int, path.read_text().split())
    assert parent == process.pid
    assert not gone(child)
    process.kill()
    assert until(lambda: gone(child))
    left = tmp_path / "left"
    assert warm.fork("x", "probe:orphan", {"path": str(left)}).wait(10) == 0
    assert until(lambda: gone(int(left.read_text())))


def test_a_fork_takes_milliseconds(warm: Warm) -> None:
    took: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        process = warm.fork("x", "probe:give", {"code": 0})
        took.append(time.perf_counter() - started)
        assert process.wait(10) == 0
    # some 5 ms; the bound is for a machine with much else to do, and under the 300 ms that the import alone takes
    assert statistics.median(took) < 0.1


def test_many_threads_may_ask_at_once(warm: Warm) -> None:
    codes: dict[int, int | None] = {}

    def ask(number: int) -> None:
        codes[number] = warm.fork("x", "probe:give", {"code": number}).wait(20)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {number: number for number in range(24)}


def test_a_clients_processes_end_with_its_connection(warm: Warm) -> None:
    ended: list[ForkedProcess] = []
    client = WarmClient(warm.path, on_exit=ended.append)
    first, second = client.fork("x", "probe:give", {"code": 3}), client.fork("x", "probe:sleep")
    assert first.wait(10) == 3
    assert until(lambda: ended == [first])
    mine = warm.fork("x", "probe:sleep")
    client.close()
    assert until(lambda: gone(second.pid))
    assert second.poll() == -signal.SIGKILL
    assert mine.poll() is None, "another client's process is left alone"
    mine.kill()
    with pytest.raises(ProcessError, match="has ended"):
        client.fork("x", "probe:sleep")


def test_nothing_can_be_loaded_once_processes_run(warm: Warm) -> None:
    process = warm.fork("x", "probe:sleep")
    with pytest.raises(ProcessError, match="before the first process"):
        warm.finish_preload(warm.begin_preload(["json"]))
    process.kill()
    assert process.wait(10) is not None


def test_a_module_that_starts_a_thread_is_left_out(probe_path: Path, tmp_path: Path) -> None:
    first = start_warm(["probe"])
    warm = warmed(first, ["threaded"])
    try:
        assert warm is not first
        assert gone(first.process.pid)
        seen = report(warm.fork("x", "probe:report", log_path=tmp_path / "log"))
        modules = seen["modules"]
        assert isinstance(modules, list)
        assert "threaded" not in modules
        assert "probe" in modules
        assert seen["imported_in"] == warm.process.pid
        assert seen["parent_threads"] == 1
    finally:
        warm.close()


def test_close_ends_everything_within_a_second(probe_path: Path, tmp_path: Path) -> None:
    warm = warmed(start_warm(["probe"]), [])
    paths = [tmp_path / f"pids{number}" for number in range(4)]
    for path in paths:
        warm.fork("x", "probe:family", {"path": str(path)})
    assert until(lambda: all(path.exists() for path in paths))
    pids = [int(pid) for path in paths for pid in path.read_text().split()]
    started = time.monotonic()
    warm.close()
    assert time.monotonic() - started < 1.0
    assert [pid for pid in pids if not gone(pid)] == []
    assert gone(warm.process.pid)
    assert not warm.run_dir.exists()
    warm.close()  # harmless


LAUNCHER = """
import sys, threading
from fedloom.sim.preload import start_warm, warmed
from fedloom.sim.forkserver.client import WarmClient

def go():
    warm = warmed(start_warm(["probe"]), [])
    for number in range(3):
        warm.fork("x", "probe:family", {"path": f"{sys.argv[1]}/pids{number}"})
    WarmClient(warm.path).fork("x", "probe:family", {"path": f"{sys.argv[1]}/pids3"})
    print(warm.process.pid, warm.run_dir, flush=True)
    threading.Event().wait(300)

if sys.argv[2] == "main":
    go()
else:
    threading.Thread(target=go).start()
"""


@pytest.mark.parametrize("thread", ["main", "other"])
def test_nothing_outlives_a_launcher_that_is_killed(probe_path: Path, tmp_path: Path, thread: str) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), thread], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    with launcher.stdout:
        line = launcher.stdout.readline()
    warm_pid, run_dir = int(line.split()[0]), Path(line.split()[1])
    paths = [tmp_path / f"pids{number}" for number in range(4)]
    assert until(lambda: all(path.exists() for path in paths))
    pids = [warm_pid, *(int(pid) for path in paths for pid in path.read_text().split())]
    assert len(pids) == 9
    assert [pid for pid in pids if gone(pid)] == []
    launcher.kill()
    launcher.wait(10)
    assert until(lambda: all(gone(pid) for pid in pids), 3.0), [pid for pid in pids if not gone(pid)]
    assert until(lambda: not run_dir.exists())


def test_a_warm_process_that_is_killed_takes_everything_along_and_is_missed(probe_path: Path, tmp_path: Path) -> None:
    warm = warmed(start_warm(["probe"]), [])
    lost = threading.Event()
    warm.on_lost = lost.set
    path = tmp_path / "pids"
    process = warm.fork("x", "probe:family", {"path": str(path)})
    client = WarmClient(warm.path)
    other_path = tmp_path / "other"
    client.fork("x", "probe:family", {"path": str(other_path)})
    assert until(lambda: path.exists() and other_path.exists())
    warm.process.kill()
    assert process.wait(5) == -signal.SIGKILL
    assert lost.wait(5)
    pids = [int(pid) for file in (path, other_path) for pid in file.read_text().split()]
    assert until(lambda: all(gone(pid) for pid in pids))
    with pytest.raises(ProcessError):
        warm.fork("x", "probe:sleep")
    client.close()
    warm.close()
    assert not warm.run_dir.exists()


def test_an_interpreter_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ProcessError, match="/no/such/python"):
        start_warm()


def test_a_long_tmp_folder_does_not_lead_to_long_socket_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    warm = Warm()
    try:
        assert len(os.fsencode(warm.run_dir)) < 80
        assert warm.run_dir.stat().st_mode & 0o777 == 0o700
    finally:
        warm.close()


def test_imports_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(
        textwrap.dedent("""
        import os, json
        import torch.nn.functional as F
        from sklearn.datasets import load_digits
        import model, psutil, fedloom.client as flare
        from . import sibling
        try:
            import no_such_package_anywhere
        except ImportError:
            pass
        if True:
            import structlog
        class A:
            import typer
        def later():
            import rich
        """)
    )
    (tmp_path / "model.py").write_text("import torch\n")
    (tmp_path / "psutil.py").write_text("")  # shadows the installed one
    (tmp_path / "half.py").write_text("import (\n")
    modules = modules_for([tmp_path])
    assert modules[:2] == ("torch", "torch._dynamo")
    assert set(modules) == {"torch", "torch._dynamo", "torch.nn.functional", "sklearn.datasets", "structlog", "typer"}
    assert modules_for([tmp_path / "half.py"]) == ()
    assert modules_for([], torch=True) == ("torch", "torch._dynamo")


@pytest.fixture
def early(probe_path: Path) -> Iterator[None]:
    start_early()
    yield
    end_early()


@pytest.mark.usefixtures("early")
def test_one_that_was_started_early_is_taken_with_what_the_script_has_set_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [started] = preload._early  # pyright: ignore[reportPrivateUsage]
    (tmp_path / "client.py").write_text("import structlog\n")
    load_early([tmp_path / "client.py"])
    assert "structlog" in started.wanted
    monkeypatch.setenv("FEDLOOM_TEST", "set by the job's script")
    monkeypatch.delenv("HOME")
    warm = take_warm(["probe"])
    try:
        assert warm is started
        env = report(warm.fork("x", "probe:report", {}, log_path=tmp_path / "log"))["env"]
        assert isinstance(env, dict)
        assert env["FEDLOOM_TEST"] == "set by the job's script"
        assert "HOME" not in env
        assert {name: env[name] for name in THREAD_ENV} == dict.fromkeys(THREAD_ENV, "1")
    finally:
        warm.close()


@pytest.mark.usefixtures("early")
def test_a_variable_that_imports_read_asks_for_another_warm_process(monkeypatch: pytest.MonkeyPatch) -> None:
    [started] = preload._early  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    warm = take_warm(["probe"])
    try:
        assert warm is not started
        assert gone(started.process.pid)
    finally:
        warm.close()


@pytest.mark.usefixtures("early")
def test_one_that_nobody_takes_ends_at_once_with_its_folder() -> None:
    [started] = preload._early  # pyright: ignore[reportPrivateUsage]
    begun = time.monotonic()
    end_early()
    assert time.monotonic() - begun < 1.0
    assert gone(started.process.pid)
    assert not started.run_dir.exists()


def test_what_starts_the_warm_process_is_light() -> None:
    """It comes before everything else in `fedloom sim`: what it imports, everybody waits for."""
    code = "import sys, fedloom.sim.preload; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not {"numpy", "zmq", "structlog", "rich", "asyncio", "typer", "torch"} & set(done.stdout.split())
