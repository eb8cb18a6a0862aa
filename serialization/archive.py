"""Job archives: a folder as one tar of bytes, and back, strictly.

The same folder gives the same bytes on every machine: names sorted, times and owners zero, no compression (zlib's
output differs between its versions, and tensors do not shrink). Reading takes plain or gzip tar, holds one block in
memory, and accepts regular files and folders only; `tarfile`'s own reader follows links, sparse maps and headers of any
size.
"""

from __future__ import annotations

import gzip
import io
import mmap
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from .envelope import Buffer
from .errors import JobError

BLOCK_BYTES = 512
_COPY_BYTES = 1024 * 1024
#: A pax or GNU long-name header only carries a file name here.
_MAX_LONG_HEADER_BYTES = 16 * 1024
#: What never belongs to a job, wherever it lies in the folder.
SKIPPED_NAMES = frozenset({"__pycache__", ".git", ".DS_Store", ".fedloom"})
SKIPPED_SUFFIXES = (".pyc", ".pyo")


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Bounds of one archive, for packing and unpacking alike."""

    total_bytes: int = 16 * 1024**3
    files: int = 20_000
    depth: int = 32
    name_bytes: int = 1024
    #: Unpacked bytes for each compressed one, above the first 16 MiB: what makes a small upload a full disk.
    ratio: int = 200


DEFAULT_LIMITS = ArchiveLimits()


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


# ---------------------------------------------------------------- packing


def folder_entries(folder: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> list[tuple[str, Path]]:
    """What `pack_folder` takes: (name in the archive, path), sorted by name; folders before what is in them.

    Raises:
        JobError: not a folder, a link or a device in it, or over a limit.
    """
    if not folder.is_dir():
        raise JobError(f"{folder} is not a folder: name a job folder, as `recipe.export` writes it")
    found: list[tuple[str, Path]] = []
    for base, dirs, files in os.walk(folder):
        dirs[:] = sorted(name for name in dirs if name not in SKIPPED_NAMES)
        for name in [*dirs, *sorted(files)]:
            path = Path(base) / name
            if name in SKIPPED_NAMES or name.endswith(SKIPPED_SUFFIXES):
                continue
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise JobError(f"{path} is a link or a special file; a job holds regular files only: copy it in")
            found.append((path.relative_to(folder).as_posix(), path))
            if len(found) > limits.files:
                raise JobError(f"{folder} holds more than {limits.files} files; a job carries code, not data")
    return sorted(found)


def write_archive(folder: Path, out: _Writable, limits: ArchiveLimits = DEFAULT_LIMITS) -> int:
    """Write a folder's archive and return its size in bytes. Memory is one block, whatever the files' size.

    Raises:
        JobError: as `folder_entries`, or a file that changed its size meanwhile.
    """
    written = 0
    for name, path in folder_entries(folder, limits):
        _check_name(name, limits)
        info = tarfile.TarInfo(name)
        info.uid = info.gid = info.mtime = 0
        if path.is_dir():
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            written += _write(out, info.tobuf(tarfile.GNU_FORMAT))
            continue
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            info.size = status.st_size
            info.mode = 0o755 if status.st_mode & 0o100 else 0o644
            if written + info.size > limits.total_bytes:
                raise JobError(f"{folder} is over {limits.total_bytes} bytes; a job carries code and a model, not data")
            written += _write(out, info.tobuf(tarfile.GNU_FORMAT))
            copied = 0
            while block := file.read(_COPY_BYTES):
                copied += _write(out, block)
            if copied != info.size:
                raise JobError(f"{path} changed while it was read ({info.size} bytes, then {copied}): try again")
            written += copied + _write(out, bytes(-copied % BLOCK_BYTES))
    return written + _write(out, bytes(2 * BLOCK_BYTES))


def pack_folder(folder: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> bytes:
    """A folder's archive as bytes; see `write_archive` for a large one."""
    out = io.BytesIO()
    write_archive(Path(folder), out, limits)
    return out.getvalue()


def _write(out: _Writable, data: bytes) -> int:
    out.write(data)
    return len(data)


# ---------------------------------------------------------------- unpacking


