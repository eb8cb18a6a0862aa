"""Processes out of the warm process, as its clients hold them.

The launcher imports this before anything else: it takes along nothing that is slow to import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...serialization.errors import CodecError, ProcessError
from .wire import Environ, Exited, Fork, Frames, Kill, Message, Preload, Preloaded, Refused, Started, frame

__all__ = ["Asked", "ForkedProcess", "WarmClient"]

_READ_BYTES = 256 * 1024


@dataclass(slots=True)
class Asked:
    """A request that waits for its answer."""

    number: int
    done: threading.Event = field(default_factory=threading.Event)
    answer: Message | None = None


class ForkedProcess:
    """A process that the warm process has started for this client. Thread-safe."""

    def __init__(self, client: WarmClient, name: str, log_path: str) -> None:
        self._client = client
        self._ended = threading.Event()
        self._status: int | None = None
        self.name = name
        self.log_path = log_path
        self.pid = 0

    def poll(self) -> int | None:
        """The exit code, minus the signal that killed it, or None while it runs."""
        return self._status

    def wait(self, timeout_s: float | None = None) -> int | None:
        """As `poll`, after its end or so many seconds."""
        self._ended.wait(timeout_s)
        return self._status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and what it has started itself; harmless once it has ended."""
        if self._status is None:
            self._client.send_signal(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.kill(signal.SIGTERM)

    def settle(self, status: int) -> None:
        """The client's reader says how it ended."""
        if self._status is None:
            self._status = status
            self._ended.set()


class WarmClient:
    """A connection to a warm process. When it ends, so do the processes that were started through it.

    Args:
        connection: a connected socket, or the path of the warm process's.
        on_exit: called in the reader's thread whenever one of this client's processes has ended.
        on_lost: called in the reader's thread when the warm process has gone.
    """

    def __init__(
        self,
        connection: socket.socket | str | Path,
        *,
        on_exit: Callable[[ForkedProcess], None] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        if isinstance(connection, socket.socket):
            self._sock = connection
        else:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._sock.connect(str(connection))
            except OSError as error:
                self._sock.close()
                raise ProcessError(f"no warm process at {connection}: {error}") from None
        self.on_exit = on_exit
        self.on_lost = on_lost
        self._lock = threading.Lock()
        self._next = 1
        self._waiting: dict[int, Asked] = {}
        self._processes: dict[int, ForkedProcess] = {}  # by the number of the Fork
        self._others: set[int] = set()
        self._lost = False
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="fedloom-warm-client", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> bool:
        """The warm process has gone, and everything with it."""
        return self._lost

    def fork(
        self,
        name: str,
        target: str = "",
        args: dict[str, Any] | None = None,
        *,
        argv: Sequence[str] = (),
        env: dict[str, str] | None = None,
        unset: Sequence[str] = (),
        cwd: str | Path = "",
        log_path: str | Path = "",
        timeout_s: float = 60.0,
    ) -> ForkedProcess:
        """Start a process: ``target`` is ``"module:function"``, called with ``args`` (plain data) as keywords, or
        ``argv`` a command in its place.

        Raises:
            ProcessError: the warm process has gone or does not answer, or the request is one it refuses.
        """
        process = ForkedProcess(self, name, str(log_path))
        asked = self._begin()
        with self._lock:
            self._processes[asked.number] = process
        try:
            self._send(
                Fork(
                    asked.number,
                    name,
                    target,
                    args or {},
                    tuple(argv),
                    env or {},
                    tuple(unset),
                    str(cwd or ""),
                    str(log_path or ""),
                )
            )
            self._finish(asked, timeout_s)
        except ProcessError:
            with self._lock:
                self._processes.pop(asked.number, None)
            raise
        return process

    def begin_preload(self, modules: Sequence[str]) -> Asked:
        """Have modules imported in the warm process, and go on meanwhile; `finish_preload` waits.

        Raises:
            ProcessError: the warm process has gone.
        """
        asked = self._begin()
        self._send(Preload(asked.number, tuple(modules)))
        return asked

    def finish_preload(self, asked: Asked, timeout_s: float = 300.0) -> Preloaded:
        """Wait until the modules are imported.

        Raises:
            ProcessError: the warm process has gone or does not answer, or has started processes already.
        """
        answer = self._finish(asked, timeout_s)
        if not isinstance(answer, Preloaded):
            raise ProcessError(f"the warm process answered {answer.OP!r} to a list of modules")
        return answer

    def set_env(self, env: dict[str, str], unset: Sequence[str] = ()) -> None:
        """Change the warm process's environment, which every later process gets.

        Raises:
            ProcessError: the warm process has gone.
        """
        self._send(Environ(env, tuple(unset)))

    def send_signal(self, pid: int, number: int) -> None:
        """A signal to one of this client's processes and its group; nothing happens where it has ended."""
        with contextlib.suppress(ProcessError):
            self._send(Kill(pid, int(number)))

    def processes(self) -> dict[int, str]:
        """Those that run now, by process id: this client's with their names, and on the launcher's connection, with
        "", everybody else's.
        """
        with self._lock:
            mine = {process.pid: process.name for process in self._processes.values() if process.pid}
        return dict.fromkeys(self._others.copy(), "") | mine

    def kill_others(self) -> None:
        """After the death of the warm process: kill the groups of what it had started, for whatever client.

        The processes themselves have their parent-death signal; what they had started themselves has none.
        """
        with self._lock:
            pids = self._others | {p.pid for p in self._processes.values() if p.pid}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the connection; the warm process kills what was started through it."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)
        self._sock.close()

    # ------------------------------------------------------------ within

    def _begin(self) -> Asked:
        with self._lock:
            asked = Asked(self._next)
            self._next += 1
            self._waiting[asked.number] = asked
        return asked

    def _finish(self, asked: Asked, timeout_s: float) -> Message:
        answered = asked.done.wait(timeout_s)
        with self._lock:
            self._waiting.pop(asked.number, None)
        if not answered:
            raise ProcessError(f"the warm process has not answered for {timeout_s:g} s")
        match asked.answer:
            case None:
                raise ProcessError("the warm process has ended")
            case Refused(_, text):
                raise ProcessError(text)
            case answer:
                return answer

    def _send(self, message: Message) -> None:
        data = frame(message)
        with self._lock:
            if self._lost:
                raise ProcessError("the warm process has ended")
            try:
                self._sock.sendall(data)
            except OSError as error:
                raise ProcessError(f"the warm process has ended: {error}") from None

    def _read(self) -> None:
        frames = Frames()
        try:
            while data := self._sock.recv(_READ_BYTES):
                for message in frames.feed(data):
                    self._take(message)
        except (OSError, CodecError) as error:
            if not self._closed:
                _log_lost(error)
        with self._lock:
            self._lost = True
            waiting, processes = list(self._waiting.values()), list(self._processes.values())
        for asked in waiting:
            asked.done.set()
        if self._closed:
            for process in processes:
                process.settle(-signal.SIGKILL)
            return
        self.kill_others()
        for process in processes:
            process.settle(-signal.SIGKILL)
            if self.on_exit is not None:
                self.on_exit(process)
        if self.on_lost is not None:
            self.on_lost()

    def _take(self, message: Message) -> None:
        match message:
            case Started(0, pid):
                self._others.add(pid)
            case Exited(0, pid):
                self._others.discard(pid)
            case Exited(number, _, status):
                with self._lock:
                    process = self._processes.pop(number, None)
                if process is not None:
                    process.settle(status)
                    if self.on_exit is not None:
                        self.on_exit(process)
            case Started(number, pid):
                # before `Exited` can be read, so that no process ends without a pid
                with self._lock:
                    process = self._processes.get(number)
                if process is not None:
                    process.pid = pid
                self._answer(number, message)
            case Refused(number) | Preloaded(number):
                self._answer(number, message)
            case _:
                raise CodecError(f"{message.OP} is the client's to say")

    def _answer(self, number: int, message: Message) -> None:
        with self._lock:
            asked = self._waiting.get(number)
        if asked is not None:
            asked.answer = message
            asked.done.set()


def _log_lost(error: Exception) -> None:
    import structlog

    structlog.get_logger(__name__).warning("warm_connection_lost", error=str(error))
