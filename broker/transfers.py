"""The data process without its sockets: sessions, and messages to and from the streams of uploads and downloads.

Messages and `now` go in, `Outgoing` messages and `Landing` files come out. Files are read and written here, through the
spool; sockets, clocks and threads are the shell's (`data.py`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import structlog

from ..serialization.errors import WireError
from ..serialization.messages import (
    Abort,
    Bye,
    Chunk,
    Event,
    Fault,
    Finish,
    Get,
    Grant,
    Hello,
    JobId,
    Packet,
    Ping,
    Pong,
    Put,
    Stored,
    Welcome,
)
from .bounds import Bounds, Figure, to_plain
from .downloads import Downloads
from .spool import Landing, Spool
from .strikes import Strikes
from .transferlimits import CONTROL, Limits, Outgoing
from .uploads import Uploads

__all__ = ["CONTROL", "Limits", "Outgoing", "Transfers"]

log = structlog.get_logger(__name__)

#: How often the figures of the bounds are told to control, where they have changed.
_FIGURES_S = 1.0
#: How long a peer's Hello waits before control is asked whether it forgot to tell us of the session.
_ASK_SESSIONS_S = 0.5


@dataclass(slots=True)
class _Waiting:
    hello: Hello
    since: float


@dataclass(slots=True)
class _End:
    answer: Abort | Stored | None  # how the stream ended, as its peer was told; None: the peer ended it
    told_at: float


class Transfers:
    """All streams of all peers.

    Args:
        spool: where payloads lie.
        limits: bounds and timers.
        boot: random hex digits of this process.
        next_epoch: rises with every call, over restarts too; below 2^32.
        endpoint: where this process listens, told to control in Hello.
    """

    def __init__(
        self, spool: Spool, limits: Limits, *, boot: str, next_epoch: Callable[[], int], endpoint: str = ""
    ) -> None:
        self.limits = limits
        self._boot = boot
        self._endpoint = endpoint
        self._outgoing: deque[Outgoing] = deque()
        self._landings: list[tuple[str, Landing]] = []
        self._sessions: OrderedDict[str, Welcome] = OrderedDict()
        self._control_epoch = ""
        self._asked_at = float("-inf")
        self._routes: dict[bytes, str] = {}  # who said Hello, and in which session
        self._peers: dict[str, bytes] = {}  # the other way round
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self._ended: OrderedDict[tuple[bytes, str], _End] = OrderedDict()
        self._now = 0.0
        self.bounds = Bounds()
        self._told: dict[str, Any] = {}  # what control knows of the bounds
        self._told_at = 0.0
        self._faults_left = float(limits.faults_per_s)
        self._faults_at = 0.0
        self.strikes: Strikes[bytes] = Strikes()
        #: Messages that broke the protocol, by what they were; for logs and tests.
        self.refused: dict[str, int] = {}
        self.uploads = Uploads(
            spool,
            limits,
            send=self._send,
            land=lambda key, landing: self._landings.append((key, landing)),
            next_epoch=next_epoch,
            boot=boot,
            bounds=self.bounds,
        )
        self.downloads = Downloads(spool, limits, send=self._send, bounds=self.bounds)

    # ------------------------------------------------------------ in

    def start(self, now: float) -> None:
        """Tell control that we are here; it answers with a Welcome for each valid session."""
        self._asked_at = now
        features = (self._endpoint,) if self._endpoint else ()
        self._send(Outgoing(CONTROL, Hello(node="data", role="controller", boot=self._boot, features=features)))

    def on_peer(self, route: bytes, packet: Packet, now: float) -> None:
        """A message off the data link."""
        self._now = now
        message = packet.message
        if self._boxed(route, now):
            return
        if isinstance(message, Hello):
            self._hello(route, message, now)
            return
        if route not in self._routes:
            if route not in self._waiting:
                self._fault(route, "session", "say Hello with the session of your control link first", now)
            return
        known = True
        match message:
            case Chunk():
                if len(packet.tail) != message.length:
                    self.malformed(route, WireError(f"chunk of {len(packet.tail)} bytes says {message.length}"), now)
                    return
                known = self.uploads.on_chunk(route, message, packet.tail, now)
            case Grant():
                known = self.downloads.on_grant(route, message, now)
            case Put():
                if not _is_stream(message.stream):
                    self.malformed(route, WireError("a Put on the data link names its stream in 32 hex digits"), now)
                    return
                self._ended.pop((route, message.stream), None)
                self.uploads.on_put(route, message, now, self._routes[route])
            case Get():
                if not _is_stream(message.stream):
                    self.malformed(route, WireError("a Get on the data link names its stream in 32 hex digits"), now)
                    return
                self._ended.pop((route, message.stream), None)
                self.downloads.on_get(route, message, now)
            case Finish():
                known = self.uploads.on_finish(route, message, now)
            case Abort():
                _ = self.uploads.on_abort(route, message.stream) or self.downloads.on_abort(route, message.stream)
                self._forget(route, message.stream)
            case Ping():
                self._send(Outgoing(route, Pong()))
            case Bye():
                self.lost(route)
            case _:
                text = f"{type(message).__name__} does not belong on the data link"
                self.malformed(route, WireError(text), now)
        if not known:
            assert isinstance(message, Chunk | Grant | Finish)
            self._unknown_stream(route, message, now)

    def malformed(self, route: bytes, error: WireError, now: float) -> None:
        """A peer sent what cannot be read, or does not belong here."""
        if self._boxed(route, now):
            return
        name = type(error).__name__
        self.refused[name] = self.refused.get(name, 0) + 1
        log.warning("malformed", error=str(error), count=self.refused[name])
        if not self.strikes.strike(route, now):
            self._fault(route, "malformed", str(error), now)
            return
        limits = self.strikes.limits
        text = f"{error}; {limits.strikes} such messages: nothing more is taken from this connection: say Hello anew"
        self._fault(route, "session", text, now, force=True)
        self.lost(route)

    def _boxed(self, route: bytes, now: float) -> bool:
        """Whether nothing is taken from this connection any more; its peer heals with a new one."""
        boxed = self.strikes.boxed(route, now) > 0
        if boxed:
            self.refused["boxed"] = self.refused.get("boxed", 0) + 1
        return boxed

    def on_control(self, packet: Packet, now: float) -> None:
        """A message of the control process."""
        self._now = now
        match packet.message:
            case Welcome() as welcome:
                self._session(welcome, now)
            case Bye() as bye:
                self._sessions.pop(bye.reason, None)
                route = self._peers.get(bye.reason)
                if route is not None:
                    self._fault(route, "session", "the session ended: say Hello on the control link", now, force=True)
                    self.lost(route)
            case Grant() | Stored() | Abort() as answer:
                self.uploads.on_control(answer, now)
            case Ping():
                self._send(Outgoing(CONTROL, Pong()))
            case Fault() as fault:
                log.error("control_refused", code=fault.code, text=fault.text)
            case _:
                pass

    def landed(self, key: str, now: float, *, gone: bool = False) -> None:
        """A `Landing` is durable under its payload's id; or ``gone``: its file was not there any more."""
        self._now = now
        self.uploads.landed(key, now, gone=gone)

    def lost(self, route: bytes) -> None:
        """The peer is gone, or its session: its streams end, its partial files stay."""
        session = self._routes.pop(route, None)
        if session is not None and self._peers.get(session) == route:
            del self._peers[session]
        self._waiting.pop(route, None)
        self.uploads.lost(route)
        self.downloads.lost(route)

    def tick(self, now: float, outbox: int = 0) -> None:
        """Let time pass: repeats, stalls, Hellos that waited too long.

        Args:
            outbox: messages in the fullest peer's outbox.
        """
        self._now = now
        self.bounds.tick(now)
        if now - self._told_at >= _FIGURES_S:
            self._told_at = now
            self._tell_figures(outbox)
        self.uploads.tick(now)
        self.downloads.tick(now)
        for route, waiting in list(self._waiting.items()):
            waited = now - waiting.since
            if waited >= self.limits.hello_wait_s:
                del self._waiting[route]
                text = f"session {waiting.hello.session!r} is unknown: say Hello on the control link first"
                self._fault(route, "session", text, now, force=True)
            elif waited >= _ASK_SESSIONS_S and now - self._asked_at >= 1.0:
                self.start(now)  # control was restarted, or we were, and one does not know of the other

    def work(self, blocked: Container[bytes], now: float, *, max_bytes: int, chunks: int) -> bool:
        """A slice of reading files again and of sending chunks; True when there may be more to do at once."""
        sent = self.downloads.pump(blocked, chunks, now)
        self.uploads.work(max_bytes, now)
        return sent >= chunks or self.uploads.working

    # ------------------------------------------------------------ out

    def outgoing(self) -> list[Outgoing]:
        """The messages to send, oldest first; they are the shell's now."""
        out = list(self._outgoing)
        self._outgoing.clear()
        return out

    def landings(self) -> list[tuple[str, Landing]]:
        """Finished files to make durable; `landed` is to be called with each key."""
        out, self._landings = self._landings, []
        return out

    @property
    def idle(self) -> bool:
        """No stream and no waiting peer: only messages bring anything new."""
        return not len(self.uploads) and not len(self.downloads) and not self._waiting

    # ------------------------------------------------------------ sessions

    def _hello(self, route: bytes, hello: Hello, now: float) -> None:
        if hello.session in self._sessions:
            self._adopt(route, hello.session)
        elif route in self._waiting or len(self._waiting) < self.limits.max_peers:
            self._waiting.setdefault(route, _Waiting(hello, now)).hello = hello
        else:
            self.bounds.reached("max_peers")
            text = f"{self.limits.max_peers} peers wait for their sessions (max_peers): try later"
            self._fault(route, "too_many", text, now)

    def _session(self, welcome: Welcome, now: float) -> None:
        if welcome.epoch != self._control_epoch:
            # another life of control: it knows none of the old sessions
            self._control_epoch = welcome.epoch
            old = [session for session in self._sessions if session != welcome.session]
            for session in old:
                del self._sessions[session]
                route = self._peers.get(session)
                if route is not None:
                    self._fault(route, "session", "the broker was restarted: say Hello again", now, force=True)
                    self.lost(route)
        self._sessions[welcome.session] = welcome
        while len(self._sessions) > self.limits.max_peers:
            self.bounds.reached("max_peers")
            self._sessions.popitem(last=False)
        for route, waiting in list(self._waiting.items()):
            if waiting.hello.session == welcome.session:
                del self._waiting[route]
                self._adopt(route, welcome.session)

    def _adopt(self, route: bytes, session: str) -> None:
        old = self._peers.get(session)
        if old is not None and old != route:
            self.lost(old)  # the peer reconnected; its streams go on at the watermark
        self._routes[route] = session
        self._peers[session] = route
        limits = self.limits
        answer = Welcome(
            session=session,
            epoch=self._boot,
            chunk_bytes=limits.chunk_bytes,
            window=limits.window,
            integrity="digest" if limits.digested else "size",
        )
        self._send(Outgoing(route, answer))

    def figures(self, outbox: int = 0) -> dict[str, Figure]:
        """What each bound of this process allows, what is there, and how often it was reached."""
        limits, counts = self.limits, self.bounds.counts
        found = {
            "max_streams": (limits.max_streams, max(len(self.uploads), len(self.downloads))),
            "max_streams_per_peer": (limits.max_streams_per_peer, self.uploads.most_of_a_peer),
            "window_bytes": (limits.window_bytes, self.uploads.window_bytes),
            "max_payload_bytes": (limits.max_payload_bytes, 0),
            "max_peers": (limits.max_peers, max(len(self._sessions), len(self._waiting))),
            "peer_outbox_messages": (limits.peer_outbox_messages, outbox),
            "control_outbox_messages": (limits.control_outbox_messages, 0),
            "max_ended": (limits.max_ended, len(self._ended)),
            "faults_per_s": (limits.faults_per_s, max(0, int(limits.faults_per_s - self._faults_left))),
        }
        return {name: Figure(limit, used, counts[name]) for name, (limit, used) in found.items()}

    def _tell_figures(self, outbox: int) -> None:
        data = to_plain(self.figures(outbox))
        if data != self._told:
            self._told = data
            self._send(Outgoing(CONTROL, Event(JobId(""), "bounds", data=data)))

    # ------------------------------------------------------------ answers

    def _send(self, out: Outgoing) -> None:
        match out.message:
            case Abort() | Stored() as answer:
                self._forget(out.route, answer.stream, answer)
            case _:
                pass
        self._outgoing.append(out)

    def _forget(self, route: bytes, stream: str, answer: Abort | Stored | None = None) -> None:
        self._ended[route, stream] = _End(answer, self._now)
        while len(self._ended) > self.limits.max_ended:
            self._ended.popitem(last=False)
            self.bounds.reached("max_ended")

    def _unknown_stream(self, route: bytes, message: Chunk | Grant | Finish, now: float) -> None:
        """Say that the stream is unknown, so that the peer repeats its Put or Get, or how it ended.

        What was on its way then is ignored; who goes on after that has not heard the answer, and gets it again.
        """
        end = self._ended.get((route, message.stream))
        if end is not None and (end.answer is None or now < end.told_at + self.limits.retry_s):
            return
        if not self._may_fault(now):
            return
        if end is None and isinstance(message, Grant) and message.next >= message.limit:
            self._forget(route, message.stream)  # the last grant of a download that was sent whole
            return
        unknown = Abort(message.stream, "unknown_stream", "repeat Put or Get", self.limits.retry_s)
        self._send(Outgoing(route, (end and end.answer) or unknown))

    def _fault(self, route: bytes, code: str, text: str, now: float, *, force: bool = False) -> None:
        if force or self._may_fault(now):
            self._send(Outgoing(route, Fault(code=code, text=text)))

    def _may_fault(self, now: float) -> bool:
        """A token bucket over all peers: nobody makes us talk without end."""
        rate = self.limits.faults_per_s
        self._faults_left = min(rate, self._faults_left + (now - self._faults_at) * rate)
        self._faults_at = now
        if self._faults_left < 1:
            self.bounds.reached("faults_per_s")
            return False
        self._faults_left -= 1
        return True


def _is_stream(stream: str) -> bool:
    return len(stream) == 32 and all(c in "0123456789abcdef" for c in stream)
