"""Codecs: float tensors of a result in fewer bytes, undone exactly, block by block.

``fp16`` and ``bf16`` round each element to that type. ``int8`` rounds groups of 256 elements to multiples of a scale of
their own: an I8 tensor of the same name and shape, and before it in the file a companion ``__scale__.<name>`` of type
F32, one element a group. A scale has at most 17 significant bits, so that scale times integer is a float32 without
rounding: what is added into a fold is what `decode_model` gives. The same values give the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from .codec import show
from .dtypes import DTYPES, Array, widen
from .elements import RUN, Bytes, Scratch, elements_of, largest_single
from .errors import JobError, LayoutError, PayloadError, ValuesError
from .header import Header, Spec
from .tensors import as_numpy, spec_of

#: What stands before the name of a tensor in that of its scales.
SCALE_PREFIX: Final = "__scale__."
#: Elements that share a scale.
GROUP: Final = 256
#: The safetensors type of each codec.
CODED: Final = {"fp16": "F16", "bf16": "BF16", "int8": "I8"}
#: The types that are coded; narrower ones and integers stay as they are.
WIDE: Final = frozenset({"F32", "F64"})

_MOST: Final = 127
#: A scale's last bits are zero; it is zero or normal, and small enough that no product overflows.
_LOW_BITS: Final = 0x7F
_LEAST_SCALE: Final = 2.0**-126
_MOST_SCALE: Final = 2.0**120
_MOST_SCALE_BITS: Final = (120 + 127) << 23
_LEAST_SCALE_BITS: Final = 1 << 23


def check_codec(value: object) -> str:
    """A codec as a job names it: one of `CODED`, or "" for none.

    Raises:
        JobError: another value.
    """
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or value not in CODED:
        raise JobError(f"codec={value!r}; allowed are None, {', '.join(repr(name) for name in CODED)}")
    return value


def coded_type(codec: str, dtype: str, items: int) -> str:
    """The type in which a tensor travels: its own where the codec leaves it alone.

    A tensor of less than a group stays as it is under int8: biases and norms, which need their digits and save nothing.
    """
    if dtype not in WIDE or codec not in CODED or (codec == "int8" and items < GROUP):
        return dtype
    return CODED[codec]


def scales_of(items: int) -> int:
    """How many scales a tensor of so many elements has."""
    return -(-items // GROUP)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A tensor as it travels; scales under int8 only."""

    values: Array
    scales: NDArray[np.float32] | None = None


def narrow(name: str, value: Any, codec: str) -> Narrowed | None:
    """A tensor in a codec's type, or None where it stays as it is.

    Args:
        name: for messages.
        value: a tensor, numpy's or torch's.
        codec: as `check_codec` gives it.

    Raises:
        ValuesError: NaN, Inf or a value that the type cannot hold.
        LayoutError: a value whose bytes cannot be taken.
    """
    dtype, shape = spec_of(value)
    flat = as_numpy(value).reshape(-1)
    to = coded_type(codec, dtype, flat.size)
    if to == dtype:
        return None
    if to == "I8":
        made = _quantised(name, np.ascontiguousarray(flat))
        return Narrowed(made.values.reshape(shape), made.scales)
    out = np.empty(flat.size, DTYPES[to].numpy)
    scratch = Scratch()
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, flat.size, RUN):
            part = out[first : first + RUN]
            np.copyto(part, flat[first : first + RUN], casting="unsafe")
            if not elements_of(to).look(first, part.view(np.uint8), scratch)[0] < np.inf:
                raise _refusal(name, flat[first : first + RUN], codec)
    return Narrowed(out.reshape(shape))


