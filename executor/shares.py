"""Results that worker processes have folded and not handed over yet: whose they are, when they are asked for. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .prefold import Gather, Result
from .runs import Key


@dataclass(slots=True)
class Share:
    """What one worker has folded of one gather."""

    host: str
    gather: Gather
    opened_at: float
    results: dict[Key, Result] = field(default_factory=dict[Key, Result])
    asked: bool = False
    spoiled: bool = False  # it holds something that must not be sent


class Shares:
    """All workers' shares; with the rules of `Batches`."""

    def __init__(self, max_tasks: int, max_s: float) -> None:
        self._max_tasks = max_tasks
        self._max_s = max_s
        self._open: dict[tuple[str, Gather], Share] = {}

    def __len__(self) -> int:
        return sum(len(share.results) for share in self._open.values())

    def gathers(self) -> set[Gather]:
        """Those with a share that was not asked for."""
        return {share.gather for share in self._open.values() if not share.asked}

    def add(self, host: str, gather: Gather, result: Result, now: float) -> None:
        """A worker has folded this result."""
        self._share(host, gather, now).results[result.item.task, result.item.attempt] = result

    def spoil(self, host: str, gather: Gather, now: float) -> None:
        """A worker has folded a result that is nobody's any more."""
        self._share(host, gather, now).spoiled = True

    def _share(self, host: str, gather: Gather, now: float) -> Share:
        share = self._open.get((host, gather))
        if share is None:
            share = self._open[host, gather] = Share(host, gather, now)
        return share

    def due(self, now: float, working: Collection[Gather]) -> list[Share]:
        """Shares to ask for now; it is taken that they are.

        Args:
            working: the gathers of which tasks are queued or running here.
        """
        out = [
            share
            for share in self._open.values()
            if not share.asked
            and (
                len(share.results) >= self._max_tasks
                or now - share.opened_at >= self._max_s
                or share.gather not in working
            )
        ]
        for share in out:
            share.asked = True
        return out

    def next_due_s(self, now: float) -> float:
        """How long until a share is old enough."""
        opened = (share.opened_at for share in self._open.values() if not share.asked)
        return min((at + self._max_s - now for at in opened), default=3600.0)

    def take(self, host: str, gather: Gather, keys: Iterable[Key], now: float) -> tuple[list[Result], bool]:
        """A worker has handed over a partial of these attempts: their results, and whether all of it may be sent.

        What it has folded since begins another share.
        """
        share = self._open.pop((host, gather), None)
        if share is None:
            return [], False
        wanted = list(keys)
        found = [share.results.pop(key) for key in wanted if key in share.results]
        if share.results:
            share.opened_at, share.asked = now, False
            self._open[host, gather] = share
        whole = not share.spoiled and len(found) == len(wanted)
        share.spoiled = False
        return found, whole

    def drop(self, host: str, gather: Gather) -> list[Result]:
        """The worker has nothing of this gather: what it had told of."""
        return self._drop([(host, gather)] if (host, gather) in self._open else [])

    def lost(self, host: str) -> list[Result]:
        """The worker is gone, and what it had folded."""
        return self._drop([place for place in self._open if place[0] == host])

    def drop_job(self, job: str) -> list[Result]:
        """The job is over: its results are wanted no more."""
        return self._drop([place for place in self._open if place[1][0] == job])

    def _drop(self, places: list[tuple[str, Gather]]) -> list[Result]:
        return [result for place in places for result in self._open.pop(place).results.values()]
