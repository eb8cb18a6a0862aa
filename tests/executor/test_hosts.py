"""Host processes on their own: started, seen to end, killed with all they started."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from fedloom.executor import hosts
from fedloom.executor.hosts import HostRequest, SubprocessSpawner, describe_exit, log_tail, open_log

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]


def request(tmp_path, code, **env):
    return HostRequest(env, str(tmp_path), str(tmp_path / "log"), argv=(sys.executable, "-c", code))


def test_output_environment_and_exit_code(tmp_path):
    code = "import os, sys; print(os.environ['X'], os.getcwd()); print('err', file=sys.stderr); sys.exit(7)"
    process = SubprocessSpawner().spawn(request(tmp_path, code, X="y z"))
    assert process.wait(20) == 7 == process.poll()
    assert log_tail(str(tmp_path / "log")) == f"y z {tmp_path}\nerr"
    process.kill()  # harmless


def test_kill_takes_along_what_it_started(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    process = SubprocessSpawner().spawn(request(tmp_path, code))
    child = _first_child(process.pid)
    assert process.poll() is None and os.getpgid(process.pid) == process.pid != os.getpgrp()
    process.kill()
    assert process.wait(10) == -9
    _until(lambda: _gone(child))


def test_what_outlives_its_host_is_ended_too(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    process = SubprocessSpawner().spawn(request(tmp_path, code + "\nimport time; time.sleep(0.5)"))
    child = _first_child(process.pid)
    _until(lambda: process.poll() is not None)
    _until(lambda: _gone(child))


def test_a_host_dies_with_the_process_that_started_it(tmp_path):
    code = f"""
import os, sys
from fedloom.executor.channel import ChannelServer
from fedloom.executor.hosts import HostRequest, SubprocessSpawner
server = ChannelServer(lambda *a: None)
server.start()
request = HostRequest(server.environ("h"), {str(tmp_path)!r}, {str(tmp_path / "log")!r})
process = SubprocessSpawner().spawn(request)
print(process.pid, flush=True)
sys.stdin.read()
"""
    agent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with agent:
        host = int(agent.stdout.readline())
        _until(lambda: psutil.Process(host).num_threads() >= 1)
        agent.kill()
    _until(lambda: _gone(host))


def test_without_an_agent_a_host_says_so(tmp_path):
    request = HostRequest({"FEDLOOM_CHANNEL": "/nowhere", "FEDLOOM_TOKEN": "x"}, str(tmp_path), str(tmp_path / "log"))
    assert SubprocessSpawner().spawn(request).wait(30) == 3
    assert "has ended" in log_tail(str(tmp_path / "log"))


def test_a_log_is_bounded_and_its_tail_starts_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "MAX_LOG_BYTES", 10)
    path = str(tmp_path / "deep" / "log")
    for text in (b"first line\n", b"second\n"):
        with open_log(path) as log:
            log.write(text)
    assert log_tail(path) == "second" and (tmp_path / "deep" / "log.1").read_text() == "first line\n"
    assert log_tail(path, 3) == "ond" and log_tail(path, limit=4) == "ond" and log_tail("/nowhere") == ""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "SIGKILL (signal 9)"),
        (139, "SIGSEGV (signal 11)"),
        (1, "exit code 1"),
        (0, "exit code 0"),
        (255, "code 255"),
    ],
)
def test_exit_codes_in_words(code, words):
    assert words in describe_exit(code)


def _first_child(pid):
    _until(lambda: psutil.Process(pid).children())
    return psutil.Process(pid).children()[0].pid


def _gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _until(true, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)
