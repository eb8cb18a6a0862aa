"""Weighted sums in float32: the fold that is not exact.

Half the memory of the exact one and half its passes, but the last bits depend on the order, and nothing can be taken
out again. Weights are relative to the first result's, so that only their ratios can overflow.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .accumulator import Accumulator
from .elements import BLOCK, Bytes, Elements, Floats, Scratch

#: Elements of a product: as much scratch as the exact fold's blocks take.
_STEP: Final = 2 * BLOCK


class FloatSums:
    """The float32 sums that stand in for `FixedSums` where a plan is not exact; threads as there."""

    __slots__ = ("_unit", "_weights", "exponents", "sums")

    exact: Final = False

    def __init__(self, dtypes: tuple[str, ...], sizes: tuple[int, ...], spare: NDArray[Any] | None = None) -> None:
        """Sums for tensors of these numbers of elements (0 for a tensor that is not summed here)."""
        self.sums: Final = Accumulator(np.float32, sizes, spare)
        self._weights = [0.0] * len(dtypes)
        self._unit: int | None = None  # the power of two that weights are multiples of
        self.exponents: tuple[int, ...] = ()

    def add(
        self,
        index: int,
        start: int,
        raw: Bytes,
        weight: float,
        elements: Elements,
        scratch: Scratch,
        *,
        checked: bool = False,
    ) -> tuple[float, int]:
        """Add a result's values; as `FixedSums.add`, but that a bad value leaves the blocks before it in the sums.

        Args:
            checked: the values were looked at before. Otherwise the products are, as long as they are in the cache.
        """
        share = self._share(weight)
        itemsize = elements.itemsize
        count = raw.size // itemsize
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, count, _STEP):
                values = elements.read(start + first, raw[first * itemsize : (first + _STEP) * itemsize], scratch)
                sums, fresh = self.sums.take(index, start + first, values.size, clear=False)
                product = sums if fresh else scratch.doubles(BLOCK).view(np.float32)[: values.size]
                np.multiply(values, share, out=product, casting="same_kind")
                if not checked:
                    finite = scratch.flags(values.size)
                    np.isfinite(product, out=finite)
                    if not np.logical_and.reduce(finite):
                        return 0.0, first
                if not fresh:
                    np.add(sums, product, out=sums)
        return 0.0, count

    def _share(self, weight: float) -> np.float32:
        if self._unit is None:
            self._unit = math.frexp(weight)[1]
        return np.float32(math.ldexp(weight, -self._unit))

    def settle(self, index: int, weight: float) -> None:
        """Count a result of which all elements of a tensor were added."""
        self._weights[index] += float(self._share(weight))

    def mean(
        self,
        index: int,
        start: int,
        count: int,
        denominator: float,
        out: Floats,
        scratch: Scratch | None = None,
    ) -> None:
        """Write elements from ``start`` on as float64; as `FixedSums.mean`, with the weights as they were rounded."""
        sums = self.sums.take(index, start, out.size, clear=True)[0]
        for first in range(0, out.size, BLOCK):
            part = out[first : first + BLOCK]
            np.copyto(part, sums[first : first + BLOCK])
            np.multiply(part, 1.0 / self._weights[index], out=part)
