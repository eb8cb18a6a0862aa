"""Sums of floats in the ring of integers modulo 2^64: the block arithmetic of the exact fold.

A value ``x`` of a result with weight ``w`` becomes the integer ``round(x * w * 2^q)``. Adding such integers is
associative and invertible, so a sum has the same bits in any order, through any partials, and whatever was taken out
again. The rounding costs nothing: for ``|t| <= 2^51`` the float64 ``t + 1.5 * 2^52`` lies in [2^52, 2^53], where floats
are one unit apart, and its bits read as int64 are ``round(t)`` (halves to even) plus the constant `BIAS`. The
accumulator therefore holds ``count * BIAS`` too much, which is subtracted once, when the sum is read.

A block with ``|t| > 2^51`` anywhere is *over*: it adds only its bias. Blocks are counted from the tensor's first
element, never from a chunk's, so that what a result adds does not depend on how its bytes arrived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, widen

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

#: Elements of a block: 256 KiB of float64, so that the scratch, its input and its sums stay in a core's cache.
BLOCK: Final = 32 * 1024

#: The largest |x * w * 2^q| of one result, as a power of two: what the rounding trick can hold.
RESULT_BITS: Final = 51
#: The largest sum of |x * w * 2^q| over a round, as a power of two: a factor of two below the ring's edge.
ROUND_BITS: Final = 62
#: A sum is fine enough when the results' largest values are this many bits above its unit on average. The worst error
#: of a mean is then 2^-25 of that magnitude, and that of 1,000 results, whose roundings average out, under 2^-28.
RESOLUTION_BITS: Final = 24
#: Room for a round's values to grow, as a power of two, before the scale is too large.
HEADROOM_BITS: Final = 4

MAGIC: Final = 1.5 * 2.0**52
BIAS: Final = 0x4338_0000_0000_0000  # the bits of MAGIC
LIMIT: Final = 2.0**RESULT_BITS

#: Totals of w * max|x| are integers in units of 2^-1074, of which every finite float64 is a multiple: exact at any
#: scale, so that one refold with the scale they give is always enough.
TOTAL_BITS: Final = 1074
#: No scale is outside: 2^q times any allowed weight is then a normal float64.
Q_MIN: Final = -950
Q_MAX: Final = 900
#: Values beyond this are refused: the smallest scale holds 2^26 of them with the largest weight.
MAX_VALUE: Final = 2.0**900


def ceil_log2(value: float) -> int:
    """The smallest ``e`` with ``value <= 2^e``; ``value`` is positive and finite."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent


def exponent_for(magnitude: float, weight_cap: float, tasks: int) -> int:
    """The largest ``q`` with ``16 * R * w_cap * 2^q <= 2^51`` and ``tasks`` times that ``<= 2^62``.

    Args:
        magnitude: R, the largest absolute value that is expected; positive.
        weight_cap: w_cap, the largest weight that is expected; positive.
        tasks: how many results a round may have; at least 1.
    """
    bound = magnitude * weight_cap
    if not math.isfinite(bound):
        return Q_MIN
    if bound == 0.0:
        return Q_MAX
    one = RESULT_BITS - HEADROOM_BITS - ceil_log2(bound)
    many = ROUND_BITS - HEADROOM_BITS - ceil_log2(bound) - ceil_log2(float(tasks))
    return max(Q_MIN, min(Q_MAX, one, many))


def exact_units(value: float) -> int:
    """A finite, non-negative float64 as an integer in units of 2^-1074."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (TOTAL_BITS - denominator.bit_length() + 1)


def exponent_from_total(total: int) -> int:
    """The largest ``q`` at which a total of w * max|x| (positive, in units of 2^-1074) is at most 2^51."""
    return max(Q_MIN, min(Q_MAX, RESULT_BITS - ((total - 1).bit_length() - TOTAL_BITS)))


def is_over(magnitude: float, weight: float, exponent: int) -> bool:
    """Whether values up to ``magnitude`` are beyond what one result may add at this scale."""
    return magnitude * math.ldexp(weight, exponent) > LIMIT


def in_range(total: int, exponent: int) -> bool:
    """Whether a sum with this total of w * max|x| cannot have wrapped."""
    return total <= 1 << (ROUND_BITS + TOTAL_BITS - exponent)


def is_fine(total: int, count: int, exponent: int) -> bool:
    """Whether the unit 2^-q is small enough beside this total of ``count`` results."""
    return total >= count << (RESOLUTION_BITS + TOTAL_BITS - exponent)


class Widener:
    """Blocks of any float type as float32 or float64 arrays that can be computed with, in one scratch array."""

    __slots__ = ("_narrow",)

    def __init__(self) -> None:
        self._narrow = np.empty(0, np.float32)

    def read(self, raw: Bytes, dtype: str) -> NDArray[Any]:
        """A block's elements. Narrow types are widened into the scratch, which the next call overwrites.

        Args:
            raw: the elements' bytes; at most `BLOCK` elements.
            dtype: their safetensors type, a float.
        """
        if dtype in ("F32", "F64"):
            return raw.view(DTYPES[dtype].numpy)
        if not self._narrow.size:
            self._narrow = np.empty(BLOCK, np.float32)
        out = self._narrow[: raw.size // DTYPES[dtype].itemsize]
        widen(raw, dtype, out)
        return out


def largest_magnitude(values: NDArray[Any]) -> float:
    """max|x| of a block that is not empty; NaN when any element is NaN."""
    # two SIMD reductions without a temporary; both are NaN if any element is
    return max(float(np.maximum.reduce(values)), -float(np.minimum.reduce(values)))


def scan(raw: Bytes, dtype: str, widener: Widener) -> tuple[float, int]:
    """max|x| of a float tensor's elements, and how many there are before a block with NaN, Inf or values over 2^900."""
    itemsize = DTYPES[dtype].itemsize
    count = raw.size // itemsize
    largest = 0.0
    for first in range(0, count, BLOCK):
        magnitude = largest_magnitude(widener.read(raw[first * itemsize : (first + BLOCK) * itemsize], dtype))
        if not magnitude <= MAX_VALUE:
            return largest, first
        largest = max(largest, magnitude)
    return largest, count


