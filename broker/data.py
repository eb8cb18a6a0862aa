"""The data process: a poll loop around `Transfers`, a process of its own so that chunks never delay a lease.

One ROUTER for the peers' data links, one internal DEALER to the control process. Every send is DONTWAIT; what a peer's
socket does not take waits in its bounded outbox, and a peer with an outbox gets no further chunks. Files are synced in
a thread, all that are ready at once, since a sync of gigabytes takes seconds that other streams must not wait.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
import zmq

from ..serialization.envelope import Buffer
from ..serialization.errors import FedloomError, StorageError, WireError
from ..serialization.loglimit import LINES
from ..serialization.memory import give_back, keep_freed_memory
from ..serialization.messages import decode, encode
from ..serialization.processes import die_with_parent, setup_logging
from .datasync import Epochs, Syncer
from .options import apply
from .sockets import bind, connect, make_context, make_socket
from .spool import Durability, Spool
from .transfers import CONTROL, Limits, Outgoing, Transfers

__all__ = ["STORAGE_EXIT", "DataConfig", "main", "run_data"]

#: The process's exit code when its disk failed: it must not be started again as if nothing had been.
STORAGE_EXIT = 5

log = structlog.get_logger(__name__)

_BATCH = 256
_BATCH_BYTES = 32 * 1024 * 1024
_WORK_BYTES = 16 * 1024 * 1024
_WORK_CHUNKS = 16
_TICK_S = 0.05
_SWEEP_S = 600.0
_IDLE_S = 5.0
_MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What the data process is started with; sizes in bytes, times in seconds."""

    store: Path
    bind: str
    internal: str  # the control process's endpoint
    durability: Durability = "power"
    integrity: Literal["digest", "size"] = "digest"
    insecure: bool = False
    chunk_bytes: int = 1024 * 1024
    window: int = 8
    trust_local: bool = False
    stall_s: float = 30.0
    hello_wait_s: float = 2.0
    bounds: Mapping[str, int | float] = field(default_factory=dict[str, int | float])  # further ones, see `options`
    parent: int = 0  # the pid that must be alive; 0: not looked at

    def limits(self) -> Limits:
        """The bounds of the transfers."""
        limits = Limits(
            chunk_bytes=self.chunk_bytes,
            window=self.window,
            digested=self.integrity == "digest",
            trust_local=self.trust_local,
            stall_s=self.stall_s,
            hello_wait_s=self.hello_wait_s,
        )
        return apply(limits, self.bounds)

    def to_json(self) -> str:
        """For the command line of `main`."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields | {"store": str(self.store), "bounds": dict(self.bounds)})

    @classmethod
    def from_json(cls, text: str) -> DataConfig:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        fields["store"] = Path(fields["store"])
        return cls(**fields)


def run_data(config: DataConfig, stop: threading.Event | None = None) -> None:
    """Serve until ``stop`` is set (looked at once a second at least).

    Raises:
        FaultError: ``insecure_bind``. LinkError: the endpoint is in use.
        StorageError: the disk failed: nothing may be acknowledged any more, so the process ends.
    """
    loop = DataLoop(config)
    try:
        loop.run(stop or threading.Event())
    finally:
        loop.close()


class DataLoop:
    """The sockets, the outboxes and the turns; everything else is in `Transfers`."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        spool = Spool(config.store, config.durability)
        self._spool = spool
        self._errors = 0
        self._sequence = 0
        self._ticked_at = self._swept_at = self._idled_at = float("-inf")
        self._outboxes: dict[bytes, deque[list[Buffer]]] = {}
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._context = make_context(2)
        try:
            self._peers = make_socket(self._context, "data-router", chunk_bytes=config.chunk_bytes)
            self._control = make_socket(self._context, "internal-dealer")
            self.endpoint = bind(self._peers, config.bind, config.insecure)
            connect(self._control, config.internal)
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._wake_r)
            os.close(self._wake_w)
            raise
        LINES.per_s = int(config.bounds.get("log_lines_per_s", LINES.per_s))
        self._syncer = Syncer(spool, self._wake_w)
        self.transfers = Transfers(
            spool,
            config.limits(),
            boot=secrets.token_hex(8),
            next_epoch=Epochs(spool.run / "data.epoch").next,
            endpoint=self.endpoint,
        )
        self._poller = zmq.Poller()
        self._poller.register(self._peers, zmq.POLLIN)
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self._wake_r, zmq.POLLIN)

    def run(self, stop: threading.Event, on_idle: Callable[[], None] = lambda: None) -> None:
        """Turn until told to stop; ``on_idle`` is called now and then where there is nothing to do."""
        log.info("data_up", endpoint=self.endpoint, durability=self._spool.durability)
        self.transfers.start(time.monotonic())
        more = True
        while not stop.is_set():
            self._poll(more)
            self._receive(self._control)
            self._receive(self._peers)
            now = time.monotonic()
            if now - self._ticked_at >= _TICK_S:
                self._ticked_at = now
                self.transfers.tick(now, max((len(w) for route, w in self._outboxes.items() if route), default=0))
            more = self.transfers.work(self._outboxes.keys(), now, max_bytes=_WORK_BYTES, chunks=_WORK_CHUNKS)
            self._syncer.submit(self.transfers.landings())
            for key, gone in self._syncer.done():
                self.transfers.landed(key, now, gone=gone)
            self._send_all()
            self._sweep(now)
            if self.transfers.idle and now - self._idled_at >= _IDLE_S:
                self._idled_at = now
                on_idle()

    def wake(self) -> None:
        """End the wait of the present turn; safe in a signal handler."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_w, b"w")

    def close(self) -> None:
        """Bring the files that are whole to the disk, free the sockets."""
        self._syncer.close()
        self._context.destroy(linger=0)
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _poll(self, more: bool) -> None:
        if more:
            wait_s = 0.0
        elif any(route != CONTROL for route in self._outboxes):
            wait_s = 0.01  # a ROUTER cannot say when one peer's pipe has room again
        else:
            wait_s = 1.0 if self.transfers.idle else 0.1
        # a DEALER can say it, and says nothing while control is away
        self._poller.modify(self._control, zmq.POLLIN | (zmq.POLLOUT if CONTROL in self._outboxes else 0))
        events = dict(self._poller.poll(int(wait_s * 1000)))
        if self._wake_r in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        taken = 0
        for _ in range(_BATCH):
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            route = CONTROL if socket is self._control else frames.pop(0).bytes
            now = time.monotonic()
            try:
                packet = decode([frame.buffer for frame in frames], self._config.chunk_bytes)
                if socket is self._control:
                    self.transfers.on_control(packet, now)
                else:
                    self.transfers.on_peer(route, packet, now)
            except WireError as error:
                if socket is self._control:
                    log.error("control_malformed", error=str(error))
                else:
                    self.transfers.malformed(route, error, now)
            except StorageError:
                raise
            except Exception:  # the loop's outermost guard: one message must not stop the others
                self._errors += 1
                log.exception("data_loop_error", count=self._errors)
                if self._errors >= _MAX_ERRORS:
                    raise
            taken += len(frames[-1]) if frames else 0
            if taken >= _BATCH_BYTES:
                return

    def _send_all(self) -> None:
        for route in list(self._outboxes):
            self._flush(route)
        for out in self.transfers.outgoing():
            self._send(out)

    def _send(self, out: Outgoing) -> None:
        self._sequence += 1
        frames = encode(out.message, out.tail, self._sequence)
        waiting = self._outboxes.get(out.route)
        if waiting is None:
            if self._put_out(out.route, frames):
                return
            waiting = self._outboxes[out.route] = deque()
        waiting.append(frames)
        limits, bounds = self.transfers.limits, self.transfers.bounds
        if out.route == CONTROL and len(waiting) > limits.control_outbox_messages:
            bounds.reached("control_outbox_messages")
            waiting.popleft()  # every question is repeated until it is answered
        elif out.route != CONTROL and len(waiting) > limits.peer_outbox_messages:
            bounds.reached("peer_outbox_messages")
            self._lost(out.route)

    def _flush(self, route: bytes) -> None:
        waiting = self._outboxes.get(route)
        while waiting:
            if not self._put_out(route, waiting[0]):
                return
            if waiting:  # empty where the peer turned out to be gone
                waiting.popleft()
        self._outboxes.pop(route, None)

    def _put_out(self, route: bytes, frames: list[Buffer]) -> bool:
        """Hand frames to the socket; False when it is full. A peer that is gone takes everything."""
        socket, parts = (self._control, frames) if route == CONTROL else (self._peers, [route, *frames])
        try:
            socket.send_multipart(parts, zmq.DONTWAIT, copy=len(frames) < 3)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._lost(route)
        return True

    def _lost(self, route: bytes) -> None:
        waiting = self._outboxes.pop(route, None)
        if waiting is not None:
            waiting.clear()
        self.transfers.lost(route)

    def _sweep(self, now: float) -> None:
        if now - self._swept_at >= _SWEEP_S:
            self._swept_at = now
            keep_s = self.transfers.limits.keep_incoming_s
            count = self._spool.sweep_incoming(time.time() - keep_s, self.transfers.uploads.names_in_use())
            if count:
                log.info("incoming_swept", files=count)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m fedloom.broker.data JSON``: the fields of `DataConfig`. Ends with its parent."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) != 1:
        sys.stderr.write("usage: python -m fedloom.broker.data JSON\n")
        return 2
    # as its control process logs, which passes its command line's wishes on in the environment
    setup_logging(os.environ.get("FEDLOOM_LOG_LEVEL", "info"), os.environ.get("FEDLOOM_LOG_FORMAT") == "json")
    config = DataConfig.from_json(args[0])
    die_with_parent()
    keep_freed_memory()
    if config.parent and os.getppid() != config.parent:
        return 0  # it was gone before we could ask for the signal
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard != soft else (soft, hard))
    stop = threading.Event()
    try:
        loop = DataLoop(config)
        try:

            def end(_signal: int, _frame: object) -> None:
                stop.set()
                loop.wake()

            signal.signal(signal.SIGTERM, end)
            signal.signal(signal.SIGINT, end)
            loop.run(stop, give_back)
        finally:
            loop.close()
    except StorageError as error:
        log.error("data_failed", error=str(error))
        return STORAGE_EXIT
    except FedloomError as error:
        log.error("data_failed", error=str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
