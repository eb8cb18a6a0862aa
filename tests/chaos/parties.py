"""A broker, a controller and executors as an operator would run them: separate processes that are started again when
they end, behind a proxy for every byte between them; and where each of their processes can be found.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siblings import load

FaultProxy = load(__file__, "proxy").FaultProxy

RESTART_S = 0.2
#: Short enough that a run of twenty faults takes a minute or two, long enough for a machine under load.
TIMES = {"ping_s": 1, "dead_s": 4, "lost_s": 2, "takeover_s": 0.5, "stall_s": 3}


@dataclass(slots=True)
class Party:
    """One command line, kept running."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    child: Any = None
    down_until: float = 0.0  # inf: it is meant to be down
    logs: list[Path] = field(default_factory=list[Path])
    codes: list[int] = field(default_factory=list[int])


class Parties:
    """All parties of one run; ``keep`` starts again what has ended, as a service manager does."""

    def __init__(
        self,
        children: Any,
        folder: Path,
        ports: tuple[int, int],
        *,
        sites: Sequence[str],
        streamed: bool,
        seed: int,
        bounds: Mapping[str, float] | None = None,
        network: Any = None,
    ) -> None:
        self.children = children
        self.folder = folder
        self.store = folder / "store"
        self.sites = tuple(sites)
        broker, front = ports
        host = network.host if network else "127.0.0.1"
        self.network = network
        self.control = FaultProxy(front, broker, seed, host)
        self.data = FaultProxy(front + 1, broker + 1, seed + 1, host)
        self.endpoint = f"tcp://{host}:{front}"
        sets = [word for name, value in (TIMES | dict(bounds or {})).items() for word in ("--set", f"{name}={value}")]
        self._streamed = {"FEDLOOM_NO_LOCAL": "1"} if streamed else {}
        self.all: dict[str, Party] = {}
        self.round = 0  # the commits that there are
        self.struck = Counter[tuple[int, str]]()  # how often a site's script was killed in a round
        self._lock = threading.RLock()
        self._stop = threading.Event()
        logs = ("--log-level", "debug", "--log-format", "json")
        self._add("broker", "broker", "--bind", f"tcp://127.0.0.1:{broker}", "--advertise", f"{host}:{front + 1}",
                  "--store", str(self.store), "--durability", "process", *sets, *logs)  # fmt: skip
        self._add("controller", "controller", "--broker", self.endpoint, *logs)
        for site in self.sites:
            workspace = str(folder / f"at {site}")
            self._add(site, "executor", "--broker", self.endpoint, "--site", site, "--workspace", workspace, *logs)
        self._logs = logs
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def _add(self, name: str, *argv: str) -> Party:
        party = self.all[name] = Party(name, argv, self._streamed)
        return party

    def extra_controller(self) -> Party:
        """A hot standby."""
        return self._add("controller again", "controller", "--broker", self.endpoint, *self._logs)

    def second(self, site: str) -> Party:
        """Another machine for a site, which is not started yet: its own workspace, the same name."""
        party = self._add(f"{site} again", "executor", "--broker", self.endpoint, "--site", site,
                          "--workspace", str(self.folder / f"also at {site}"), *self._logs)  # fmt: skip
        party.down_until = float("inf")
        return party

    # ------------------------------------------------------------ running

    def start(self) -> None:
        for party in self.all.values():
            if party.down_until != float("inf"):
                self._start(party)
        self.all["broker"].child.says("broker_ready", 60)
        self._keeper.start()

    def _start(self, party: Party) -> None:
        away = self.network.prefix if self.network and party.name != "broker" else ()
        argv = [*away, sys.executable, "-m", "fedloom", *party.argv]
        party.child = self.children.start(argv, name=f"fedloom-{party.argv[0]}", env=party.env)
        party.logs.append(party.child.log_path)

    def _keep(self) -> None:
        while not self._stop.wait(0.02):
            with self._lock:
                now = time.monotonic()
                for party in self.all.values():
                    if party.child is None or party.child.process.poll() is not None:
                        if party.child is not None:
                            party.codes.append(party.child.process.returncode)
                            party.child = None
                            party.down_until = max(party.down_until, now + RESTART_S)
                        if now >= party.down_until:
                            self._start(party)

    def close(self) -> None:
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join(5.0)
        self.control.close()
        self.data.close()

    # ------------------------------------------------------------ faults

    def kill(self, *pids: int) -> int:
        """kill -9, all at once; how many were alive. 0 stands for nobody, and is no process group here."""
        pids = tuple(filter(None, pids))
        with self._lock:
            hit = sum(alive(pid) for pid in pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return hit

    def kill_all(self) -> int:
        """Every process of every party, at once."""
        with self._lock:
            return self.kill(*(pid for name in self.all for pid in self.tree(name)))

    def hold(self, name: str, seconds: float) -> None:
        """Leave a party down for so long once it has ended."""
        with self._lock:
            self.all[name].down_until = time.monotonic() + seconds

    def pid(self, name: str) -> int:
        """The party's own process; 0: it is down."""
        child = self.all[name].child
        return child.pid if child is not None and child.process.poll() is None else 0

    def connected(self, name: str, event: str = "executor_up") -> bool:
        """Whether the present process of an executor (or another, by what it says) is there for others."""
        child = self.all[name].child
        return child is not None and child.process.poll() is None and event in child.text

    def tree(self, name: str) -> list[int]:
        """The party's process and all that it has started."""
        root = self.pid(name)
        return [root, *descendants(root)] if root else []

    def part(self, name: str, words: str) -> int:
        """The process among what a party has started whose command line has these words; 0: none now."""
        for pid in self.tree(name)[1:]:
            if words in command(pid):
                return pid
        return 0

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        """What a party has logged over all its lives, as far as it is JSON."""
        out: list[dict[str, Any]] = []
        for path in self.all[name].logs:
            for line in path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    if isinstance(found := json.loads(line), dict):
                        out.append(found)
        return out


def alive(pid: int) -> bool:
    """Whether a process runs (or is stopped): zombies do not count."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def descendants(root: int) -> list[int]:
    """All processes below one, by /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    out: list[int] = []
    todo = [root]
    while todo:
        found = parents.get(todo.pop(), [])
        out += found
        todo += found
    return out


def until(check: Callable[[], Any], seconds: float) -> Any:
    """The first truthy value within so long, or the last one."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := check()) and time.monotonic() < deadline:
        pause.wait(0.01)
    return value
