"""What may grow in the broker, how far it may, and how often it got there: counted here, shown by Ask ``broker``.

A bound has one name: its field in a settings dataclass, the name for ``fedloom broker --set``, and its key in the
answer. `docs/bounds.md` has them all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import structlog

__all__ = ["REMIND_S", "Bounds", "Figure", "figures_of", "to_plain"]

log = structlog.get_logger(__name__)

#: A bound that is reached again and again is logged once in so long.
REMIND_S = 60.0


@dataclass(frozen=True, slots=True)
class Figure:
    """What a bound allows, what is there now (the fullest one, where each peer or job has its own), and the count."""

    limit: int | float
    used: int | float
    reached: int = 0

    def with_count(self, reached: int) -> Figure:
        """The same, reached so often."""
        return replace(self, reached=reached)


class Bounds:
    """Counts how often each bound was reached, and says so in the log: at once, then at most once a minute."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: dict[str, tuple[float, int]] = {}  # when, and the count then

    def reached(self, name: str, times: int = 1) -> None:
        """The bound held: something was refused, had to wait, or made room."""
        self.counts[name] += times

    def tick(self, now: float) -> list[str]:
        """Log the bounds that were reached since they were last logged; returns their names."""
        due: list[str] = []
        for name, count in self.counts.items():
            at, said = self._said.get(name, (float("-inf"), 0))
            if count > said and now - at >= REMIND_S:
                self._said[name] = (now, count)
                due.append(name)
                log.warning("bound_reached", bound=name, times=count - said, since_start=count)
        return due


def to_plain(found: dict[str, Figure]) -> dict[str, Any]:
    """For an answer: ``{name: {limit, used, reached}}``."""
    return {name: {"limit": f.limit, "used": f.used, "reached": f.reached} for name, f in sorted(found.items())}


def figures_of(data: dict[str, Any]) -> dict[str, Figure]:
    """The inverse; what is no figure is left out."""
    out: dict[str, Figure] = {}
    for name, value in data.items():
        match value:
            case {"limit": int() | float() as limit, "used": int() | float() as used, "reached": int() as reached}:
                out[name] = Figure(limit, used, reached)
            case _:
                continue
    return out
