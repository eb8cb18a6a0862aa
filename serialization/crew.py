"""Threads for large folds: started for one call, ended before it returns.

numpy computes without the interpreter's lock, so a second thread nearly doubles what a fold reads a second. Nothing is
kept between calls: a thread costs a tenth of a millisecond, and a process that forked has no dead pool to wait for.
One thread is the rule; a process whose cores are its own to use asks for more with `allow`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")

#: Below so many bytes a thread costs more than it brings.
WORTHWHILE: Final = 8 * 1024 * 1024

_allowed = 1


def allow(threads: int) -> None:
    """Let large folds of this process use so many threads, the calling one among them; at most one a core."""
    global _allowed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _allowed = max(1, min(threads, cores))


def threads_for(size: int) -> int:
    """How many threads work on so many bytes."""
    return _allowed if size > WORTHWHILE else 1


def each(tasks: Sequence[Task], work: Callable[[int, Task], Done], threads: int) -> list[Done]:
    """The result of ``work(worker, task)`` for every task, in their order.

    Args:
        tasks: pieces of work; whoever is free takes the next.
        work: called in several threads at a time; ``worker`` is 0 to ``threads`` - 1.
        threads: how many work, the calling one among them.

    Raises:
        BaseException: the first that a call raised, in the order of the tasks that were begun. No others are begun.
    """
    if threads < 2 or len(tasks) < 2:
        return [work(0, task) for task in tasks]
    lock = threading.Lock()
    places = iter(range(len(tasks)))
    done: dict[int, Done] = {}
    failed: dict[int, BaseException] = {}

    def take(worker: int) -> None:
        while not failed:
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                done[place] = work(worker, tasks[place])
            except BaseException as error:  # noqa: BLE001 - raised again by the caller
                failed[place] = error

    helpers = [
        threading.Thread(target=take, args=(worker,), name=f"fold-{worker}", daemon=True)
        for worker in range(1, min(threads, len(tasks)))
    ]
    try:
        for helper in helpers:
            helper.start()
        take(0)
    finally:
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
    if failed:
        raise failed[min(failed)]
    return [done[place] for place in range(len(tasks))]
