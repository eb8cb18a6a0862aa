"""The broker host's disk: real files, and a memory of what was synced, so that a power cut can take the rest.

What survives a cut: of a file its bytes as they were synced last, or as they are, or something between; of a folder the
names that it had when it was synced last, each change since then with even odds. The database is SQLite's own affair:
with ``synchronous=FULL`` what it has committed survives, with less a part of it may not.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any


class Disk:
    """One folder that may forget, and everybody's temporary ones.

    Args:
        root: of the run.
        store: the broker's folder, in it.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.store = root / "store"
        self.shadow = root / "shadow"
        self.chance = Random(seed)
        self.synchronous = ""
        self.full = False
        self.failing = False
        self.hits: Counter[str] = Counter()
        #: rows that were committed: (table, row); who listens takes them out
        self.rows: list[tuple[str, Any]] = []
        self._bytes: dict[int, bytes] = {}  # of files, by inode, as they were synced
        self._names: dict[str, dict[str, int]] = {}  # of folders, by path, as they were synced
        self._temporary = 0
        self.shadow.mkdir(parents=True)

    # ------------------------------------------------------------ what programs do

    def fsync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self.failing and path.is_relative_to(self.store):
            self.hits["sync"] += 1
            raise OSError(errno.EIO, "the disk failed")
        if path.is_dir():
            names: dict[str, int] = {}
            for entry in os.scandir(path):
                inode = entry.inode()
                names[entry.name] = inode
                if entry.is_file() and not (self.shadow / str(inode)).exists():
                    os.link(entry.path, self.shadow / str(inode))
            self._names[str(path)] = names
        else:
            info = os.fstat(fd)
            self._bytes[info.st_ino] = os.pread(fd, info.st_size, 0)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if self.refuses():
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(fd, data, offset)

    def refuses(self) -> bool:
        """Whether the disk takes nothing more."""
        if self.full:
            self.hits["full"] += 1
        return self.full

    def committed(self, rows: list[Any]) -> None:
        """The database has these rows for good."""
        self.rows += rows

    def temporary(self, prefix: str) -> str:
        self._temporary += 1
        path = self.root / f"{prefix}{self._temporary}"
        path.mkdir()
        return str(path)

    # ------------------------------------------------------------ the cut

    def power_cut(self) -> int:
        """Forget what was not synced, or some of it; how many names and files were changed."""
        assert self.synchronous == "FULL", f"synchronous={self.synchronous}: commits would not survive a power cut"
        return sum(self._forget(self.store / name) for name in ("payloads", "incoming", "run"))

    def _forget(self, folder: Path) -> int:
        changes = 0
        replaced: set[str] = set()  # a name's file was exchanged by a rename: it is the old one or the new, never none
        known = self._names.get(str(folder), {})
        for path in sorted(folder.iterdir()):
            inode = path.lstat().st_ino
            if known.get(path.name) != inode and self.chance.random() < 0.5:
                changes += 1
                replaced.add(path.name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_dir():
                changes += self._forget(path)
        for name, inode in known.items():
            kept = self.shadow / str(inode)
            if (folder / name).exists() or not kept.exists():
                continue
            if name in replaced or self.chance.random() < 0.5:
                changes += 1
                shutil.copyfile(kept, folder / name)
                self._bytes[(folder / name).stat().st_ino] = self._bytes.get(inode, b"")
        for path in sorted(folder.iterdir()):
            if path.is_file():
                changes += self._forget_bytes(path)
        return changes

    def _forget_bytes(self, path: Path) -> int:
        now = path.read_bytes()
        synced = self._bytes.get(path.stat().st_ino, b"")
        if now == synced or not path.stat().st_size:
            return 0
        match self.chance.randrange(4):
            case 0:
                return 0  # the system had written it anyway
            case 1:
                path.write_bytes(synced)
            case 2:
                path.write_bytes(now[: self.chance.randrange(len(now))])
            case _:
                start = self.chance.randrange(len(now))
                path.write_bytes(now[:start] + bytes(len(now) - start))
        return 1
