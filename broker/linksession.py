"""One life of a link's two sockets: Hello, the poll loop, pings, streams, until the broker is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import zmq

from ..serialization.codec import pack
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FencedError, LinkError, NondeterministicError
from ..serialization.messages import Bye, Fault, Hello, Message, Ping, Pong, TaskRef, Welcome, decode, encode
from .linkstreams import Streams
from .sockets import connect, make_socket, resolve_data_endpoint

OnMessage = Callable[[Message, Buffer], None]
State = Literal["connecting", "up", "down", "closed"]

FAULTS: dict[str, type[FaultError]] = {"fenced": FencedError, "nondeterministic": NondeterministicError}
_RETRYABLE_FAULTS = frozenset({"session"})  # the broker restarted and does not know us: say Hello again
_BATCH = 256
_OUTBOX = 65536


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


@dataclass(slots=True)
class Request:
    """A message that is repeated after each reconnect until its answer comes."""

    message: Message
    tail: Buffer
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[Message, Buffer] | None = None
    error: FaultError | None = None


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
        self.outbox: deque[tuple[Message, Buffer]] = deque(maxlen=_OUTBOX)
        self.requests: dict[int, Request] = {}
        self.streams = Streams()
        self.lock = threading.Lock()
        self.connected = threading.Event()
        self.closing = threading.Event()
        self.wake_r, self.wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(self.wake_w, False)

    def wake(self) -> None:
        """Have the link's thread look at what is new; any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self.wake_w, b"x")

    def waiting(self) -> list[Request]:
        """The requests that have no answer yet."""
        with self.lock:
            return list(self.requests.values())

    def give_up(self, fault: FaultError) -> None:
        """The link is over: whoever waits gets this error."""
        self.fatal = fault
        for request in self.waiting():
            request.error = fault
            request.done.set()
        self.on_message(Fault(code=fault.code, text=str(fault), fatal=True), b"")

    def deliver(self, message: Message, tail: Buffer) -> None:
        """A control message from the broker: to the request it answers, or to the owner of the link."""
        ref = getattr(message, "ref", 0)
        with self.lock:
            request = self.requests.get(ref) if ref else None
        match message:
            case Pong():
                pass
            case Fault() if request is not None:
                request.error = FAULTS.get(message.code, FaultError)(message.code, message.text)
                request.done.set()
            case Fault() if message.code in _RETRYABLE_FAULTS:
                raise LinkError(f"{message.code}: {message.text}")
            case Fault() if message.fatal:
                self.give_up(FAULTS.get(message.code, FaultError)(message.code, message.text))
            case _ if request is not None:
                request.answer = (message, bytes(tail))
                request.done.set()
            case _:
                self.on_message(message, tail)


