"""Who attacks: peers on bare sockets, which say what they like and how they like it."""

from __future__ import annotations

import re
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.serialization.codec import pack
from fedloom.serialization.envelope import pack_envelope
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Ask,
    Assign,
    Bye,
    DoneItem,
    Fault,
    Hello,
    Message,
    TaskRef,
    Welcome,
    decode,
    encode,
)

M = TypeVar("M")

WAIT_S = 20.0


class Wire:
    """A stranger's program: two bare DEALER sockets, and whatever bytes it wants to send."""

    def __init__(self, ground: Any, hello: Hello | None, sites: tuple[str, ...] = ()) -> None:
        self.ground = ground
        self.hello = hello
        self.sites = sites
        self.welcome: Welcome | None = None
        self.sequence = 0
        self._kept: list[tuple[Message, bytes]] = []
        self._control = self._socket(ground.endpoint)
        self._data: zmq.Socket[bytes] | None = None
        self.got: list[tuple[Message, bytes]] = []

    def _socket(self, endpoint: str) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self.ground.context.socket(zmq.DEALER)
        sock.set(zmq.LINGER, 0)
        sock.connect(endpoint)
        return sock

    def join(self) -> Wire:
        """Say Hello and be welcome."""
        assert self.hello is not None
        self.send(self.hello, pack({"sites": list(self.sites)}) if self.sites else b"")
        self.welcome = self.take(Welcome)
        return self

    # ------------------------------------------------------------ out

    def send(self, message: Message, tail: bytes = b"") -> int:
        """A message on the control link; its sequence number."""
        self.sequence += 1
        self._control.send_multipart(encode(message, tail, self.sequence))
        return self.sequence

    def frames(self, *frames: bytes) -> None:
        """Any frames on the control link."""
        self._control.send_multipart(list(frames))

    def body(self, kind: int, body: bytes, tail: bytes = b"") -> None:
        """A right envelope around any body."""
        self.frames(pack_envelope(kind, 0, body, tail), body, *([tail] if tail else []))

    def put(self, message: Message, tail: bytes = b"") -> None:
        """A message on the data link."""
        self.data.send_multipart(encode(message, tail))

    @property
    def data(self) -> zmq.Socket[bytes]:
        """The data link's socket; nothing is said on it yet."""
        if self._data is None:
            self._data = self._socket(self.ground.data_endpoint)
        return self._data

    def open_data(self) -> Wire:
        """Say Hello on the data link and be welcome there."""
        assert self.hello is not None and self.welcome is not None
        self.put(Hello(self.hello.node, self.hello.role, self.hello.boot, session=self.welcome.session))
        self.take_data(Welcome)
        return self

    # ------------------------------------------------------------ in

    def take(self, kind: type[M], timeout_s: float = WAIT_S, where: Callable[[M], bool] = lambda m: True) -> M:
        """The next message of this kind off the control link; others are kept."""
        return self._take(self._control, kind, timeout_s, where)[0]

    def take_data(self, kind: type[M], timeout_s: float = WAIT_S, where: Callable[[M], bool] = lambda m: True) -> M:
        """The same off the data link."""
        return self._take(self.data, kind, timeout_s, where)[0]

    def _take(
        self, sock: zmq.Socket[bytes], kind: type[M], timeout_s: float, where: Callable[[M], bool]
    ) -> tuple[M, bytes]:
        for at, (message, tail) in enumerate(self._kept):
            if isinstance(message, kind) and where(message):
                del self._kept[at]
                return message, tail
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not sock.poll(int(left * 1000) + 1):
                raise AssertionError(f"no {kind.__name__} within {timeout_s:g} s; there came {self.described()}")
            packet = decode(sock.recv_multipart())
            if isinstance(packet.message, kind) and where(packet.message):
                return packet.message, bytes(packet.tail)
            self._kept.append((packet.message, bytes(packet.tail)))

    def described(self) -> str:
        """What came and was not taken, the last of it."""
        return ", ".join(str(message)[:160] for message, _ in self._kept[-8:])

    def refused(self, code: str, words: str = "", *, about: int | None = None, data: bool = False) -> Fault:
        """The next Fault is of this code, and says these words (a regular expression)."""
        fault = self.take_data(Fault) if data else self.take(Fault)
        assert fault.code == code, fault
        assert re.search(words, fault.text), fault
        assert about is None or fault.about == about, fault
        return fault

    def silent(self, kind: type[Any], *, data: bool = False, probe: Message | None = None) -> None:
        """No message of this kind has come by the time that a later question is answered."""
        if data:
            with pytest.raises(AssertionError, match="no "):
                self.take_data(kind, 0.2)
            return
        ref = secrets.randbelow(2**40) + 1
        self.send(probe or Ask(ref, "jobs"))
        self.take(Answer, where=lambda m: m.ref == ref)
        assert not [m for m, _ in self._kept if isinstance(m, kind)]

    # ------------------------------------------------------------ work

    def work(self) -> tuple[Assign, DoneItem]:
        """Take a task and accept it."""
        assign = self.take(Assign)
        item = assign.items[0]
        self.send(Accept(tuple(TaskRef(i.task, i.attempt) for i in assign.items)))
        return assign, DoneItem(item.task, item.attempt, item.site)

    def close(self) -> None:
        """Go, politely where there is a session: the next test may want the name."""
        if self.welcome is not None:
            self.send(Bye("done"))
        self._control.close(linger=200)
        if self._data is not None:
            self._data.close(linger=0)


GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"


class Tcp:
    """A ZMTP connection by hand: frames that libzmq would never send."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self.sock = socket.create_connection((host, int(port)), WAIT_S)
        self.sock.sendall(GREETING)
        self._read(64)
        self.sock.sendall(bytes((4, len(READY))) + READY)
        self._read(self._read(2)[1])  # its READY

    def _read(self, count: int) -> bytes:
        out = b""
        while len(out) < count:
            got = self.sock.recv(count - len(out))
            assert got, "the connection was cut during the handshake"
            out += got
        return out

    def frame(self, body: bytes, *, more: bool = False, size: int | None = None) -> None:
        """A frame; ``size`` is what its header claims."""
        self.sock.sendall(struct.pack(">BQ", 2 | more, len(body) if size is None else size) + body)

    def cut(self) -> bool:
        """Whether the other side ends the connection at once: whoever is silent is cut too, but only after 15 s."""
        self.sock.settimeout(4.0)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True