def _quantised(name: str, flat: Array) -> Narrowed:
    values = np.empty(flat.size, np.int8)
    scales = np.empty(scales_of(flat.size), np.float32)
    work = np.empty(RUN, np.float32)
    for first in range(0, flat.size, RUN):
        count = min(RUN, flat.size - first)
        padded = work[: scales_of(count) * GROUP]
        padded[count:] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(padded[:count], flat[first : first + count], casting="same_kind")
            groups = padded.reshape(-1, GROUP)
            scale = np.maximum(groups.max(axis=1), -groups.min(axis=1)) / np.float32(_MOST)
            bits = scale.view(np.uint32)
            np.bitwise_and(bits + np.uint32(_LOW_BITS), np.uint32(0xFFFF_FFFF ^ _LOW_BITS), out=bits)
        if not bool((scale < _MOST_SCALE).all()):
            raise _refusal(name, flat[first : first + count], "int8")
        scale[scale < _LEAST_SCALE] = 0.0
        np.divide(groups, np.where(scale == 0.0, np.float32(1), scale)[:, None], out=groups)
        np.rint(groups, out=groups)
        np.copyto(values[first : first + count], padded[:count], casting="unsafe")
        scales[first // GROUP : first // GROUP + scale.size] = scale
    return Narrowed(values, scales)


def _refusal(name: str, values: Array, codec: str) -> ValuesError:
    most = float(np.abs(values).max())
    other = "" if codec == "bf16" else ", or use codec='bf16'"
    return ValuesError(f"tensor {name!r} reaches {most}, which {codec} cannot hold: train with smaller steps{other}")


class Grouped:
    """How the elements of an int8 tensor are read, once its scales are in."""

    __slots__ = ("_raw", "_scales", "itemsize")

    def __init__(self, items: int) -> None:
        """Scales for a tensor of so many elements, to be filled."""
        self.itemsize = 1
        self._raw = np.zeros(4 * scales_of(items), np.uint8)
        self._scales = self._raw.view(np.float32)

    def fill(self, offset: int, raw: Bytes) -> None:
        """Take bytes of the scales from this one on."""
        self._raw[offset : offset + raw.size] = raw

    @property
    def good(self) -> bool:
        """Whether every scale is one that `narrow` can make."""
        bits = self._raw.view(np.uint32)
        fits = (bits == 0) | ((bits >= _LEAST_SCALE_BITS) & (bits < _MOST_SCALE_BITS))
        return bool((fits & ((bits & _LOW_BITS) == 0)).all())

    def look(self, start: int, raw: Bytes, scratch: Scratch) -> tuple[float, NDArray[Any] | None]:
        """As `Elements.look`."""
        values = self.read(start, raw, scratch)
        return largest_single(values), values

    def read(self, start: int, raw: Bytes, scratch: Scratch) -> NDArray[Any]:
        """As `Elements.read`."""
        out = scratch.singles(raw.size)
        self.decode(start, raw, out)
        return out

    def decode(self, start: int, raw: Bytes, out: Array) -> None:
        """Write elements from ``start`` on, a multiple of `GROUP`, into a float array of their number."""
        np.copyto(out, raw.view(np.int8))
        first, whole = start // GROUP, raw.size // GROUP
        groups = out[: whole * GROUP].reshape(-1, GROUP)
        np.multiply(groups, self._scales[first : first + whole, None], out=groups)
        if whole * GROUP < raw.size:
            out[whole * GROUP :] *= self._scales[first + whole]

    def codes(self, raw: Bytes) -> NDArray[Any] | None:
        """As `Elements.codes`: none, since each group has values of its own."""
        return None

    def values(self) -> NDArray[np.float32]:
        """As `Elements.values`: of one group, there are none."""
        return np.empty(0, np.float32)


def widened(raw: Bytes, scales: Bytes | None, codec: str, dtype: str) -> Bytes:
    """The bytes of a whole coded tensor in its own type, F32 or F64.

    Args:
        raw: the tensor's bytes as it came.
        scales: those of its scales, under int8.
        codec: one of `CODED`.
        dtype: the type that it had.

    Raises:
        ValuesError: scales that no encoder makes.
    """
    out = np.empty(raw.size // DTYPES[CODED[codec]].itemsize, DTYPES[dtype].numpy)
    if codec != "int8":
        widen(raw, CODED[codec], out)
        return out.view(np.uint8)
    grouped = Grouped(out.size)
    grouped.fill(0, scales if scales is not None else np.empty(0, np.uint8))
    if not grouped.good:
        raise ValuesError("scales that are NaN, Inf, negative, or no multiple of their last bits")
    grouped.decode(0, raw, out)
    return out.view(np.uint8)


def narrow_all(tensors: dict[str, Any], names: Sequence[str], codec: str) -> dict[str, str]:
    """Narrow these of the tensors in their places, and add their scales; the types of those that changed.

    Raises:
        LayoutError: a name that is kept for scales.
        ValuesError: as `narrow`.
    """
    reserved = next((name for name in names if name.startswith(SCALE_PREFIX)), None)
    if reserved is not None:
        raise LayoutError(f"tensor {reserved!r}: names that start with {SCALE_PREFIX!r} are the codec's")
    had: dict[str, str] = {}
    for name in names:
        made = narrow(name, tensors[name], codec)
        if made is None:
            continue
        had[name], tensors[name] = spec_of(tensors[name])[0], made.values
        if made.scales is not None:
            tensors[SCALE_PREFIX + name] = made.scales
    return had


def positions_of(had: Mapping[str, str], order: Sequence[Spec]) -> dict[str, list[int]]:
    """By the type that they had, the places of narrowed tensors in a file."""
    out: dict[str, list[int]] = {}
    for place, (name, _, _) in enumerate(order):
        if name in had:
            out.setdefault(had[name], []).append(place)
    return out


def coded_tensors(header: Header, codec: Any, coded: Any) -> dict[str, str]:
    """The types that tensors had before a codec narrowed them, by name; empty without one.

    Args:
        header: the payload's header.
        codec, coded: what its description says; None where it does not.

    Raises:
        PayloadError: an unknown codec, or tensors that it does not make.
    """
    if codec is None and coded is None:
        return {}
    if codec not in CODED:
        raise PayloadError(f"a payload with codec {show(codec)}; this version knows {', '.join(CODED)}")
    had: dict[str, str] = {}
    for dtype, positions in cast("dict[str, Any]", coded).items() if isinstance(coded, dict) else [("", None)]:
        if dtype not in WIDE or not isinstance(positions, list):
            raise PayloadError(f"a payload of codec {codec} that does not say which tensors it is of")
        for position in cast("list[Any]", positions):
            if type(position) is not int or not 0 <= position < len(header.tensors):
                raise PayloadError(f"a payload of codec {codec} for a tensor at {show(position)}, where there is none")
            tensor = header.tensors[position]
            scales = header.by_name.get(SCALE_PREFIX + tensor.name)
            made = codec != "int8" or (
                scales is not None and (scales.dtype, scales.shape) == ("F32", (scales_of(tensor.items),))
            )
            if tensor.dtype != CODED[codec] or not made:
                raise PayloadError(f"tensor {tensor.name!r} is {tensor.dtype} and not as codec {codec} makes it")
            had[tensor.name] = dtype
    return had
