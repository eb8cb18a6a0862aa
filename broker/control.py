"""The control process: a poll loop around `ControlCore`. Sockets, clock and the order of a turn; nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog
import zmq

from ..serialization.envelope import MAX_TAIL_BYTES, Buffer
from ..serialization.errors import CodecError, StorageError, WireError
from ..serialization.loglimit import LINES
from ..serialization.messages import Ask, Bye, Fault, Get, Message, PackedDone, Packet, Ping, Progress, decode, encode
from .core import ControlCore
from .journal import Journal
from .ledger import Limits
from .lock import StoreLock
from .options import apply
from .sessions import Session, Timing
from .sockets import bind, data_endpoint_for, is_local, make_context, make_socket
from .spool import Durability, Spool
from .state import Settings

__all__ = ["ControlConfig", "ControlLoop", "run_control"]

log = structlog.get_logger(__name__)

_BATCH = 256
_BLOCKED_S = 0.02
_MAX_ERRORS = 100
#: Messages whose handlers change nothing of what the journal has.
_READS = (Ask, Get, Ping, Progress)
#: But for what an Ask orders.
_ORDERS = frozenset({"abort", "retry", "drop"})


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """What the control process is started with; sizes in bytes, times in seconds."""

    store: Path
    bind: str
    internal: str  # where the data process connects
    data_bind: str = ""  # "": the default place next to ``bind``
    advertise: str = ""  # HOST:PORT of the data link for peers that cannot dial the data bind
    durability: Durability = "power"
    integrity: Literal["digest", "size"] = "digest"
    insecure: bool = False
    trust_local: bool = True  # co-located peers of this user may map payload files; only where both links are local
    chunk_bytes: int = 1024 * 1024
    window: int = 8
    ping_s: float = 5.0
    dead_s: float = 30.0
    lost_s: float = 10.0
    takeover_s: float = 1.0
    start_s: float = 30.0
    retry_s: float = 1.0
    quota_bytes: int = 0  # of the spool; 0: four fifths of the disk's free space at the start, and what is here
    bounds: Mapping[str, int | float] = field(default_factory=dict[str, int | float])  # further ones, see `options`

    @property
    def local(self) -> bool:
        """Whether payload files may be offered to co-located peers."""
        return self.trust_local and is_local(self.bind) and (not self.data_bind or is_local(self.data_bind))

    def settings(self, endpoint: str, quota_bytes: int = 0) -> Settings:
        """What the core is told, bound at ``endpoint``."""
        settings = Settings(
            timing=apply(Timing(self.ping_s, self.dead_s, self.lost_s, self.takeover_s), self.bounds),
            limits=apply(Limits(retry_s=self.retry_s), self.bounds),
            data_endpoint=self._offered(endpoint),
            chunk_bytes=self.chunk_bytes,
            window=self.window,
            integrity=self.integrity,
            trust_local=self.local,
            quota_bytes=self.quota_bytes or quota_bytes,
            start_s=self.start_s,
        )
        return apply(settings, self.bounds)

    def _offered(self, endpoint: str) -> str:
        """The data endpoint for Welcome: peers use the host they dialled, unless one is advertised."""
        if self.advertise:
            return f"tcp://{self.advertise}"
        data = self.data_bind or data_endpoint_for(endpoint)
        return f"tcp://*:{data.rpartition(':')[2]}" if data.startswith("tcp://") else data


def run_control(
    config: ControlConfig,
    stop: threading.Event | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
    every_turn: Callable[[], None] | None = None,
) -> None:
    """Serve until ``stop`` is set, looked at twice a second at least (`ControlLoop.wake` ends a wait at once).

    Args:
        on_ready: called with the actual endpoint once peers can connect.
        every_turn: called in each turn, at least twice a second: to look after the data process.

    Raises:
        FaultError: ``insecure_bind``. LinkError: the endpoint is in use.
        StorageError: the disk failed; nothing may be acknowledged any more.
    """
    loop = ControlLoop(config)
    try:
        if on_ready is not None:
            on_ready(loop.endpoint)
        loop.run(stop or threading.Event(), every_turn)
    finally:
        loop.close()


class Clock:
    """Wall time that never jumps while the process lives: deadlines survive restarts, and no step ends every lease."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch, as it was believed at the start."""
        return time.monotonic() + self._offset


