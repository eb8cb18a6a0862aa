"""Exact weighted sums of integer tensors.

Batch-norm counters, quantised weights and id tables are integers and must come out as integers: the exact rational
mean, halves to even. A float64 weight times an int64 does not fit any machine type, so a sum is kept in limbs of 24
bits, each an int64 array: the product of two 24-bit digits has 48 bits, and 4,096 results fit before the carries must
be passed on. Like the fixed-point sums of floats they are exact integers: any order, any partials, and a result can be
taken out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES
from .elements import BLOCK, Ints
from .errors import FoldError, ValuesError

#: Weights are integers in units of 2^-120: exact for every float64 of at least 2^-64.
WEIGHT_BITS: Final = 120

DIGIT_BITS: Final = 24
_MASK: Final = (1 << DIGIT_BITS) - 1
#: Additions between two carry passes: each adds at most three products of 48 bits to a limb.
_MAX_PENDING: Final = 1 << 12
#: A limb of another's sum after its carry pass is below this, whatever it summed.
_MAX_LIMB: Final = 1 << 40
#: A highest limb below this fits on top of the one below it.
_SMALL_TOP: Final = 1 << 15
#: Limbs that the largest weight (2^64), the largest value and 2^40 results can reach.
MAX_LIMBS: Final = 14

Digits = tuple[tuple[int, int], ...]


def weight_digits(weight: int) -> Digits:
    """The digits of a weight (in units of 2^-120) that are not zero, with their positions; few for whole steps."""
    out: list[tuple[int, int]] = []
    position = 0
    while weight:
        if weight & _MASK:
            out.append((position, weight & _MASK))
        weight >>= DIGIT_BITS
        position += 1
    return tuple(out)


def _value_digits(values: NDArray[Any]) -> list[Ints]:
    """Integers as digits of 24 bits, lowest first; the last one carries the sign."""
    match values.dtype.itemsize:
        case 1 | 2:
            return [values.astype(np.int64)]
        case 4:
            wide = values.astype(np.int64)
            return [wide & _MASK, wide >> DIGIT_BITS]
        case _:
            # shifts keep the type: logical for uint64, arithmetic for int64
            middle = (values >> DIGIT_BITS) & _MASK
            return [part.astype(np.int64) for part in (values & _MASK, middle, values >> (2 * DIGIT_BITS))]


class IntSum:
    """The exact weighted sum of one integer tensor over many results.

    Memory: three to four int64 limbs an element with whole-number weights, up to eight with fractional ones.
    """

    __slots__ = ("_dtype", "_limbs", "_pending", "_size")

    def __init__(self, dtype: str, size: int) -> None:
        """A sum for a tensor of this safetensors integer type and number of elements."""
        self._dtype = DTYPES[dtype].numpy
        self._size = size
        self._limbs: dict[int, Ints] = {}
        self._pending = 0

    def begin(self, digits: Digits) -> None:
        """Make room for one more result with these `weight_digits`: once for each result, before its `add` calls."""
        if not digits:
            return
        # the limb above the highest product takes the carries
        self._reserve(digits[0][0], digits[-1][0] + _digits_of(self._dtype))
        if self._pending >= _MAX_PENDING:
            self._carry()
        self._pending += 1

    def add(self, start: int, values: NDArray[Any], digits: Digits, *, subtract: bool = False) -> None:
        """Add (or take out) a run of consecutive elements times the weight.

        Args:
            start: the first element.
            values: 1-D, of the tensor's type.
            digits: the weight's `weight_digits`.
            subtract: take out what the same call without it added.
        """
        for first in range(0, values.size, BLOCK):
            parts = _value_digits(values[first : first + BLOCK])
            for position, digit in digits:
                for offset, part in enumerate(parts):
                    limb = self._limbs[position + offset][start + first : start + first + part.size]
                    product = part * digit
                    (np.subtract if subtract else np.add)(limb, product, out=limb)

    def export(self) -> tuple[int, list[Ints]]:
        """The lowest limb's position and the limbs, ready for another's `combine`: as few as hold the sum.

        Equal sums have equal limbs, whatever was added and taken out before. Some may be the sum's own memory.
        """
        self._carry()
        positions = sorted(position for position, limb in self._limbs.items() if limb.any())
        if not positions:
            return 0, []
        limbs = [self._limbs[position] for position in range(positions[0], max(self._limbs) + 1)]
        while len(limbs) > 1 and _magnitude(limbs[-1]) < _SMALL_TOP:
            top = limbs.pop()
            limbs[-1] = (top << DIGIT_BITS) + limbs[-1]
        return positions[0], limbs

    def combine(self, lowest: int, limbs: Sequence[Ints], *, subtract: bool = False) -> None:
        """Add (or take out) another sum as `export` gave it.

        Raises:
            FoldError: limbs that no sum has.
        """
        check_limbs(lowest, limbs)
        if not limbs:
            return
        self._reserve(lowest, lowest + len(limbs))
        if self._pending >= _MAX_PENDING:
            self._carry()
        self._pending += 1
        for offset, limb in enumerate(limbs):
            mine = self._limbs[lowest + offset]
            (np.subtract if subtract else np.add)(mine, limb, out=mine)

    def mean(self, start: int, stop: int, denominator: int, base: NDArray[Any] | None = None) -> NDArray[Any]:
        """The exact mean of elements ``start`` to ``stop``, halves to even, in the tensor's type.

        Args:
            start: the first element.
            stop: behind the last.
            denominator: the sum of the weights, in units of 2^-120; positive.
            base: what the mean is added to before it is rounded (DIFF); same elements and type.

        Raises:
            ValuesError: an element that the type cannot hold.
        """
        out = np.empty(stop - start, self._dtype)
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            below = base[first - start : last - start] if base is not None else None
            rounded = self._mean_of_block(first, last, denominator, below)
            limits = np.iinfo(self._dtype)
            if rounded.min() < limits.min or rounded.max() > limits.max:
                raise ValuesError(
                    f"a mean of integers is outside {limits.min} to {limits.max}, the range of {self._dtype}"
                )
            out[first - start : last - start] = rounded
        return out

    def _mean_of_block(self, first: int, last: int, denominator: int, base: NDArray[Any] | None) -> NDArray[Any]:
        blocks = {position: limb[first:last].copy() for position, limb in self._limbs.items()}
        _pass_carries(blocks)
        positions = sorted((p for p, block in blocks.items() if block.any()), reverse=True)
        lowest = positions[-1] if positions else 0
        shift = DIGIT_BITS * lowest
        fast = base is None or base.dtype.itemsize < 8
        if fast and denominator % (1 << shift) == 0 and denominator >> shift < 1 << 61:
            numerator = _narrow(blocks, lowest, last - first)
            if numerator is not None:
                below = None if base is None else base.astype(np.int64)
                return _round_half_even(numerator, denominator >> shift, below)
        exact = np.zeros(last - first, object)
        for position in sorted(blocks, reverse=True):
            exact = exact * (1 << DIGIT_BITS) + blocks[position].astype(object)
        if blocks:
            exact = exact * (1 << (DIGIT_BITS * min(blocks)))
        return _round_half_even(exact, denominator, None if base is None else base.astype(object))

    def _reserve(self, lowest: int, highest: int) -> None:
        if self._limbs:
            lowest, highest = min(lowest, *self._limbs), max(highest, *self._limbs)
        for position in range(lowest, highest + 1):
            if position not in self._limbs:
                self._limbs[position] = np.zeros(self._size, np.int64)

    def _carry(self) -> None:
        _pass_carries(self._limbs)
        self._pending = 0


def check_limbs(lowest: int, limbs: Sequence[Ints]) -> None:
    """Refuse limbs of a peer that no sum has.

    Raises:
        FoldError: positions or magnitudes out of range.
    """
    if lowest < 0 or lowest + len(limbs) > MAX_LIMBS:
        raise FoldError(f"limbs {lowest} to {lowest + len(limbs)} of an integer sum; they lie in 0 to {MAX_LIMBS}")
    for limb in limbs:
        if _magnitude(limb) >= _MAX_LIMB:
            raise FoldError(
                f"an integer sum with limbs beyond {_MAX_LIMB}; its carries must be passed on before it is sent"
            )


def _magnitude(limb: Ints) -> int:
    return max(int(limb.max()), -int(limb.min())) if limb.size else 0


def _digits_of(dtype: np.dtype[Any]) -> int:
    return {1: 1, 2: 1, 4: 2}.get(dtype.itemsize, 3)


def _pass_carries(limbs: dict[int, Ints]) -> None:
    """Bring every limb but the highest into [0, 2^24); the positions are consecutive."""
    for position in sorted(limbs)[:-1]:
        limb = limbs[position]
        limbs[position + 1] += limb >> DIGIT_BITS
        limb &= _MASK


def _narrow(blocks: dict[int, Ints], lowest: int, size: int) -> Ints | None:
    """The sum in units of its lowest limb, as int64, or None where that may not hold it."""
    value = np.zeros(size, np.int64)
    for position in sorted((p for p in blocks if p >= lowest), reverse=True):
        if _magnitude(value) >= 1 << (61 - DIGIT_BITS):
            return None
        value = (value << DIGIT_BITS) + blocks[position]
    return value


def _round_half_even(numerator: NDArray[Any], denominator: int, base: NDArray[Any] | None) -> NDArray[Any]:
    whole = numerator // denominator
    twice = (numerator - whole * denominator) * 2
    if base is not None:
        whole = whole + base
    up = (twice > denominator) | ((twice == denominator) & (whole % 2 == 1))
    return whole + up.astype(whole.dtype)
