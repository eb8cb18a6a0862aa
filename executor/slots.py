"""Which of the waiting tasks starts next, and in which slot. Pure.

A slot is room for one running task, with its device in an environment of its own. A lane is what must not overlap: the
tasks of one job at one site. A lane whose process was started in one slot's environment (its script sees that GPU and
no other) goes on in slots with the same environment only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one running task."""

    index: int
    env: tuple[tuple[str, str], ...] = ()


#: Tasks shorter than this start as they come: to sort them would take longer than it saves.
WORTH_SORTING_S = 0.05
#: The oldest task waits for at most so many others that are started before it, times the capacity.
PATIENCE = 8
_MAX_KNOWN = 200_000


class Slots(Generic[K]):
    """A queue in front of a fixed number of slots: first come first served, and what takes long goes first.

    A long task that starts last ends long after all others, and a round waits for it. So of the tasks that wait the one
    starts whose site's last task took longest (Graham 1969: at most 4/3 of the shortest schedule). A site of which
    nothing is known goes before those. The order changes no result.

    Args:
        capacity: how many tasks run at once.
        envs: the slots' environments, given out in turn; none: nothing is set.
    """

    def __init__(self, capacity: int, envs: Sequence[Mapping[str, str]] = ()) -> None:
        if capacity < 1:
            raise ValueError(f"capacity {capacity}; at least 1")
        chosen = [tuple(sorted(envs[i % len(envs)].items())) if envs else () for i in range(capacity)]
        self._free: list[Slot] = [Slot(i, env) for i, env in enumerate(chosen)]
        self._capacity = capacity
        self._waiting: dict[K, str] = {}
        self._running: dict[K, tuple[Slot, str]] = {}
        self._behind: dict[int, int] = {}  # tasks more than one in a slot, by its index
        self._busy_lanes: set[str] = set()
        self._bound: dict[str, tuple[tuple[str, str], ...]] = {}
        self._took: dict[str, float] = {}  # by lane
        self._long = 0  # lanes that are worth sorting
        self._passed = 0  # tasks that were started before the oldest one

    @property
    def capacity(self) -> int:
        """How many tasks run at once."""
        return self._capacity

    @property
    def free(self) -> int:
        """Slots that neither run a task nor are spoken for by a waiting one."""
        return max(0, len(self._free) - len(self._waiting))

    @property
    def waiting(self) -> int:
        """Tasks in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Tasks in slots."""
        return len(self._running)

    def push(self, key: K, lane: str = "") -> None:
        """Queue a task; in a lane that is not empty it runs alone."""
        if key not in self._running:
            self._waiting.setdefault(key, lane)

    def bind(self, lane: str, slot: Slot) -> None:
        """The lane has a process in this slot's environment now."""
        self._bound[lane] = slot.env

    def unbind(self, lane: str) -> None:
        """The lane's process has ended."""
        self._bound.pop(lane, None)

    def took(self, lane: str, seconds: float) -> None:
        """What the lane's last task took."""
        self._long += (seconds >= WORTH_SORTING_S) - (self._took.pop(lane, 0.0) >= WORTH_SORTING_S)
        self._took[lane] = seconds
        if len(self._took) > _MAX_KNOWN:
            self._forget(next(iter(self._took)))

    def forget(self, job: str) -> None:
        """The job is over: its lanes will have no more tasks."""
        for lane in [lane for lane in self._took if lane.startswith(f"{job}/")]:
            self._forget(lane)

    def _forget(self, lane: str) -> None:
        self._long -= self._took.pop(lane) >= WORTH_SORTING_S

    def _in_order(self) -> list[tuple[K, str]]:
        waiting = list(self._waiting.items())
        if not self._long or len(waiting) <= len(self._free):
            return waiting
        oldest = waiting[:1] if self._passed >= PATIENCE * self._capacity else []
        rest = waiting[len(oldest) :]
        rest.sort(key=lambda item: self._took.get(item[1], math.inf), reverse=True)  # equals stay in their order
        return oldest + rest

    def take(self) -> Iterator[tuple[K, Slot]]:
        """Start what can start now; a task that must wait does not hold up those behind it."""
        for key, lane in self._in_order() if self._free else ():
            if not self._free:
                return
            if lane and lane in self._busy_lanes:
                continue
            slot = self._slot_for(lane)
            if slot is None:
                continue
            self._free.remove(slot)
            self._passed = 0 if key == next(iter(self._waiting)) else self._passed + 1
            del self._waiting[key]
            self._running[key] = (slot, lane)
            if lane:
                self._busy_lanes.add(lane)
            yield key, slot

    def follow(self, slot: Slot, wanted: Callable[[K], bool], most: int) -> list[K]:
        """Take up to ``most`` waiting tasks from the front of the queue, as long as they are ``wanted``, into a slot
        that a task was given already: they run behind it, one after another.
        """
        taken: dict[K, str] = {}
        for key, lane in self._waiting.items():
            if len(taken) >= most or (lane and (lane in self._busy_lanes or lane in self._bound)) or not wanted(key):
                break
            taken[key] = lane
            self._busy_lanes.add(lane)
        for key, lane in taken.items():
            del self._waiting[key]
            self._running[key] = (slot, lane)
        if taken:
            self._behind[slot.index] = self._behind.get(slot.index, 0) + len(taken)
        return list(taken)

    def _slot_for(self, lane: str) -> Slot | None:
        wanted = self._bound.get(lane) if lane else None
        if wanted is None:
            return self._free[0]
        return next((slot for slot in self._free if slot.env == wanted), None)

    def release(self, key: K) -> None:
        """The task has ended, or is wanted no more; harmless for an unknown one."""
        self._waiting.pop(key, None)
        held = self._running.pop(key, None)
        if held is not None:
            slot, lane = held
            self._busy_lanes.discard(lane)
            if left := self._behind.pop(slot.index, 0):
                if left > 1:
                    self._behind[slot.index] = left - 1
                return
            # freed slots go behind: with GPUs the next task goes to the one that has rested longest
            self._free.append(slot)
