"""One life of a link's two sockets: Hello, the poll loop, pings, streams, until the broker is lost."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import structlog
import zmq

from ..serialization.codec import CodecError, pack, unpack
from ..serialization.envelope import Buffer, pack_envelope
from ..serialization.errors import EnvelopeError, FaultError, LinkError, WireError
from ..serialization.messages import Bye, Fault, Message, Packet, Ping, Welcome, decode, encode
from .linkstate import LinkState, LocalSpool, Outgoing, Request
from .sockets import connect, make_socket, resolve_data_endpoint

log = structlog.get_logger(__name__)

_BATCH = 256
_TURN_S = 0.5
#: A session whose Hello nobody answers is tried anew after this.
_HELLO_S = 5.0
#: The data link's Hello is said again after this.
_DATA_HELLO_S = 2.5
#: The data link is asked whether it stands after such a silence: a new data process says that it does not know us.
_DATA_PING_S = 1.0
#: A request without an answer for so long, while the broker speaks, is said again: no request may wait for ever.
_REPEAT_S = 10.0
#: Messages that wait for room in the socket; the others wait in the outbox, which has its own bound.
_MAX_UNSENT = 1024
#: An answer that came whole and cannot be read so often is what the broker says.
_MAX_UNREADABLE = 3
#: A sequence number that is so far ahead, modulo 2^32, is behind.
_BEHIND = 1 << 31


class Session:
    """One life of the two sockets, from Hello to the loss of the broker."""

    def __init__(
        self, link: LinkState, context: zmq.Context[zmq.Socket[bytes]], patience_s: float | None = None
    ) -> None:
        self.link = link
        self.hello_s = _HELLO_S if patience_s is None else max(0.1, min(_HELLO_S, patience_s))
        self.context = context
        self.control = make_socket(context, "control-dealer")
        self.data: zmq.Socket[bytes] | None = None
        self.data_up = False
        self.welcomed = False
        self.poller = zmq.Poller()
        self.unsent: deque[list[Buffer]] = deque()
        self.expected = 0  # the sequence number of the broker's next message, from Welcome on
        self.heard_at = time.monotonic()
        self.pinged_at = self.heard_at
        self.data_hello_at = 0.0  # when it is due (again)
        self.data_alive_at = 0.0  # heard, or asked

    def run(self) -> None:
        """Until the link closes, or has an error that only connecting anew can heal."""
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
        """Free the sockets; a Bye on its way gets a moment."""
        linger = 200 if self.welcomed and self.link.closing.is_set() else 0
        self.control.close(linger=linger)
        if self.data is not None:
            self.data.close(linger=0)

    def _turn(self) -> None:
        link = self.link
        events = dict(self.poller.poll(self._wait_ms(time.monotonic())))
        if link.wake_r in events:
            with contextlib.suppress(BlockingIOError):
                os.read(link.wake_r, 4096)
        if events.get(self.control, 0) & zmq.POLLIN:
            self._receive_control()
        if self.data is not None and events.get(self.data, 0) & zmq.POLLIN:
            self._receive_data()
        self._drain_outbox()
        self._flush()
        self._drive_data()
        self._keep_alive()

    def _wait_ms(self, now: float) -> int:
        """How long to wait for messages; and for room, where something waits to be sent."""
        link = self.link
        timeout = _TURN_S
        if self.welcomed and link.welcome is not None:
            timeout = min(timeout, self.pinged_at + link.welcome.ping_s - now)
        # with IMMEDIATE a DEALER has room as soon as its connection stands
        self.poller.modify(self.control, zmq.POLLIN | (zmq.POLLOUT if self.unsent else 0))
        if self.data is not None:
            hello_s = self.data_hello_at - now
            full = link.streams.blocked if self.data_up else hello_s <= 0
            self.poller.modify(self.data, zmq.POLLIN | (zmq.POLLOUT if full else 0))
            if self.data_up:
                timeout = min(timeout, link.streams.wait_s(now))
                if link.streams:
                    timeout = min(timeout, self.data_alive_at + _DATA_PING_S - now)
            elif hello_s > 0:
                timeout = min(timeout, hello_s)
        return max(0, math.ceil(timeout * 1000))

    def _receive_control(self) -> None:
        for _ in range(_BATCH):
            try:
                frames = self.control.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.heard_at = time.monotonic()
            try:
                packet = decode(frames)
            except WireError as error:
                self._unreadable(frames, error)
                continue
            if not self._in_order(packet):
                continue
            if isinstance(packet.message, Welcome):
                self._welcome(packet.message)
            elif isinstance(packet.message, Bye):
                raise LinkError(f"the broker said goodbye: {packet.message.reason or 'it stops'}")
            else:
                self.link.deliver(packet.message, packet.tail)

    def _in_order(self, packet: Packet) -> bool:
        """Whether a message is the next one; a repeated one is passed over.

        Raises:
            LinkError: the one before it is missing: only a new connection brings back what was lost.
        """
        if not packet.sequence:  # not numbered: no answer to anything of this session's
            return True
        ahead = (packet.sequence - self.expected) & 0xFFFFFFFF if self.welcomed else 0
        if ahead > _BEHIND:
            log.warning("message_repeated", endpoint=self.link.endpoint, kind=type(packet.message).__name__)
            return False
        if ahead:
            raise LinkError(f"{ahead} messages of the broker's were lost on the way")
        self.expected = packet.sequence + 1
        return True

    def _unreadable(self, frames: list[bytes], error: WireError) -> None:
        """A message that cannot be read: it is asked for again, and whoever waits is told if that brings no other.

        Raises:
            LinkError: what was altered on the way comes again with a new connection.
        """
        link = self.link
        refused = FaultError("malformed", f"the broker's answer cannot be read: {error}")
        # behind a wrong envelope nothing can be trusted, the ref neither: that says nothing about the answer
        ref = 0 if isinstance(error, EnvelopeError) else _ref_of(frames)
        request = link.requests.get(ref) if ref else None
        if request is not None:
            request.unreadable += 1
            if request.unreadable >= _MAX_UNREADABLE:
                request.fail(refused)
                return
        log.error("message_unreadable", endpoint=link.endpoint, reason=str(error))
        link.note_unreadable(refused)
        raise LinkError(f"a message of the broker's cannot be read: {error}")

    def _welcome(self, welcome: Welcome) -> None:
        link = self.link
        link.welcome = welcome
        link.local = LocalSpool.prove(welcome)
        link.state = "up"
        self.welcomed = True
        for request in link.waiting():
            self._say_again(request)
        link.on_message(welcome, b"")
        link.connected.set()

    def _say_again(self, request: Request) -> None:
        request.said_at = time.monotonic()
        self._queue_encoded(request.outgoing)

    def _queue(self, message: Message, tail: Buffer = b"") -> None:
        self._queue_encoded(Outgoing(message.KIND, encode(message, tail)))

    def _queue_encoded(self, outgoing: Outgoing) -> None:
        link = self.link
        link.sequence += 1
        _, *rest = outgoing.frames
        self.unsent.append([pack_envelope(outgoing.kind, link.sequence, *rest), *rest])

    def _drain_outbox(self) -> None:
        outbox = self.link.outbox
        while outbox and self.welcomed and len(self.unsent) < _MAX_UNSENT:
            self._queue_encoded(outbox.popleft())

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
        dead_s = welcome.dead_s if self.welcomed and welcome else self.hello_s
        if now - self.heard_at > dead_s:
            raise LinkError(f"nothing heard from {self.link.endpoint} for {dead_s:g} s")
        if welcome and self.welcomed and now - self.pinged_at >= welcome.ping_s:
            self.pinged_at = now
            self._queue(Ping(self.link.free()))
            for request in self.link.waiting():
                if now - request.said_at >= _REPEAT_S:
                    log.warning("request_repeated", endpoint=self.link.endpoint, kind=request.outgoing.kind)
                    self._say_again(request)
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
            if now >= self.data_hello_at:  # IMMEDIATE: fails until the connection stands
                hello = replace(self.link.hello, session=welcome.session)
                if self._send_data(encode(hello)):
                    self.data_hello_at = now + _DATA_HELLO_S
            return
        if streams and now - self.data_alive_at >= _DATA_PING_S:
            self.data_alive_at = now
            self._send_data(encode(Ping()))
        for frames in streams.outgoing(now, welcome):
            if not self._send_data(frames):
                streams.unsend(frames)
                break
            self.link.bytes_sent += sum(len(f) for f in frames)

    def _send_data(self, frames: Sequence[Buffer]) -> bool:
        assert self.data is not None
        try:
            # a chunk aliases its source; ZeroMQ's frame holds that until it is sent or dropped
            self.data.send_multipart(frames, zmq.DONTWAIT, copy=len(frames) < 3)
        except zmq.Again:
            return False
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
            self.data_alive_at = time.monotonic()
            packet = decode([frame.buffer for frame in raw], welcome.chunk_bytes + 4096)
            match packet.message:
                case Welcome():
                    self.data_up = True
                    streams.connected()
                case Fault(code="session"):
                    raise LinkError("the data link's session is unknown: connecting anew")
                case Fault() as fault:
                    log.warning("data_fault", endpoint=self.link.endpoint, code=fault.code, reason=fault.text)
                case message:
                    streams.on_message(message, packet.tail, time.monotonic())


def _ref_of(frames: list[bytes]) -> int:
    """The request that a message is about whose fields cannot be parsed; 0 where not even that can be read."""
    with contextlib.suppress(CodecError, IndexError):
        values: Any = unpack(frames[1])
        ref: Any = cast("dict[str, Any]", values).get("ref", 0) if isinstance(values, dict) else 0
        return ref if type(ref) is int else 0
    return 0
