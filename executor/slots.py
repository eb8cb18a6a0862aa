"""Which of the waiting tasks starts next, and in which slot. Pure.

A slot is room for one running task, with its device in an environment of its own. A lane is what must not overlap: the
tasks of one job at one site. A lane whose process was started in one slot's environment (its script sees that GPU and
no other) goes on in slots with the same environment only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one running task."""

    index: int
    env: tuple[tuple[str, str], ...] = ()


class Slots(Generic[K]):
    """A first-come queue in front of a fixed number of slots.

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
        self._busy_lanes: set[str] = set()
        self._bound: dict[str, tuple[tuple[str, str], ...]] = {}

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

    def take(self) -> Iterator[tuple[K, Slot]]:
        """Start what can start now, oldest first; a task that must wait does not hold up those behind it."""
        for key, lane in list(self._waiting.items()):
            if not self._free:
                return
            if lane and lane in self._busy_lanes:
                continue
            slot = self._slot_for(lane)
            if slot is None:
                continue
            self._free.remove(slot)
            del self._waiting[key]
            self._running[key] = (slot, lane)
            if lane:
                self._busy_lanes.add(lane)
            yield key, slot

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
            # freed slots go behind: with GPUs the next task goes to the one that has rested longest
            self._free.append(slot)
