"""Folders for what only a running process needs, in the system's place for temporary files.

Whoever is killed leaves one behind, and over months a machine's ``/tmp`` would fill with sockets and unpacked jobs. So
each holds a lock that the kernel frees with its process, and whoever makes the next one removes those that nobody
holds. All of them lie in one folder of the user's, ``fedloom-UID``: nothing is removed that fedloom did not make.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Scratch"]

#: A longer one leaves too little of the 107 bytes that a unix socket's path may have.
_MAX_BASE_BYTES = 40
#: What a process that was killed between making and locking it left behind.
_UNFINISHED_S = 24 * 3600.0


class Scratch:
    """A private folder, gone with `close` or with its process. Use it as a context manager.

    Args:
        what: the beginning of its name.
        short: its path must be short, for unix sockets: in ``/tmp`` where ``TMPDIR`` is a long one.

    Attributes:
        path: the folder.

    Raises:
        OSError: there is no place for temporary files.
    """

    def __init__(self, what: str, *, short: bool = False) -> None:
        base = _base(short)
        path = Path(tempfile.mkdtemp(prefix="new-", dir=base))
        # not inherited: it belongs to the open file, and a child of ours must not keep it
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # without locks none is removed either
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        self.path = path.rename(path.with_name(what + path.name.removeprefix("new")))
        for other in base.iterdir():
            _remove_if_left(other)

    def close(self) -> None:
        """Remove it; harmless a second time."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _base(short: bool) -> Path:
    """The user's own folder; where somebody else has taken its name, a new one that is only used once."""
    temporary = tempfile.gettempdir()
    if short and len(os.fsencode(temporary)) > _MAX_BASE_BYTES:
        temporary = "/tmp"  # noqa: S108 - nobody else may look into what is made there
    path = Path(temporary) / f"fedloom-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return path
    return Path(tempfile.mkdtemp(prefix="fedloom-", dir=temporary))


def _remove_if_left(path: Path) -> None:
    """Remove a scratch folder whose process is gone."""
    try:
        if path.name.startswith("new-") and time.time() - path.lstat().st_mtime < _UNFINISHED_S:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # another one was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # somebody works in it
    finally:
        os.close(fd)
