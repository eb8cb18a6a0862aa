"""One executor a workspace, and whether the one before it ended well."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from ..serialization.errors import JobError


class WorkspaceLock:
    """Held by a process until its end, however it ends.

    The file holds the pid of an executor that is connected, and nothing once it has said goodbye: who finds a pid there
    is the next life of one that was killed, and whose name the broker may not have given up yet.

    Raises:
        JobError: another process holds it.
    """

    def __init__(self, workspace: Path, node: str) -> None:
        workspace.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(workspace / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise JobError(
                f"another executor works in {workspace}: stop it, or give {node} a --workspace of its own"
            ) from None
        self.was_killed = bool(os.pread(self._fd, 1, 0))

    def connected(self) -> None:
        """From here on an end without `goodbye` is seen by the next one."""
        with contextlib.suppress(OSError):  # a full disk: the next one takes it that this one ended well
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def goodbye(self) -> None:
        """The broker knows that this executor has ended."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Let go of it. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
