"""What Python programs know of their system, as modules: time, threading, queue, pools, chance, files.

Stand-ins for the standard library's modules, so that the product's own shells (poll loops, link threads, agents, job
processes) run unchanged in the room. Whatever is not pretended here is the real thing.
"""

from __future__ import annotations

import errno
import fcntl as real_fcntl
import os as real_os
import queue as real_queue
import random as real_random
import secrets as real_secrets
import tempfile as real_tempfile
import threading as real_threading
import time as real_time
from collections import deque
from collections.abc import Callable
from concurrent import futures as real_futures
from types import ModuleType
from typing import Any

from machine import EPOCH, Machine, Party, Task

#: The room of the present run. One at a time.
room: Machine = None  # type: ignore[assignment]
disk: Any = None


def enter(machine: Machine, its_disk: Any) -> None:
    """Whatever is asked of the system from here on is asked of this room."""
    global room, disk
    room, disk = machine, its_disk
    _locks.clear()
    pipes.clear()
    _threads.clear()


def party() -> Party:
    """Whose thread this is."""
    assert room.current is not None
    return room.current.party


class Proxy(ModuleType):
    """A real module with some names exchanged."""

    def __init__(self, real: ModuleType, **names: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(names)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


# ---------------------------------------------------------------- time


def _wall() -> float:
    return EPOCH + room.now + (room.current.party.wall_offset if room.current is not None else 0.0)


def _sleep(seconds: float) -> None:
    room.block(seconds)


time = Proxy(
    real_time,
    monotonic=lambda: room.now,
    perf_counter=lambda: room.now,
    time=_wall,
    sleep=_sleep,
    monotonic_ns=lambda: int(room.now * 1e9),
    time_ns=lambda: int(_wall() * 1e9),
)

# ---------------------------------------------------------------- threads


class Lock:
    """A lock; here nobody loses the processor while holding one unless he waits for something else."""

    def __init__(self) -> None:
        self._owner: Task | None = None
        self._count = 0
        self._waiting: deque[tuple[Task, int]] = deque()
        self._again = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = room.current
        while self._owner is not None and self._owner.party.alive and not (self._again and self._owner is me):
            if not blocking:
                return False
            self._waiting.append(room.me())
            if not room.block(None if timeout < 0 else timeout):
                return False
        self._owner = me if me is not None else _HUB
        self._count += 1
        return True

    def release(self) -> None:
        self._count -= 1
        if self._count <= 0:
            self._owner, self._count = None, 0
            while self._waiting:
                room.wake(*self._waiting.popleft())

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class RLock(Lock):
    """A lock that its holder may take again."""

    def __init__(self) -> None:
        super().__init__()
        self._again = True


class Event:
    """A flag to wait for."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[tuple[Task, int]] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for waiter in self._waiting:
            room.wake(*waiter)
        self._waiting.clear()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            self._waiting.append(room.me())
            room.block(timeout)
        return self._set


class Thread:
    """A thread of whichever process makes it."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., Any] | None = None,
        name: str = "thread",
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name
        self.daemon = bool(daemon)
        self.ident: int | None = None
        self._call = lambda: target(*args, **(kwargs or {})) if target is not None else None
        self._task: Task | None = None

    def start(self) -> None:
        self._task = room.spawn(party(), self.name, self._call)
        self.ident = id(self._task)
        _threads[id(self._task)] = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done and self._task.party.alive

    def join(self, timeout: float | None = None) -> None:
        if self._task is not None and not self._task.done:
            self._task.waiters.append(room.me())
            room.block(timeout)


class _Main:
    name = "main"


_HUB: Any = type("Hub", (), {"party": type("P", (), {"alive": True})()})()
_threads: dict[int, Thread] = {}
_MAIN = _Main()
#: The interpreter's own main thread, in which no simulated thread runs: nobody here may catch signals.
_INTERPRETER = _Main()


def _current_thread() -> Any:
    return _threads.get(id(room.current), _MAIN) if room.current is not None else _INTERPRETER


threading = Proxy(
    real_threading,
    Lock=Lock,
    RLock=RLock,
    Event=Event,
    Thread=Thread,
    current_thread=_current_thread,
    main_thread=lambda: _INTERPRETER,
    get_ident=lambda: id(room.current),
)

# ---------------------------------------------------------------- queues and pools


class SimpleQueue:
    """A queue between threads."""

    def __init__(self, maxsize: int = 0) -> None:
        self._items: deque[Any] = deque()
        self._waiting: deque[tuple[Task, int]] = deque()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._items.append(item)
        while self._waiting:
            room.wake(*self._waiting.popleft())

    put_nowait = put

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        end = None if timeout is None else room.now + timeout
        while not self._items:
            left = None if end is None else end - room.now
            if not block:
                raise real_queue.Empty
            if left is not None and left <= 0:
                room.pause()
                if self._items:
                    break
                raise real_queue.Empty
            self._waiting.append(room.me())
            room.block(left)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


queue = Proxy(real_queue, SimpleQueue=SimpleQueue, Queue=SimpleQueue)


class ThreadPoolExecutor:
    """As many threads as asked for, begun when there is work."""

    def __init__(self, max_workers: int = 4, thread_name_prefix: str = "pool") -> None:
        self._most = max_workers
        self._name = thread_name_prefix
        self._todo: SimpleQueue = SimpleQueue()
        self._idle = 0
        self._threads: list[Thread] = []
        self._over = False

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._over:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._todo.put(lambda: call(*args, **kwargs))
        if self._idle < self._todo.qsize() and len(self._threads) < self._most:
            thread = Thread(target=self._main, name=f"{self._name}-{len(self._threads)}")
            self._threads.append(thread)
            thread.start()

    def _main(self) -> None:
        while True:
            self._idle += 1
            call = self._todo.get()
            self._idle -= 1
            if call is None:
                return
            call()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._over = True
        for _ in self._threads:
            self._todo.put(None)


futures = Proxy(real_futures, ThreadPoolExecutor=ThreadPoolExecutor)

# ---------------------------------------------------------------- chance


class _SystemRandom(real_random.Random):
    def __init__(self) -> None:
        super().__init__(room.rng.getrandbits(64))


class _Random(real_random.Random):
    """A generator without a seed: from the room's state, not by a draw, which would change every schedule."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(hash(room.rng.getstate()[1]) if seed is None else seed)


random = Proxy(
    real_random,
    Random=_Random,
    random=lambda: room.rng.random(),
    uniform=lambda a, b: room.rng.uniform(a, b),
    randrange=lambda *a: room.rng.randrange(*a),
    randint=lambda a, b: room.rng.randint(a, b),
    choice=lambda seq: room.rng.choice(seq),
    shuffle=lambda seq: room.rng.shuffle(seq),
    SystemRandom=_SystemRandom,
)


def _bytes(count: int = 32) -> bytes:
    return room.rng.randbytes(count)


secrets = Proxy(
    real_secrets,
    token_bytes=_bytes,
    token_hex=lambda count=32: _bytes(count).hex(),
    randbelow=lambda most: room.rng.randrange(most),
)

# ---------------------------------------------------------------- files

_FAKE = 1 << 24
_next_fd = _FAKE


class Pipe:
    """The two ends of a pipe that wakes somebody up."""

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: list[tuple[Task, int]] = []


pipes: dict[int, Pipe] = {}


def _pipe2(flags: int) -> tuple[int, int]:
    global _next_fd
    pipe = Pipe()
    _next_fd += 2
    pipes[_next_fd] = pipes[_next_fd + 1] = pipe
    return _next_fd, _next_fd + 1


def _write(fd: int, data: bytes) -> int:
    if fd < _FAKE:
        return real_os.write(fd, data)
    pipe = pipes[fd]
    pipe.bytes += len(data)
    for waiter in pipe.waiting:
        room.wake(*waiter)
    pipe.waiting.clear()
    return len(data)


def _read(fd: int, count: int) -> bytes:
    if fd < _FAKE:
        return real_os.read(fd, count)
    pipe = pipes[fd]
    if not pipe.bytes:
        raise BlockingIOError
    pipe.bytes = 0
    return b"x"


def _close(fd: int) -> None:
    if fd < _FAKE:
        real_os.close(fd)
    else:
        pipes.pop(fd, None)


def killed() -> None:
    """Told when a process kills itself at a named point; each run puts its own listener here."""


def _kill(pid: int, number: int) -> None:
    found = room.parties.get(pid)
    if found is None:
        raise ProcessLookupError(pid)
    if room.current is not None and found is room.current.party:
        killed()
    room.crash(found, f"signal {number}")


def _fsync(fd: int) -> None:
    room.step()
    room.pause()  # others run while the disk works
    disk.fsync(fd)


def _pwrite(fd: int, data: Any, offset: int) -> int:
    room.step()
    return disk.pwrite(fd, data, offset) if party().name in ("control", "data") else real_os.pwrite(fd, data, offset)


def _pid() -> int:
    return room.current.party.pid if room.current is not None else real_os.getpid()


os = Proxy(
    real_os,
    pipe2=_pipe2,
    write=_write,
    read=_read,
    close=_close,
    kill=_kill,
    getpid=_pid,
    getppid=lambda: party().parent.pid if party().parent is not None else 1,
    urandom=_bytes,
    fsync=_fsync,
    pwrite=_pwrite,
)

_locks: dict[tuple[int, int], Party] = {}


def _flock(fd: int, operation: int) -> None:
    info = real_os.fstat(fd)
    key = (info.st_dev, info.st_ino)
    holder = _locks.get(key)
    me = party()
    if holder is not None and holder.alive and holder is not me:
        raise BlockingIOError(errno.EWOULDBLOCK, "locked")
    _locks[key] = me
    me.releases.append(lambda polite: _locks.pop(key, None) if _locks.get(key) is me else None)


fcntl = Proxy(real_fcntl, flock=_flock)


def _mkdtemp(suffix: str = "", prefix: str = "tmp", dir: str | None = None) -> str:
    return disk.temporary(prefix)


tempfile = Proxy(real_tempfile, mkdtemp=_mkdtemp)

MODULES: dict[str, ModuleType] = {
    "time": time,
    "threading": threading,
    "queue": queue,
    "concurrent.futures": futures,
    "random": random,
    "secrets": secrets,
    "os": os,
    "fcntl": fcntl,
    "tempfile": tempfile,
}