class Session:
    """One life of the two sockets, from Hello to the loss of the broker."""

    def __init__(self, link: LinkState, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.link = link
        self.context = context
        self.control = make_socket(context, "control-dealer")
        self.data: zmq.Socket[bytes] | None = None
        self.data_up = False
        self.welcomed = False
        self.poller = zmq.Poller()
        self.unsent: deque[list[Buffer]] = deque()
        self.heard_at = time.monotonic()
        self.pinged_at = self.heard_at
        self.data_hello_at = 0.0

    def run(self) -> None:
        link = self.link
        connect(self.control, link.endpoint)
        self.poller.register(self.control, zmq.POLLIN)
        self.poller.register(link.wake_r, zmq.POLLIN)
        held = [[t.task, t.attempt] for t in link.held()]
        self._queue(link.hello, pack({"sites": list(link.sites), "held": held}))
        while not link.closing.is_set() and link.fatal is None:
            self._turn()
        self._drain_outbox()
        self._flush()

    def close(self) -> None:
        linger = 200 if self.welcomed and self.link.closing.is_set() else 0
        self.control.close(linger=linger)
        if self.data is not None:
            self.data.close(linger=0)

    def _turn(self) -> None:
        link = self.link
        now = time.monotonic()
        ping_s = link.welcome.ping_s if link.welcome else 1.0
        timeout = min(self.pinged_at + ping_s - now, 0.5)
        streams = link.streams
        if self.unsent or (streams and not self.data_up):
            timeout = min(timeout, 0.005)  # IMMEDIATE: nothing says when a connection stands, so ask
        if self.data_up:
            timeout = min(timeout, streams.wait_s(now))
        events = dict(self.poller.poll(max(0, int(timeout * 1000))))
        if link.wake_r in events:
            with contextlib.suppress(BlockingIOError):
                os.read(link.wake_r, 4096)
        if self.control in events:
            self._receive_control()
        if self.data is not None and self.data in events:
            self._receive_data()
        self._drain_outbox()
        self._flush()
        self._drive_data()
        self._keep_alive()

    def _receive_control(self) -> None:
        for _ in range(_BATCH):
            try:
                frames = self.control.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.heard_at = time.monotonic()
            packet = decode(frames)
            if isinstance(packet.message, Welcome):
                self._welcome(packet.message)
            elif isinstance(packet.message, Bye):
                raise LinkError(f"the broker said goodbye: {packet.message.reason or 'it stops'}")
            else:
                self.link.deliver(packet.message, packet.tail)

    def _welcome(self, welcome: Welcome) -> None:
        link = self.link
        link.welcome = welcome
        link.local = LocalSpool.prove(welcome)
        link.state = "up"
        self.welcomed = True
        for request in link.waiting():
            self._queue(request.message, request.tail)
        link.on_message(welcome, b"")
        link.connected.set()

    def _queue(self, message: Message, tail: Buffer = b"") -> None:
        link = self.link
        link.sequence += 1
        self.unsent.append(encode(message, tail, link.sequence))

    def _drain_outbox(self) -> None:
        outbox = self.link.outbox
        while outbox and self.welcomed:
            message, tail = outbox.popleft()
            self._queue(message, tail)

    def _flush(self) -> None:
        while self.unsent:
            try:
                self.control.send_multipart(self.unsent[0], zmq.DONTWAIT)
            except zmq.Again:
                return
            self.unsent.popleft()

    def _keep_alive(self) -> None:
        now = time.monotonic()
        welcome = self.link.welcome
        dead_s = welcome.dead_s if self.welcomed and welcome else 5.0
        if now - self.heard_at > dead_s:
            raise LinkError(f"nothing heard from {self.link.endpoint} for {dead_s:g} s")
        if welcome and self.welcomed and now - self.pinged_at >= welcome.ping_s:
            self.pinged_at = now
            self._queue(Ping(self.link.free()))
            self._flush()

    # ------------------------------------------------------------ data link

    def _drive_data(self) -> None:
        """Open the data link at the first stream, then let the streams send what their grants allow."""
        streams = self.link.streams
        welcome = self.link.welcome
        if not self.welcomed or welcome is None or (self.data is None and not streams):
            return
        now = time.monotonic()
        if self.data is None:
            self.data = make_socket(self.context, "data-dealer", chunk_bytes=welcome.chunk_bytes)
            connect(self.data, resolve_data_endpoint(self.link.endpoint, welcome.data_endpoint))
            self.poller.register(self.data, zmq.POLLIN)
        if not self.data_up:
            if now - self.data_hello_at >= 0.5:  # IMMEDIATE: fails until the connection stands
                hello = replace(self.link.hello, session=welcome.session)
                if self._send_data(encode(hello)):
                    self.data_hello_at = now + 2.0
            return
        for frames in streams.outgoing(now, welcome):
            self.link.bytes_sent += sum(len(f) for f in frames)
            if not self._send_data(frames):
                streams.unsend(frames)
                break

    def _send_data(self, frames: Sequence[Buffer]) -> bool:
        assert self.data is not None
        try:
            # a chunk aliases its source, which lives until the broker has stored the whole payload
            self.data.send_multipart(frames, zmq.DONTWAIT, copy=len(frames) < 3)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise
        return True

    def _receive_data(self) -> None:
        assert self.data is not None
        streams = self.link.streams
        welcome = self.link.welcome
        assert welcome is not None
        for _ in range(_BATCH):
            try:
                raw = self.data.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            self.heard_at = time.monotonic()
            packet = decode([frame.buffer for frame in raw], welcome.chunk_bytes + 4096)
            match packet.message:
                case Welcome():
                    self.data_up = True
                    streams.connected()
                case Fault(code="session"):
                    raise LinkError("the data link's session is unknown: connecting anew")
                case message:
                    streams.on_message(message, packet.tail, time.monotonic())
