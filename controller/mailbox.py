"""What the broker says to a job process, handed to the gathers that it is about."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ..broker.link import Link, fault_error
from ..serialization import spans
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, LinkError
from ..serialization.messages import Cancel, Done, Fault, GatherId, JobId, Message, Receipt, Welcome
from .gather import Gather
from .inbox import Inbox

log = structlog.get_logger(__name__)

#: After how long a wait is looked at first, and at last.
QUIET_S = (0.1, 1.0)


class JobAborted(FaultError):
    """Somebody aborted the job; the process only has to leave."""

    def __init__(self, reason: str) -> None:
        super().__init__("aborted", reason or "the job was aborted")


class Mailbox:
    """The messages of one job, taken in the workflow's thread."""

    def __init__(self, link: Link, inbox: Inbox, job: JobId) -> None:
        #: called where a wait for the broker's next word becomes long, less and less often
        self.on_quiet: Callable[[], None] | None = None
        self._link = link
        self._inbox = inbox
        self._job = job
        self._gathers: list[Gather] = []

    def expect(self, gather: Gather) -> None:
        """Messages about this gather are handed to it, and it is opened again after a reconnect, until it is over."""
        self._gathers = [known for known in self._gathers if not known.complete]
        self._gathers.append(gather)

    def pump(self, gather: Gather) -> None:
        """Wait for the broker's next word, on account of this gather, and hand it on.

        Raises:
            JobAborted: the job is over.
            FaultError: the broker refused what was asked.
            LinkError: there is no broker any more, and the link has given up; or a payload is lost.
        """
        pause_s = QUIET_S[0]
        while True:
            if self._inbox.missed():
                self._ask_again()
            began = spans.start()
            taken = self.take(pause_s if self.on_quiet else QUIET_S[1])
            spans.end("wait", began, round=gather.opening.round)
            if taken:
                return
            pause_s = min(QUIET_S[1], 2 * pause_s)
            if self.on_quiet is not None and self._link.state == "up":
                self.on_quiet()
            if self._link.state == "closed":
                reason = self._link.fatal or "the link to the broker was closed"
                raise LinkError(f"{reason}, in round {gather.opening.round}, {gather.opening.name}")

    def take(self, timeout_s: float) -> bool:
        """Hand the next message on; False where none came in time. Raises as `pump`."""
        got = self._inbox.get(timeout_s)
        if got is not None:
            self._dispatch(*got)
        return got is not None

    def _ask_again(self) -> None:
        for gather in self._gathers:
            if not gather.complete:
                self._link.send(*gather.message())

    def _dispatch(self, message: Message, tail: Buffer) -> None:
        match message:
            case Receipt():
                if (gather := self._find(message.gather, message.ref)) is not None:
                    gather.on_receipt(message)
            case Done():
                if (gather := self._find(message.gather, 0)) is not None:
                    gather.on_done(message, tail)
            case Welcome():
                for gather in self._gathers:  # the first Welcome is here before any gather has its id
                    gather.seen.cuts += bool(gather.id) and not gather.complete
                self._ask_again()
            case Cancel():
                raise JobAborted(message.reason)
            case Fault(code="lost_payload" | "gone"):
                # nothing that the workflow did: another process goes on from the last commit
                raise LinkError(message.text)
            case Fault():
                raise fault_error(message.code, message.text)
            case _:
                log.warning("unexpected_message", kind=type(message).__name__)

    def _find(self, gather: GatherId, ref: int) -> Gather | None:
        for known in self._gathers:
            if known.id == gather or (ref and known.opening.ref == ref):
                return known
        return None
