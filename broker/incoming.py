"""One upload's file on its way in: bytes in order, digested as they come, whole blocks remembered for a resume.

Beside ``<id>.part`` lies ``<id>.blocks``: a header and the digests of the 4 MiB blocks written so far. After a restart
of the broker the part is read again, and its prefix whose blocks have the remembered digests is the watermark, whatever
a power cut did to the rest. Payloads of at most one block are simply sent again and have no such file.
"""

from __future__ import annotations

import os
import struct

from ..serialization.digest import BLOCK_BYTES, DIGEST_BYTES, Digester
from ..serialization.envelope import Buffer
from ..serialization.messages import PayloadRef
from .spool import BLOCKS, PART, Spool, write_at

_HEADER = struct.Struct(">8sQ64s")
_MAGIC = b"FDLMBLK1"


class FileCheck:
    """Digests a whole file some blocks at a time."""

    def __init__(self, fd: int, size: int, name: str | None) -> None:
        self.fd = fd
        self.size = size
        self.name = name  #: its name in ``incoming/``; None: it lies in ``payloads/`` already
        self._digester = Digester()

    def step(self, max_bytes: int) -> int:
        """Read on; returns the bytes read, 0 at the end."""
        data = os.pread(self.fd, min(max_bytes, BLOCK_BYTES), self._digester.size)
        self._digester.update(data)
        return len(data)

    def hexdigest(self) -> str:
        """The file's digest; "" when its length changed meanwhile."""
        return self._digester.hexdigest() if self._digester.size == self.size else ""


class IncomingFile:
    """The partial file of one payload id.

    A file that may be resumed starts ``verifying``: call `verify` until it is not, then `size` is the watermark.

    Args:
        spool: where it lies.
        payload: what it is to become.
        digested: check blocks and root; else the file's length is trusted (within one user in `sim`).

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, spool: Spool, payload: PayloadRef, *, digested: bool) -> None:
        self.spool = spool
        self.payload = payload
        self.name = payload.id + PART
        self.size = 0
        #: Whether its blocks are still being read again.
        self.verifying = False
        self._digester = Digester() if digested else None
        self._blocks_name = payload.id + BLOCKS
        self._blocks_fd: int | None = None
        self._recorded = 0
        self._claimed: list[bytes] = []
        self._fd: int | None = spool.open_incoming(self.name)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def matches(self, payload: PayloadRef) -> bool:
        """Whether another Put of this id means the same bytes."""
        return payload.size == self.payload.size and payload.digest == self.payload.digest

    def verify(self, max_bytes: int) -> int:
        """Read on through the blocks to be trusted, about ``max_bytes`` of them; returns the bytes read."""
        count = max(1, max_bytes // BLOCK_BYTES)
        first = self.size // BLOCK_BYTES
        claimed = self._claimed[first : first + count]
        check = Digester()
        for index in range(first, first + len(claimed)):
            check.update(os.pread(self.fd, BLOCK_BYTES, index * BLOCK_BYTES))
        found = check.blocks
        good = next((i for i, digest in enumerate(claimed) if i >= len(found) or found[i] != digest), len(claimed))
        self.size += good * BLOCK_BYTES
        if good < len(claimed) or first + good == len(self._claimed):
            self._resume_behind(first + good)
        return len(claimed) * BLOCK_BYTES

    def cut(self, size: int) -> None:
        """Forget what lies behind ``size`` bytes: a chunk's start, where the verified blocks end within one."""
        if size < self.size:
            self._cut(size)

    def append(self, data: Buffer) -> None:
        """The next bytes.

        Raises:
            OSError: the disk refuses; the file stands as it was before.
        """
        write_at(self.fd, data, self.size)
        self.size += len(data)
        if self._digester is not None:
            self._digester.update(data)
            self._record()

    def hexdigest(self) -> str:
        """The digest of all bytes, or the one the payload claims where none is kept."""
        return self._digester.hexdigest() if self._digester is not None else self.payload.digest

    def release(self) -> int:
        """Hand over the descriptor of the finished file, to be synced and closed; the remembered blocks are dropped."""
        fd = self.fd
        self._fd = None
        self._drop_blocks()
        return fd

    def close(self) -> None:
        """Leave it for a later resume."""
        for fd in (self._fd, self._blocks_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._blocks_fd = None

    def drop(self) -> None:
        """Remove it: its bytes are wrong."""
        self.close()
        self.spool.incoming_path(self.name).unlink(missing_ok=True)
        self._drop_blocks()

    @property
    def fd(self) -> int:
        """The open descriptor."""
        assert self._fd is not None, "the file was closed"
        return self._fd

    def _recover(self) -> None:
        length = os.fstat(self.fd).st_size
        if self._digester is None:
            # processes alone can die here, and bytes were written in order: the length is the watermark
            self.size = length if length <= self.payload.size else 0
            self._truncate()
            return
        if self.payload.size <= BLOCK_BYTES:
            self._truncate()
            return
        self._blocks_fd = self.spool.open_incoming(self._blocks_name)
        header = _HEADER.pack(_MAGIC, self.payload.size, self.payload.digest.encode())
        recorded = os.pread(self._blocks_fd, _HEADER.size + self.payload.size // BLOCK_BYTES * DIGEST_BYTES, 0)
        if recorded[: _HEADER.size] == header:
            digests = recorded[_HEADER.size :]
            most = min(len(digests) // DIGEST_BYTES, length // BLOCK_BYTES)
            self._claimed = [digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(most)]
        else:
            os.ftruncate(self._blocks_fd, 0)
            write_at(self._blocks_fd, header, 0)
        self.verifying = bool(self._claimed)
        if not self.verifying:
            self._truncate()

    def _resume_behind(self, blocks: int) -> None:
        self._digester = Digester(self._claimed[:blocks])
        self._claimed = []
        self._recorded = blocks
        self.size = blocks * BLOCK_BYTES
        self.verifying = False
        self._truncate()

    def _cut(self, size: int) -> None:
        if self._digester is not None:
            blocks = size // BLOCK_BYTES
            self._digester = Digester(self._digester.blocks[:blocks])
            self._digester.update(os.pread(self.fd, size - blocks * BLOCK_BYTES, blocks * BLOCK_BYTES))
            self._recorded = min(self._recorded, blocks)
        self.size = size
        self._truncate()

    def _truncate(self) -> None:
        os.ftruncate(self.fd, self.size)

    def _record(self) -> None:
        """Remember new whole blocks. Rarer the longer the file is, since the list is copied: at most 1/64 is lost."""
        assert self._digester is not None
        whole = self._digester.size // BLOCK_BYTES
        if self._blocks_fd is None or whole - self._recorded < max(1, whole // 64):
            return
        fresh = b"".join(self._digester.blocks[self._recorded :])
        write_at(self._blocks_fd, fresh, _HEADER.size + self._recorded * DIGEST_BYTES)
        self._recorded = whole

    def _drop_blocks(self) -> None:
        if self._blocks_fd is not None:
            os.close(self._blocks_fd)
            self._blocks_fd = None
        if self.payload.size > BLOCK_BYTES and self._digester is not None:
            self.spool.incoming_path(self._blocks_name).unlink(missing_ok=True)
