"""The pipe between an agent and its hosts: length-prefixed msgpack maps over a unix stream socket.

A frame is a big-endian u32 with the body's size, and the body: one msgpack map with an ``"op"``. Result bytes up to the
inline size travel within it; everything larger is a file that the map names. The socket lies in a folder that only this
user may enter, and the first frame must carry the agent's token.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from ..serialization.codec import check_plain, pack, unpack
from ..serialization.envelope import Buffer
from ..serialization.errors import CodecError, LinkError, LinkTimeout
from ..serialization.scratch import Scratch

log = structlog.get_logger(__name__)

Map = dict[str, Any]

ENV_CHANNEL = "FEDLOOM_CHANNEL"
ENV_TOKEN = "FEDLOOM_TOKEN"  # noqa: S105 - the variable's name
ENV_HOST = "FEDLOOM_HOST"
#: For the processes of an external command that do not connect, such as the other ranks of a training.
ENV_SITE = "FEDLOOM_SITE"
ENV_JOB = "FEDLOOM_JOB"

MAX_FRAME_BYTES = 1024 * 1024
#: What one slow host may leave unread before the agent gives it up.
MAX_BACKLOG_BYTES = 16 * 1024 * 1024
_ACCEPT_AGAIN_S = 0.2
_READ_BYTES = 256 * 1024
_LENGTH = struct.Struct(">I")


def pack_frame(message: Mapping[str, Any]) -> bytes:
    """A map as one frame.

    Raises:
        CodecError: over 1 MiB, or not plain data.
    """
    check_plain(dict(message))  # the other end would drop the connection over it; here its caller can say what it was
    body = pack(message)
    if len(body) > MAX_FRAME_BYTES:
        raise CodecError(f"channel message {message.get('op')!r} of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Bytes in, maps out. Pure."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Map]:
        """The maps that these bytes complete.

        Raises:
            CodecError: an oversize frame, or one that is not a map with an op.
        """
        self._buffer += data
        out: list[Map] = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise CodecError(f"channel frame of {size} bytes; at most {MAX_FRAME_BYTES}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            message = unpack(bytes(self._buffer[_LENGTH.size : end]), max_bytes=MAX_FRAME_BYTES)
            del self._buffer[:end]
            if not isinstance(message, dict) or not isinstance(message.get("op"), str):  # pyright: ignore[reportUnknownMemberType]
                raise CodecError("channel frame without an op")
            out.append(message)  # pyright: ignore[reportUnknownArgumentType]
        return out


class Channel:
    """A host's blocking end. `send` may be called from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader()
        self._ready: list[Map] = []
        self._send_lock = threading.Lock()

    @classmethod
    def connect(cls, environ: Mapping[str, str], role: str, timeout_s: float = 30.0) -> Channel:
        """Connect as the environment says and introduce this process as ``"host"`` or ``"client"``.

        Raises:
            LinkError: the variables are missing, or nobody listens there.
        """
        path, token = environ.get(ENV_CHANNEL, ""), environ.get(ENV_TOKEN, "")
        if not path or not token:
            raise LinkError(f"{ENV_CHANNEL} and {ENV_TOKEN} are not set: this process was not started by an executor")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise LinkError(f"the executor's channel {path} cannot be reached ({error}): it has ended") from None
        sock.settimeout(None)
        channel = cls(sock)
        hello = {"op": "hello", "token": token, "host": environ.get(ENV_HOST, ""), "role": role, "pid": os.getpid()}
        try:
            channel.send(hello)
        except LinkError:
            channel.close()
            raise
        return channel

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one map.

        Raises:
            LinkError: the agent is gone.
            CodecError: the map is too large or not plain.
        """
        self.send_frames(pack_frame(message))

    def send_frames(self, frames: Buffer) -> None:
        """Send what `pack_frame` has made, one or several one behind the other.

        Raises:
            LinkError: the agent is gone.
        """
        try:
            with self._send_lock:
                self._sock.sendall(frames)
        except OSError as error:
            raise LinkError(f"the executor is gone: {error}") from None

    def receive(self, timeout_s: float | None = None) -> Map:
        """The next map.

        Raises:
            LinkTimeout: none came in time.
            LinkError: the agent is gone.
        """
        while not self._ready:
            try:
                self._sock.settimeout(timeout_s)
                data = self._sock.recv(_READ_BYTES)
            except TimeoutError:
                raise LinkTimeout(f"nothing from the executor within {timeout_s} s") from None
            except OSError as error:
                raise LinkError(f"the executor is gone: {error}") from None
            finally:
                with contextlib.suppress(OSError):
                    self._sock.settimeout(None)
            if not data:
                raise LinkError("the executor closed its channel")
            self._ready += self._reader.feed(data)
        return self._ready.pop(0)

    def close(self) -> None:
        """Close; whoever waits in `receive` gets a LinkError."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


@dataclass(slots=True)
class _Peer:
    sock: socket.socket
    id: int
    host: str = ""
    role: str = ""
    known: bool = False
    reader: FrameReader = field(default_factory=FrameReader)
    out: bytearray = field(default_factory=bytearray)
    closing: bool = False


#: (connection, host id, role, message); the message is None when that connection ended.
OnMessage = Callable[[int, str, str, Map | None], None]


