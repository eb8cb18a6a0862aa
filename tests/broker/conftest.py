"""A broker's control core with a virtual clock and plain Python objects for peers: no sockets, no processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fedloom.broker.core import ControlCore
from fedloom.broker.journal import Journal
from fedloom.broker.ledger import Limits
from fedloom.broker.sessions import Timing
from fedloom.broker.spool import Spool
from fedloom.broker.state import Settings
from fedloom.serialization.codec import pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Assign,
    Claimed,
    ClaimJob,
    CloseRule,
    Done,
    DoneItem,
    Hello,
    JobId,
    Message,
    OpenGather,
    PackedDone,
    Packet,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    SubmitJob,
    TaskRef,
    decode,
    encode,
)

M = TypeVar("M")


class Peer:
    """A peer of the world: what it sent and got."""

    def __init__(self, world: World, hello: Hello, sites: tuple[str, ...] = ()) -> None:
        self.world = world
        self.hello = hello
        self.sites = sites
        self.address = b""
        self.got: list[tuple[Message, bytes]] = []
        self.online = False
        self._ref = 0

    def connect(self, held: tuple[TaskRef, ...] = ()) -> Peer:
        """A new connection and a Hello."""
        self.world.disconnect(self)
        self.address = random.randbytes(5)
        self.world.peers[self.address] = self
        self.online = True
        tail = pack({"sites": list(self.sites), "held": [[t.task, t.attempt] for t in held]})
        self.send(self.hello, tail)
        return self

    def send(self, message: Message, tail: bytes = b"") -> None:
        """Through the real codec, then a turn."""
        packet = decode(encode(message, tail))
        self.world.core.handle(self.address, packet, self.world.now)
        self.world.turn()

    def ref(self) -> int:
        """A fresh reference."""
        self._ref += 1
        return self._ref

    def take(self, kind: type[M]) -> list[M]:
        """All messages of a kind so far, taken out."""
        out = [m for m, _ in self.got if isinstance(m, kind)]
        self.got = [(m, t) for m, t in self.got if not isinstance(m, kind)]
        return out

    def one(self, kind: type[M]) -> M:
        """Exactly one message of that kind."""
        found = self.take(kind)
        assert len(found) == 1, f"{len(found)} {kind.__name__}; in the inbox: {self.got}"
        return found[0]

    def put(self, data: bytes, *, id: str = "", **fields: Any) -> PayloadRef:
        """Store a small payload."""
        digest = digest_buffers([data])
        ref = PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest, "blob")
        self.send(Put(payload=ref, ref=self.ref(), **fields), data)
        assert self.one(Stored).payload == ref
        return ref


class World:
    """One control core over a store on disk, so that `restart` finds what was committed."""

    def __init__(self, store: Path, **settings: Any) -> None:
        self.store = store
        self.now = 1_000_000.0
        self.peers: dict[bytes, Peer] = {}
        self.to_data: list[Message] = []
        self.settings = Settings(
            timing=settings.pop("timing", Timing()), limits=settings.pop("limits", Limits()), **settings
        )
        self.journal: Journal
        self.core: ControlCore
        self.boot()

    def boot(self) -> None:
        """A fresh process over the store."""
        spool = Spool(self.store, "process")
        self.journal = Journal(self.store / "journal.db", "process")
        self.core = ControlCore(self.settings, self.journal, spool, "epoch", self.now, seed=1)

    def restart(self) -> None:
        """As a kill -9: what was not committed is gone, and so are all connections."""
        self.journal.close()
        for peer in list(self.peers.values()):
            self.disconnect(peer)
        self.boot()
        self.turn()

    def turn(self) -> None:
        """Tick, commit, and deliver everything through the real codec."""
        self.core.tick(self.now)
        self.core.commit()
        for address, message, tail in self.core.loose:
            self._deliver(address, message, tail)
        self.core.loose.clear()
        sessions = self.core.state.sessions
        for session in list(sessions.by_id.values()):
            while session.outbox:
                if session.peer not in self.peers:
                    self.core.unreachable(session, self.now)
                    break
                self._deliver(session.peer, *session.pop())
        sessions.ready.clear()
        self.to_data += self.core.data_out
        self.core.data_out.clear()
        self.core.streams.pump(sessions.by_id)
        if any(s.outbox for s in sessions.by_id.values()):
            self.turn()

    def _deliver(self, address: bytes, message: Message | PackedDone, tail: bytes) -> None:
        packet = decode(encode(message, tail))
        if address in self.peers:
            self.peers[address].got.append((packet.message, bytes(packet.tail)))

    def pass_time(self, seconds: float, step: float = 0.5) -> None:
        """Let time pass in steps; connected peers ping."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            for peer in list(self.peers.values()):
                session = self.core.state.sessions.of(peer.address)
                if session is not None:
                    self.core.state.sessions.heard(session, self.now)
                    self.core.state.ledger.renew(session.node, self.now)
            self.turn()

    def disconnect(self, peer: Peer) -> None:
        """The connection is cut."""
        self.peers.pop(peer.address, None)
        peer.online = False

    def data(self, message: Message) -> list[Message]:
        """A message of the data process; the answers."""
        self.to_data.clear()
        self.core.handle_data(Packet(message), self.now)
        self.turn()
        return list(self.to_data)

    # ------------------------------------------------------------ peers

    def peer(self, role: Any, node: str, **fields: Any) -> Peer:
        """A connected peer."""
        sites = tuple(fields.pop("sites", ()))
        return Peer(self, Hello(node=node, role=role, boot=fields.pop("boot", "b1"), **fields), sites).connect()

    def executor(self, *sites: str, node: str = "", boot: str = "b1", capacity: int = 0) -> Peer:
        """A connected executor of these sites."""
        name = node or f"executor/{sites[0]}"
        return self.peer("executor", name, sites=sites, boot=boot, capacity=capacity or max(1, len(sites)))

    def client(self) -> Peer:
        """A connected client."""
        return self.peer("client", f"client/{random.randbytes(4).hex()}")

    def submit(self, token: str = "token", name: str = "demo", **meta: Any) -> JobId:
        """Submit a job; its id."""
        client = self.client()
        archive = client.put(b"archive of " + token.encode())
        client.send(SubmitJob(client.ref(), token, name, archive, meta=meta))
        return JobId(client.one(Answer).data["job_id"])

    def job(self, token: str = "token", **meta: Any) -> Peer:
        """Submit and claim a job, and connect its process."""
        self.submit(token, **meta)
        controller = self.peer("controller", f"controller/{token}")
        controller.send(ClaimJob(controller.ref()))
        return self.process(controller.one(Claimed))

    def process(self, claimed: Claimed) -> Peer:
        """The process of a claim, connected."""
        node = f"job/{claimed.job}/{claimed.claim}"
        return self.peer("job", node, job=claimed.job, claim=claimed.claim)


