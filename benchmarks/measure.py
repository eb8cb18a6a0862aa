"""Runs a command and watches it from outside: seconds, and the memory of its whole process tree.

*PSS* counts a page that n processes share as 1/n of a page in each, so its sum over a tree is what the tree really
takes; *RSS* counts it n times. *VmHWM* is the kernel's own peak of a process. What lies outside the tree (the page
cache of files that nobody maps) is not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVERY_S = 0.5
#: A run that has just begun is looked at more often, so that a short one is seen too; also a look's share of the time.
_OFTEN_S = 0.1
_SUBREAPER = 36
_KIB = 1024
_MIB = 2**20
_LEFT_S = 5.0


@dataclass
class Seen:
    """A process of the tree, as the last look found it; sizes are peaks over all looks, in bytes.

    Attributes:
        hwm: VmHWM.
        own: anonymous and shared memory by PSS: what mapped files do not explain.
    """

    pid: int
    role: str = ""
    command: str = ""
    hwm: int = 0
    pss: int = 0
    own: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """The tree at one moment: bytes in all, and of each role (PSS, and its anonymous and shared part)."""

    at: float
    rss: int
    pss: int
    roles: Mapping[str, tuple[int, int]]


@dataclass
class Measured:
    """What a command took, and what it said."""

    wall_s: float
    started_at: float
    code: int
    said: str
    timed_out: bool = False
    processes: list[Seen] = field(default_factory=list[Seen])
    looks: list[Look] = field(default_factory=list[Look])

    @property
    def rss_mib(self) -> float:
        """The tree's largest sum of resident sizes."""
        return max((look.rss for look in self.looks), default=0) / _MIB

    @property
    def pss_mib(self) -> float:
        """The tree's largest sum of proportional sizes."""
        return max((look.pss for look in self.looks), default=0) / _MIB

    def group_mib(self, chosen: Callable[[str], bool], *, own: bool = False) -> float:
        """The largest sum over the roles that are chosen, of PSS or of its anonymous and shared part."""
        return max((group_bytes(look, chosen, own=own) for look in self.looks), default=0) / _MIB


def group_bytes(look: Look, chosen: Callable[[str], bool], *, own: bool = False) -> int:
    """The sum over the roles that are chosen."""
    return sum(sizes[own] for role, sizes in look.roles.items() if chosen(role))


def watch(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 600.0,
    every_s: float = _EVERY_S,
) -> Measured:
    """Run a command to its end and look at its processes. What it leaves running is ended, and not waited for."""
    with _adopting():
        return _watch(argv, env, cwd, timeout_s, every_s)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Children whose parents end stay in our tree; for no longer: nobody else collects them."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SUBREAPER, 0, 0, 0, 0)


def _watch(
    argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, timeout_s: float, every_s: float
) -> Measured:
    others = frozenset(descendants(os.getpid()))
    seen: dict[tuple[int, str], Seen] = {}
    looks: list[Look] = []
    over = threading.Event()
    with tempfile.TemporaryFile() as out:
        started, started_at = time.perf_counter(), time.time()
        process = subprocess.Popen(
            list(argv), env={**os.environ, **(env or {})}, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )

        def look_again() -> None:
            while True:
                with contextlib.suppress(OSError):
                    looks.append(look(seen, time.perf_counter() - started, others))
                elapsed = time.perf_counter() - started
                if over.wait(max(_OFTEN_S, min(every_s, elapsed * _OFTEN_S))):
                    return

        watcher = threading.Thread(target=look_again, name="bench-watch")
        watcher.start()
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            process.wait()
        finally:
            wall_s = time.perf_counter() - started
            over.set()
            watcher.join()
            _end_left(others)
        out.seek(0)
        said = out.read().decode(errors="replace")
    order = sorted(seen.values(), key=lambda item: item.first_s)
    return Measured(wall_s, started_at, process.returncode, said, timed_out, order, looks)


def look(seen: dict[tuple[int, str], Seen], now_s: float, others: Container[int] = ()) -> Look:
    """Look at every process below this one, but these."""
    roles: dict[str, tuple[int, int]] = {}
    rss = pss = 0
    for pid in descendants(os.getpid()):
        if pid in others:
            continue
        with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
            process, resident = _note(pid, seen, now_s)
            proportional, own = memory_of(pid)
            process.pss, process.own = max(process.pss, proportional), max(process.own, own)
            before = roles.get(process.role, (0, 0))
            roles[process.role] = (before[0] + proportional, before[1] + own)
            rss, pss = rss + resident, pss + proportional
    return Look(time.time(), rss, pss, roles)


def memory_of(pid: int) -> tuple[int, int]:
    """A process's PSS, and its anonymous and shared part, in bytes."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    return rollup["Pss"], rollup.get("Pss_Anon", 0) + rollup.get("Pss_Shmem", 0)


def private_of(pid: int | str) -> int:
    """The bytes that are there for this process alone."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    return rollup["Private_Clean"] + rollup["Private_Dirty"]


def _fields(path: Path) -> dict[str, int]:
    out: dict[str, int] = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith("kB"):
            out[name] = int(rest.split()[0]) * _KIB
    return out


def descendants(root: int) -> Iterator[int]:
    """The processes below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(stat[1]), []).append(int(folder.name))
    waiting = list(children.get(root, []))
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        yield pid


def _note(pid: int, seen: dict[tuple[int, str], Seen], now_s: float) -> tuple[Seen, int]:
    """The process, and its resident bytes; KeyError for one that has ended."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * _KIB
    born = (folder / "stat").read_text().rpartition(")")[2].split()[19]
    process = seen.setdefault((pid, born), Seen(pid, first_s=now_s))
    process.command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    process.role = role_of(pid, status["Name"].strip(), process.command)
    process.hwm = max(process.hwm, int(status["VmHWM"].split()[0]) * _KIB)
    process.last_s = now_s
    return process, resident


def role_of(pid: int, name: str, command: str) -> str:
    """What a process is: the name that it gave itself, else of the log that it writes, else its command line's end."""
    if not name.startswith("python"):
        return name
    if "fedloom.sim.forkserver" in command:
        command = "warm process"  # its own log is warm.log; what is forked from it has others
    with contextlib.suppress(OSError):
        log = Path(f"/proc/{pid}/fd/1").readlink()
        if log.suffix == ".log":
            return log.stem
    return command[-400:]


def _end_left(others: Container[int]) -> None:
    """End what the command has left running, and collect it."""
    deadline = time.monotonic() + _LEFT_S
    while time.monotonic() < deadline:
        left = [pid for pid in descendants(os.getpid()) if pid not in others]
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        if not left:
            return
        time.sleep(0.01)


def by_role(processes: Sequence[Seen]) -> list[dict[str, Any]]:
    """The largest process of each role, and how many there were."""
    groups: dict[str, list[Seen]] = {}
    for process in processes:
        groups.setdefault(process.role[-60:], []).append(process)
    return [
        {
            "role": role,
            "count": len(group),
            "hwm_mib": round(max(p.hwm for p in group) / _MIB, 1),
            "pss_mib": round(max(p.pss for p in group) / _MIB, 1),
            "own_mib": round(max(p.own for p in group) / _MIB, 1),
        }
        for role, group in groups.items()
    ]