class ControlLoop:
    """The sockets and the turns."""

    def __init__(self, config: ControlConfig) -> None:
        self._clock = Clock()
        self._errors = 0
        self._sequence = 0
        self._data_peer: bytes | None = None
        self._data_outbox: deque[Message] = deque()
        self._lock = StoreLock(config.store)
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._context = make_context(2)
        self._journal: Journal | None = None
        try:
            self._spool = Spool(config.store, config.durability)
            self._journal = Journal(config.store / "journal.db", config.durability)
            self._peers = make_socket(self._context, "control-router")
            self._data = make_socket(self._context, "internal-router")
            # the replay comes before the bind: a peer that connects is answered at once
            settings = config.settings(config.bind, self._spool.default_quota())
            LINES.per_s = settings.log_lines_per_s
            self.core = ControlCore(settings, self._journal, self._spool, secrets.token_hex(8), self._clock.now())
            bind(self._data, config.internal)
            self.endpoint = bind(self._peers, config.bind, config.insecure)
        except BaseException:
            self.close()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._peers, zmq.POLLIN)
        self._poller.register(self._data, zmq.POLLIN)
        self._poller.register(self._wake_r, zmq.POLLIN)

    def run(self, stop: threading.Event, every_turn: Callable[[], None] | None = None) -> None:
        """Turn until told to stop or until the broker cannot go on, then say goodbye."""
        log.info("control_up", endpoint=self.endpoint, epoch=self.core.state.epoch)
        try:
            self._turns(stop, every_turn)
        except Exception:
            self._say_bye()
            raise
        self._say_bye()

    def _turns(self, stop: threading.Event, every_turn: Callable[[], None] | None) -> None:
        while not stop.is_set():
            self._poll()
            self._receive_peers()
            self._receive_data()
            try:
                self.core.tick(self._clock.now())
                self.core.commit()
            except StorageError:
                raise
            except Exception:  # noqa: BLE001 - as in `_receive_peers`
                self._failed("turn")
                self._start_over()
            self._send_all()
            if every_turn is not None:
                every_turn()

    @property
    def data_up(self) -> bool:
        """Whether the data process is connected."""
        return self._data_peer is not None

    def wake(self) -> None:
        """End the wait of the present turn; safe in a signal handler and from other threads."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_w, b"w")

    def close(self) -> None:
        """Free sockets and database."""
        self._context.destroy(linger=100)
        if self._journal is not None:
            self._journal.close()
        self._lock.close()
        for fd in (self._wake_r, self._wake_w):
            with contextlib.suppress(OSError):
                os.close(fd)

    # ------------------------------------------------------------ in

    def _poll(self) -> None:
        now = self._clock.now()
        blocked = bool(self.core.state.sessions.ready) or bool(self._data_outbox and self._data_peer)
        wait_s = _BLOCKED_S if blocked else max(0.0, min(0.5, self.core.next_at(now) - now))
        events = dict(self._poller.poll(int(wait_s * 1000) + (wait_s > 0)))
        if self._wake_r in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)

    def _receive_peers(self) -> None:
        for _ in range(_BATCH):
            try:
                peer, *frames = self._peers.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            now = self._clock.now()
            try:
                packet = decode(frames, MAX_TAIL_BYTES)
            except WireError as error:
                self.core.malformed(peer, error, now)
                continue
            try:
                self.core.handle(peer, packet, now)
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - the outermost guard: one message must not stop the others
                self._failed(type(packet.message).__name__)
                self._answer_failed(peer, packet, error)

    def _receive_data(self) -> None:
        for _ in range(_BATCH):
            try:
                peer, *frames = self._data.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            if peer != self._data_peer:
                self._data_peer = peer  # the data process was started anew: it says Hello and is told all sessions
                self._data_outbox.clear()
            try:
                self.core.handle_data(decode(frames, MAX_TAIL_BYTES), self._clock.now())
            except WireError as error:
                log.error("data_malformed", error=str(error))
            except StorageError:
                raise
            except Exception:  # noqa: BLE001 - as above
                self._failed("data")
                self._start_over()

    def _answer_failed(self, peer: bytes, packet: Packet, error: Exception) -> None:
        """Whoever waits for an answer gets one; and no half of a change is ever committed."""
        text = f"the broker failed at this {type(packet.message).__name__}: {error!r}"
        self._put_out(
            peer, self._frames(Fault("internal", text[:4096], getattr(packet.message, "ref", 0), packet.sequence))
        )
        if not isinstance(packet.message, _READS) or getattr(packet.message, "what", "") in _ORDERS:
            self._start_over()

    def _start_over(self) -> None:
        """Forget what is in memory and go on from the journal, as after a crash: peers say Hello and repeat.

        A handler that fails half way is a bug, and nothing tells which half was done. What the turn changed before it
        was acknowledged to nobody.
        """
        assert self._journal is not None
        peers = [session.peer for session in self.core.state.sessions.by_id.values()]
        self._journal.rewind()
        settings = self.core.state.settings
        self.core = ControlCore(settings, self._journal, self._spool, secrets.token_hex(8), self._clock.now())
        for peer in peers:
            self._put_out(peer, self._frames(Fault("session", "the broker started over: say Hello again")))

    def _failed(self, kind: str) -> None:
        self._errors += 1
        log.exception("control_loop_error", kind=kind, count=self._errors)
        if self._errors >= _MAX_ERRORS:
            raise

    # ------------------------------------------------------------ out

    def _send_all(self) -> None:
        core = self.core
        for peer, message, tail in core.loose:
            self._put_out(peer, self._frames(message, tail))
        core.loose.clear()
        sessions = core.state.sessions
        for session_id in list(sessions.ready):
            session = sessions.by_id.get(session_id)
            if session is None or self._flush(session):
                sessions.ready.discard(session_id)
        self._data_outbox.extend(core.data_out)
        core.data_out.clear()
        while len(self._data_outbox) > core.state.settings.data_outbox_messages:
            self._data_outbox.popleft()
            core.state.bounds.reached("data_outbox_messages")
        self._flush_data()
        core.state.data_outbox = len(self._data_outbox)

    def _flush(self, session: Session) -> bool:
        """Send what the peer's pipe takes; whether the outbox is empty."""
        while session.outbox:
            outgoing = session.pop()
            frames = self._frames(*outgoing, session.sequence + 1)
            sent = self._put_out(session.peer, frames)
            session.sequence += bool(sent and frames)  # the peer takes a missing number for a lost message
            if sent is None:
                session.unpop(outgoing)
                return False
            if not sent:
                session.unpop(outgoing)
                self.core.unreachable(session, self._clock.now())
                return True
        return True

    def _frames(self, message: Message | PackedDone, tail: bytes = b"", sequence: int = 0) -> list[Buffer]:
        """The frames of a message; numbered within a session only. Nothing where no peer could take it."""
        try:
            if len(tail) > MAX_TAIL_BYTES:  # the peer would cut the connection, and ask again
                raise CodecError(f"{type(message).__name__} with a tail of {len(tail)} bytes; at most {MAX_TAIL_BYTES}")
            return encode(message, tail, sequence)
        except CodecError as error:
            log.error("message_too_large", kind=type(message).__name__, error=str(error))
            ref = getattr(message, "ref", 0)
            if isinstance(message, Fault) or not ref:
                return []
            return encode(Fault("too_large", str(error), ref), sequence=sequence)

    def _put_out(self, peer: bytes, frames: list[Buffer]) -> bool | None:
        """Hand a message to the socket: True sent, None full, False gone."""
        if not frames:
            return True
        try:
            self._peers.send_multipart([peer, *frames], zmq.DONTWAIT)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return False
        return True

    def _flush_data(self) -> None:
        while self._data_outbox and self._data_peer is not None:
            self._sequence += 1
            frames = encode(self._data_outbox[0], sequence=self._sequence)
            try:
                self._data.send_multipart([self._data_peer, *frames], zmq.DONTWAIT)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                self._data_peer = None  # it died; its successor asks for everything
                self._data_outbox.clear()
                return
            self._data_outbox.popleft()

    def _say_bye(self) -> None:
        """Peers that are told connect anew at once when the broker is back, rather than after ``dead_s``."""
        for session in self.core.state.sessions.by_id.values():
            session.sequence += 1
            self._put_out(session.peer, self._frames(Bye("the broker stops"), sequence=session.sequence))