def opening(job: Peer, **fields: Any) -> tuple[OpenGather, bytes]:
    """An OpenGather of this job process and its tail."""
    sites = fields.pop("sites", ())
    rule = fields.pop("rule", None) or CloseRule(**{k: fields.pop(k) for k in list(fields) if k in RULE})
    values: dict[str, Any] = {"round": 0, "step": 0, "name": "train", "ref": job.ref()} | fields
    message = OpenGather(job=job.hello.job, claim=job.hello.claim, rule=rule, **values)
    return message, pack({"sites": list(sites)}) if sites else b""


RULE = {"min_clients", "deadline_s", "after_quorum_s", "sites_s", "straggler_patience"}


def work(executor: Peer, *, accept: bool = True) -> list[tuple[Assign, TaskRef, str]]:
    """The tasks assigned to an executor, accepted: (assign, attempt, site)."""
    out = [(a, TaskRef(i.task, i.attempt), str(i.site)) for a in executor.take(Assign) for i in a.items]
    if accept and out:
        executor.send(Accept(tuple(ref for _, ref, _ in out)))
    return out


def finish(executor: Peer, task: tuple[Assign, TaskRef, str], data: bytes = b"result", **fields: Any) -> Stored:
    """Send an inline result for a task; the broker's Stored."""
    assign, ref, site = task
    item = DoneItem(ref.task, ref.attempt, site, inline_bytes=len(data), **fields)  # pyright: ignore[reportArgumentType]
    executor.send(Done(assign.job, assign.gather, (item,)), data)
    return executor.one(Stored)


def indices(job: Peer) -> list[int]:
    """The numbers of the results that a job process was sent since."""
    return [item.index for done in job.take(Done) for item in done.items]


def partial_of(executor: Peer, tasks: list[tuple[Assign, TaskRef, str]], payload: PayloadRef) -> Done:
    """A Done of these tasks as one partial."""
    assign = tasks[0][0]
    items = tuple(DoneItem(ref.task, ref.attempt, site) for _, ref, site in tasks)  # pyright: ignore[reportArgumentType]
    return Done(assign.job, assign.gather, items, partial=payload)


class Tools:
    """The helpers above, for test files."""

    opening = staticmethod(opening)
    work = staticmethod(work)
    finish = staticmethod(finish)
    indices = staticmethod(indices)
    partial_of = staticmethod(partial_of)
    World = World
    Peer = Peer


@pytest.fixture(name="tools")
def tools_fixture() -> type[Tools]:
    return Tools


@pytest.fixture(name="world")
def world_fixture(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store")
    yield world
    world.journal.close()