class ChannelServer:
    """The agent's end: one thread that owns the listening socket and every host's connection.

    ``on_message`` is called in that thread and must return fast. A host's first message is its hello, passed on once
    its token held. It opens with the first host: an executor of functions alone has no socket and no thread.
    """

    def __init__(self, on_message: OnMessage) -> None:
        self._on_message = on_message
        self.token = secrets.token_hex(16)
        self.path = ""
        self._peers: dict[int, _Peer] = {}
        self._dirty: set[int] = set()  # those to look after: something is to be sent, or they are to close
        self._accept_at = 0.0  # the listener rests until then; 0: it listens
        self._next_id = 1
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fedloom-channel", daemon=True)

    def start(self) -> None:
        """Open the socket and start the thread."""
        self._scratch = Scratch("executor", short=True)
        self.path = str(self._scratch.path / "channel")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(256)
        self._listener.setblocking(False)
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread.start()

    def environ(self, host: str) -> dict[str, str]:
        """What a host must find in its environment to connect."""
        if not self.path:
            self.start()
        return {ENV_CHANNEL: self.path, ENV_TOKEN: self.token, ENV_HOST: host}

    def send(self, connection: int, message: Mapping[str, Any]) -> bool:
        """Queue a map for a connection. False where it is gone. Thread-safe, never blocks."""
        frame = pack_frame(message)
        with self._lock:
            peer = self._peers.get(connection)
            if peer is None or peer.closing:
                return False
            if len(peer.out) + len(frame) > MAX_BACKLOG_BYTES:
                log.warning("host_not_reading", host=peer.host, backlog_bytes=len(peer.out))
                peer.closing = True
                self._dirty.add(connection)
                self._wake()
                return False
            peer.out += frame
            self._dirty.add(connection)
        self._wake()
        return True

    def disconnect(self, connection: int) -> None:
        """End a connection after what is queued for it."""
        with self._lock:
            peer = self._peers.get(connection)
            if peer is not None:
                peer.closing = True
                self._dirty.add(connection)
        self._wake()

    def close(self) -> None:
        """Stop the thread and remove the socket."""
        if not self.path:
            return
        self._stopping = True
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        for peer in list(self._peers.values()):
            peer.sock.close()
        self._peers.clear()
        self._selector.close()
        for sock in (self._listener, self._wake_r, self._wake_w):
            sock.close()
        self._scratch.close()

    # ------------------------------------------------------------ the thread

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
            self._wake_w.send(b"\0")

    def _run(self) -> None:
        while not self._stopping:
            events = self._selector.select(_ACCEPT_AGAIN_S if self._accept_at else 5.0)
            if self._accept_at and time.monotonic() >= self._accept_at:
                self._accept_at = 0.0
                self._selector.register(self._listener, selectors.EVENT_READ)
            for key, mask in events:
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_r:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_r.recv(4096)
                else:
                    peer: _Peer = key.data
                    if mask & selectors.EVENT_WRITE:
                        with self._lock:
                            self._dirty.add(peer.id)
                    if mask & selectors.EVENT_READ and peer.id in self._peers:
                        self._read(peer)
            self._flush()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # mostly no descriptor left: asking again at once would only spin
            log.warning("channel_accept_failed", error=str(error))
            self._selector.unregister(self._listener)
            self._accept_at = time.monotonic() + _ACCEPT_AGAIN_S
            return
        sock.setblocking(False)
        with self._lock:
            peer = _Peer(sock, self._next_id)
            self._next_id += 1
            self._peers[peer.id] = peer
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        try:
            messages = peer.reader.feed(data)
        except CodecError as error:
            log.warning("channel_malformed", host=peer.host, error=str(error))
            self._drop(peer)
            return
        for message in messages:
            if not peer.known and not self._admit(peer, message):
                self._drop(peer)
                return
            self._on_message(peer.id, peer.host, peer.role, message)

    def _admit(self, peer: _Peer, message: Map) -> bool:
        token, host, role = message.get("token"), message.get("host"), message.get("role")
        good = (
            message["op"] == "hello"
            and isinstance(token, str)
            and hmac.compare_digest(token.encode(), self.token.encode())
            and isinstance(host, str)
            and role in ("host", "client")
        )
        if not good:
            log.warning("channel_refused", reason="no hello with this executor's token")
            return False
        peer.host, peer.role, peer.known = str(host), str(role), True
        return True

    def _flush(self) -> None:
        with self._lock:
            peers = [self._peers[id] for id in self._dirty if id in self._peers]
            self._dirty.clear()
        for peer in peers:
            broken = False
            with self._lock:
                while peer.out:
                    try:
                        sent = peer.sock.send(memoryview(peer.out)[:_READ_BYTES])
                    except BlockingIOError:
                        break
                    except OSError:
                        broken = True
                        break
                    del peer.out[:sent]
                left = bool(peer.out)
            if broken or (peer.closing and (not left or len(peer.out) > MAX_BACKLOG_BYTES // 2)):
                self._drop(peer)
                continue
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if left else 0)
            if self._selector.get_key(peer.sock).events != wanted:
                self._selector.modify(peer.sock, wanted, peer)

    def _drop(self, peer: _Peer) -> None:
        with self._lock:
            if self._peers.pop(peer.id, None) is None:
                return
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer.known:
            self._on_message(peer.id, peer.host, peer.role, None)
