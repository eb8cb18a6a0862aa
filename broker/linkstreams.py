"""The payload streams of one link: uploads under grants, downloads into a sink. The link moves their frames."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence

from ..serialization.checksum import crc32
from ..serialization.digest import Digester
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FencedError, PayloadError
from ..serialization.faultpoints import fault_point
from ..serialization.messages import (
    Abort,
    Chunk,
    Fault,
    Finish,
    Get,
    Grant,
    Message,
    PayloadRef,
    Put,
    Stored,
    Welcome,
    encode,
)
from ..serialization.stream import ChunkPlan, Outcome, Receiver, Sender
from .linksource import Source

#: ``sink(offset, data)``: where a download's chunks go, in order.
Sink = Callable[[int, memoryview], None]

#: Chunks that one stream may send in a turn before the others and the control link get theirs.
_BURST = 4
#: A Put, Get or Finish that nobody answered is repeated after this.
_ASK_S = 5.0
_NEVER = float("-inf")
#: A sender that has sent all, and sends nothing again for so long, has another payload than the one asked for.
_SHORT_S = 15.0


class Upload:
    """A payload on its way to the broker.

    Args:
        put: says what it is; with ``local`` the broker takes the finished file of that name.
        source: what chunks are cut from; None for a finished file.
        digest: what Finish says; "" where nobody looks at it.
    """

    def __init__(self, put: Put, source: Source | None, digest: str = "") -> None:
        self.put = put
        self.stream = put.stream
        self.source = source
        self.done = threading.Event()
        self.error: Exception | None = None
        self.stored: PayloadRef | None = None
        #: chunks sent by this process, and the chunk at which it went on with what an earlier one had sent
        self.chunks_sent = 0
        self.resumed_at = 0
        self._sender: Sender | None = None
        self._chunk_bytes = 0
        self._asked_at = _NEVER
        self._answered = False
        self._finished_at = _NEVER
        self._digest = digest or put.payload.digest

    def reconnect(self) -> None:
        """The data link is new: ask again, and take its grants, whose epochs may be lower: a power cut forgets some."""
        self._asked_at = _NEVER
        self._answered = False
        self._finished_at = _NEVER
        self._sender = None

    def outgoing(self, now: float, welcome: Welcome) -> Iterator[Sequence[Buffer]]:
        """The frames to send now."""
        if not self._answered and now >= self._asked_at + _ASK_S:
            self._asked_at = now
            yield encode(self.put)
        sender = self._sender
        if self.source is None or not self._answered or sender is None or self._chunk_bytes != welcome.chunk_bytes:
            return
        for _ in range(_BURST):
            index = sender.next_chunk(now)
            if index is None:
                break
            fault_point("link.before_chunk")
            data = self.source.read(*sender.plan.span(index))
            if data is None:
                return  # whoever put it has given up; the link is told in a moment
            self.chunks_sent += 1
            self._finished_at = _NEVER
            yield encode(Chunk(self.stream, index, len(data), crc32(data)), data)
        if sender.sent_all and now >= self._finished_at + _ASK_S:
            # said again as long as there is no answer: a broker that has lost the stream says so, and gets a Put
            self._finished_at = now
            yield encode(Finish(self.stream, self._digest))

    def wait_s(self, now: float) -> float:
        """How long until this stream wants a turn without a message coming."""
        if not self._answered:
            return max(0.0, self._asked_at + _ASK_S - now)
        sender = self._sender
        if sender is None or self.source is None:
            return 1.0
        if sender.cursor < sender.limit:
            return 0.0
        due = [self._finished_at + _ASK_S] if sender.sent_all else []
        if sender.deadline is not None:
            due.append(sender.deadline)
        return max(0.0, min(due) - now) if due else 1.0

    def on_message(self, message: Message, tail: Buffer, now: float, welcome_chunk: int) -> None:
        """A Grant, Stored, Abort or Fault about this stream."""
        match message:
            case Grant():
                if self._sender is None or self._chunk_bytes != welcome_chunk:
                    self._chunk_bytes = welcome_chunk
                    self._sender = Sender(ChunkPlan(self.put.payload.size, welcome_chunk))
                    if not self.chunks_sent:
                        self.resumed_at = message.next
                self._answered = True
                self._sender.on_grant(message.epoch, message.next, message.limit, now)
            case Stored():
                self.stored = message.payload
                self.done.set()
            case Abort() if message.retry_after_s > 0:
                self._answered = False
                self._asked_at = now + message.retry_after_s - _ASK_S
            case Abort() | Fault():
                self.error = _refused(message, f"the broker refused payload {self.put.payload.id}")
                self.done.set()
            case _:
                pass


class Download:
    """A payload on its way here."""

    def __init__(self, stream: str, ref: PayloadRef, sink: Sink) -> None:
        self.stream = stream
        self.ref = ref
        self.sink = sink
        self.done = threading.Event()
        self.error: Exception | None = None
        self.stored: PayloadRef | None = None
        self._receiver: Receiver | None = None
        self._asked_at = _NEVER
        self._answered = False
        self._grant_due = False
        self._all_sent_at: float | None = None
        self._digester = Digester() if ref.digest else None

    def reconnect(self) -> None:
        """The data link is new: ask again, from the watermark."""
        self._asked_at = _NEVER
        self._all_sent_at = None
        self._answered = False

    def outgoing(self, now: float, welcome: Welcome) -> Iterator[Sequence[Buffer]]:
        """The frames to send now."""
        if self._receiver is None:
            plan = ChunkPlan(self.ref.size, welcome.chunk_bytes)
            self._receiver = Receiver(plan, welcome.window, random.randrange(1, 2**31), now=now)
            if self._receiver.complete:
                self._end()
                return
        if self._receiver.plan.chunk_bytes != welcome.chunk_bytes:
            self._fail(PayloadError(f"payload {self.ref.id}: the broker came back with another chunk size: ask again"))
            return
        if self._all_sent_at is not None and now >= self._all_sent_at + _SHORT_S:
            self._fail(PayloadError(f"payload {self.ref.id} is not of the {self.ref.size} bytes asked for"))
            return
        if not self._answered and now >= self._asked_at + _ASK_S:
            self._asked_at = now
            _, start, limit = self._receiver.grant()
            yield encode(Get(self.stream, self.ref.id, start, limit))
        elif self._answered and self._all_sent_at is not None and self._receiver.due(now):
            # a link keeps order: what did not come before Finish was lost, and is asked for again
            _, start, limit = self._receiver.grant()
            yield encode(Get(self.stream, self.ref.id, start, limit))
        elif self._grant_due or (self._answered and self._receiver.due(now)):
            self._grant_due = False
            yield encode(Grant(self.stream, *self._receiver.grant()))

    def wait_s(self, now: float) -> float:
        """How long until this stream wants a turn without a message coming."""
        if self._receiver is None or self._grant_due:
            return 0.0
        deadline = self._receiver.deadline if self._answered else self._asked_at + _ASK_S
        return 1.0 if deadline is None else max(0.0, deadline - now)

    def on_message(self, message: Message, tail: Buffer, now: float, welcome_chunk: int) -> None:
        """A Chunk, Finish, Abort or Fault about this stream."""
        match message:
            case Chunk() if self._receiver is not None and not self.done.is_set():
                self._answered = True
                arrival = self._receiver.on_chunk(message.index, tail, message.crc32, now)
                self._grant_due = self._grant_due or arrival.grant
                if arrival.accepted:
                    self._all_sent_at = None
                    self._take(arrival.start, memoryview(tail))
                elif arrival.outcome is Outcome.CORRUPT and crc32(tail) == message.crc32:
                    self._fail(PayloadError(f"payload {self.ref.id} is not of the {self.ref.size} bytes asked for"))
            case Finish():
                self._all_sent_at = now
            case Abort() if message.retry_after_s > 0:
                self._answered = False
                self._asked_at = now + message.retry_after_s - _ASK_S
            case Abort() | Fault():
                self._fail(_refused(message, f"the broker does not send payload {self.ref.id}"))
            case _:
                pass

    def _take(self, start: int, data: memoryview) -> None:
        try:
            self.sink(start, data)
        except Exception as error:  # noqa: BLE001 - foreign code: its error is raised to whoever asked for the stream
            self._fail(error)
            return
        if self._digester is not None:
            self._digester.update(data)
        if self._receiver is not None and self._receiver.complete:
            self._end()

    def _end(self) -> None:
        if self._digester is not None and self._digester.hexdigest() != self.ref.digest:
            self._fail(PayloadError(f"payload {self.ref.id} arrived damaged: its digest is not {self.ref.digest}"))
        self.done.set()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


def _refused(message: Abort | Fault, otherwise: str) -> FaultError:
    text = message.reason if isinstance(message, Abort) else message.text
    return (FencedError if message.code == "fenced" else FaultError)(message.code, text or otherwise)


Stream = Upload | Download


class Streams:
    """All streams of a link; `add` and `remove` from any thread, the rest in the link's."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self._held: list[Sequence[Buffer]] = []
        self._ended: list[str] = []
        self._first = 0
        self._lock = threading.Lock()
        self._chunk_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._streams)

    def add(self, stream: Stream) -> None:
        """A stream to be moved until it is done."""
        with self._lock:
            self._streams[stream.stream] = stream

    def remove(self, stream: Stream) -> None:
        """Forget it; what the other side still sends of it is ignored."""
        with self._lock:
            self._streams.pop(stream.stream, None)
            if stream.error is not None or not stream.done.is_set():
                self._ended.append(stream.stream)

    @property
    def blocked(self) -> bool:
        """Whether frames wait for room in the socket."""
        return bool(self._held)

    def connected(self) -> None:
        """The data link is up (again)."""
        self._held.clear()
        for stream in self._snapshot():
            stream.reconnect()

    def outgoing(self, now: float, welcome: Welcome) -> Iterator[Sequence[Buffer]]:
        """Frames to send now, fairly over the streams. What could not be sent comes back through `unsend`."""
        self._chunk_bytes = welcome.chunk_bytes
        while self._held:
            yield self._held.pop(0)
        while self._ended:
            yield encode(Abort(self._ended.pop(), "cancelled", "the peer gave it up"))
        streams = self._snapshot()
        self._first += 1  # another one is first each turn: a socket that is soon full must not starve the last
        start = self._first % max(1, len(streams))
        for stream in streams[start:] + streams[:start]:
            if not stream.done.is_set():
                for frames in stream.outgoing(now, welcome):
                    yield frames
                    if self._held:
                        return

    def unsend(self, frames: Sequence[Buffer]) -> None:
        """The socket was full: these frames go first next time."""
        self._held.insert(0, frames)

    def wait_s(self, now: float) -> float:
        """How long the link may wait for messages before a stream wants a turn."""
        if self._held:
            return 1.0  # until the socket has room
        if self._ended:
            return 0.0
        return min((s.wait_s(now) for s in self._snapshot() if not s.done.is_set()), default=1.0)

    def on_message(self, message: Message, tail: Buffer, now: float) -> None:
        """A message of the data link."""
        stream = self._streams.get(getattr(message, "stream", ""))
        if stream is not None:
            stream.on_message(message, tail, now, self._chunk_bytes)

    def _snapshot(self) -> list[Stream]:
        with self._lock:
            return list(self._streams.values())
