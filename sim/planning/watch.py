"""What the processes of a running simulation take, by what they are: looked up in /proc, a few times a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ..devices import gpu_memory
from ..pipeline import ROLES

__all__ = ["WORKER", "Look", "Watch", "task_cpu_s"]

WORKER = "worker"
_EVERY_S = 0.05
#: A process whose size stays as it is is looked at closely no more often: that costs the kernel a walk of its pages.
_CLOSE_LOOK_S = 0.2
_GPU_EVERY_S = 0.5
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    """The worker's processes at one time: CPU seconds so far, and bytes of their own."""

    at: float
    cpu_s: float
    bytes: int


@dataclass(slots=True)
class _Seen:
    role: str = WORKER
    cpu_s: float = 0.0
    anon: int = 0
    own: int = 0
    peak: int = 0
    looked_at: float = 0.0
    alive: bool = True


class Watch:
    """Looks at all processes below this one while the block lasts.

    A process's own memory is what would not be there without it: pages that it has written. What it shares with the
    warm process it came from, and mapped files, are not.

    Args:
        log_dir: where the simulation's processes write their logs, by which they are known; others are the worker's.
        gpus: GPUs whose memory is watched as well.
    """

    def __init__(self, log_dir: Path, gpus: Sequence[str] = ()) -> None:
        self._log_dir = str(log_dir)
        self._gpus = tuple(gpus)
        self._root = os.getpid()
        self._seen: dict[tuple[int, str], _Seen] = {}
        self._before = _memory(self._root)[0]
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._look_on, name="fedloom-plan-watch", daemon=True)]
        self._gpu_before = gpu_memory() if gpus else {}
        self._gpu_peak: dict[str, int] = {}
        if self._gpu_before:
            self._threads.append(threading.Thread(target=self._look_at_gpus, name="fedloom-plan-gpus", daemon=True))
        self.looks: list[Look] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def look(self) -> Look:
        """The worker's processes now."""
        with self._lock:
            return self._look(time.monotonic(), closely=True)

    def memory(self) -> dict[str, int]:
        """The most that each role's processes had of their own: the worker's together, of others the largest one."""
        with self._lock:
            peaks: dict[str, int] = {}
            for seen in self._seen.values():
                if seen.role != WORKER:
                    peaks[seen.role] = max(peaks.get(seen.role, 0), seen.peak)
            return peaks | {WORKER: max((look.bytes for look in self.looks), default=0)}

    def waiting(self, since: Look) -> int:
        """The least that the worker's processes had since then, when one of its tasks was over; 0: nothing was seen."""
        with self._lock:
            return min((look.bytes for look in [since, *self.looks] if look.at >= since.at and look.bytes), default=0)

    def gpu(self) -> int | None:
        """The most of one GPU's memory that was taken beyond what was before; None: not known."""
        if not self._gpu_before:
            return None
        known = [gpu for gpu in self._gpus if gpu in self._gpu_before and gpu in self._gpu_peak]
        if len(known) < len(self._gpus):
            return None
        return max(max(0, self._gpu_peak[gpu] - self._gpu_before[gpu].used) for gpu in known)

    # ------------------------------------------------------------ threads

    def _look_on(self) -> None:
        while not self._over.wait(_EVERY_S):
            with self._lock:
                self.looks.append(self._look(time.monotonic()))

    def _look_at_gpus(self) -> None:
        while True:
            for gpu, memory in gpu_memory().items():
                self._gpu_peak[gpu] = max(self._gpu_peak.get(gpu, 0), memory.used)
            if self._over.wait(_GPU_EVERY_S):
                return

    # ------------------------------------------------------------ /proc

    def _look(self, now: float, *, closely: bool = False) -> Look:
        there: set[tuple[int, str]] = set()
        for pid, born, cpu_s in _below(self._root):
            key = (pid, born)
            seen = self._seen.setdefault(key, _Seen())
            with contextlib.suppress(OSError, IndexError, ValueError):  # it may end at any point
                role = "launcher" if pid == self._root else self._role(pid)
                if role != seen.role:  # it has just been forked, and became itself only now
                    seen.role, seen.peak, seen.looked_at = role, 0, 0.0
                seen.cpu_s = cpu_s
                anon = _anon(pid)
                if closely or anon > seen.anon or now - seen.looked_at >= _CLOSE_LOOK_S:
                    seen.own, seen.looked_at = self._own(pid, seen.role), now
                    seen.peak = max(seen.peak, seen.own)
                else:
                    seen.own = max(0, seen.own + anon - seen.anon)  # what a process gives back was its own
                seen.anon = anon
                there.add(key)
        for key, seen in self._seen.items():
            seen.alive = key in there
        workers = [seen for seen in self._seen.values() if seen.role == WORKER]
        return Look(now, sum(seen.cpu_s for seen in workers), sum(seen.own for seen in workers if seen.alive))

    def _own(self, pid: int, role: str) -> int:
        every, private = _memory(pid)
        match role:
            case "launcher":
                return max(0, every - self._before)  # what it had is not in what is available either
            case "warm":
                return every  # what the others share is its own
            case _:
                return private

    def _role(self, pid: int) -> str:
        log = Path(f"/proc/{pid}/fd/1").readlink()
        if str(log.parent) == self._log_dir and log.stem in (*ROLES, "job"):
            return log.stem
        return "warm" if log.name.removesuffix(" (deleted)") == "warm.log" else WORKER


def _below(root: int) -> list[tuple[int, str, float]]:
    """A process and all that came out of it: id, time of birth, CPU seconds."""
    children: dict[int, list[int]] = {}
    found: dict[int, tuple[str, float]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a name, not a path, is wanted, forty times a second
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    children.setdefault(int(stat[1]), []).append(int(name))
                    found[int(name)] = (stat[19], (int(stat[11]) + int(stat[12])) * _TICK_S)
    waiting, tree = [root], list[tuple[int, str, float]]()
    while waiting:
        pid = waiting.pop()
        if pid in found:
            tree.append((pid, *found[pid]))
        waiting += children.get(pid, [])
    return tree


def _anon(pid: int) -> int:
    """Bytes that are no file's, shared ones included: cheap, and grows with what is looked for."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split(None, 1)[0]) * 1024


def _memory(pid: int) -> tuple[int, int]:
    """Bytes that are no file's: all of them, and those that no other process shares."""
    anon = private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous":
            anon = int(value.split()[0]) * 1024
        elif name in ("Private_Dirty", "SwapPss"):
            private += int(value.split()[0]) * 1024
    return anon, private


def task_cpu_s(looks: Sequence[Look], begin: Look, end: Look, run_s: Sequence[float]) -> float:
    """CPU seconds of the last of tasks that took ``run_s``, of which the looks from ``begin`` to ``end`` saw the most.

    Both ends are late by what it takes to hear of a commit, so the rate is taken while the CPU time grew, and holds for
    the whole task. A task too short for that has its part of all that was used so far, and no more than one core.
    """
    within = [look for look in looks if begin.at < look.at <= end.at]
    grew = [look.at for before, look in zip([begin, *within], within, strict=False) if look.cpu_s > before.cpu_s]
    busy_s = min(run_s[-1], grew[-1] - begin.at) if grew else 0.0
    if busy_s < 8 * _EVERY_S:
        return min(run_s[-1], end.cpu_s * run_s[-1] / max(sum(run_s), 1e-9))
    return (end.cpu_s - begin.cpu_s) * run_s[-1] / busy_s