class FixedSums:
    """The int64 sums of a model's float tensors, in one flat array that exists from the first addition on.

    Not thread-safe: all additions share one scratch block.
    """

    __slots__ = ("_acc", "_dtypes", "_scaled", "_sizes", "_starts", "_widener", "exponents")

    exact: Final = True

    def __init__(self, dtypes: Sequence[str], sizes: Sequence[int]) -> None:
        """Sums for tensors of these types and numbers of elements (0 for a tensor that is not summed here)."""
        self._dtypes = tuple(dtypes)
        self._sizes = tuple(sizes)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        self._starts = tuple(starts)
        self._acc: Ints = np.empty(0, np.int64)
        self._scaled: Floats = np.empty(0, np.float64)
        self._widener = Widener()
        #: q of each tensor; set before the first addition, fixed from then on
        self.exponents: Sequence[int] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take, or will."""
        return 8 * self._starts[-1]

    def view(self, index: int) -> Ints:
        """A tensor's raw sums, flat and writable, with their biases in them."""
        if not self._acc.size and self._starts[-1]:
            # zeros come from the system untouched: pages of tensors that no result carries are never used
            self._acc = np.zeros(self._starts[-1], np.int64)
        return self._acc[self._starts[index] : self._starts[index + 1]]

    def add(self, index: int, start: int, raw: Bytes, weight: float, *, subtract: bool = False) -> tuple[float, int]:
        """Add (or take out) consecutive elements of a tensor, block by block.

        Args:
            index: the tensor.
            start: the first element, a multiple of `BLOCK`.
            raw: the elements' bytes; whole blocks, but for the tensor's last.
            weight: the result's weight.
            subtract: take out what the same call without it added.

        Returns:
            max|x| of the blocks that were added, and how many elements those are: fewer than given when a block holds
            NaN, Inf or a value beyond 2^900; of that block, and of those behind it, nothing was added.
        """
        dtype = self._dtypes[index]
        itemsize = DTYPES[dtype].itemsize
        sums = self.view(index)
        scale = math.ldexp(weight, self.exponents[index])
        combine = np.subtract if subtract else np.add
        if not self._scaled.size:
            self._scaled = np.empty(BLOCK, np.float64)
        largest = 0.0
        count = raw.size // itemsize
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            values = self._widener.read(raw[first * itemsize : last * itemsize], dtype)
            magnitude = largest_magnitude(values)
            if not magnitude <= MAX_VALUE:
                return largest, first
            largest = max(largest, magnitude)
            block = sums[start + first : start + last]
            if magnitude == 0.0 or magnitude * scale > LIMIT:
                combine(block, BIAS, out=block)
                continue
            scaled = self._scaled[: last - first]
            np.copyto(
                scaled, values
            )  # widening first and apart: a mixed multiplication goes through numpy's slow buffer
            np.multiply(scaled, scale, out=scaled)
            np.add(scaled, MAGIC, out=scaled)
            combine(block, scaled.view(np.int64), out=block)
        return largest, count

    def combine(self, index: int, sums: Ints, *, subtract: bool = False) -> None:
        """Add (or take out) another object's raw sums of the same tensor, at the same scale."""
        mine = self.view(index)
        (np.subtract if subtract else np.add)(mine, sums, out=mine)

    def mean(self, index: int, start: int, count: int, denominator: float, out: Floats) -> None:
        """Write the weighted mean of ``out.size`` elements from ``start`` on, as float64.

        Args:
            index: the tensor.
            start: its first element to write.
            count: how many results it holds.
            denominator: the sum of their weights.
            out: 1-D float64.
        """
        bias = (count * BIAS) % 2**64
        wrapped = np.int64(bias - 2**64 if bias >= 2**63 else bias)
        sums = self.view(index)[start : start + out.size] - wrapped
        np.divide(sums, denominator, out=out)
        np.multiply(out, math.ldexp(1.0, -self.exponents[index]), out=out)
