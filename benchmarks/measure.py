"""Runs a command and watches its process tree: wall time, and each process's peak memory as the kernel counts it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY_S = 0.05


@dataclass
class Seen:
    """A process of the tree.

    Attributes:
        hwm_kib: VmHWM, the kernel's own peak of resident memory, shared and mapped pages included.
        anon_kib: the largest RssAnon seen at a sample: memory of its own, without mapped files.
    """

    pid: int
    command: str
    role: str
    hwm_kib: int = 0
    anon_kib: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass
class Measured:
    """What a run took. `output` is the last line that the command printed, a JSON object."""

    output: dict[str, Any]
    wall_s: float
    processes: list[Seen] = field(default_factory=list[Seen])


def run(argv: Sequence[str], timeout_s: float = 900.0) -> Measured:
    """Run it to its end. A failing command ends the benchmark with what it said."""
    started = time.perf_counter()
    process = subprocess.Popen(list(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen: dict[tuple[int, str], Seen] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            sample(process.pid, seen, time.perf_counter() - started)

    watcher = threading.Thread(target=watch, name="bench-watch")
    watcher.start()
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        wall_s = time.perf_counter() - started
        over.set()
        watcher.join()
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(argv)} ended with {process.returncode}:\n{out}\n{err}")
    return Measured(json.loads(out.strip().splitlines()[-1]), wall_s, sorted(seen.values(), key=lambda s: s.first_s))


def sample(root: int, seen: dict[tuple[int, str], Seen], now_s: float) -> None:
    """Note every process of the tree as it is now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(stat[1]), []).append(int(folder.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
            _note(pid, root, seen, now_s)


def _note(pid: int, root: int, seen: dict[tuple[int, str], Seen], now_s: float) -> None:
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    if "VmHWM" not in status:
        return  # a zombie
    born = (folder / "stat").read_text().rpartition(")")[2].split()[19]
    process = seen.get((pid, born))
    if process is None:
        process = seen[pid, born] = Seen(pid, "", "", first_s=now_s)
    process.command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    process.role = "launcher" if pid == root else role_of(pid, status["Name"].strip(), process.command)
    process.hwm_kib = max(process.hwm_kib, int(status["VmHWM"].split()[0]))
    process.anon_kib = max(process.anon_kib, int(status["RssAnon"].split()[0]))
    process.last_s = now_s


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
    return command[-50:]


def by_role(processes: Sequence[Seen]) -> list[dict[str, Any]]:
    """The largest process of each role, and how many there were."""
    groups: dict[str, list[Seen]] = {}
    for process in processes:
        groups.setdefault(process.role, []).append(process)
    return [
        {
            "role": role,
            "count": len(group),
            "hwm_mib": round(max(p.hwm_kib for p in group) / 1024, 1),
            "anon_mib": round(max(p.anon_kib for p in group) / 1024, 1),
        }
        for role, group in groups.items()
    ]


def machine() -> dict[str, Any]:
    """What was measured on."""
    model = "unknown"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }
