"""How a float tensor's bytes are read as numbers: runs of elements, their largest magnitude, scratch that is reused.

A run is read once from memory and then stays in a core's second-level cache. The largest magnitude is found on the
bytes themselves where the type allows: among floats of one sign, the larger one has the larger code, and NaN and Inf
are above all others. Two integer maxima cost half of what two float ones do, and a sixteenth-bit type is not widened
for it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, widen

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

#: Elements of a block: 256 KiB of float64, so that the scratch, its input and its sums stay in a core's cache.
BLOCK: Final = 32 * 1024
#: Elements that are looked at before they are added, whole blocks: a check of more at once costs fewer calls.
RUN: Final = 4 * BLOCK

#: Up to so many float32 elements two calls are cheaper than the reading of codes, which takes four and their views.
_FEW: Final = 4096

#: Values beyond this are refused: the smallest scale of a fold holds 2^26 of them with the largest weight.
MAX_VALUE: Final = 2.0**900

#: Types of which the codes without their sign are in the order of the values, and NaN and Inf behind all of them.
_ORDERED: Final = frozenset({"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_CODES: Final[dict[int, tuple[type[Any], type[Any], int]]] = {
    1: (np.int8, np.uint8, 0x7F),
    2: (np.int16, np.uint16, 0x7FFF),
    4: (np.int32, np.uint32, 0x7FFF_FFFF),
    8: (np.int64, np.uint64, 0x7FFF_FFFF_FFFF_FFFF),
}


class Scratch:
    """One thread's scratch arrays, made when first used."""

    __slots__ = ("_doubles", "_flags", "_ints", "_singles")

    def __init__(self) -> None:
        self._flags: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._singles = np.empty(0, np.float32)
        self._doubles: Floats = np.empty(0, np.float64)
        self._ints: Ints = np.empty(0, np.int64)

    def flags(self, count: int) -> NDArray[np.bool_]:
        """Up to `RUN` bools."""
        if not self._flags.size:
            self._flags = np.empty(RUN, np.bool_)
        return self._flags[:count]

    def singles(self, count: int) -> NDArray[np.float32]:
        """Up to `RUN` float32 elements."""
        if not self._singles.size:
            self._singles = np.empty(RUN, np.float32)
        return self._singles[:count]

    def doubles(self, count: int) -> Floats:
        """Up to `BLOCK` float64 elements."""
        if not self._doubles.size:
            self._doubles = np.empty(BLOCK, np.float64)
        return self._doubles[:count]

    def ints(self, count: int) -> Ints:
        """Up to `BLOCK` int64 elements."""
        if not self._ints.size:
            self._ints = np.empty(BLOCK, np.int64)
        return self._ints[:count]


class Elements(Protocol):
    """How the elements of one float tensor are read."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        ...

    def look(self, start: int, raw: Bytes, scratch: Scratch) -> tuple[float, NDArray[Any] | None]:
        """max|x| of up to `RUN` elements, at least one, NaN or Inf when any is not finite; and what `read` gives.

        Args:
            start: the first one's place in the tensor, a multiple of `BLOCK`.
            raw: their bytes.
            scratch: may be overwritten.

        Returns:
            The elements are None where they were not needed for it.
        """
        ...

    def read(self, start: int, raw: Bytes, scratch: Scratch) -> NDArray[Any]:
        """Up to `RUN` elements as float32 or float64; in `Scratch.singles` if they are not their own memory."""
        ...

    def codes(self, raw: Bytes) -> NDArray[Any] | None:
        """The elements as places in `values`, where reading from a table is the fastest way."""
        ...

    def values(self) -> NDArray[np.float32]:
        """The value of each code; only where there are codes."""
        ...


class Plain:
    """Elements of a safetensors float type."""

    __slots__ = ("_dtype", "_numpy", "_ordered", "_single", "_tabled", "itemsize")

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._numpy = DTYPES[dtype].numpy
        self._ordered = dtype in _ORDERED
        self._single = dtype == "F32"
        self.itemsize = DTYPES[dtype].itemsize
        self._tabled = self.itemsize < 3 and dtype != "BF16"

    def look(self, start: int, raw: Bytes, scratch: Scratch) -> tuple[float, NDArray[Any] | None]:
        """As `Elements`."""
        if not self._ordered:
            values = self.read(start, raw, scratch)
            return largest_magnitude(values), values
        if self._single and raw.size <= 4 * _FEW:
            values = raw.view(self._numpy)
            return largest_of_few(values, scratch.singles(values.size)), values
        return _largest_code(raw, self.itemsize, self._numpy), None

    def read(self, start: int, raw: Bytes, scratch: Scratch) -> NDArray[Any]:
        """As `Elements`."""
        if self.itemsize > 2:
            return raw.view(self._numpy)
        out = scratch.singles(raw.size // self.itemsize)
        widen(raw, self._dtype, out)
        return out

    def codes(self, raw: Bytes) -> NDArray[Any] | None:
        """As `Elements`."""
        return raw.view(_CODES[self.itemsize][1]) if self._tabled else None

    def values(self) -> NDArray[np.float32]:
        """As `Elements`."""
        codes = np.arange(1 << 8 * self.itemsize, dtype=_CODES[self.itemsize][1])
        out = np.empty(codes.size, np.float32)
        widen(codes, self._dtype, out)
        return out


@cache
def elements_of(dtype: str) -> Elements:
    """How elements of this safetensors float type are read."""
    return Plain(dtype)


def _largest_code(raw: NDArray[Any], itemsize: int, kind: np.dtype[Any]) -> float:
    signed, unsigned, mask = _CODES[itemsize]
    # of those without a sign, if there are any, and of those with one, if there are any
    code = max(int(np.maximum.reduce(raw.view(signed))), int(np.maximum.reduce(raw.view(unsigned))) & mask)
    return float(np.asarray(code, unsigned).view(kind))


def largest_of_few(values: NDArray[Any], magnitudes: NDArray[Any]) -> float:
    """max|x| of a few float32 elements, at least one; NaN when any is NaN. Scratch for as many is overwritten."""
    np.absolute(values, out=magnitudes)
    return float(magnitudes[magnitudes.argmax()])  # the place of a NaN, if there is one


def largest_single(values: NDArray[Any]) -> float:
    """max|x| of float32 elements, at least one; NaN when any of them is NaN."""
    return _largest_code(values, 4, values.dtype)


def largest_magnitude(values: NDArray[Any]) -> float:
    """max|x| of float elements, at least one; NaN when any of them is NaN."""
    # two SIMD reductions without a temporary; both are NaN if any element is
    return max(float(np.maximum.reduce(values)), -float(np.minimum.reduce(values)))


def all_finite(raw: Bytes, dtype: str) -> bool:
    """Whether a float tensor's bytes hold neither NaN nor Inf, in runs that stay in the cache."""
    if dtype not in _ORDERED and dtype != "F64":
        return bool(np.isfinite(raw.view(DTYPES[dtype].numpy)).all())
    step = RUN * DTYPES[dtype].itemsize
    parts = (raw[first : first + step] for first in range(0, raw.size, step))
    return all(math.isfinite(_largest_code(part, DTYPES[dtype].itemsize, DTYPES[dtype].numpy)) for part in parts)


def scan(start: int, raw: Bytes, elements: Elements, scratch: Scratch) -> tuple[float, int]:
    """max|x| of a float tensor's elements, and how many there are before a block with NaN, Inf or values over 2^900."""
    itemsize = elements.itemsize
    count = raw.size // itemsize
    largest = 0.0
    first, step = 0, RUN
    while first < count:
        found, _ = elements.look(start + first, raw[first * itemsize : (first + step) * itemsize], scratch)
        if found <= MAX_VALUE:
            largest = max(largest, found)
            first += step
        elif step == RUN:
            step = BLOCK  # which of its blocks it is
        else:
            return largest, first
    return largest, count
