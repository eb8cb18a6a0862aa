"""Starting and ending the processes in which a job's code runs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .host import ENV_PARENT
from .lifeline import ENV_LIFELINE, lifeline

#: A site's log past this size is moved aside when its next process starts: two of them are kept.
MAX_LOG_BYTES = 64 * 1024 * 1024
_ENTRY = "from fedloom.executor.host import main; raise SystemExit(main())"


@dataclass(frozen=True, slots=True)
class HostRequest:
    """A process to start. Without ``argv`` it runs `fedloom.executor.host.main`, which learns the rest on its channel.

    Attributes:
        env: joins the environment: the channel's address and token, the slot's device, the threads.
        log_path: where its standard output and error go, appended.
        slot: the index of the slot it is started for.
    """

    env: Mapping[str, str]
    cwd: str
    log_path: str
    slot: int = 0
    argv: tuple[str, ...] = ()
    name: str = field(default="")


class HostProcess(Protocol):
    """A started process, leader of a process group of its own."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Its exit code (negative: the signal), or None while it runs."""
        ...

    def wait(self, timeout_s: float) -> int | None:
        """As `poll`, waiting up to so long."""
        ...

    def kill(self) -> None:
        """Kill it with everything it started; harmless when it has ended."""
        ...


class Spawner(Protocol):
    """What starts hosts: `SubprocessSpawner`, or a fork server."""

    def spawn(self, request: HostRequest) -> HostProcess:
        """Start a process. Called in the agent's thread only: the kernel ties parent-death signals to threads.

        Raises:
            OSError: it cannot be started.
        """
        ...


class _Subprocess:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        if self._process.returncode is None and self._has_ended():
            self._end_group()
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        if self._process.returncode is None:
            self._await_end(timeout_s)
        return self.poll()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._end_group()

    def _has_ended(self) -> bool:
        """Whether it is dead, without reaping it: until then nobody else can get its process group's number."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _await_end(self, timeout_s: float) -> None:
        """Not `Popen.wait`, which reaps it before its group is ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # another system, or gone already
            deadline, never = time.monotonic() + timeout_s, threading.Event()
            while not self._has_ended() and time.monotonic() < deadline:
                never.wait(0.02)
            return
        try:
            ended = select.poll()
            ended.register(fd, select.POLLIN)
            ended.poll(max(0.0, timeout_s) * 1000)
        finally:
            os.close(fd)

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class SubprocessSpawner:
    """A fresh interpreter for each host, in a session of its own: a terminal's Ctrl-C reaches the agent only."""

    def spawn(self, request: HostRequest) -> HostProcess:
        """See `Spawner.spawn`."""
        environ = dict(os.environ)
        environ.update(request.env)
        environ[ENV_PARENT] = str(os.getpid())
        environ.setdefault("PYTHONUNBUFFERED", "1")
        argv = list(request.argv) or [sys.executable, "-P", "-c", _ENTRY]
        inherited: tuple[int, ...] = ()
        environ.pop(ENV_LIFELINE, None)
        if not request.argv:
            inherited = (lifeline(),)
            environ[ENV_LIFELINE] = str(inherited[0])
        with open_log(request.log_path) as log:
            process = subprocess.Popen(
                argv,
                cwd=request.cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log.fileno(),
                stderr=log.fileno(),
                start_new_session=True,
                pass_fds=inherited,
            )
        return _Subprocess(process)


def open_log(path: str):
    """A log opened for appending; one that has grown too large is moved aside first."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
        file.replace(file.with_name(file.name + ".1"))
    return file.open("ab")


def log_size(path: str) -> int:
    """How long a log is now; 0 where there is none."""
    try:  # looked for first: of thousands of quick tasks hardly one has a log, and an error costs more than a look
        return os.stat(path).st_size if os.access(path, os.F_OK) else 0  # noqa: PTH116
    except OSError:
        return 0


def log_tail(path: str, since: int = 0, limit: int = 6000) -> str:
    """The last lines of a log, of those written after position ``since``."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(since, size), size - limit))
            return file.read(limit).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def describe_exit(code: int) -> str:
    """An exit code in words."""
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            name = signal.Signals(number).name
            return f"was killed by {name} (signal {number})"
    return f"ended with exit code {code}"