def unpack_archive(data: Buffer | Path, dest: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> list[Path]:
    """Unpack an archive, given as bytes or as a file, into ``dest``, which must not exist or be empty.

    Returns:
        The files written, in the archive's order. A failure leaves nothing in ``dest``.

    Raises:
        JobError: not an archive, or one that holds links, devices, absolute or parent names, a name twice, or more than
            the limits allow.
    """
    dest = Path(dest)
    if dest.is_dir() and any(dest.iterdir()):
        raise JobError(f"{dest} is not empty; an archive is unpacked into a folder of its own")
    dest.mkdir(parents=True, exist_ok=True)
    try:
        if not isinstance(data, Path):
            return _unpack(memoryview(data), dest, limits)
        if not data.is_file():
            raise JobError(f"{data} is not a file: name a job archive, as `fedloom job` stores it")
        with data.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise JobError(f"{data} is empty, not a job archive")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                return _unpack(view, dest, limits)
    except BaseException:
        shutil.rmtree(dest, ignore_errors=True)
        raise


def _unpack(view: memoryview, dest: Path, limits: ArchiveLimits) -> list[Path]:
    raw = _ViewFile(view)
    compressed = bytes(view[:2]) == b"\x1f\x8b"
    allowed = limits.total_bytes
    if compressed:
        allowed = min(allowed, 16 * 1024**2 + limits.ratio * len(view))
    stream: _Readable = gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw
    try:
        return _extract(_Counted(stream, allowed), dest, limits)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise JobError(f"the job archive is damaged: {error}") from None


def _extract(stream: _Counted, dest: Path, limits: ArchiveLimits) -> list[Path]:
    written: list[Path] = []
    seen: set[str] = set()
    made: set[str] = set()  # files and folders, with those folders that only the names of files speak of
    for info, name in _headers(stream):
        name = name.rstrip("/") if info.isdir() else name
        _check_name(name, limits)
        if name in seen:
            raise JobError(f"the job archive holds {name!r} twice")
        seen.add(name)
        made.update(accumulate(name.split("/"), "{}/{}".format))
        if len(made) > limits.files:
            raise JobError(f"the job archive holds more than {limits.files} files and folders")
        path = dest.joinpath(*PurePosixPath(name).parts)
        try:
            if info.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o755 if info.mode & 0o100 else 0o644
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        except (FileExistsError, NotADirectoryError):
            raise JobError(f"the job archive uses {name!r} both as a file and as a folder") from None
        with os.fdopen(handle, "wb") as file:
            _copy(stream, file, info.size, name)
        written.append(path)
    return written


def _headers(stream: _Counted) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Each file's or folder's header and full name; the caller reads exactly the file's bytes in between."""
    long_name = ""
    while True:
        block = stream.read(BLOCK_BYTES)
        if len(block) != BLOCK_BYTES:
            raise JobError("the job archive is cut short, or no tar archive at all")
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise JobError(f"not a job archive: {error}") from None
        if info.size < 0:
            raise JobError(f"the job archive's {info.name!r} has {info.size} bytes")
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if info.size > _MAX_LONG_HEADER_BYTES:
                raise JobError(f"a header of {info.size} bytes in the job archive; at most {_MAX_LONG_HEADER_BYTES}")
            body = _exactly(stream, info.size, "a long name")
            _exactly(stream, -info.size % BLOCK_BYTES, "a long name")
            long_name = _long_name(info.type, body) or long_name
            continue
        if not (info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.isdir()):
            raise JobError(f"the job archive's {info.name!r} is a link or a device; only files and folders are allowed")
        yield info, long_name or info.name
        long_name = ""


def _long_name(kind: bytes, body: bytes) -> str:
    try:
        if kind == tarfile.GNUTYPE_LONGNAME:
            return body.rstrip(b"\0").decode()
        name = ""
        while body:  # pax records: "<length> <key>=<value>\n"
            length = int(body.split(b" ", 1)[0])
            record, body = body[:length], body[length:]
            key, separator, value = record.split(b" ", 1)[1].partition(b"=")
            if length < 5 or not separator or not value.endswith(b"\n"):
                raise ValueError("pax record")
            if key == b"path":
                name = value[:-1].decode()
            elif key == b"size" or key.startswith(b"GNU.sparse"):
                raise JobError("the job archive has a pax size or sparse record; pack it as GNU tar")
        return name
    except (ValueError, IndexError):
        raise JobError("the job archive has a malformed long-name header") from None


def _check_name(name: str, limits: ArchiveLimits) -> None:
    parts = name.split("/")
    if (
        not name
        or len(name.encode()) > limits.name_bytes
        or len(parts) > limits.depth
        or "\\" in name
        or not name.isprintable()
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    ):
        raise JobError(
            f"file name {name[:200]!r} in a job; allowed are relative printable names without '..' or '\\',"
            f" up to {limits.depth} deep and {limits.name_bytes} bytes"
        )


def _copy(stream: _Counted, out: IO[bytes], size: int, name: str) -> None:
    left = size
    while left:
        block = stream.read(min(left, _COPY_BYTES))
        if not block:
            raise JobError(f"the job archive ends within {name!r}")
        out.write(block)
        left -= len(block)
    _exactly(stream, -size % BLOCK_BYTES, name)


def _exactly(stream: _Counted, size: int, what: str) -> bytes:
    data = stream.read(size) if size else b""
    if len(data) != size:
        raise JobError(f"the job archive ends within {what!r}")
    return data


class _Counted:
    """Reads full blocks, and stops at a number of bytes: the guard against bombs."""

    def __init__(self, inner: _Readable, allowed: int) -> None:
        self._inner = inner
        self._allowed = allowed
        self._left = allowed

    def read(self, size: int) -> bytes:
        data = self._inner.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise JobError(f"the job archive unpacks to more than {self._allowed} bytes, which its size allows")
        return data


class _ViewFile(io.RawIOBase):
    """A buffer as a file, without a copy of the whole."""

    def __init__(self, view: memoryview) -> None:
        self._view = view.cast("B")
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        stop = len(self._view) if size < 0 else min(self._at + size, len(self._view))
        data = bytes(self._view[self._at : stop])
        self._at = stop
        return data
