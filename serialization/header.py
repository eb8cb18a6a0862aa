"""Safetensors headers, written canonically and read strictly.

A file is ``u64 N (little endian) | N bytes of JSON | data``. The JSON maps each tensor's name to its dtype, its shape
and its offsets in the data, and ``__metadata__`` to a map of text. All offsets come first, so a reader of a stream can
use each tensor as soon as its bytes are there. The safetensors library refuses partial files and lets pass much that
must not come from a peer (duplicate names, control characters, unknown keys, absurd shapes); this reader does neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NoReturn, cast

from blake3 import blake3

from .codec import pack, show
from .dtypes import DTYPES, ORDER, SUB_BYTE, DType
from .envelope import Buffer
from .errors import HeaderError

MAX_HEADER_BYTES: Final = 16 * 1024 * 1024
MAX_TENSORS: Final = 200_000
MAX_NAME: Final = 512
MAX_RANK: Final = 16
#: The most bytes of data a header may promise: more than any disk, and exact in a float.
MAX_DATA_BYTES: Final = 2**53
#: The largest product of the other dimensions of a tensor that has no elements.
MAX_EMPTY_ITEMS: Final = 2**32

#: Data starts at a multiple of this, so that a mapped file's tensors are aligned for any vector unit.
ALIGNMENT: Final = 64
METADATA: Final = "__metadata__"

_LENGTH_BYTES: Final = 8
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
#: Lists and maps a header may hold. Python needs 60 bytes and more for each, of three bytes of JSON.
_MAX_NODES: Final = 1_000_000
_MAX_DIGITS: Final = 20

#: A tensor to write: name, dtype, shape.
Spec = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: ``start`` and ``stop`` are offsets in the data section, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def items(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their bytes, the metadata, and where in the file the data starts."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int

    @property
    def data_bytes(self) -> int:
        """The size of the data section."""
        return self.tensors[-1].stop if self.tensors else 0

    @property
    def total_bytes(self) -> int:
        """The size of the whole file."""
        return self.data_start + self.data_bytes

    @cached_property
    def layout_id(self) -> str:
        """64 hex digits that are equal for equal names, dtypes and shapes in equal order; metadata does not count."""
        return blake3(pack([[t.name, t.dtype, t.shape] for t in self.tensors])).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """The tensors by name, in order."""
        return {t.name: t for t in self.tensors}


def file_order(specs: Iterable[Spec]) -> list[Spec]:
    """Tensors in the order in which a file holds them: wide dtypes first, then by name."""
    return sorted(specs, key=lambda spec: (ORDER.get(spec[1], -1), spec[0]))


def build_header(specs: Iterable[Spec], metadata: Mapping[str, str] | None = None) -> tuple[Header, bytes]:
    """The header of a file with these tensors, and its bytes, which end where the data starts.

    Tensors are placed as the safetensors library places them (wide dtypes first, then by name), whatever the order of
    ``specs``: the same model has the same layout on every side. The same arguments give the same bytes.

    Raises:
        HeaderError: a name, dtype, shape or size that `read_header` would refuse.
    """
    notes = _check_metadata(dict(metadata or {}))
    ordered = file_order(specs)
    if len(ordered) > MAX_TENSORS:
        raise HeaderError(f"{len(ordered)} tensors; at most {MAX_TENSORS}")
    tensors: list[TensorInfo] = []
    entries: dict[str, Any] = {METADATA: {key: notes[key] for key in sorted(notes)}} if notes else {}
    start = 0
    for name, dtype, shape in ordered:
        _check_name(name)
        if name in entries:
            raise HeaderError(f"tensor {name!r} twice; each name is one tensor's")
        stop = start + _size(name, _dtype(name, dtype), _check_shape(name, list(shape)))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        tensors.append(TensorInfo(name, dtype, tuple(shape), start, stop))
        start = stop
    if start > MAX_DATA_BYTES:
        raise HeaderError(f"{start} bytes of data; at most {MAX_DATA_BYTES}")
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderError(f"header of {len(text)} bytes; at most {MAX_HEADER_BYTES}: shorten names and metadata")
    header = Header(tuple(tensors), notes, _LENGTH_BYTES + len(text))
    return header, len(text).to_bytes(_LENGTH_BYTES, "little") + text


def header_bytes_needed(first8: Buffer) -> int:
    """How many bytes from the start of the file `read_header` needs, told from the first 8 of them.

    Raises:
        HeaderError: fewer than 8 bytes, or a header over 16 MiB or too short to be one.
    """
    if len(first8) < _LENGTH_BYTES:
        raise HeaderError(f"{len(first8)} bytes; a safetensors file has at least {_LENGTH_BYTES + 2}")
    length = int.from_bytes(first8[:_LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise HeaderError(f"header of {length} bytes; 2 to {MAX_HEADER_BYTES} are allowed: is this a safetensors file?")
    return _LENGTH_BYTES + length


def read_header(prefix: Buffer, total_bytes: int | None = None) -> Header:
    """Read the header at the start of ``prefix``.

    Args:
        prefix: the start of the file, at least the header; what lies behind it is not looked at.
        total_bytes: the size of the whole file, or None where it is not known yet.

    Raises:
        HeaderError: anything that breaks a rule of the format or one of fedloom's. Tensors must lie one after another
            from 0 without hole or overlap, each at a multiple of its element's size, with as many bytes as its shape
            says, and end where the file ends.
    """
    needed = header_bytes_needed(prefix[:_LENGTH_BYTES])
    if total_bytes is not None and needed > total_bytes:
        raise HeaderError(f"header of {needed} bytes in a file of {total_bytes}")
    if len(prefix) < needed:
        raise HeaderError(f"{len(prefix)} bytes of a header of {needed}; all of it is needed")
    entries = _parse(bytes(prefix[_LENGTH_BYTES:needed]))
    metadata = _check_metadata(entries.pop(METADATA, {}))
    if len(entries) > MAX_TENSORS:
        raise HeaderError(f"{len(entries)} tensors; at most {MAX_TENSORS}")
    tensors = [_read_entry(name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise HeaderError(f"tensor {tensor.name!r} starts at {tensor.start}, not at {end}: it {what}")
        end = tensor.stop
    header = Header(tuple(tensors), metadata, needed)
    if end > MAX_DATA_BYTES:
        raise HeaderError(f"{end} bytes of data; at most {MAX_DATA_BYTES}")
    if total_bytes is not None and header.total_bytes != total_bytes:
        raise HeaderError(f"a file of {total_bytes} bytes whose header describes {header.total_bytes}")
    return header


def _parse(text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise HeaderError(f"header starts with {text[:8]!r}; it must start with '{{'")
    nodes = text.count(b"{") + text.count(b"[")
    if nodes > _MAX_NODES:
        raise HeaderError(f"header with {nodes} lists and maps; at most {_MAX_NODES}")
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except HeaderError:
        raise
    except RecursionError:
        raise HeaderError("header nested too deep; it has three levels") from None
    except ValueError as error:
        raise HeaderError(f"header is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise HeaderError(f"name {show(key)} twice; each name is one tensor's")
            seen.add(key)
    return out


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise HeaderError(f"number of {len(digits)} digits; at most {_MAX_DIGITS}")
    if digits == "-0":  # which other readers take for a float
        raise HeaderError("number -0; shapes and offsets are whole numbers")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise HeaderError(f"number {show(text)}; shapes and offsets are whole numbers")


def _read_entry(name: str, entry: Any) -> TensorInfo:
    _check_name(name)
    if type(entry) is not dict:
        raise HeaderError(f"tensor {name!r}: {type(entry).__name__} where a map belongs")
    fields = cast("dict[str, Any]", entry)
    if fields.keys() != _ENTRY_KEYS:
        raise HeaderError(f"tensor {name!r}: keys {show(sorted(fields))}; exactly {sorted(_ENTRY_KEYS)} belong there")
    dtype = _dtype(name, fields["dtype"])
    shape = _check_shape(name, fields["shape"])
    offsets = fields["data_offsets"]
    if type(offsets) is not list or len(cast("list[Any]", offsets)) != 2:
        raise HeaderError(f"tensor {name!r}: data_offsets are not two whole numbers")
    start, stop = (_check_count(name, "offset", value) for value in cast("list[Any]", offsets))
    size = _size(name, dtype, shape)
    if stop - start != size:
        raise HeaderError(f"tensor {name!r}: offsets {start} to {stop}; {dtype.name}{list(shape)} has {size} bytes")
    if start % dtype.itemsize:
        raise HeaderError(
            f"tensor {name!r}: {dtype.name} at offset {start}, which is not a multiple of {dtype.itemsize}:"
            " load the file with the safetensors library and save it again"
        )
    return TensorInfo(name, dtype.name, shape, start, stop)


def _check_name(name: str) -> None:
    # "/" is common in names; a path out of a folder is not, and tools that unpack a file by its names trust them
    if not 0 < len(name) <= MAX_NAME:
        raise HeaderError(f"tensor name of {len(name)} characters; 1 to {MAX_NAME} are allowed: {show(name)}")
    if not name.isprintable():
        raise HeaderError(f"tensor name {show(name)}; only printable characters are allowed")
    if name == METADATA or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise HeaderError(f"tensor name {show(name)} is not allowed")


def _dtype(name: str, dtype: Any) -> DType:
    entry = DTYPES.get(dtype) if type(dtype) is str else None
    if entry is None:
        advice = ": elements must be whole bytes" if type(dtype) is str and dtype in SUB_BYTE else ""
        raise HeaderError(f"tensor {name!r}: dtype {show(dtype)}; allowed are {', '.join(DTYPES)}{advice}")
    return entry


def _check_shape(name: str, shape: Any) -> tuple[int, ...]:
    if type(shape) is not list:
        raise HeaderError(f"tensor {name!r}: shape {show(shape)}; a list of whole numbers belongs there")
    dims = cast("list[Any]", shape)
    if len(dims) > MAX_RANK:
        raise HeaderError(f"tensor {name!r} with {len(dims)} dimensions; at most {MAX_RANK}")
    return tuple(_check_count(name, "dimension", dim) for dim in dims)


def _check_count(name: str, what: str, value: Any) -> int:
    # bool is an int to Python and must not pass for one
    if type(value) is not int or not 0 <= value <= MAX_DATA_BYTES:
        raise HeaderError(f"tensor {name!r}: {what} {show(value)}; whole numbers of 0 to {MAX_DATA_BYTES} are allowed")
    return value


def _size(name: str, dtype: DType, shape: tuple[int, ...]) -> int:
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_DATA_BYTES or (size == 0 and math.prod(dim for dim in shape if dim) > MAX_EMPTY_ITEMS):
        raise HeaderError(f"tensor {name!r}: shape {list(shape)} is too large")
    return size


def _check_metadata(metadata: Any) -> dict[str, str]:
    if type(metadata) is not dict:
        raise HeaderError(f"{METADATA}: {type(metadata).__name__} where a map of text belongs")
    for key, value in cast("dict[Any, Any]", metadata).items():
        if type(key) is not str or not 0 < len(key) <= MAX_NAME or not key.isprintable():
            raise HeaderError(f"{METADATA}: key {show(key)}; 1 to {MAX_NAME} printable characters are allowed")
        if type(value) is not str:
            raise HeaderError(f"{METADATA}: {key!r} is a {type(value).__name__}; only text is allowed")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise HeaderError(f"{METADATA}: {key!r} holds half a surrogate pair; only text is allowed") from None
    return cast("dict[str, str]", metadata)
