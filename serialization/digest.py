"""The digest of a payload: BLAKE3 of each 4 MiB block, then BLAKE3 over those digests.

The block size is fixed, whatever the chunks of a transport are. So a receiver that restarts knows how much of a half
payload it can trust, from the block digests alone, and two sides that cut the same bytes differently agree on the root.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from blake3 import blake3

from .envelope import Buffer
from .errors import PayloadError

BLOCK_BYTES: Final = 4 * 1024 * 1024
DIGEST_BYTES: Final = 32

#: Updates from this size on are hashed on all cores; below, handing the work out costs more than it saves.
PARALLEL_BYTES: Final = 1024 * 1024


class _Pool:
    """Whether blake3's thread pool may be used in this process.

    The pool's threads do not survive a fork, and a child that waited for them would wait for ever. A child of a process
    that has used the pool therefore hashes on one thread.
    """

    started = False
    usable = True

    @classmethod
    def after_fork(cls) -> None:
        if cls.started:
            cls.usable = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.after_fork)


def _block_hasher(parallel: bool) -> blake3:
    if parallel and _Pool.usable:
        _Pool.started = True
        return blake3(max_threads=blake3.AUTO)
    return blake3()


class Digester:
    """The digest of bytes that come in pieces of any size.

    Args:
        blocks: the digests (32 bytes each) of whole blocks that were seen before, to go on behind them.

    Raises:
        PayloadError: ``blocks`` is not a whole number of digests.
    """

    __slots__ = ("_blocks", "_filled", "_hasher")

    def __init__(self, blocks: Iterable[bytes] = ()) -> None:
        self._blocks = bytearray()
        for block in blocks:
            if len(block) != DIGEST_BYTES:
                raise PayloadError(f"block digest of {len(block)} bytes; it has {DIGEST_BYTES}")
            self._blocks += block
        self._hasher: blake3 | None = None  # of the block that is not full yet
        self._filled = 0

    @property
    def size(self) -> int:
        """How many bytes were seen, those of earlier blocks included."""
        return len(self._blocks) // DIGEST_BYTES * BLOCK_BYTES + self._filled

    @property
    def blocks(self) -> list[bytes]:
        """The digests of the blocks that are full, in order."""
        return [bytes(self._blocks[i : i + DIGEST_BYTES]) for i in range(0, len(self._blocks), DIGEST_BYTES)]

    def update(self, data: Buffer) -> None:
        """The next bytes; any contiguous buffer."""
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        while len(view):
            part = view[: BLOCK_BYTES - self._filled]
            if self._hasher is None:
                self._hasher = _block_hasher(len(part) >= PARALLEL_BYTES)
            self._hasher.update(part)
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._blocks += self._hasher.digest()
                self._hasher = None
                self._filled = 0
            view = view[len(part) :]

    def hexdigest(self) -> str:
        """The root over all bytes so far, 64 hex digits. More bytes may follow."""
        root = blake3(self._blocks)
        if self._hasher is not None:
            root.update(self._hasher.digest())
        return root.hexdigest()


def digest_buffers(buffers: Iterable[Buffer]) -> str:
    """The digest of these buffers, one after another."""
    digester = Digester()
    for buffer in buffers:
        digester.update(buffer)
    return digester.hexdigest()


def block_digest(data: Buffer) -> bytes:
    """The digest of one block: of `BLOCK_BYTES`, fewer in the last. Hashes in the calling thread alone."""
    return blake3(data).digest()


def root_digest(blocks: Iterable[bytes]) -> str:
    """The digest of a payload, 64 hex digits, out of those of its blocks in their order."""
    return blake3(b"".join(blocks)).hexdigest()


def digest_file(path: Path | str) -> str:
    """The digest of a file's bytes; reads a block at a time.

    Raises:
        OSError: the file cannot be read.
    """
    # read, not mapped: a file cut short by someone else would kill a process that has it mapped
    digester = Digester()
    block = memoryview(bytearray(BLOCK_BYTES))
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digester.update(block[:count])
    return digester.hexdigest()
