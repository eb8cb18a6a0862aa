"""Who keeps sending what cannot be read is cut off for a while. Pure; times are arguments."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["StrikeLimits", "Strikes"]

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class StrikeLimits:
    """So many messages that cannot be read within ``window_s`` put a sender into the box for ``box_s``."""

    strikes: int = 8
    window_s: float = 60.0
    box_s: float = 60.0
    tracked: int = 4096  # senders with strikes, and as many in the box; the oldest are forgotten


class Strikes(Generic[K]):
    """Counts strikes by sender: a connection or a node name; there are no keys yet that a stranger could not change."""

    def __init__(self, limits: StrikeLimits | None = None) -> None:
        self.limits = limits or StrikeLimits()
        self._struck: OrderedDict[K, deque[float]] = OrderedDict()
        self._boxed: OrderedDict[K, float] = OrderedDict()

    def strike(self, who: K, now: float) -> bool:
        """One more; True when it was one too many, and the sender is in the box from now on."""
        limits = self.limits
        times = self._struck.setdefault(who, deque(maxlen=limits.strikes))
        self._struck.move_to_end(who)
        times.append(now)
        if len(times) == limits.strikes and now - times[0] <= limits.window_s:
            self.box(who, now)
            return True
        _trim(self._struck, limits.tracked)
        return False

    def box(self, who: K, now: float) -> None:
        """Into the box, whatever it has done."""
        self._struck.pop(who, None)
        self._boxed[who] = now + self.limits.box_s
        self._boxed.move_to_end(who)
        _trim(self._boxed, self.limits.tracked)

    def boxed(self, who: K, now: float) -> float:
        """For how many seconds more nothing is taken from this sender; 0 where it may speak."""
        until = self._boxed.get(who)
        if until is None:
            return 0.0
        if now >= until:
            del self._boxed[who]
            return 0.0
        return until - now

    def __len__(self) -> int:
        return len(self._boxed)


def _trim(entries: OrderedDict[K, deque[float]] | OrderedDict[K, float], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
