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

from .accumulator import Accumulator
from .elements import BLOCK, MAX_VALUE, RUN, Bytes, Elements, Floats, Ints, Scratch, elements_of

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

#: A table of what each code adds pays where a tensor has so many times as many elements.
_PAYS: Final = 4


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


class FixedSums:
    """The int64 sums of a model's float tensors, in one flat array that exists from the first addition on.

    Several threads may add to different elements at a time, each with a `Scratch` of its own, once `sums` is ready.
    """

    __slots__ = ("_dtypes", "_scratch", "_sizes", "_table", "exponents", "sums")

    exact: Final = True

    def __init__(self, dtypes: Sequence[str], sizes: Sequence[int], spare: NDArray[Any] | None = None) -> None:
        """Sums for tensors of these types and numbers of elements (0 for a tensor that is not summed here)."""
        self._dtypes = tuple(dtypes)
        self._sizes = tuple(sizes)
        #: the raw sums, with their biases in them
        self.sums: Final = Accumulator(np.int64, sizes, spare)
        self._scratch = Scratch()
        self._table: tuple[Elements | None, float, Ints] = (None, 0.0, np.empty(0, np.int64))
        #: q of each tensor; set before the first addition, fixed from then on
        self.exponents: Sequence[int] = ()

    def add(
        self,
        index: int,
        start: int,
        raw: Bytes,
        weight: float,
        *,
        subtract: bool = False,
        elements: Elements | None = None,
        scratch: Scratch | None = None,
    ) -> tuple[float, int]:
        """Add (or take out) consecutive elements of a tensor, block by block.

        Args:
            index: the tensor.
            start: the first element, a multiple of `BLOCK`.
            raw: the elements' bytes; whole blocks, but for the tensor's last.
            weight: the result's weight.
            subtract: take out what the same call without it added.
            elements: how the bytes are read; by default as the tensor's own type.
            scratch: the calling thread's, where there are several.

        Returns:
            max|x| of the blocks that were added, and how many elements those are: fewer than given when a block holds
            NaN, Inf or a value beyond 2^900; of that block, and of those behind it, nothing was added.
        """
        read = elements or elements_of(self._dtypes[index])
        scratch = scratch or self._scratch
        itemsize = read.itemsize
        count = raw.size // itemsize
        scale = math.ldexp(weight, self.exponents[index])
        combine = np.subtract if subtract else np.add
        codes = read.codes(raw)
        table = None
        if codes is not None and self._sizes[index] >= _PAYS << 8 * itemsize:
            table = self._addends(read, scale)
        largest = 0.0
        first, until = 0, 0
        while first < count:
            # blocks one by one where a run of them is not good as a whole
            step = BLOCK if first < until else RUN
            last = min(first + step, count)
            part = raw[first * itemsize : last * itemsize]
            magnitude, values = read.look(start + first, part, scratch)
            good = magnitude <= MAX_VALUE
            over = magnitude * scale > LIMIT
            if (over or not good) and last - first > BLOCK:
                until = last
                continue
            if not good:
                return largest, first
            block, fresh = self.sums.take(index, start + first, last - first, clear=subtract)
            method = None if fresh else combine
            if over or magnitude == 0.0:
                _put(block, BIAS, method)
            elif table is not None and codes is not None:
                _put_codes(block, codes[first:last], table, method, scratch)
            else:
                values = read.read(start + first, part, scratch) if values is None else values
                _put_values(block, values, scale, method, scratch)
            largest = max(largest, magnitude)
            first = last
        return largest, count

    def add_block(self, index: int, values: NDArray[Any], largest: float, weight: float, scaled: Floats) -> None:
        """Add a tensor of one block or less, as `add` does.

        Args:
            index: the tensor.
            values: all of its elements, float32 or float64, flat.
            largest: max|x|, at most 2^900.
            weight: the result's weight.
            scaled: scratch for as many elements.
        """
        scale = math.ldexp(weight, self.exponents[index])
        block, fresh = self.sums.take(index, 0, values.size, clear=False)
        addend: Any = BIAS
        if largest * scale <= LIMIT and largest != 0.0:
            np.copyto(scaled, values)
            np.multiply(scaled, scale, out=scaled)
            np.add(scaled, MAGIC, out=scaled)
            addend = scaled.view(np.int64)
        _put(block, addend, None if fresh else np.add)

    def _addends(self, elements: Elements, scale: float) -> Ints:
        """What each code adds at this scale: those of values that are not to be added are never looked up."""
        known, known_scale, table = self._table
        if known is not elements or known_scale != scale:
            with np.errstate(invalid="ignore", over="ignore"):
                table = (elements.values().astype(np.float64) * scale + MAGIC).view(np.int64)
            self._table = (elements, scale, table)
        return table

    def combine(self, index: int, sums: Ints, *, subtract: bool = False) -> None:
        """Add (or take out) another object's raw sums of the same tensor, at the same scale."""
        mine, fresh = self.sums.take(index, 0, self._sizes[index], clear=subtract)
        if fresh:
            np.copyto(mine, sums)
        else:
            (np.subtract if subtract else np.add)(mine, sums, out=mine)

    def mean(
        self, index: int, start: int, count: int, denominator: float, out: Floats, scratch: Scratch | None = None
    ) -> None:
        """Write the weighted mean of ``out.size`` elements from ``start`` on, as float64.

        Args:
            index: the tensor.
            start: its first element to write.
            count: how many results it holds.
            denominator: the sum of their weights.
            out: 1-D float64.
            scratch: the calling thread's, where there are several.
        """
        bias = (count * BIAS) % 2**64
        wrapped = np.int64(bias - 2**64 if bias >= 2**63 else bias)
        # a product with a power of two is exact, and no quotient is subnormal: one rounding, as by the two apart
        divisor = math.ldexp(denominator, self.exponents[index])
        sums = self.sums.take(index, start, out.size, clear=True)[0]
        whole = (scratch or self._scratch).ints(BLOCK)
        for first in range(0, out.size, BLOCK):
            part = out[first : first + BLOCK]
            block = whole[: part.size]
            np.subtract(sums[first : first + BLOCK], wrapped, out=block)
            if math.frexp(divisor)[0] == 0.5:
                np.multiply(block, 1.0 / divisor, out=part)
            else:
                np.divide(block, divisor, out=part)


