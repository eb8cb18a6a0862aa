"""The broker's payload files.

Layout, under a root that only its user may enter::

    payloads/<first two of the id>/<id>   whole payloads; a tensors payload is a valid .safetensors file
    incoming/                             what is still coming: <id>.part and <id>.blocks, and files of local peers
    run/                                  sockets
    .token                                proof of co-location: who can read it may map payloads

A payload appears by a rename, so that its path never names half a file. With durability ``"power"`` the bytes, then the
name, are on the disk before `finish` returns, and the row that speaks of them is written after that; to delete, the row
goes first. What a crash leaves between the two is a file without a row, which `sweep` removes at start.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from ..serialization.envelope import Buffer
from ..serialization.errors import PayloadError, StorageError

__all__ = ["Durability", "Landing", "Spool"]

log = structlog.get_logger(__name__)

Durability = Literal["power", "process"]

#: What names a file of the spool: an id, or the file a local peer hands over. No separators, never hidden.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MAX_ID = 128
#: Endings that belong to uploads in progress; a local peer's file may not have them.
PART = ".part"
#: What `Spool.store` writes begins with this.
_WHOLE = "w-"
BLOCKS = ".blocks"


@dataclass(frozen=True, slots=True)
class Landing:
    """A finished file of ``incoming/`` that is to become a payload.

    ``fd``, where one is open, is synced in place of a fresh one, since it alone is sure to see every failed write.
    It is closed.
    """

    name: str
    payload: str
    fd: int | None = None


class Spool:
    """The payload files under ``root``, which is made when it is not there.

    Args:
        root: the folder; its mode becomes 0700.
        durability: ``"power"``: synced to the disk; ``"process"``: safe when only processes can die.

    Raises:
        StorageError: the folder cannot be made or used.
    """

    def __init__(self, root: Path | str, durability: Durability = "power") -> None:
        self.root = Path(root).absolute()
        self.durability: Durability = durability
        self.payloads = self.root / "payloads"
        self.incoming = self.root / "incoming"
        self.run = self.root / "run"
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.payloads, self.incoming, self.run):
                folder.mkdir(mode=0o700, exist_ok=True)
            self.root.chmod(0o700)
            self.token = self._token()
        except OSError as error:
            raise StorageError(
                f"spool {self.root} cannot be used: {error}; give --store a folder of your own"
            ) from None

    def path(self, payload: str) -> Path:
        """Where the whole payload of this id lies, once it is there.

        Raises:
            PayloadError: the id cannot be a file's name.
        """
        if len(payload) > _MAX_ID or not _NAME.fullmatch(payload):
            raise PayloadError(
                f"payload id {payload[:160]!r}; it is 1 to {_MAX_ID} of A-Z a-z 0-9 . _ - and no dot first"
            )
        return self.payloads / payload[:2] / payload

    def incoming_path(self, name: str) -> Path:
        """Where a file on its way in lies.

        Raises:
            PayloadError: the name has a separator, begins with a dot, or is too long.
        """
        if not _NAME.fullmatch(name):
            raise PayloadError(f"incoming file {name[:200]!r}; its name is of A-Z a-z 0-9 . _ - and has no dot first")
        return self.incoming / name

    def local_path(self, name: str) -> Path:
        """Where a local peer's finished file lies; like `incoming_path`, less the names of uploads in progress."""
        path = self.incoming_path(name)
        if path.suffix in (PART, BLOCKS):
            raise PayloadError(f"incoming file {name!r}; names that end in {PART} and {BLOCKS} are the broker's own")
        return path

    def size(self, payload: str) -> int | None:
        """The bytes of a whole payload; None when it is not here."""
        try:
            info = self.path(payload).lstat()
        except FileNotFoundError:
            return None
        return info.st_size if stat.S_ISREG(info.st_mode) else None

    def exists(self, payload: str, size: int | None = None) -> bool:
        """Whether the whole payload is here, with this size where one is given."""
        found = self.size(payload)
        return found is not None and size in (None, found)

    def open_incoming(self, name: str, *, create: bool = True) -> int:
        """A descriptor to read and write a file of ``incoming/``; links are not followed.

        Raises:
            PayloadError: the name is not allowed. OSError: there is no such file, or the disk refuses.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name must not block the loop
        return os.open(self.incoming_path(name), flags | (os.O_CREAT if create else 0), 0o600)

    def finish(self, name: str, payload: str, fd: int | None = None) -> Path:
        """Make a finished file of ``incoming/`` the payload; synced when this returns, as the durability says.

        Raises:
            PayloadError: there is no such file any more.
            StorageError: the disk failed; nothing may be acknowledged any more.
        """
        if self.finish_all([Landing(name, payload, fd)]):
            raise PayloadError(f"incoming file {name!r} is gone: write it again")
        return self.path(payload)

    def finish_all(self, landings: Sequence[Landing]) -> list[Landing]:
        """`finish` many at once, each folder synced once. Returns those whose files were taken away or exchanged.

        Raises:
            StorageError: the disk failed; nothing may be acknowledged any more.
        """
        folders: dict[Path, None] = {}
        gone: list[Landing] = []
        try:
            inodes = [self._sync_file(landing) for landing in landings]
            for landing, inode in zip(landings, inodes, strict=True):
                source, target = self.incoming_path(landing.name), self.path(landing.payload)
                try:
                    same = source.lstat().st_ino == inode
                except FileNotFoundError:
                    same = False
                if not same:
                    gone.append(landing)
                    continue
                self._make_folder(target.parent)
                source.replace(target)
                folders[target.parent] = None
            self._sync_folders(folders)
            return gone
        except OSError as error:
            for landing in landings:  # what a failed sync left in the page cache must not pass for written
                self.incoming_path(landing.name).unlink(missing_ok=True)
            raise StorageError(f"{error}: payloads in {self.root} could not be made durable") from error

    def store(self, payload: str, buffers: Iterable[Buffer]) -> int:
        """Write a small payload as a whole; durable when this returns. Returns its bytes.

        Raises:
            StorageError: the disk refused.
        """
        name = f"{_WHOLE}{os.getpid()}-{secrets.token_hex(8)}"
        size = 0
        try:
            fd = self.open_incoming(name)
            try:
                for buffer in buffers:
                    size = write_at(fd, buffer, size)
            except OSError:
                os.close(fd)
                self.incoming_path(name).unlink()
                raise
        except OSError as error:
            raise StorageError(f"payload {payload} cannot be written: {error}") from error
        self.finish(name, payload, fd)
        return size

    def read(self, payload: str, max_bytes: int) -> bytes | None:
        """A small payload's bytes; None when it is not here or larger than ``max_bytes``."""
        size = self.size(payload)
        if size is None or size > max_bytes:
            return None
        try:
            return self.path(payload).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, payload: str) -> int:
        """Remove a payload whose row is gone; returns the bytes freed, 0 when it was not here."""
        size = self.size(payload)
        if size is None:
            return 0
        self.path(payload).unlink(missing_ok=True)
        return size

    def sweep(self, known: Collection[str]) -> list[str]:
        """Remove payloads that no row knows; their ids. For the start, before anyone is answered.

        What `store` had not finished goes too: nobody else writes files of that name.
        """
        for path in self.incoming.glob(f"{_WHOLE}*"):
            path.unlink(missing_ok=True)
        gone: list[str] = []
        for path in self._payload_files():
            if path.name not in known:
                path.unlink(missing_ok=True)
                gone.append(path.name)
        if gone:
            log.info("spool_swept", files=len(gone))
        return gone

    def sweep_incoming(self, before: float, keep: Collection[str] = ()) -> int:
        """Remove files of ``incoming/`` last written before this wall time, unless named in ``keep``; how many."""
        count = 0
        for path in self.incoming.iterdir():
            try:
                if path.name not in keep and path.lstat().st_mtime < before:
                    path.unlink()
                    count += 1
            except (FileNotFoundError, IsADirectoryError):
                continue
        return count

    def drop_incoming(self, owners: Collection[str]) -> int:
        """Remove what is half here of these payloads, or of any attempt's result of these tasks; how many files."""
        count = 0
        for path in self.incoming.iterdir():
            if path.suffix not in (PART, BLOCKS):
                continue
            task = path.stem.removeprefix("r-").partition(".")[0]
            if path.stem in owners or task in owners:
                path.unlink(missing_ok=True)
                count += 1
        return count

    def incoming_since(self, payload: str) -> float | None:
        """When a half-finished upload of the payload was last written to (wall time); None where there is none."""
        try:
            return self.incoming_path(payload + PART).lstat().st_mtime
        except FileNotFoundError:
            return None

    def usage(self) -> int:
        """The bytes of all payloads, and of what is coming in."""
        total = 0
        for path in (*self._payload_files(), *self.incoming.iterdir()):
            try:
                total += path.lstat().st_size
            except FileNotFoundError:
                continue
        return total

    def default_quota(self) -> int:
        """Four fifths of what the disk has free now, and what is here."""
        return self.usage() + shutil.disk_usage(self.root).free * 4 // 5

    def _payload_files(self) -> list[Path]:
        return [path for folder in self.payloads.iterdir() if folder.is_dir() for path in folder.iterdir()]

    def _token(self) -> str:
        """The token, made by whichever of the broker's processes comes first."""
        path = self.root / ".token"
        if path.exists() and not path.read_text().strip():
            path.unlink()  # a power cut came between its name and its bytes
        if not path.exists():
            fresh = self.root / f".token-{os.getpid()}-{secrets.token_hex(4)}"
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_hex(16))
            try:
                os.link(fresh, path)  # unlike a rename, this leaves the other process's token alone
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return path.read_text().strip()

    def _sync_file(self, landing: Landing) -> int | None:
        """Sync and close; the file's inode, None when it is not there."""
        fd = landing.fd
        if fd is None:
            try:
                fd = self.open_incoming(landing.name, create=False)
            except FileNotFoundError:
                return None
        try:
            if self.durability == "power":
                os.fsync(fd)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            self._sync_folders([self.payloads])

    def _sync_folders(self, folders: Iterable[Path]) -> None:
        if self.durability != "power":
            return
        for folder in folders:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def write_at(fd: int, data: Buffer, offset: int) -> int:
    """Write all of ``data`` at ``offset``; returns the offset behind it.

    Raises:
        OSError: the disk refuses.
    """
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
    return offset
