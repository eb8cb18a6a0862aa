"""A host's process group ends with its executor, whatever the executor dies of.

The kernel's parent-death signal reaches one process, and a script may have started more. So each host opens the reading
end of a pipe into which nobody writes, and has the kernel send SIGKILL to the host's whole process group when that pipe
moves: which it does when the executor's writing end closes, and that is when the executor is gone. No process and no
thread of the host's takes part. Linux; elsewhere `tie_group` says False.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import threading

#: Tells a host the descriptor of the reading end.
ENV_LIFELINE = "FEDLOOM_LIFELINE"

_lock = threading.Lock()
_ends: tuple[int, int] | None = None  # of this process: reading, writing


def lifeline() -> int:
    """The reading end, to be inherited by a host; the writing end stays open until this process ends."""
    global _ends
    with _lock:
        if _ends is None:
            _ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        return _ends[0]


def _after_fork() -> None:
    global _ends, _lock
    _lock = threading.Lock()
    if _ends is not None:  # a fork's copy would hold the pipe open beyond the executor's end
        for fd in _ends:
            with contextlib.suppress(OSError):
                os.close(fd)
        _ends = None


os.register_at_fork(after_in_child=_after_fork)


def tie_group(fd: int) -> bool:
    """Have this process group killed when the pipe's writing end closes. False where the system cannot.

    Ends the group at once if that has happened already.
    """
    setsig = getattr(fcntl, "F_SETSIG", None)
    if setsig is None or os.getpgrp() != os.getpid():
        return False
    try:
        # a description of its own: owner and signal belong to it, and the inherited one is shared with all other hosts
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(own, setsig, int(signal.SIGKILL))
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
        os.close(fd)
    except OSError:
        return False
    gone = select.poll()
    gone.register(own, 0)
    if gone.poll(0):
        os.killpg(0, signal.SIGKILL)
    return True
