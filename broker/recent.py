"""The results that were journaled last, in memory: the job's process is told of them in the turn that writes them.

Without them each result would be read out of the journal again, and parsed again, as soon as it is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ..serialization.messages import DoneItem, GatherId, PayloadRef
from .gathers import FreshResult
from .rows import ResultRow

__all__ = ["RecentResults", "StoredResult"]

_MAX_BYTES = 4 * 1024 * 1024
#: A small one takes ten times its packed size as an object.
_MAX_ROWS = 2048


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result as the Done stream needs it; of a partial, the first result has the inline bytes if there are any."""

    item: DoneItem
    inline: bytes | None
    partial: PayloadRef | None
    packed: bytes  # the item, as its row has it

    @property
    def size(self) -> int:
        """What counts of it."""
        return len(self.packed) + len(self.inline or b"")


class RecentResults:
    """Rows that the journal has: the last 2,048, as far as they are no more than 4 MiB."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[GatherId, int], StoredResult] = OrderedDict()
        self._bytes = 0

    def clear(self) -> None:
        """Results were forgotten, or have other numbers now."""
        self._rows.clear()
        self._bytes = 0

    def add(self, written: Iterable[tuple[FreshResult, ResultRow]]) -> None:
        """These were committed."""
        for fresh, (gather, index, packed, inline, _) in written:
            row = StoredResult(fresh.item, inline, fresh.partial, packed)
            self._rows[gather, index] = row
            self._bytes += row.size
        while self._bytes > _MAX_BYTES or len(self._rows) > _MAX_ROWS:
            self._bytes -= self._rows.popitem(last=False)[1].size

    def of(self, gather: GatherId, start: int, count: int) -> list[StoredResult]:
        """A gather's results from ``start`` on, as far as they are here without a gap."""
        out: list[StoredResult] = []
        while len(out) < count and (row := self._rows.get((gather, start + len(out)))) is not None:
            out.append(row)
        return out
