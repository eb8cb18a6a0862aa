"""A peer's side of the wire: two sockets in one thread, reconnects, requests, payloads in and out.

Controllers, executors and clients all talk to the broker through a `Link`. Its thread owns the sockets; every other
thread hands it messages. What must not be lost is repeated after a reconnect: requests by the link, results and gathers
by their owners, who are told of each (re)connect by a `Welcome` through ``on_message``. Payload streams go on at the
receiver's watermark.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import structlog
import zmq

from ..serialization.digest import digest_buffers
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, LinkError, LinkTimeout, PayloadError, WireError
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
from .linksession import Session
from .linksource import Source
from .linkstate import LinkState, LocalSpool, OnMessage, Outgoing, Request, State, fault_error
from .linkstreams import Download, Sink, Upload
from .sockets import make_context

__all__ = ["Link", "LocalSpool", "Request", "fault_error"]

log = structlog.get_logger(__name__)

_BACKOFF_S = (0.05, 2.0)
#: How often a file is written for a co-located broker that loses it.
_WRITES = 5


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
            if self._shared.closing.is_set():
                raise LinkError(f"the link to {self.endpoint} was closed while it connected")
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
        """Send on the control link; while it is down the message is dropped: the protocol's repeats make up for it.

        Raises:
            CodecError: too large, or a field out of its bounds: no broker would read it.
        """
        if self.state == "up":
            self._shared.outbox.append(Outgoing.of(message, tail))
            self._shared.wake()

    def request(self, message: Any, tail: Buffer = b"", timeout_s: float = 60.0) -> tuple[Message, Buffer]:
        """Send a message with a ``ref`` and wait for its answer; repeated after a reconnect, and when none comes.

        Raises:
            FaultError: the broker refused (`FencedError` and `NondeterministicError` for those codes).
            CodecError: too large, or a field out of its bounds: no broker would read it.
            LinkTimeout: no answer in time.
            LinkError: the link was closed or given up.
        """
        return self.answer(self.ask(message, tail), timeout_s)

    def ask(self, message: Any, tail: Buffer = b"", *, more: bool = False) -> Request:
        """Send a message with a ``ref``, as `request` does; `answer` has to be called for what is asked.

        What is asked one after another comes in this order, after a reconnect as well.

        Args:
            more: something else is sent soon, or waited for: the broker takes what comes together in one turn.

        Raises:
            CodecError: as `request`.
        """
        request = Request(Outgoing.of(message, tail), message.ref, type(message).__name__)
        self._shared.ask(message.ref, request)
        if self.state == "up":  # else it is sent with the next Welcome
            self._shared.outbox.append(request.outgoing)
            if not more:
                self._shared.wake()
        return request

    def answer(self, request: Request, timeout_s: float = 60.0) -> tuple[Message, Buffer]:
        """Wait for the answer to what was asked. Raises as `request`."""
        if self._shared.outbox:
            self._shared.wake()
        try:
            self._wait(request.done, timeout_s, f"{request.what} to {self.endpoint}")
        finally:
            self._shared.forget(request.ref)
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

        Small ones ride inline, a co-located broker takes the finished file, others are streamed under grants and go on
        at the watermark after a reconnect. A ``source`` path is left in place.

        Raises:
            PayloadError: the source is not of the reference's size. FaultError: the broker refused it.
            LinkTimeout: it did not get there in time.
        """
        put = Put(payload=ref, job=JobId(job), claim=claim, task=TaskId(task), attempt=attempt)
        with Source(source, ref.size) as opened:
            if ref.size <= INLINE_BYTES:
                answer, _ = self.request(replace(put, ref=self.next_ref()), b"".join(opened.buffers), timeout_s)
                return (answer.payload if isinstance(answer, Stored) else None) or ref
            put = replace(put, stream=secrets.token_hex(16))
            if self.local is not None:
                return self._put_file(put, opened, self.local.incoming_path(f"{put.stream}.up"), timeout_s)
            needed = not ref.digest and not (self.welcome and self.welcome.integrity == "size")
            upload = Upload(put, opened, opened.digest() if needed else "")
            stored = self._run_stream(upload, timeout_s, f"upload of {ref.id}") or ref
        sent, resumed = upload.chunks_sent, upload.resumed_at
        log.info("uploaded", payload=ref.id, size=ref.size, chunks_sent=sent, resumed_at=resumed)
        return stored

    def _put_file(self, put: Put, source: Source, path: Path, timeout_s: float) -> PayloadRef:
        for left in reversed(range(_WRITES)):
            source.write_to(path)  # in the caller's thread; the broker takes it by its name
            upload = Upload(replace(put, stream=secrets.token_hex(16), local=path.name), None)
            try:
                return self._run_stream(upload, timeout_s, f"upload of {put.payload.id}") or put.payload
            except FaultError as error:
                if error.code != "missing" or not left:
                    raise  # else a broker took it and died before it had a row for it
            finally:
                if not upload.done.is_set() or upload.error:
                    path.unlink(missing_ok=True)
        raise AssertionError(put)

    def put_local(self, ref: PayloadRef, name: str, *, timeout_s: float = 600.0, **owner: Any) -> PayloadRef:
        """Hand over a finished file that was written as ``local.incoming_path(name)``. Raises as `put`."""
        upload = Upload(Put(payload=ref, stream=secrets.token_hex(16), local=name, **owner), None)
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
        if dest is None:
            return self._fetch_inline(ref, timeout_s) if ref.size <= INLINE_BYTES else self._fetch_bytes(ref, timeout_s)
        part = dest.with_name(f"{dest.name}.{secrets.token_hex(4)}.part")
        try:
            if ref.size <= INLINE_BYTES:
                part.write_bytes(self._fetch_inline(ref, timeout_s))
            else:
                with part.open("wb", buffering=0) as file:
                    self.stream(ref, lambda offset, data: _write_all(file, data), timeout_s)
            part.replace(dest)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return dest

    def _fetch_inline(self, ref: PayloadRef, timeout_s: float) -> bytes:
        answer, tail = self.request(Get("0" * 32, ref.id, 0, 0, ref=self.next_ref()), timeout_s=timeout_s)
        found = answer.payload if isinstance(answer, Stored) else None
        if len(tail) != ref.size or (ref.digest and digest_buffers([tail]) != ref.digest):
            raise PayloadError(f"payload {ref.id} is {found} at the broker, and {len(tail)} bytes came; not {ref}")
        return bytes(tail)

    def _fetch_bytes(self, ref: PayloadRef, timeout_s: float) -> bytes:
        out = bytearray(ref.size)

        def fill(offset: int, data: memoryview) -> None:
            out[offset : offset + len(data)] = data

        self.stream(ref, fill, timeout_s)
        return bytes(out)

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
                self._shared.outbox.append(Outgoing.of(Bye(reason[:1000])))
            self._shared.closing.set()
            self._shared.wake()
        if self._thread.ident is None:
            self._shared.free_pipe()  # it was never started
        elif threading.current_thread() is not self._thread:
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
                left = None if self._give_up_s is None else self._give_up_s - (time.monotonic() - down_since)
                session = Session(self._shared, context, left)
                try:
                    session.run()
                except (WireError, LinkError, zmq.ZMQError) as error:
                    # one line when it goes down, not one a try
                    say = log.warning if session.welcomed or tries == 0 else log.debug
                    node, limit = self._shared.hello.node, self._give_up_s
                    next_ = "it looks again" + ("" if limit is None else f", for {limit:g} s")
                    say("link_down", endpoint=self.endpoint, node=node, reason=str(error), next=next_)
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
            self._shared.free_pipe()


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:  # a stream's chunks come in order, and a full disk takes a part of one before it says so
        data = data[file.write(data) :]
