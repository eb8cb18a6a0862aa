"""Threads of this process in which the functions of an embedded executor run.

They are kept for the next task: to start one takes longer than a quick function does. A function that outlives its time
keeps its thread to itself, and another takes its place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_IDLE_S = 30.0


class Call:
    """One call of a function, to be begun by whichever thread is free."""

    __slots__ = ("given_up", "name", "work")

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self.work = work
        self.given_up = False  # nobody waits for it: its thread ends with it


class FunctionThreads:
    """At most ``most`` threads, besides those of calls that were given up. Calls begin in the order they came.

    Belongs to one thread; the lock is for the threads' own comings and goings.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # calls that are not over
        self._live = 0

    def submit(self, call: Call) -> None:
        """Have it called; it must not raise."""
        with self._lock:
            self._open += 1
            self._calls.put(call)
            self._grow()

    def give_up(self, call: Call) -> None:
        """A call that was begun goes on for nobody: others do not wait for it."""
        with self._lock:
            if call.given_up or call.work is _over:
                return
            call.given_up = True
            self._open -= 1
            self._live -= 1
            self._grow()

    def close(self) -> None:
        """Let the threads end, each after what it is at."""
        with self._lock:
            for _ in range(self._live):
                self._calls.put(None)

    def _grow(self) -> None:
        if self._live < min(self._most, self._open):
            threading.Thread(target=self._main, name="fedloom-functions", daemon=True).start()
            self._live += 1

    def _main(self) -> None:
        thread = threading.current_thread()
        while True:
            try:
                call = self._calls.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._calls.empty():
                        self._live -= 1
                        return
                continue
            if call is None:
                return
            thread.name = f"fedloom-task-{call.name}"
            call.work()
            with self._lock:
                call.work = _over
                if call.given_up:
                    return
                self._open -= 1
            thread.name = "fedloom-functions"


def _over() -> None:
    """What is left of a call that is over."""