def _put(sums: Ints, addend: Any, combine: np.ufunc | None) -> None:
    """Combine the sums with an addend, or write it where they are fresh."""
    if combine is None:
        np.copyto(sums, addend)
    else:
        combine(sums, addend, out=sums)


def _put_values(sums: Ints, values: NDArray[Any], scale: float, combine: np.ufunc | None, scratch: Scratch) -> None:
    for first in range(0, values.size, BLOCK):
        part = values[first : first + BLOCK]
        block = sums[first : first + BLOCK]
        scaled = scratch.doubles(part.size)
        if part.dtype == np.float64:
            np.multiply(part, scale, out=scaled)
        else:
            np.copyto(scaled, part)  # first and apart: a mixed multiplication goes through numpy's slow buffer
            np.multiply(scaled, scale, out=scaled)
        if combine is None:
            np.add(scaled, MAGIC, out=block.view(np.float64))
        else:
            np.add(scaled, MAGIC, out=scaled)
            combine(block, scaled.view(np.int64), out=block)


def _put_codes(sums: Ints, codes: NDArray[Any], table: Ints, combine: np.ufunc | None, scratch: Scratch) -> None:
    for first in range(0, codes.size, BLOCK):
        part = codes[first : first + BLOCK]
        block = sums[first : first + BLOCK]
        found = block if combine is None else scratch.ints(part.size)
        np.take(table, part, out=found, mode="clip")  # every code has its place: "clip" is numpy's fast mode
        if combine is not None:
            combine(block, found, out=block)
