"""What an upload reads: a file, mapped, or buffers, as one run of bytes."""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from ..serialization.digest import Digester
from ..serialization.envelope import Buffer
from ..serialization.errors import PayloadError


class Source:
    """A file, mapped, or buffers one after another. ZeroMQ's frames hold the memory that they alias by themselves.

    Args:
        source: a file's path, or the buffers.
        size: bytes that there must be.

    Raises:
        PayloadError: there are more or fewer. OSError: the file cannot be read.
    """

    def __init__(self, source: Sequence[Buffer] | Path, size: int) -> None:
        self._map: mmap.mmap | None = None
        if isinstance(source, Path):
            buffers: list[memoryview] = []
            with source.open("rb") as file:
                if file.seek(0, 2):  # nothing cannot be mapped
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    buffers = [memoryview(self._map)]
        else:
            buffers = [memoryview(b).cast("B") for b in source if memoryview(b).nbytes]
        self.buffers = buffers
        self._ends = list(accumulate(len(b) for b in buffers))
        seen = self._ends[-1] if self._ends else 0
        if seen != size:
            self.close()
            what = str(source) if isinstance(source, Path) else "the source"
            raise PayloadError(f"{what} has {seen} bytes; its reference says {size}")

    def read(self, start: int, stop: int) -> memoryview | None:
        """Bytes ``start`` to ``stop``, a copy only where they span buffers; None once it is closed, by any thread."""
        buffers = self.buffers
        if not buffers:
            return None
        first = bisect_right(self._ends, start)
        base = self._ends[first - 1] if first else 0
        if stop <= self._ends[first]:
            return buffers[first][start - base : stop - base]
        parts = [buffers[first][start - base :]]
        while self._ends[first] < stop:
            base = self._ends[first]
            first += 1
            parts.append(buffers[first][: stop - base])
        return memoryview(b"".join(parts))

    def digest(self) -> str:
        """The digest of all of it."""
        digester = Digester()
        for buffer in self.buffers:
            digester.update(buffer)
        return digester.hexdigest()

    def write_to(self, path: Path) -> None:
        """All of it as a new file, which does not stay when it cannot be written."""
        try:
            with path.open("wb") as file:
                for buffer in self.buffers:
                    file.write(buffer)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Let go of the memory; frames under way keep theirs."""
        self.buffers = []
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a frame may still be in ZeroMQ's hands: it frees the map
                self._map.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
