"""ZeroMQ without a network: routers and dealers over connections that lose, repeat, overtake, alter, stall and break.

As far as the product can tell the real thing: a connection keeps its order until it breaks, what was on its way then is
lost, a ROUTER that has no such peer says EHOSTUNREACH, a full pipe says EAGAIN, a DEALER without a connection says
EAGAIN (IMMEDIATE) and connects anew by itself. The faults beyond that (`Weather`) are what a proxy, a bad network card
or a bug below could do.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import ModuleType
from typing import Any

import system
import zmq as real_zmq
from machine import Machine, Party, Task

_IN, _OUT = int(real_zmq.POLLIN), int(real_zmq.POLLOUT)
_LATENCY_S = (0.0002, 0.003)
_RECONNECT_S = (0.05, 0.4)
_NOTICED_S = 0.002


@dataclass
class Weather:
    """What happens to single messages, and how often, in a window of time."""

    begins: float = 0.0
    ends: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    flip: float = 0.0


class Again(real_zmq.Again):
    """The pipe is empty, or full; without the real one's costly look at the system's error texts."""

    def __init__(self) -> None:
        self.errno = errno.EAGAIN
        self.strerror = "again"


class Frame:
    """What ``recv_multipart(copy=False)`` gives."""

    __slots__ = ("bytes",)

    def __init__(self, data: bytes) -> None:
        self.bytes = data

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.bytes)

    def __len__(self) -> int:
        return len(self.bytes)


class Connection:
    """Between a dealer and a router."""

    def __init__(self, dealer: Socket, router: Socket, route: bytes) -> None:
        self.dealer = dealer
        self.router = router
        self.route = route
        self.up = True
        self.last = {dealer: 0.0, router: 0.0}  # when the latest message towards that end arrives
        self.flying = {dealer: 0, router: 0}


class Network:
    """All sockets of a room."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.chance = Random(seed)
        self.bound: dict[str, Socket] = {}
        self.connections: list[Connection] = []
        self.weather: list[Weather] = []
        self.hits: Counter[str] = Counter()
        self.partitions: dict[Party, float] = {}
        #: told of every message as it is handed to a socket: (from, to, frames)
        self.watch: Callable[[Socket, Socket, list[bytes]], None] = lambda socket, to, frames: None
        self._routes = 0

    # ------------------------------------------------------------ connections

    def try_connect(self, dealer: Socket) -> None:
        """A dealer's next attempt."""
        if dealer.closed or dealer.connection is not None or not dealer.party.alive:
            return
        router = self.bound.get(dealer.endpoint)
        if router is None or not router.party.alive or router.closed or self.apart(dealer.party):
            self._later(dealer)
            return
        self._routes += 1
        connection = Connection(dealer, router, b"\0" + self._routes.to_bytes(4, "big"))
        dealer.connection = connection
        router.peers[connection.route] = connection
        self.connections.append(connection)
        dealer.changed()

    def _later(self, dealer: Socket) -> None:
        pause = self.machine.rng.uniform(*_RECONNECT_S)
        self.machine.call_at(self.machine.now + pause, lambda: self.try_connect(dealer))

    def apart(self, party: Party) -> bool:
        """Whether the party cannot reach anybody now."""
        return self.partitions.get(party, 0.0) > self.machine.now

    def cut(self, connection: Connection, *, flying_too: bool = True) -> None:
        """It breaks: what is on its way is lost, or, where one side said goodbye, arrives still."""
        if not connection.up:
            return
        connection.up = not flying_too
        if connection in self.connections:
            self.connections.remove(connection)
        dealer, router = connection.dealer, connection.router
        if dealer.connection is connection:
            dealer.connection = None
            if not dealer.closed and dealer.party.alive:
                self._later(dealer)

        def noticed() -> None:
            connection.up = False
            router.peers.pop(connection.route, None)

        self.machine.call_at(self.machine.now + (_NOTICED_S if flying_too else 0.05), noticed)

    # ------------------------------------------------------------ messages

    def send(self, connection: Connection, to: Socket, frames: list[bytes], *, inside: bool) -> None:
        """A message on its way."""
        machine = self.machine
        arrives = max(connection.last[to] + 1e-6, machine.now + machine.rng.uniform(*_LATENCY_S))
        for kind in () if inside else self._fate():
            self.hits[kind] += 1
            match kind:
                case "drop":
                    return
                case "duplicate":
                    self._fly(connection, to, frames, arrives + self.chance.random() * 0.02)
                case "reorder":
                    self._fly(connection, to, frames, arrives + 0.005 + self.chance.random() * 0.1)
                    return
                case "delay":
                    arrives += self.chance.random() * 1.5
                case _:
                    frames = self._flipped(frames)
        connection.last[to] = arrives
        self._fly(connection, to, frames, arrives)

    def _fate(self) -> list[str]:
        now, out = self.machine.now, []
        for weather in self.weather:
            if weather.begins <= now < weather.ends:
                for kind in ("drop", "duplicate", "reorder", "delay", "flip"):
                    share = getattr(weather, kind)
                    if share and self.chance.random() < share:
                        out.append(kind)
        return out

    def _flipped(self, frames: list[bytes]) -> list[bytes]:
        out = list(frames)
        index = self.chance.randrange(len(out))
        if out[index]:
            data = bytearray(out[index])
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            out[index] = bytes(data)
        return out

    def _fly(self, connection: Connection, to: Socket, frames: list[bytes], when: float) -> None:
        connection.flying[to] += 1

        def arrive() -> None:
            connection.flying[to] -= 1
            if connection.up and not to.closed and to.party.alive:
                to.inbox.append([connection.route, *frames] if to is connection.router else frames)
                to.changed()

        self.machine.call_at(when, arrive)


