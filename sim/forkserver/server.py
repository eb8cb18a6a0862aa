"""The warm process: a fork server with the job's modules loaded.

It is a fresh interpreter, never a fork of the user's (no main script, no threads, no sockets of a library, no CUDA). It
imports what it is told to, then forks a process for each request: some 5 ms and 1.4 MiB instead of the seconds and the
hundreds of megabytes that `import torch` costs every time.

Nothing outlives it, and it does not outlive the launcher. Every process has a group of its own and a parent-death
signal. When a client's connection ends its processes are killed with their groups, so an agent's scripts go with the
agent; when the launcher's connection ends, so does everything.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

from ...serialization.errors import CodecError
from ...serialization.processes import die_with_parent
from .forked import become, check
from .wire import Environ, Exited, Fork, Frames, Kill, Message, Preload, Preloaded, Refused, Started, frame

__all__ = ["Server", "main"]

#: A client that lets this much pile up unread is cut off.
MAX_UNREAD_BYTES = 4 * 1024 * 1024
#: Forked processes at once; the kernel's own limits come before.
MAX_PROCESSES = 20_000

_READ_BYTES = 256 * 1024


def main() -> None:
    """Entry point of the interpreter that `Warm` starts: CONTROL_FD RUN_DIR PARENT_PID."""
    control_fd, run_dir, parent = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["fedloom-warm"]
    if parent:
        die_with_parent(parent, signal.SIGTERM)  # not SIGKILL: there is something to clear up
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    server = Server(control, run_dir / "warm")
    try:
        server.serve()
    finally:
        server.kill_all()
        shutil.rmtree(run_dir, ignore_errors=True)
        sys.stderr.flush()
    os._exit(0)  # the interpreter's own end would take modules apart for a quarter of a second


class _Client:
    """One connection: what it has sent so far, what it has not read yet, and its processes."""

    __slots__ = ("control", "frames", "outgoing", "pids", "sock")

    def __init__(self, sock: socket.socket, *, control: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.control = control
        self.frames = Frames()
        self.outgoing = bytearray()
        self.pids: dict[int, int] = {}  # pid to the number of its Fork


class Server:
    """The single-threaded loop: requests in, processes out, exits reported."""

    def __init__(self, control: socket.socket, path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._control = _Client(control, control=True)
        self._clients = {self._control}
        self._owner: dict[int, _Client] = {}
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        self._selector.register(control, selectors.EVENT_READ, self._control)
        self._stop = False
        self._loading = False

    def serve(self) -> None:
        """Serve until the launcher's connection or a SIGTERM ends it."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _on_child)
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.disable()  # a collection in here would only unshare pages
        gc.freeze()
        while not self._stop:
            # forking happens in this loop: leave it at once when the launcher has gone
            for key, events in self._selector.select(timeout=60.0):
                if self._stop:
                    break
                match key.data:
                    case "listener":
                        self._accept()
                    case "wake":
                        os.read(self._wake_read, 4096)
                    case _:
                        self._serve_client(key.data, events)
            self._reap()

    def kill_all(self) -> None:
        """Kill every process with its group, and wait until they are gone: a SIGKILL leaves none waiting for long."""
        for pid in self._owner:
            _kill_group(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while self._owner:
                pid, _ = os.waitpid(-1, 0)
                self._owner.pop(pid, None)

    def _on_terminate(self, *_: object) -> None:
        if self._loading:  # no process runs yet, and the loop may be seconds away
            raise SystemExit(143)
        self._stop = True

    # ------------------------------------------------------------ clients

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if uid != os.getuid():
            sock.close()
            return
        client = _Client(sock, control=False)
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve_client(self, client: _Client, events: int) -> None:
        if client not in self._clients:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(client)
            if events & selectors.EVENT_READ:
                data = client.sock.recv(_READ_BYTES)
                if not data:
                    self._drop(client)
                    return
                for message in client.frames.feed(data):
                    self._handle(client, message)
        except BlockingIOError:
            return
        except (OSError, CodecError) as error:
            print(f"fedloom-warm: a client is dropped: {error}", file=sys.stderr)
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._selector.unregister(client.sock)
        client.sock.close()
        for pid in client.pids:
            _kill_group(pid, signal.SIGKILL)
        if client.control:
            self._stop = True

    def _send(self, client: _Client, message: Message) -> None:
        if client not in self._clients:
            return
        client.outgoing += frame(message)
        if len(client.outgoing) > MAX_UNREAD_BYTES:
            self._drop(client)
            return
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        try:
            while client.outgoing:
                sent = client.sock.send(client.outgoing)
                del client.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outgoing else 0)
        self._selector.modify(client.sock, wanted, client)

    # ------------------------------------------------------------ requests

    def _handle(self, client: _Client, message: Message) -> None:
        match message:
            case Fork():
                self._fork(client, message)
            case Kill(pid, number):
                if pid in client.pids or (client.control and pid in self._owner):
                    _kill_group(pid, number)
            case Environ(env, unset):
                for name in unset:
                    os.environ.pop(name, None)
                os.environ.update(env)
            case Preload(number, modules):
                if self._owner:
                    self._send(client, Refused(number, "modules are loaded before the first process starts"))
                else:
                    self._loading = True
                    answer = preload(number, modules)
                    self._loading = False
                    self._send(client, answer)
            case _:
                raise CodecError(f"{message.OP} is the server's to say")

    def _fork(self, client: _Client, request: Fork) -> None:
        if len(self._owner) >= MAX_PROCESSES:
            self._send(client, Refused(request.number, f"{MAX_PROCESSES} processes run already"))
            return
        log_fd = -1
        try:
            check(request)
            if request.log:
                log_fd = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            pid = self._fork_now(request, log_fd)
        except (OSError, ValueError) as error:
            self._send(client, Refused(request.number, f"cannot start {request.name!r}: {error}"))
            return
        finally:
            if log_fd >= 0:
                os.close(log_fd)
        client.pids[pid] = request.number
        self._owner[pid] = client
        self._send(client, Started(request.number, pid))
        if not client.control:
            self._send(self._control, Started(0, pid))

    def _fork_now(self, request: Fork, log_fd: int) -> int:
        server = os.getpid()
        # a signal to the new process must wait until the server's handlers are gone from it
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                become(request, log_fd, server, self._close_in_child)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        # the child does it too: whichever comes first, a kill finds the group. Refused: it has done so and called exec
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        return pid

    def _close_in_child(self) -> None:
        """Close what belongs to the server; its peers must not see the child hold their connections open."""
        self._selector.close()
        self._listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        for client in self._clients:
            client.sock.close()

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            # what it left in its group goes too, while the unreaped leader still keeps the number from being used again
            _kill_group(pid, signal.SIGKILL)
            _, raw = os.waitpid(pid, 0)
            client = self._owner.pop(pid, None)
            if client is None:
                continue
            exited = Exited(client.pids.pop(pid), pid, os.waitstatus_to_exitcode(raw))
            self._send(client, exited)
            if not client.control:
                self._send(self._control, Exited(0, pid, exited.status))


