"""An executor's points of a job on their way to the broker: those of all its sites in one event, numbered.

The number of an event's first point and the stream that it belongs to let a reader see what is missing: points that
waited while the broker could not be reached and became too many, or those of a job that logs more than it may keep.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from ..serialization.codec import pack
from .channel import Map
from .points import BATCH_BYTES

#: The least time between two events of a job; it grows with their number, so that an hour of one executor is some 400
#: events and a day 2,000: a job keeps 50,000.
PAUSE_S = 0.5
_GROWTH_S = 0.05
#: So many events go with their results at once; those of a job that has more wait for their pause.
_PROMPT_EVENTS = 2000
#: Points that wait for the broker: the oldest go first.
MAX_WAITING_BYTES = 8 * 1024 * 1024
#: So many are said again after a reconnect, where the link may have lost them.
_REPEATED = 8
#: What a point's number, or a site's entry, takes beside what it holds.
_PLACE_BYTES = 8


class PointFlow:
    """One job's. Pure."""

    def __init__(self) -> None:
        self._stream = secrets.token_hex(4)
        self._waiting: deque[tuple[str, Map, int]] = deque()
        self._bytes = 0
        self._first = 0  # the number of the first that waits
        self._events = 0
        self._told_at = float("-inf")
        self._hurried = False
        self._last: deque[tuple[str, Map]] = deque(maxlen=_REPEATED)

    def add(self, site: str, points: list[Map]) -> None:
        """Points of a site."""
        for point in points:
            size = len(pack(point)) + _PLACE_BYTES
            self._waiting.append((site, point, size))
            self._bytes += size
        while self._bytes > MAX_WAITING_BYTES:
            self._bytes -= self._waiting.popleft()[2]
            self._first += 1

    def hurry(self) -> None:
        """A result comes: what was logged for it goes before it."""
        self._hurried = True

    def due_s(self, now: float) -> float:
        """How long until `take` has something; infinite where nothing waits."""
        if not self._waiting:
            return float("inf")
        if self._bytes >= BATCH_BYTES or (self._hurried and self._events < _PROMPT_EVENTS):
            return 0.0
        return max(0.0, self._told_at + max(PAUSE_S, _GROWTH_S * self._events) - now)

    def take(self, now: float, everything: bool = False) -> list[tuple[str, Map]]:
        """The events that are due, each with its site ("" where it holds several) and its data."""
        out: list[tuple[str, Map]] = []
        if everything or self.due_s(now) <= 0:
            while self._waiting:
                out.append(self._event())
            self._told_at = now
            self._events += len(out)
            self._last.extend(out)
        self._hurried = False
        return out

    def again(self) -> list[tuple[str, Map]]:
        """The last events, for a link that may have lost them; a reader takes each number once."""
        return list(self._last)

    def _event(self) -> tuple[str, Map]:
        sites: dict[str, Any] = {}
        first, size = self._first, 0
        while self._waiting and (not size or size + self._waiting[0][2] <= BATCH_BYTES):
            site, point, weight = self._waiting.popleft()
            sites.setdefault(site, []).append([self._first, point])
            size += weight + (len(site) + _PLACE_BYTES if len(sites[site]) == 1 else 0)
            self._bytes -= weight
            self._first += 1
        only = next(iter(sites)) if len(sites) == 1 else ""
        return only, {"stream": self._stream, "first": first, "count": self._first - first, "sites": sites}


class PointFlows:
    """Those of all jobs. Belongs to the agent's thread.

    Args:
        tell: sends an event of (job, site, data).
    """

    def __init__(self, tell: Callable[[str, str, Map], None]) -> None:
        self._tell = tell
        self._flows: dict[str, PointFlow] = {}
        self.up = True

    @property
    def jobs(self) -> list[str]:
        """The jobs that something was logged of."""
        return list(self._flows)

    def add(self, job: str, site: str, points: list[Map]) -> None:
        """Points of a job's site."""
        self._flows.setdefault(job, PointFlow()).add(site, points)

    def hurry(self, job: str) -> None:
        """A result of this job comes."""
        if (flow := self._flows.get(job)) is not None:
            flow.hurry()

    def next_due_s(self, now: float) -> float:
        """How long until `turn` has something to do."""
        if not self.up:
            return float("inf")  # `again` comes with the broker
        return min((flow.due_s(now) for flow in self._flows.values()), default=float("inf"))

    def turn(self, now: float, up: bool, ended: Collection[str] = ()) -> None:
        """Tell what is due, as long as the broker can be reached."""
        self.up = up
        if not up:
            return
        for job, flow in list(self._flows.items()):
            for site, data in flow.take(now, everything=job in ended):
                self._tell(job, site, data)
            if job in ended:
                del self._flows[job]

    def again(self) -> None:
        """The link is new: what was told last on the old one may be lost."""
        self.up = True
        for job, flow in self._flows.items():
            for site, data in flow.again():
                self._tell(job, site, data)
