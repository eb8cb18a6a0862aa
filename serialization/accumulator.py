"""The memory of a fold's float sums: one flat array, of which a block counts as zero until it is written.

New memory costs more than the sums that are made in it: the system clears each page at its first use. So the first
result of a round is written and not added, nothing is cleared, and an array can serve round after round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .elements import BLOCK
from .errors import FoldError


class Accumulator:
    """Sums of tensors, one behind the other. Several threads may use different blocks at a time, once `ready`."""

    __slots__ = ("_array", "_blocks", "_given", "_spare", "_starts", "_written", "dtype")

    def __init__(self, dtype: Any, sizes: Sequence[int], spare: NDArray[Any] | None = None) -> None:
        """Sums of this type for tensors of these numbers of elements.

        Args:
            dtype: numpy's.
            sizes: 0 for a tensor that is not summed here.
            spare: an array that nobody uses any more; taken if it is of the right type and size.
        """
        self.dtype = np.dtype(dtype)
        starts, blocks = [0], [0]
        for size in sizes:
            starts.append(starts[-1] + size)
            blocks.append(blocks[-1] - -size // BLOCK)
        self._starts = tuple(starts)
        self._blocks = tuple(blocks)
        self._array: NDArray[Any] = np.empty(0, self.dtype)
        fits = spare is not None and spare.dtype == self.dtype and spare.size == starts[-1]
        self._spare = spare if fits else None
        self._written = bytearray(blocks[-1])
        self._given = False

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take, or will."""
        return self.dtype.itemsize * self._starts[-1]

    def ready(self) -> None:
        """Have the array: pages of tensors that no result carries are not touched.

        Raises:
            FoldError: it was given away.
        """
        if self._given:
            raise FoldError("these sums are gone: their memory serves the next fold")
        if not self._array.size and self._starts[-1]:
            self._array = np.empty(self._starts[-1], self.dtype) if self._spare is None else self._spare
            self._spare = None

    def release(self) -> NDArray[Any]:
        """The array, for another's use; these sums are gone.

        Raises:
            FoldError: it was given away before.
        """
        self.ready()
        array, self._array, self._given = self._array, np.empty(0, self.dtype), True
        return array

    def take(self, index: int, start: int, count: int, *, clear: bool) -> tuple[NDArray[Any], bool]:
        """Elements of a tensor that are about to be changed, and whether they must be written, not added to.

        Args:
            index: the tensor.
            start: the first element, a multiple of `BLOCK`.
            count: how many: whole blocks, but for the tensor's last.
            clear: have zeros where nothing is, so that they can be added to.
        """
        self.ready()
        at = self._starts[index] + start
        part = self._array[at : at + count]
        first = self._blocks[index] + start // BLOCK
        last = first - -count // BLOCK
        known = self._written.count(1, first, last)
        if known == last - first:
            return part, False
        if known or clear:
            for block in range(first, last):
                if not self._written[block]:
                    part[(block - first) * BLOCK : (block - first + 1) * BLOCK] = 0
        self._written[first:last] = b"\1" * (last - first)
        return part, not (known or clear)

    def view(self, index: int) -> NDArray[Any]:
        """All of a tensor's sums, flat and writable."""
        return self.take(index, 0, self._starts[index + 1] - self._starts[index], clear=True)[0]
