"""CPU time of the run's processes, watched from the launcher: nothing in them has to say it."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = ["CpuSeries", "CpuWatch", "cpu_seconds"]

#: How often to look; of a long run less and less often, so that a series keeps to its bound.
EVERY_S = 0.05
MAX_SAMPLES = 4096
#: Processes watched at once; what is started beyond that is not.
MAX_PROCESSES = 256


@dataclass(slots=True)
class CpuSeries:
    """A process's CPU seconds, all of its threads', as they grew."""

    name: str
    at: list[float] = field(default_factory=list[float])
    used: list[float] = field(default_factory=list[float])

    def add(self, at: float, used: float) -> None:
        """A later look."""
        self.at.append(at)
        self.used.append(max(used, self.used[-1] if self.used else 0.0))

    def thin(self) -> None:
        """Forget every other look."""
        self.at, self.used = self.at[::2], self.used[::2]

    def between(self, start: float, end: float) -> float:
        """CPU seconds used between two times, in a straight line between looks."""
        return self._by(end) - self._by(start)

    def _by(self, when: float) -> float:
        after = bisect_right(self.at, when)
        if after == 0:
            return self.used[0] if self.used else 0.0
        if after == len(self.at):
            return self.used[-1]
        before = after - 1
        share = (when - self.at[before]) / (self.at[after] - self.at[before])
        return self.used[before] + share * (self.used[after] - self.used[before])

    def shares(self) -> Iterator[tuple[float, float]]:
        """From when on, and how many cores were busy with it."""
        for i in range(1, len(self.at)):
            if (took := self.at[i] - self.at[i - 1]) > 0:
                yield self.at[i - 1], (self.used[i] - self.used[i - 1]) / took


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process, None where it has ended. Linux makes its clock's number of its own: clock_getres(2)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


class CpuWatch:
    """A thread that looks at the processes now and then.

    Args:
        processes: those that run now, by id, with a name where it is known.
    """

    def __init__(self, processes: Callable[[], dict[int, str]]) -> None:
        self.series: dict[int, CpuSeries] = {}
        self._processes = processes
        self._every_s = EVERY_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedloom-sim-cpu", daemon=True)

    def start(self) -> None:
        """Begin; the launcher itself is one of them."""
        self.series[os.getpid()] = CpuSeries("launcher")
        self._thread.start()

    def stop(self) -> None:
        """Look for a last time, and end."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            over = self._over.wait(self._every_s)
            self._look()
            if over:
                return

    def _look(self) -> None:
        for pid, name in self._processes().items():
            if pid not in self.series and len(self.series) < MAX_PROCESSES:
                self.series[pid] = CpuSeries(name)
        for pid, series in self.series.items():
            if (used := cpu_seconds(pid)) is not None:
                series.add(time.monotonic(), used)
        if max(len(series.at) for series in self.series.values()) >= MAX_SAMPLES:
            self._every_s *= 2
            for series in self.series.values():
                series.thin()
