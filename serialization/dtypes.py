"""The element types of safetensors, and how numpy sees them.

numpy has no bfloat16 or 8-bit floats of its own; `ml_dtypes` lends them, so an array of such a type is an ordinary
array. The packed sub-byte types (F4, F6_E2M3, F6_E3M2) are refused: an element that shares its byte with another can
neither be viewed nor folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import LayoutError

Array = NDArray[Any]

#: Elements widened at a time where a scratch array is needed: what stays in a core's second-level cache.
BLOCK_ITEMS: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the name in a safetensors header, such as ``"BF16"``.
        bits: the size of an element in bits, always whole bytes.
        numpy: the numpy type with the same bytes (little endian).
    """

    name: str
    bits: int
    numpy: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """The size of an element in bytes."""
        return self.bits // 8


def _table(*rows: tuple[str, Any]) -> dict[str, DType]:
    types = ((name, np.dtype(kind)) for name, kind in rows)
    return {name: DType(name, 8 * kind.itemsize, kind) for name, kind in types}


#: Every element type by its safetensors name, in the order in which a file holds its tensors: wide types first, as the
#: safetensors library writes them, so that each tensor starts at a multiple of its element's size.
DTYPES: Final[dict[str, DType]] = _table(
    ("U64", "<u8"),
    ("I64", "<i8"),
    ("F64", "<f8"),
    ("C64", "<c8"),
    ("F32", "<f4"),
    ("U32", "<u4"),
    ("I32", "<i4"),
    ("BF16", ml_dtypes.bfloat16),
    ("F16", "<f2"),
    ("U16", "<u2"),
    ("I16", "<i2"),
    ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
    ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
    ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("F8_E5M2", ml_dtypes.float8_e5m2),
    ("I8", "i1"),
    ("U8", "u1"),
    ("BOOL", "?"),
)

#: A type's place in a file, lower first.
ORDER: Final[dict[str, int]] = {name: place for place, name in enumerate(DTYPES)}

#: Types that the format knows and fedloom refuses.
SUB_BYTE: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2"})

_BY_NUMPY: Final[dict[np.dtype[Any], DType]] = {entry.numpy: entry for entry in DTYPES.values()}
_FLOATS: Final = frozenset(name for name in DTYPES if name.startswith(("F", "BF")))
_INTS: Final = frozenset(name for name in DTYPES if name.startswith(("I", "U")))


def from_numpy(dtype: np.dtype[Any]) -> DType:
    """The safetensors type of a numpy type; its byte order does not matter.

    Raises:
        LayoutError: the format has no such type (float128, complex128, objects, text, dates, records).
    """
    found = _BY_NUMPY.get(dtype) or _BY_NUMPY.get(dtype.newbyteorder("<"))
    if found is None:
        raise LayoutError(
            f"numpy type {dtype} cannot be stored; allowed are {', '.join(str(e.numpy) for e in DTYPES.values())}:"
            " convert the array with .astype(...) first"
        )
    return found


def is_float(name: str) -> bool:
    """Whether elements are real floating-point numbers, of 8 to 64 bits."""
    return name in _FLOATS


def is_int(name: str) -> bool:
    """Whether elements are integers; BOOL is not."""
    return name in _INTS


def widen(raw: Array, name: str, out: Array) -> None:
    """Write float elements into ``out`` as float32 or float64, exactly (F64 into float32 is rounded).

    Args:
        raw: 1-D, contiguous: the elements' bytes as uint8, or any array of the same bytes. Need not be aligned.
        name: the safetensors type of the elements, one for which `is_float` holds.
        out: 1-D, contiguous float32 or float64 array with one item for each element.

    Raises:
        LayoutError: a type that is not a float, or sizes that do not match.
    """
    if name not in _FLOATS:
        raise LayoutError(f"{name} elements cannot be widened; only floats can: {', '.join(sorted(_FLOATS))}")
    entry = DTYPES[name]
    wanted = out.size * entry.itemsize
    if raw.nbytes != wanted:
        raise LayoutError(f"{raw.nbytes} bytes of {name} for {out.size} elements; {wanted} belong there")
    if out.dtype.char not in "fd":
        raise LayoutError(f"widening into {out.dtype}; only float32 and float64 are allowed")
    # a cast of NaN or of a large F64 warns; whether a result's values are finite is for the fold to say
    with np.errstate(invalid="ignore", over="ignore"):
        if name == "BF16":
            _widen_bf16(raw, out)
        elif name == "F16":
            _look_up(raw.view(np.uint16), _f16_values(), out)
        elif entry.bits == 8:
            _look_up(raw.view(np.uint8), _byte_values(name), out)
        else:
            np.copyto(out, raw.view(entry.numpy), casting="same_kind")


def _widen_bf16(raw: Array, out: Array) -> None:
    # a bfloat16 is the upper half of a float32
    halves = raw.view(np.uint16)
    if out.dtype == np.float32:
        words = out.view(np.uint32)
        np.copyto(words, halves)
        np.left_shift(words, 16, out=words)
        return
    scratch = np.empty(min(BLOCK_ITEMS, halves.size), np.uint32)
    for start in range(0, halves.size, BLOCK_ITEMS):
        part = halves[start : start + BLOCK_ITEMS]
        words = scratch[: part.size]
        np.copyto(words, part)
        np.left_shift(words, 16, out=words)
        np.copyto(out[start : start + part.size], words.view(np.float32))


def _look_up(codes: Array, values: Array, out: Array) -> None:
    # numpy converts an fp16 or fp8 element in software; reading its value from a table is 2 to 7 times faster.
    # Every code has a value, so "clip" never clips: it is numpy's fast mode.
    if out.dtype == np.float32:
        np.take(values, codes, out=out, mode="clip")
        return
    scratch = np.empty(min(BLOCK_ITEMS, codes.size), np.float32)
    for start in range(0, codes.size, BLOCK_ITEMS):
        part = codes[start : start + BLOCK_ITEMS]
        found = scratch[: part.size]
        np.take(values, part, out=found, mode="clip")
        np.copyto(out[start : start + part.size], found)


@cache
def _f16_values() -> Array:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@cache
def _byte_values(name: str) -> Array:
    return np.arange(1 << 8, dtype=np.uint8).view(DTYPES[name].numpy).astype(np.float32)
