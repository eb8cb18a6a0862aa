"""The processes of one simulation: broker control, broker data, controller and agent, forked, watched and ended."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..serialization.errors import ProcessError
from .forkserver.client import ForkedProcess
from .forkserver.warm import Warm

__all__ = ["LogTail", "Pipeline", "PipelineSettings"]

#: In the order in which they are started. `env` of the settings may also name "job": the controller's job processes.
ROLES = ("broker", "data", "controller", "agent")

_LEVELS = ("debug", "info", "warning", "error", "critical")
_TEXT_LEVEL = re.compile(r"^\S+(?: \S+)? \[(?:\x1b\[[0-9;]*m)*(debug|info|warning|error|critical)\b")
_MAX_ECHO_BYTES = 256 * 1024
_READY_S = 30.0


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What the processes need to know.

    Attributes:
        work_dir: the run's own folder in the workspace: broker store, agent workspace, logs.
        slot_envs: the environment of each of the T slots.
        env: more environment for a role's process, as tests need it.
        agent: further fields of the agent's config; ``broker`` likewise.
    """

    work_dir: Path
    sites: tuple[str, ...]
    slot_envs: tuple[Mapping[str, str], ...]
    prefold: bool = True
    max_parked: int | None = None
    log_level: str = "info"
    log_json: bool = False
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    broker: Mapping[str, Any] = field(default_factory=dict[str, Any])
    agent: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Pipeline:
    """Started by `start`; whatever happens then, closing the warm process ends all of it.

    Args:
        on_death: called once, in another thread, when one of the processes has ended unasked.
    """

    def __init__(self, warm: Warm, settings: PipelineSettings, on_death: Callable[[], None]) -> None:
        self._warm = warm
        self._settings = settings
        self._on_death = on_death
        self._processes: dict[str, ForkedProcess] = {}
        self._stopping = False
        self._dead: ForkedProcess | None = None
        self._lock = threading.Lock()
        self.log_dir = settings.work_dir / "logs"
        self.agent_dir = settings.work_dir / "agent"
        #: The broker's control endpoint: short, whatever the workspace is called.
        self.endpoint = f"ipc://{warm.run_dir}/broker"
        self._ready_path = warm.run_dir / "ready"
        self._ready = -1

    def start(self) -> None:
        """Fork the four processes; they find each other through the broker, which is there before the others look.

        A peer that finds nobody tries again after up to a second, with jitter: right for a fleet, far too long here.

        Raises:
            ProcessError: one cannot be started, or ends at once.
        """
        settings = self._settings
        for folder in (self.log_dir, self.agent_dir, settings.work_dir / "store"):
            folder.mkdir(parents=True, exist_ok=True)
        self._warm.on_exit = self._on_exit
        common = {"endpoint": self.endpoint, "log_level": settings.log_level, "log_json": settings.log_json}
        store = {
            "store": str(settings.work_dir / "store"),
            "internal": f"ipc://{self._warm.run_dir}/internal",
            "options": dict(settings.broker),
        }
        os.mkfifo(self._ready_path, 0o600)
        self._ready = os.open(self._ready_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for role in ("broker", "data"):
                self._fork(role, {**common, **store, "ready": str(self._ready_path)})
                self._await_ready(role)
        finally:
            with self._lock:
                os.close(self._ready)
                self._ready = -1
        self._fork(
            "controller",
            {
                **common,
                "warm": str(self._warm.path),
                "job_log": str(self.log_dir / "job.log"),
                "job_env": {"TMPDIR": str(self._warm.run_dir), **settings.env.get("job", {})},
            },
        )
        self._fork(
            "agent",
            {
                **common,
                "warm": str(self._warm.path),
                "workspace": str(self.agent_dir),
                "sites": list(settings.sites),
                "slot_envs": [dict(env) for env in settings.slot_envs],
                "prefold": settings.prefold,
                "max_parked": settings.max_parked,
                "options": dict(settings.agent),
            },
        )

    def _await_ready(self, role: str) -> None:
        readable, _, _ = select.select([self._ready], [], [], _READY_S)
        if readable:
            os.read(self._ready, 1)
        self.check()
        if not readable:
            raise ProcessError(f"the simulation's {role} process is not ready after {_READY_S:g} s")

    def _fork(self, role: str, args: dict[str, Any]) -> None:
        process = self._warm.fork(
            role,
            f"fedloom.sim.children:run_{role}",
            args,
            # what the processes themselves write for a moment goes with the run
            env={"TMPDIR": str(self._warm.run_dir), **self._settings.env.get(role, {})},
            log_path=self.log_dir / f"{role}.log",
        )
        with self._lock:
            self._processes[role] = process
        if process.poll() is not None:  # so soon that it was not known yet
            self._on_exit(process)

    def _on_exit(self, process: ForkedProcess) -> None:
        with self._lock:
            if self._stopping or self._dead is not None or process not in self._processes.values():
                return
            self._dead = process
            if self._ready >= 0:
                os.write(self._ready, b"x")  # whoever waits for it to be ready waits in vain
        self._on_death()

    @property
    def pids(self) -> dict[str, int]:
        """The process ids by role."""
        return {role: process.pid for role, process in self._processes.items()}

    @property
    def answers(self) -> bool:
        """Whether the broker, which holds what was committed, still lives."""
        broker = self._processes.get("broker")
        return not self._warm.lost and broker is not None and broker.poll() is None

    def check(self) -> None:
        """See whether all of it still runs.

        Raises:
            ProcessError: a process has ended unasked; with what it said last.
        """
        if self._warm.lost:  # all the others end with it, and are not to blame
            raise ProcessError("the simulation's warm process was killed" + _quoted(self._warm.last_words()))
        dead = self._dead
        if dead is not None:
            from ..executor.hosts import describe_exit, log_tail  # most of the executor: only when it is needed

            code = dead.poll()
            how = describe_exit(code) if code is not None else "has ended"
            words = log_tail(dead.log_path, limit=3000)
            raise ProcessError(f"the simulation's {dead.name} process (pid {dead.pid}) {how}" + _quoted(words))

    def end_agent(self, grace_s: float) -> bool:
        """Ask the agent to end, which lets its scripts end first; whether it did within ``grace_s``."""
        with self._lock:
            self._stopping = True
            agent = self._processes.get("agent")
        if agent is None or agent.poll() is not None:
            return True
        agent.terminate()
        return agent.wait(grace_s) is not None

    def end_work(self) -> None:
        """End the job's process and the sites' at once, by those whose they are; what was committed stays readable."""
        self.stopping()
        for role in ("controller", "agent"):
            if (process := self._processes.get(role)) is not None and process.poll() is None:
                process.kill()

    def stopping(self) -> None:
        """From now on the end of a process is no surprise."""
        with self._lock:
            self._stopping = True

    def keep_logs(self, folder: Path) -> None:
        """Move the processes' own logs, as ``_<role>.log``: no site's name begins with an underscore."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.log_dir.glob("*.log")):
            shutil.move(file, folder / f"_{file.name}")


def _quoted(words: str) -> str:
    return f"; it said last:\n{words.strip()}" if words.strip() else "; it said nothing"


class LogTail:
    """New lines of some log files, those of at least a level, with the lines that belong to them (tracebacks).

    Args:
        without: events left out, since the run itself reports them.
    """

    def __init__(self, folder: Path, level: str, without: Sequence[str] = ()) -> None:
        self._folder = folder
        self._without = re.compile("|".join(map(re.escape, without)) or r"(?!)")
        self._least = _LEVELS.index(level) if level in _LEVELS else _LEVELS.index("warning")
        self._read: dict[Path, int] = {}
        self._shown: dict[Path, bool] = {}

    def lines(self) -> Sequence[str]:
        """What was written since the last call; a line that is not finished waits."""
        out: list[str] = []
        for path in sorted(self._folder.glob("*.log")):
            start = self._read.get(path, 0)
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read(_MAX_ECHO_BYTES)
            except OSError:
                continue
            whole = data[: data.rfind(b"\n") + 1] or (data if len(data) == _MAX_ECHO_BYTES else b"")
            self._read[path] = start + len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                level = _level_of(line)
                if level is not None:
                    self._shown[path] = level >= self._least and not self._without.search(line)
                if self._shown.get(path, True) and line.strip():
                    out.append(f"{path.stem}: {line}")
        return out


def _level_of(line: str) -> int | None:
    if line.startswith("{"):
        try:
            entry = json.loads(line)
        except ValueError:
            return None
        name = cast("dict[str, Any]", entry).get("level") if isinstance(entry, dict) else None
    else:
        match = _TEXT_LEVEL.match(line)
        name = match[1] if match else None
    return _LEVELS.index(name) if name in _LEVELS else None
