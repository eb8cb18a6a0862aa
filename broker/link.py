"""A peer's side of the wire: two sockets in one thread, reconnects, requests, payloads in and out.

Controllers, executors and clients all talk to the broker through a `Link`. Its thread owns the sockets; every other
thread hands it messages. What must not be lost is repeated after a reconnect: requests by the link, results and gathers
by their owners, who are told of each (re)connect by a `Welcome` through ``on_message``. Payload streams go on at the
receiver's watermark.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import zmq

from ..serialization.envelope import Buffer
from ..serialization.errors import (
    FaultError,
    LinkError,
    LinkTimeout,
    PayloadError,
    WireError,
)
from ..serialization.messages import (
    INLINE_BYTES,
    Bye,
    Get,
    Hello,
    JobId,
    Message,
    PayloadRef,
    Put,
    Stored,
    TaskId,
    TaskRef,
    Welcome,
)
from .linksession import LinkState, LocalSpool, OnMessage, Request, Session, State
from .linkstreams import Download, Sink, Source, Upload
from .sockets import make_context

log = structlog.get_logger(__name__)

_BACKOFF_S = (0.05, 2.0)


class Link:
    """A peer's connection to the broker.

    Args:
        endpoint: the broker's control endpoint.
        hello: who this peer is; sent at each connect.
        sites: the sites it serves.
        held: asked at each connect: the attempts it holds (their leases are re-adopted).
        on_message: called in the link's thread, must return fast. Also gets a `Welcome` at each (re)connect, and a
            fatal `Fault` when the link is given up.
        give_up_s: after this long without a broker the link closes; None: it tries for ever.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        *,
        sites: Sequence[str] = (),
        held: Callable[[], list[TaskRef]] = list,
        on_message: OnMessage = lambda message, tail: None,
        free: Callable[[], int] = lambda: 0,
        give_up_s: float | None = None,
    ) -> None:
        self._shared = LinkState(endpoint, hello, sites, held, free, on_message)
        self._give_up_s = give_up_s
        self._ref = 0
        self._thread = threading.Thread(target=self._main, name="fedloom-link", daemon=True)
        self._pid = os.getpid()

    @property
    def endpoint(self) -> str:
        """The broker's control endpoint."""
        return self._shared.endpoint

    @property
    def state(self) -> State:
        """Whether the broker answers: connecting, up, down, or closed for good."""
        return self._shared.state

    @property
    def welcome(self) -> Welcome | None:
        """The broker's last Welcome."""
        return self._shared.welcome

    @property
    def local(self) -> LocalSpool | None:
        """The broker's spool, if this process is co-located with it."""
        return self._shared.local

    @property
    def fatal(self) -> FaultError | None:
        """Why the link was given up."""
        return self._shared.fatal

    @property
    def bytes_sent(self) -> int:
        """Bytes sent on the data link so far."""
        return self._shared.bytes_sent

    # ------------------------------------------------------------ any thread

    def start(self, timeout_s: float = 30.0) -> Welcome:
        """Connect and say Hello.

        Raises:
            LinkTimeout: no broker answered in time.
            FaultError: it answered, and refused.
        """
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._shared.connected.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
            if self.fatal:
                self.close()
                raise self.fatal
            if time.monotonic() >= deadline:
                self.close()
                raise LinkTimeout(
                    f"no broker answered at {self.endpoint} within {timeout_s:g} s: does it run, is the address right?"
                )
        assert self.welcome is not None
        return self.welcome

    def next_ref(self) -> int:
        """A fresh number for a request's ``ref``."""
        with self._shared.lock:
            self._ref += 1
            return self._ref

    def send(self, message: Message, tail: Buffer = b"") -> None:
        """Send on the control link; while it is down the message is dropped: the protocol's repeats make up for it."""
        if self.state == "up":
            self._shared.outbox.append((message, tail))
            self._shared.wake()

    def request(self, message: Any, tail: Buffer = b"", timeout_s: float = 60.0) -> tuple[Message, Buffer]:
        """Send a message with a ``ref`` and wait for its answer; it is repeated after a reconnect.

        Raises:
            FaultError: the broker refused (`FencedError` and `NondeterministicError` for those codes).
            LinkTimeout: no answer in time.
            LinkError: the link was closed or given up.
        """
        request = Request(message, tail)
        with self._shared.lock:
            self._shared.requests[message.ref] = request
        try:
            self.send(message, tail)
            self._wait(request.done, timeout_s, f"{type(message).__name__} to {self.endpoint}")
        finally:
            with self._shared.lock:
                self._shared.requests.pop(message.ref, None)
        if request.error:
            raise request.error
        assert request.answer is not None
        return request.answer

    def put(
        self,
        ref: PayloadRef,
        source: Sequence[Buffer] | Path,
        *,
        job: str = "",
        claim: int = 0,
        task: str = "",
        attempt: int = 0,
        timeout_s: float = 3600.0,
    ) -> PayloadRef:
        """Store a payload at the broker; returns once it is committed there.

        Small ones ride inline, a co-located broker takes the finished file, all others are streamed under grants and go
        on at the watermark after a reconnect. A ``source`` path is left in place.

        Raises:
            FaultError: the broker refused it. LinkTimeout: it did not get there in time.
        """
        put = Put(payload=ref, job=JobId(job), claim=claim, task=TaskId(task), attempt=attempt)
        if ref.size <= INLINE_BYTES:
            data = source.read_bytes() if isinstance(source, Path) else b"".join(source)
            answer, _ = self.request(replace(put, ref=self.next_ref()), data, timeout_s)
            assert isinstance(answer, Stored)
            return answer.payload or ref
        with Source(source) as opened:
            upload = Upload(replace(put, stream=secrets.token_hex(16)), opened, self.local)
            stored = self._run_stream(upload, timeout_s, f"upload of {ref.id}") or ref
        if self.local is None:
            sent, resumed = upload.chunks_sent, upload.resumed_at
            log.info("uploaded", payload=ref.id, size=ref.size, chunks_sent=sent, resumed_at=resumed)
        return stored

    def put_local(self, ref: PayloadRef, name: str, *, timeout_s: float = 600.0, **owner: Any) -> PayloadRef:
        """Hand over a finished file that was written as ``local.incoming_path(name)``.

        Raises:
            FaultError: the broker refused it. LinkTimeout: it did not answer in time.
        """
        upload = Upload(Put(payload=ref, stream=secrets.token_hex(16), local=name, **owner), None, None)
        return self._run_stream(upload, timeout_s, f"hand-over of {ref.id}") or ref

    def fetch(self, ref: PayloadRef, timeout_s: float = 3600.0, dest: Path | None = None) -> Path | bytes:
        """A payload: its path where it can be mapped, else its bytes, or ``dest`` filled with them (moved there whole).

        Raises:
            PayloadError: its size or digest is not what the reference says. FaultError: unknown to the broker.
        """
        if self.local and (path := self.local.payload_path(ref.id)).is_file():
            if path.stat().st_size != ref.size:
                raise PayloadError(f"payload {ref.id} has {path.stat().st_size} bytes; its reference says {ref.size}")
            return path
        if ref.size <= INLINE_BYTES:
            answer, tail = self.request(Get("0" * 32, ref.id, 0, 0, ref=self.next_ref()), timeout_s=timeout_s)
            if isinstance(answer, Stored) and len(tail) == ref.size:
                return bytes(tail)
        if dest is None:
            out = bytearray(ref.size)

            def fill(offset: int, data: memoryview) -> None:
                out[offset : offset + len(data)] = data

            self.stream(ref, fill, timeout_s)
            return bytes(out)
        part = dest.with_name(dest.name + ".part")
        with part.open("wb") as file:

            def write(offset: int, data: memoryview) -> None:
                file.seek(offset)
                file.write(data)

            self.stream(ref, write, timeout_s)
        part.replace(dest)
        return dest

    def stream(self, ref: PayloadRef, sink: Sink, timeout_s: float = 3600.0) -> None:
        """Receive a payload chunk by chunk, in order: ``sink(offset, data)`` runs in the link's thread.

        Raises:
            PayloadError: damaged on the way. Whatever ``sink`` raises is raised here and ends the stream.
        """
        self._run_stream(Download(secrets.token_hex(16), ref, sink), timeout_s, f"download of {ref.id}")

    def close(self, reason: str = "") -> None:
        """Say Bye, stop the thread, free the sockets. Safe to call twice."""
        if self._pid != os.getpid():
            return  # a fork's copy: the sockets are the parent's
        if not self._shared.closing.is_set():
            if reason and self.state == "up":
                self._shared.outbox.append((Bye(reason), b""))
            self._shared.closing.set()
            self._shared.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run_stream(self, stream: Upload | Download, timeout_s: float, what: str) -> PayloadRef | None:
        self._shared.streams.add(stream)
        self._shared.wake()
        try:
            self._wait(stream.done, timeout_s, what)
        finally:
            self._shared.streams.remove(stream)
        if stream.error is not None:
            raise stream.error
        return stream.stored

    def _wait(self, event: threading.Event, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not event.wait(min(0.5, max(0.001, deadline - time.monotonic()))):
            if self.fatal:
                raise self.fatal
            if self.state == "closed" or not self._thread.is_alive():
                raise LinkError(f"{what}: the link was closed")
            if time.monotonic() >= deadline:
                raise LinkTimeout(f"{what}: no answer within {timeout_s:g} s")

    # ------------------------------------------------------------ the link's thread

    def _main(self) -> None:
        context = make_context(2)
        down_since = time.monotonic()
        tries = 0
        try:
            while not self._shared.closing.is_set() and self.fatal is None:
                session = Session(self._shared, context)
                try:
                    session.run()
                except (WireError, LinkError, zmq.ZMQError) as error:
                    # one line when it goes down, not one a try
                    say = log.warning if session.welcomed or tries == 0 else log.debug
                    say("link_down", endpoint=self.endpoint, node=self._shared.hello.node, reason=str(error))
                finally:
                    if session.welcomed:
                        down_since, tries = time.monotonic(), 0
                    session.close()
                    self._shared.state = "down"
                    self._shared.connected.clear()
                if self._give_up_s is not None and time.monotonic() - down_since > self._give_up_s:
                    self._shared.give_up(FaultError("gone", f"no broker at {self.endpoint} for {self._give_up_s:g} s"))
                tries += 1
                pause = min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**tries) * (0.5 + random.random())
                self._shared.closing.wait(pause if self.fatal is None else 0)
        except Exception as error:
            log.exception("link_crashed", endpoint=self.endpoint)
            self._shared.give_up(FaultError("internal", f"the link's thread failed: {error!r}"))
        finally:
            self._shared.state = "closed"
            context.destroy(linger=0)
            for fd in (self._shared.wake_r, self._shared.wake_w):
                with contextlib.suppress(OSError):
                    os.close(fd)
