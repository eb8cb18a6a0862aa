"""What a link's thread and the threads that use the link share: requests, the outbox, the way to wake the thread."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog

from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FencedError, LinkError, NondeterministicError
from ..serialization.messages import Fault, Hello, Message, Pong, TaskRef, Welcome, encode_checked
from .linkstreams import Streams

log = structlog.get_logger(__name__)

OnMessage = Callable[[Message, Buffer], None]
State = Literal["connecting", "up", "down", "closed"]

_FAULTS: dict[str, type[FaultError]] = {"fenced": FencedError, "nondeterministic": NondeterministicError}
_RETRYABLE_FAULTS = frozenset({"session"})  # the broker restarted and does not know us: say Hello again
_NOT_THE_LINKS = frozenset({"nondeterministic"})  # the job's end, which its process has yet to tell
_OUTBOX = 65536
#: So many messages that cannot be read within so long are another protocol, not an accident.
_MAX_UNREADABLE = 8
_UNREADABLE_S = 60.0
_ANSWERED = 1024


def fault_error(code: str, text: str) -> FaultError:
    """A broker's Fault as the exception that stands for it."""
    return _FAULTS.get(code, FaultError)(code, text)


class LocalSpool:
    """The broker's spool, as a co-located peer of the same user sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def prove(welcome: Welcome) -> LocalSpool | None:
        """The spool that Welcome offers, if this process can read the token in it."""
        if not welcome.spool_dir or os.environ.get("FEDLOOM_NO_LOCAL") == "1":
            return None
        root = Path(welcome.spool_dir)
        try:
            token = (root / ".token").read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return LocalSpool(root) if secrets.compare_digest(token.strip(), welcome.spool_token) else None

    def payload_path(self, payload: str) -> Path:
        """Where the whole payload of this id lies, if it is there."""
        return self.root / "payloads" / payload[:2] / payload

    def incoming_path(self, name: str) -> Path:
        """Where to write a file that a Put with ``local=name`` then hands over."""
        return self.root / "incoming" / name


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An encoded message; the link's thread puts its sequence number in."""

    kind: int
    frames: list[Buffer]

    @staticmethod
    def of(message: Message, tail: Buffer = b"") -> Outgoing:
        """Encoded and checked in the sender's thread, so that it learns of what the broker would refuse to read.

        Raises:
            CodecError: too large, or a field out of its bounds. EnvelopeError: too large a tail.
        """
        return Outgoing(message.KIND, encode_checked(message, tail))


@dataclass(slots=True)
class Request:
    """A message that is repeated, after each reconnect and when it waits too long, until its answer comes."""

    outgoing: Outgoing
    ref: int = 0
    what: str = ""
    said_at: float = field(default_factory=time.monotonic)
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[Message, Buffer] | None = None
    error: FaultError | None = None
    unreadable: int = 0  # answers that could not be read

    def fail(self, error: FaultError) -> None:
        """There will be no answer."""
        self.error = error
        self.done.set()


class LinkState:
    """What the link's thread and the threads that use the link share."""

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        sites: Sequence[str],
        held: Callable[[], list[TaskRef]],
        free: Callable[[], int],
        on_message: OnMessage,
    ) -> None:
        self.endpoint = endpoint
        self.hello = hello
        self.sites = tuple(sites)
        self.held = held
        self.free = free
        self.on_message = on_message
        self.local: LocalSpool | None = None
        self.welcome: Welcome | None = None
        self.state: State = "connecting"
        self.fatal: FaultError | None = None
        self.bytes_sent = 0
        self.sequence = 0
        #: when messages could not be read, by either side, and were no answers
        self._unreadable: deque[float] = deque(maxlen=_MAX_UNREADABLE)
        self.outbox: deque[Outgoing] = deque(maxlen=_OUTBOX)
        self.requests: dict[int, Request] = {}
        self.streams = Streams()
        self.lock = threading.Lock()
        self.connected = threading.Event()
        self.closing = threading.Event()
        self.wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        #: refs of requests that nobody waits for any more: a repeat's second answer is nobody's
        self._answered: deque[int] = deque(maxlen=_ANSWERED)

    def wake(self) -> None:
        """Have the link's thread look at what is new; any thread, also after the end."""
        with self.lock:
            if self._wake_w >= 0:
                with contextlib.suppress(BlockingIOError):  # full: it wakes up anyway
                    os.write(self._wake_w, b"x")

    def free_pipe(self) -> None:
        """The thread has ended. Nobody may write to these numbers any more: they are soon another file's."""
        with self.lock:
            if self._wake_w >= 0:
                os.close(self.wake_r)
                os.close(self._wake_w)
                self._wake_w = -1

    def waiting(self) -> list[Request]:
        """The requests that have no answer yet."""
        with self.lock:
            return [request for request in self.requests.values() if not request.done.is_set()]

    def ask(self, ref: int, request: Request) -> None:
        """Answers with this ref are the request's from now on."""
        with self.lock:
            self.requests[ref] = request

    def forget(self, ref: int) -> None:
        """Nobody waits for this request any more."""
        with self.lock:
            self.requests.pop(ref, None)
            self._answered.append(ref)

    def give_up(self, fault: FaultError) -> None:
        """The link is over: whoever waits gets this error."""
        self.fatal = fault
        for request in self.waiting():
            request.fail(fault)
        self.on_message(Fault(code=fault.code, text=str(fault), fatal=True), b"")

    def note_unreadable(self, fault: FaultError) -> None:
        """A message could not be read, here or by the broker; too many of them are the link's end."""
        self._unreadable.append(time.monotonic())
        if len(self._unreadable) == _MAX_UNREADABLE and self._unreadable[-1] - self._unreadable[0] < _UNREADABLE_S:
            self.give_up(fault)

    def deliver(self, message: Message, tail: Buffer) -> None:
        """A control message from the broker: to the request it answers, or to the owner of the link."""
        ref = getattr(message, "ref", 0)
        with self.lock:
            request = self.requests.get(ref) if ref else None
            late = bool(ref) and ref in self._answered
        match message:
            case Pong():
                pass
            case Fault() if message.code in _RETRYABLE_FAULTS:
                raise LinkError(f"{message.code}: {message.text}")
            case Fault(code="malformed") if request is None and not message.fatal:
                # what was altered on the way is said again with the next connection
                self.note_unreadable(fault_error(message.code, message.text))
                raise LinkError(f"the broker could not read a message: {message.text}")
            case Fault() if message.fatal and message.code not in _NOT_THE_LINKS:
                fault = fault_error(message.code, message.text)
                if request is not None:
                    request.fail(fault)
                self.give_up(fault)
            case Fault() if request is not None:
                request.fail(fault_error(message.code, message.text))
            case _ if request is not None:
                if not request.done.is_set():
                    request.answer = (message, bytes(tail))
                    request.done.set()
            case _ if late:
                log.debug("late_answer", kind=type(message).__name__, ref=ref)
            case _:
                self.on_message(message, tail)
