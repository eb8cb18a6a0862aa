"""How many tasks a worker is given at once: where they take microseconds, handing over one at a time is most of the
work. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

#: What a worker may have before it, by what such tasks have taken: long enough that it does not wait for the next
#: hand-over, short enough that workers end a round together.
AHEAD_S: Final = 0.03
MOST: Final = 128
_OLD: Final = 0.8
_MAX_KINDS: Final = 256


class Pace:
    """What tasks of a kind have taken lately."""

    def __init__(self) -> None:
        self._mean_s: dict[Hashable, float] = {}

    def note(self, kind: Hashable, seconds: float) -> None:
        """A task of this kind took so long. One that took longer than the others counts in full."""
        known = self._mean_s.pop(kind, seconds)
        self._mean_s[kind] = max(seconds, _OLD * known + (1 - _OLD) * seconds)
        if len(self._mean_s) > _MAX_KINDS:
            del self._mean_s[next(iter(self._mean_s))]

    def ahead(self, kind: Hashable, waiting: int, workers: int) -> int:
        """How many more of ``waiting`` tasks go along with the next one; none before anything is known of the kind.

        At most half of each worker's part of those that wait: what is left evens out what took longer.
        """
        mean_s = self._mean_s.get(kind)
        if mean_s is None:
            return 0
        return min(MOST, int(AHEAD_S / max(mean_s, 1e-6)), waiting // (2 * workers))
