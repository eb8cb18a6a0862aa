"""What a job process asks its broker: how full the spool is, and which sites there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..broker.link import Link
from ..serialization.codec import unpack
from ..serialization.envelope import MAX_TAIL_BYTES
from ..serialization.messages import Ask, JobId


class Spool(NamedTuple):
    """The broker's spool: its quota (0: none), what results may still take of it, and how many uploads wait."""

    quota_bytes: int
    room_bytes: int
    waiting: int


class Questions:
    """Asks the broker; each question outlives its absence for ``timeout_s``."""

    def __init__(self, link: Link, job: JobId, timeout_s: float) -> None:
        self._link = link
        self._job = job
        self._timeout_s = timeout_s

    def spool(self) -> Spool:
        """How full the spool is."""
        told = self._ask("spool")
        quota = int(told["quota_bytes"])
        taken = int(told["used_bytes"]) + int(told["coming_bytes"]) + int(told["reserved_bytes"])
        return Spool(quota, max(0, quota - taken), int(told.get("waiting", 0)))

    def live_sites(self) -> list[str]:
        """The sites that an executor serves now, in the order of their names."""
        return [str(row["name"]) for row in self._pages("sites") if row["live"]]

    def job_sites(self) -> list[str]:
        """The sites that have had tasks of the job."""
        return [str(name) for name in self._ask("job").get("sites") or ()]

    def _pages(self, what: str) -> Iterator[dict[str, Any]]:
        after = 0
        while True:
            data = self._ask(what, after)
            rows: list[dict[str, Any]] = data[what]
            yield from rows
            if not rows:
                return
            after = int(data["next"])

    def _ask(self, what: str, after: int = 0) -> dict[str, Any]:
        question = Ask(self._link.next_ref(), what, self._job, after)
        answer, tail = self._link.request(question, timeout_s=self._timeout_s)
        return unpack(tail, max_bytes=MAX_TAIL_BYTES) if len(tail) else getattr(answer, "data", {})
