"""One broker a store: a lock that the kernel frees when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..serialization.errors import StorageError

__all__ = ["StoreLock"]


class StoreLock:
    """Held from construction to `close`. The file names the holder's pid; a file of a dead process is taken over.

    Raises:
        StorageError: another broker uses the store, or the folder cannot be written.
    """

    def __init__(self, store: Path) -> None:
        path = store / "broker.lock"
        try:
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            # not inherited: the lock belongs to the open file, and a child of ours must not keep it
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"store {store}: {error}; give --store a folder of your own") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise StorageError(
                f"store {store} is used by another broker (process {holder or 'unknown'}): stop it, or give this one"
                " another --store"
            ) from None
        except OSError as error:
            os.close(self._fd)
            raise StorageError(f"store {store} cannot be locked: {error}") from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise StorageError(f"store {store} cannot be written: {error}") from None

    def close(self) -> None:
        """Let the store go; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
