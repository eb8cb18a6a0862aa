"""Who is connected: sessions, heartbeats, name and site conflicts, bounded outboxes. Pure; times are arguments.

A session belongs to a node and one boot of it. The same boot again is a reconnect and keeps its session; another boot
of a live node, or of a site that a live executor serves, is refused until the first is dead. A peer is a routing id,
good only for sending: never an identity.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..serialization.errors import FaultError
from ..serialization.messages import Hello, Message, PackedDone

__all__ = ["Arrival", "Session", "Sessions", "Timing"]

#: How soon a send to a closed connection is known to have failed.
_PROBE_S = 0.3

#: A message on its way out: the message and its tail.
Outgoing = tuple[Message | PackedDone, bytes]


@dataclass(frozen=True, slots=True)
class Timing:
    """How soon silence means death, and how much may wait for a slow peer."""

    ping_s: float = 5.0
    dead_s: float = 30.0  # no traffic for so long: dead
    lost_s: float = 10.0  # its connection is closed and it has not come back for so long: dead
    takeover_s: float = 1.0  # its connection is closed and another boot wants the name: dead after so long
    outbox_messages: int = 1024
    outbox_bytes: int = 32 * 1024 * 1024
    max_sessions: int = 20_000
    max_waiting: int = 1024  # Hellos that wait for an older boot's death
    max_strikes: int = 8  # messages of a session that cannot be read, until it ends


@dataclass(slots=True)
class Session:
    """One peer process."""

    id: str
    hello: Hello
    sites: tuple[str, ...]
    peer: bytes
    seen: float
    timing: Timing
    lost_at: float | None = None  # since when its connection is known to be closed
    probed_at: float = 0.0
    strikes: int = 0
    overflowed: bool = False
    outbox: deque[Outgoing] = field(default_factory=deque[Outgoing])
    outbox_bytes: int = 0
    sequence: int = 0  # of the last message to the peer
    heard_sequence: int = 0  # of the last message from it; 0: not known
    ready: set[str] = field(default_factory=set[str])  # shared by all sessions: whose outboxes hold something

    @property
    def node(self) -> str:
        """Its node name."""
        return self.hello.node

    @property
    def role(self) -> str:
        """Its role."""
        return self.hello.role

    @property
    def room(self) -> bool:
        """Whether a derived message (an Assign, a Done) may be added: half of the outbox is kept for answers."""
        return self.outbox_bytes < self.timing.outbox_bytes // 2 and len(self.outbox) < self.timing.outbox_messages // 2

    def in_order(self, sequence: int) -> int:
        """How many of the peer's messages are missing before the one with this number; -1: it was here before."""
        ahead = (sequence - self.heard_sequence - 1) & 0xFFFFFFFF
        if not sequence or not self.heard_sequence or not ahead:
            self.heard_sequence = sequence or self.heard_sequence
            return 0
        return -1 if ahead > 1 << 31 else ahead

    def push(self, message: Message | PackedDone, tail: bytes = b"") -> None:
        """Queue a message; one too many marks the session as overflowed, which ends it."""
        if len(self.outbox) >= self.timing.outbox_messages or self.outbox_bytes >= self.timing.outbox_bytes:
            self.overflowed = True
            return
        self.outbox.append((message, tail))
        self.outbox_bytes += len(tail) + 512
        self.ready.add(self.id)

    def pop(self) -> Outgoing:
        """The next message to send."""
        message, tail = self.outbox.popleft()
        self.outbox_bytes -= len(tail) + 512
        return message, tail

    def unpop(self, outgoing: Outgoing) -> None:
        """Put back what could not be sent."""
        self.outbox.appendleft(outgoing)
        self.outbox_bytes += len(outgoing[1]) + 512

    def drop_outbox(self) -> None:
        """Forget what was queued for a connection that is gone."""
        self.outbox.clear()
        self.outbox_bytes = 0
        self.overflowed = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of a Hello. ``wait``: an older boot may be dying; decided by `Sessions.settle_arrivals`."""

    state: Literal["new", "again", "wait"]
    session: Session | None = None
    ended: tuple[Session, ...] = ()  # older boots that this one replaces


@dataclass(slots=True)
class _Waiting:
    peer: bytes
    hello: Hello
    sites: tuple[str, ...]
    payload: object
    since: float


class Sessions:
    """All sessions, by id, node, peer and site."""

    def __init__(self, timing: Timing | None = None) -> None:
        self.timing = timing or Timing()
        self.by_id: dict[str, Session] = {}
        self.by_node: dict[str, Session] = {}
        self.by_peer: dict[bytes, Session] = {}
        self.by_site: dict[str, Session] = {}
        self.ready: set[str] = set()
        self._waiting: dict[bytes, _Waiting] = {}

    # ------------------------------------------------------------ arrivals

    def hello(self, peer: bytes, hello: Hello, sites: Iterable[str], now: float, payload: object = None) -> Arrival:
        """A peer said Hello. ``payload`` is given back with an arrival that had to wait.

        Raises:
            FaultError: ``name_taken``, ``too_many``, ``hello``.
        """
        names = tuple(dict.fromkeys(sites))
        if not hello.node or not hello.boot:
            raise FaultError("hello", "Hello needs a node name and a boot")
        if names and hello.role != "executor":
            raise FaultError("hello", f"a {hello.role} serves no sites")
        same = self.by_node.get(hello.node)
        if same is not None and same.hello.boot == hello.boot:
            return self._again(same, peer, hello, names, now)
        rivals = self._rivals(hello, names)
        alive = [s for s in rivals if s.lost_at is None or now - s.lost_at < self.timing.takeover_s]
        if alive:
            most = self.timing.max_waiting
            if peer not in self._waiting and len(self._waiting) >= most:
                text = f"{most} peers wait for a name that is in use (max_waiting): try later"
                raise FaultError("too_many", text, bound="max_waiting")
            self._waiting[peer] = _Waiting(peer, hello, names, payload, now)
            for session in alive:
                session.probed_at = 0.0  # ask at once whether its connection still stands
            return Arrival("wait")
        if len(self.by_id) - len(rivals) >= self.timing.max_sessions:
            text = f"{self.timing.max_sessions} sessions are open (max_sessions): end some, or raise it"
            raise FaultError("too_many", text, bound="max_sessions")
        for session in rivals:
            self.end(session)
        session = Session(secrets.token_hex(16), hello, names, peer, now, self.timing, ready=self.ready)
        self.by_id[session.id] = session
        self.by_node[hello.node] = session
        self._attach(session, peer)
        for site in names:
            self.by_site[site] = session
        return Arrival("new", session, tuple(rivals))

    def _again(self, session: Session, peer: bytes, hello: Hello, sites: tuple[str, ...], now: float) -> Arrival:
        was = session.hello
        if (hello.role, hello.job, hello.claim) != (was.role, was.job, was.claim):
            raise FaultError("hello", f"{was.node} was a {was.role}: another role or job needs another node or boot")
        for site in sites:
            other = self.by_site.get(site)
            if other is not None and other is not session:
                raise _taken(f"site {site!r}", other)
        for site in session.sites:
            self.by_site.pop(site, None)
        for site in sites:
            self.by_site[site] = session
        session.hello, session.sites = hello, sites
        session.seen, session.lost_at = now, None
        session.drop_outbox()
        self._attach(session, peer)
        return Arrival("again", session)

    def _attach(self, session: Session, peer: bytes) -> None:
        if self.by_peer.get(session.peer) is session:
            del self.by_peer[session.peer]
        stranger = self.by_peer.get(peer)
        if stranger is not None and stranger is not session:
            stranger.lost_at = stranger.lost_at or session.seen  # one connection speaks for one session: the newest
        session.peer = peer
        self.by_peer[peer] = session

    def _rivals(self, hello: Hello, sites: Iterable[str]) -> list[Session]:
        found = {s.id: s for site in sites if (s := self.by_site.get(site)) is not None}
        same = self.by_node.get(hello.node)
        if same is not None:
            found[same.id] = same
        return list(found.values())

    def settle_arrivals(self, now: float) -> list[tuple[bytes, Hello, tuple[str, ...], object, FaultError | None]]:
        """Hellos that waited and can be decided: to be said again (None), or refused because the rival answered."""
        out: list[tuple[bytes, Hello, tuple[str, ...], object, FaultError | None]] = []
        for waiting in list(self._waiting.values()):
            rivals = self._rivals(waiting.hello, waiting.sites)
            alive = [s for s in rivals if s.lost_at is None or now - s.lost_at < self.timing.takeover_s]
            since = waiting.since
            # alive is who spoke since, or whose connection took what we sent it
            standing = [
                s
                for s in alive
                if s.lost_at is None and (s.seen > since or (s.probed_at >= since and now - s.probed_at >= _PROBE_S))
            ]
            fault: FaultError | None = None
            if standing:
                what = f"node {waiting.hello.node!r}" if standing[0].node == waiting.hello.node else "a site of it"
                fault = _taken(what, standing[0])
            elif alive:
                continue
            del self._waiting[waiting.peer]
            out.append((waiting.peer, waiting.hello, waiting.sites, waiting.payload, fault))
        return out

    @property
    def waiting(self) -> int:
        """How many Hellos wait for a decision."""
        return len(self._waiting)

    # ------------------------------------------------------------ life

    def of(self, peer: bytes) -> Session | None:
        """The session that speaks on this connection."""
        return self.by_peer.get(peer)

    def heard(self, session: Session, now: float) -> None:
        """Any traffic renews a session."""
        session.seen, session.lost_at = now, None

    def detach(self, session: Session, now: float) -> None:
        """Its connection has lost a message: what still comes over it is nobody's, and the peer is to come anew."""
        self.by_peer.pop(session.peer, None)
        self.unreachable(session, now)

    def unreachable(self, session: Session, now: float) -> None:
        """A send failed: the connection is closed, the peer may come back with another."""
        if session.lost_at is None:
            session.lost_at = now
        session.drop_outbox()

    def to_probe(self, now: float) -> list[Session]:
        """Silent sessions to send something to, which shows whether their connections stand."""
        out: list[Session] = []
        for session in self.by_id.values():
            if session.lost_at is None and now - session.probed_at >= self.timing.ping_s:
                contested = session.probed_at == 0.0 and self._waiting
                if contested or now - session.seen >= self.timing.ping_s * 1.5:
                    session.probed_at = now
                    out.append(session)
        return out

    def dead(self, now: float) -> list[Session]:
        """Sessions whose time is over; the caller ends them."""
        timing = self.timing
        return [
            s
            for s in self.by_id.values()
            if now - s.seen > timing.dead_s
            or (s.lost_at is not None and now - s.lost_at > timing.lost_s)
            or s.overflowed
        ]

    def end(self, session: Session) -> None:
        """Forget a session."""
        self.by_id.pop(session.id, None)
        if self.by_node.get(session.node) is session:
            del self.by_node[session.node]
        if self.by_peer.get(session.peer) is session:
            del self.by_peer[session.peer]
        for site in session.sites:
            if self.by_site.get(site) is session:
                del self.by_site[site]


def _taken(what: str, rival: Session) -> FaultError:
    return FaultError(
        "name_taken",
        f"{what} is taken by {rival.node}, which is alive: stop that one, or give this one another name",
    )