network: Network = None  # type: ignore[assignment]


def enter(its_network: Network) -> None:
    """Sockets made from here on are of this network."""
    global network
    network = its_network


class Socket:
    """A ROUTER or a DEALER."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.party: Party = system.party()
        self.endpoint = ""
        self.closed = False
        self.inbox: deque[list[bytes]] = deque()
        self.peers: dict[bytes, Connection] = {}
        self.connection: Connection | None = None
        self.waiting: list[tuple[Task, int]] = []
        self._hwm = 1024
        self.party.releases.append(self._released)

    def set(self, option: int, value: Any) -> None:
        if option == real_zmq.SNDHWM:
            self._hwm = int(value)

    def get(self, option: int) -> Any:
        return self.endpoint.encode() if option == real_zmq.LAST_ENDPOINT else 0

    setsockopt, getsockopt = set, get

    def bind(self, endpoint: str) -> None:
        holder = network.bound.get(endpoint)
        if holder is not None and holder.party.alive and not holder.closed:
            raise real_zmq.ZMQError(errno.EADDRINUSE)
        self.endpoint = endpoint
        network.bound[endpoint] = self

    def connect(self, endpoint: str) -> None:
        self.endpoint = endpoint
        machine = network.machine
        machine.call_at(machine.now + machine.rng.uniform(*_LATENCY_S), lambda: network.try_connect(self))

    # ------------------------------------------------------------ messages

    def send_multipart(self, frames: Any, flags: int = 0, copy: bool = True) -> None:
        network.machine.step()
        data = [bytes(frame) for frame in frames]
        if self.kind == real_zmq.ROUTER:
            connection = self.peers.get(data.pop(0))
            if connection is None:
                raise real_zmq.ZMQError(errno.EHOSTUNREACH)
            to = connection.dealer
        else:
            connection = self.connection
            if connection is None:
                raise Again
            to = connection.router
        if connection.flying[to] + (len(to.inbox) if to is connection.dealer else 0) >= 2 * self._hwm:
            raise Again
        network.watch(self, to, data)
        network.send(connection, to, data, inside=self.endpoint.startswith("ipc://"))

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> list[Any]:
        if not self.inbox:
            raise Again
        network.machine.step()
        frames = self.inbox.popleft()
        return list(frames) if copy else [Frame(frame) for frame in frames]

    def ready(self, wanted: int) -> int:
        """What could be done now."""
        out = _IN if self.inbox and wanted & _IN else 0
        if wanted & _OUT and self.connection is not None:
            to = self.connection.router
            out |= _OUT if self.connection.flying[to] < 2 * self._hwm else 0
        return out

    def changed(self) -> None:
        """Whoever polls it may look again."""
        for waiter in self.waiting:
            network.machine.wake(*waiter)
        self.waiting.clear()

    def close(self, linger: int | None = None) -> None:
        self._end(polite=True)

    def _released(self, polite: bool) -> None:
        self._end(polite=polite)

    def _end(self, *, polite: bool) -> None:
        if self.closed:
            return
        self.closed = True
        if network.bound.get(self.endpoint) is self:
            del network.bound[self.endpoint]
        for connection in [*self.peers.values(), *([self.connection] if self.connection else [])]:
            network.cut(connection, flying_too=not polite)


class Context:
    """What sockets are made of."""

    def __init__(self, io_threads: int = 1) -> None:
        self._sockets: list[Socket] = []

    def set(self, option: int, value: Any) -> None:
        pass

    def socket(self, kind: int) -> Socket:
        made = Socket(kind)
        self._sockets.append(made)
        return made

    def destroy(self, linger: int | None = None) -> None:
        for socket in self._sockets:
            socket.close()

    def term(self) -> None:
        self.destroy()


class Poller:
    """Waits for sockets and pipes."""

    def __init__(self) -> None:
        self._wanted: dict[Any, int] = {}

    def register(self, what: Any, flags: int = _IN) -> None:
        self._wanted[what] = int(flags)

    modify = register

    def unregister(self, what: Any) -> None:
        self._wanted.pop(what, None)

    def _ready(self) -> list[tuple[Any, int]]:
        out: list[tuple[Any, int]] = []
        for what, wanted in self._wanted.items():
            if isinstance(what, int):
                if system.pipes[what].bytes:
                    out.append((what, _IN))
            elif flags := what.ready(wanted):
                out.append((what, flags))
        return out

    def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
        machine = network.machine
        machine.step()
        if timeout == 0 or self._ready():
            machine.pause()
            return self._ready()
        me = machine.me()
        for what in self._wanted:
            waiting = system.pipes[what].waiting if isinstance(what, int) else what.waiting
            waiting.append(me)
        machine.block(None if timeout is None or timeout < 0 else timeout / 1000)
        return self._ready()


class _Zmq(ModuleType):
    """The module that the product imports as ``zmq``."""

    Again = Again
    Context = Context
    DONTWAIT, POLLIN, POLLOUT = int(real_zmq.DONTWAIT), _IN, _OUT
    Poller = Poller
    Socket = Socket

    def __getattr__(self, name: str) -> Any:
        return getattr(real_zmq, name)


zmq = _Zmq("zmq")