def _on_child(_number: int, _frame: object) -> None:
    """The wake-up pipe is what matters; without a handler the signal would not write to it."""


def _kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        # the group is not there yet (between fork and setpgid) or is gone: the process itself is still ours
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---------------------------------------------------------------- loading


def preload(number: int, modules: Sequence[str]) -> Preloaded:
    """Import modules one by one.

    One that fails is left to the job, which will say it better; one that leaves a thread or a CUDA context behind makes
    this process unfit to fork, and ends the list.
    """
    loaded: list[str] = []
    failed: dict[str, str] = {}
    unsafe = ""
    gc.disable()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a third party's import can raise anything
            failed[name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"fedloom-warm: {name} is not preloaded: {failed[name]}", file=sys.stderr)
        else:
            loaded.append(name)
        if _unfit():
            unsafe = name
            break
    _spare_exit_work()
    # no collection writes to these objects' headers, so their pages stay shared. None is made before either: it takes
    # as long as some of the imports, and every process would fill, and so unshare, the holes that it leaves
    gc.freeze()
    return Preloaded(number, tuple(loaded), failed, unsafe)


def _spare_exit_work() -> None:
    """What the loaded modules would tidy up at an interpreter's end dies with each process as well.

    Torch alone takes back hundreds of operators one by one, 50 ms at every process's exit. Finalizers that a process
    makes itself, such as a temporary folder's, are not touched.
    """
    registry: dict[weakref.finalize[..., object], object] = getattr(weakref.finalize, "_registry", {})
    for item in registry:
        item.atexit = False


def _unfit() -> bool:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return True
    return len(list(Path("/proc/self/task").iterdir())) > 1
