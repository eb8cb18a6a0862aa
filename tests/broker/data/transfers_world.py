"""What `test_transfers_machine` drives: a data process over a folder, peers with real streams, a played control."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

from fedloom.broker.linkstreams import Download, Streams, Upload
from fedloom.broker.spool import Spool
from fedloom.broker.transfers import CONTROL, Limits, Transfers
from fedloom.serialization import digest
from fedloom.serialization.errors import FedloomError
from fedloom.serialization.messages import (
    Abort,
    Event,
    Fault,
    Grant,
    Hello,
    Message,
    Packet,
    PayloadRef,
    Put,
    Stored,
    Welcome,
    decode,
    encode,
)

KIB = 1024
BLOCK = 4 * KIB
SOURCE = random.Random(5).randbytes(24 * KIB)
#: The payloads that there are: none, one byte, less than a block, whole blocks, and more.
SIZES = (0, 1, 1000, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 19 * KIB + 7)
LIMITS = Limits(chunk_bytes=1500, window=3, max_streams=4, max_streams_per_peer=2, window_bytes=8 * 1500)
#: A fair network ends every stream in this time: a stall, a session's Hello, some questions, a few supersedings.
FAIR_S = 150.0


@dataclass(eq=False)
class Peer:
    """A process with a data link: its streams are those of `link`."""

    name: str
    route: bytes = b""
    boots: int = 0
    streams: Streams = field(default_factory=Streams)
    wants: list[Upload | Download] = field(default_factory=list[Any])
    welcome: Welcome | None = None
    hello_at: float = 0.0
    up: list[list[bytes]] = field(default_factory=list[Any])
    down: list[list[bytes]] = field(default_factory=list[Any])


class TransfersWorld:
    """Peers, one data process over a folder, and what control knows; the machine adds what happens to them."""

    # ------------------------------------------------------------ the data process

    def start(self) -> None:
        self.boots += 1
        self.spool = Spool(self.folder, "process")
        self.transfers = Transfers(
            self.spool, self.limits, boot=f"{self.boots:016x}", next_epoch=self.next_epoch, endpoint="tcp://d"
        )
        self.transfers.start(self.now)
        self.asked.clear()
        self.collect()

    def kill(self) -> None:
        """The process is gone, and its descriptors with it."""
        for _, landing in self.transfers.landings():
            if landing.fd is not None:
                os.close(landing.fd)
        for peer in self.peers:
            self.transfers.lost(peer.route)

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def collect(self, *, land: bool = True) -> None:
        """Take what the data process sends and hands over."""
        if land:
            landings = self.transfers.landings()
            gone = self.spool.finish_all([landing for _, landing in landings])
            for key, landing in landings:
                if landing not in gone:
                    path = self.spool.path(landing.payload)
                    assert path.read_bytes() == self.bytes[landing.payload], "whole, and the bytes that were put"
                self.transfers.landed(key, self.now, gone=landing in gone)
        for out in self.transfers.outgoing():
            message = out.message
            if out.route == CONTROL:
                self.from_data(message)
                continue
            if isinstance(message, Stored) and message.payload is not None:
                assert self.rows.get(message.payload.id) == message.payload, "stored is said after the row"
            for peer in self.peers:
                if peer.route == out.route:
                    peer.down.append([bytes(frame) for frame in encode(message, out.tail)])

    # ------------------------------------------------------------ control, played

    def from_data(self, message: Message) -> None:
        match message:
            case Hello():
                for peer in self.peers:
                    self.order(Welcome(peer.name, "control-1"), collect=False)
            case Put():
                if all(message != known for known in self.asked):
                    self.asked.append(message)
            case Event():
                pass
            case other:
                raise AssertionError(other)

    def order(self, message: Message, *, collect: bool = True) -> None:
        self.transfers.on_control(decode_of(encode(message)), self.now)
        if collect:
            self.collect()

    def answer(self, put: Put, refuse: str = "") -> None:
        """Control's word on a question; what has landed gets its row."""
        ref = put.payload
        if ref.id in self.rows:
            self.order(Stored(stream=put.stream, payload=self.rows[ref.id]))
        elif put.local == "landed":
            if not self.spool.exists(ref.id, ref.size):
                self.order(Abort(put.stream, "lost", "put it again", 0.1))
                return
            data = self.bytes[ref.id]
            assert self.spool.path(ref.id).read_bytes() == data
            assert ref == PayloadRef(ref.id, len(data), digest.digest_buffers([data])), "told by its own digest"
            self.rows[ref.id] = ref
            self.order(Stored(stream=put.stream, payload=ref))
        elif refuse:
            self.order(Abort(put.stream, refuse, "no", 1.0 if refuse == "quota" else 0.0))
        else:
            self.order(Grant(put.stream, 0, 0, 0))

    # ------------------------------------------------------------ peers

    def connect(self, peer: Peer) -> None:
        """A new connection: what was on the old one is lost, and the broker hears of that when it writes to it."""
        if peer.route:
            self.transfers.lost(peer.route)
        peer.boots += 1
        peer.route = f"{peer.name}-{peer.boots}".encode()
        peer.up.clear()
        peer.down.clear()
        peer.welcome = None
        peer.hello_at = float("-inf")

    def speak(self, peer: Peer) -> bool:
        """What the link would send now."""
        before = len(peer.up)
        if peer.welcome is None:
            if self.now >= peer.hello_at + 2.5:
                peer.hello_at = self.now
                peer.up.append(frames_of(encode(Hello(peer.name, "executor", "boot", session=peer.name))))
        else:
            for frames in peer.streams.outgoing(self.now, peer.welcome):
                peer.up.append(frames_of(frames))
        for want in list(peer.wants):
            if want.done.is_set():
                peer.streams.remove(want)
                peer.wants.remove(want)
                self.ended(want)
        return len(peer.up) > before

    def ended(self, want: Upload | Download) -> None:
        """What its user is told."""
        if want.error is not None:
            assert isinstance(want.error, FedloomError), want.error
        elif isinstance(want, Upload):
            assert want.stored is not None and self.rows[want.stored.id] == want.stored
            assert self.spool.path(want.stored.id).read_bytes() == self.bytes[want.stored.id]
        else:
            assert bytes(want.got) == self.bytes[want.ref.id]  # type: ignore[attr-defined]

    def hear(self, peer: Peer, frames: list[bytes]) -> None:
        packet = decode(frames, self.limits.chunk_bytes + 4096)
        match packet.message:
            case Welcome() as welcome:
                peer.welcome = welcome
                peer.streams.connected()
            case Fault(code="session"):
                self.connect(peer)
            case Fault():
                pass
            case message:
                peer.streams.on_message(message, packet.tail, self.now)

    def tell(self, peer: Peer, frames: list[bytes]) -> None:
        self.transfers.on_peer(peer.route, decode(frames, self.limits.chunk_bytes), self.now)
        self.collect()


def frames_of(frames: Any) -> list[bytes]:
    """As the socket would take them."""
    return [bytes(frame) for frame in frames]


def decode_of(frames: Any) -> Packet:
    return decode(frames_of(frames), 1 << 20)
