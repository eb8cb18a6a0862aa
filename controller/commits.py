"""A job process's commits, of which at most one is under way."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from ..broker.link import Link, Request
from ..serialization import spans
from ..serialization.faultpoints import fault_point
from ..serialization.messages import Commit
from .payloads import Payloads

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    commit: Commit
    asked: Request


class Commits:
    """Sends commits behind the payloads that they name.

    Args:
        link: to the broker.
        payloads: where the small ones that a commit names are under way too.
        timeout_s: how long the broker may be away.
    """

    def __init__(self, link: Link, payloads: Payloads, timeout_s: float) -> None:
        self._link = link
        self._payloads = payloads
        self._timeout_s = timeout_s
        self._under_way: _UnderWay | None = None

    @property
    def under_way(self) -> int:
        """The ref of the commit that has no answer yet; 0 where there is none."""
        return self._under_way.commit.ref if self._under_way else 0

    def begin(self, commit: Commit) -> None:
        """Send a commit, when the one before it is durable. Raises as `settle`."""
        self.settle()
        fault_point("job.before_commit")
        began = spans.start()
        self._under_way = _UnderWay(commit, self._link.ask(commit))
        spans.end("commit", began, round=commit.round)

    def settle(self) -> None:
        """Wait until the last commit is durable.

        Raises:
            FencedError: another controller has the job. FaultError: the broker refused it, or what it names.
            LinkError: there is no broker any more.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        began = spans.start()
        try:
            self._payloads.settle()
        finally:
            self._link.answer(under_way.asked, self._timeout_s)
        commit = under_way.commit
        spans.end("commit", began, round=commit.round)
        spans.flush()
        log.info("round_committed", job=commit.job, round=commit.round)
