"""A model as a payload, and back: one safetensors stream that any other tool opens, and that alone restores an FLModel.

Tensors of ``optimizer_params`` have names that start with ``__optimizer__.``. The metadata key ``fedloom`` holds, as
JSON, the plain side (see `plain_side`) and what the names cannot tell: ``order`` (the user's order of names, as
positions in the file's), ``structure`` and ``optimizer`` (the specs of `model.flatten`), and where a codec was used
(see `narrowing`) ``codec`` and ``coded``: by the type that they had, the positions of the tensors that it changed.
"""

from __future__ import annotations

import mmap
import platform
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

import numpy as np

from .digest import digest_buffers
from .dtypes import DTYPES, Array, is_int
from .envelope import Buffer
from .errors import HeaderError, LayoutError, PayloadError, ValuesError
from .header import Header, TensorInfo, build_header, file_order, read_header
from .model import FLModel, ParamsType, flatten, unflatten
from .narrowing import SCALE_PREFIX, coded_tensors, narrow_all, positions_of, widened
from .plain import dump_json, model_of, parse_json, plain_side
from .tensors import as_numpy, is_torch, raw_bytes, spec_of, view_numpy, view_torch

Framework = Literal["numpy", "pytorch", "auto"]

OPTIMIZER_PREFIX: Final = "__optimizer__."
#: The key of `Header.metadata` that holds a model's description.
DESCRIPTION: Final = "fedloom"

_STRUCTURE_KEYS: Final = frozenset({"order", "structure", "optimizer", "codec", "coded"})
#: What tools of the torch world look for before they load a file.
_FORMAT: Final = "format"
_TORCH_FORMAT: Final = "pt"
#: MAP_NORESERVE, which Python names from 3.13 on.
_NORESERVE: Final = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0


class Writable(Protocol):
    """What `write_buffers` needs of a file: raw ones may write less than asked."""

    def write(self, data: memoryview, /) -> int | None:
        """Write bytes; return how many."""
        ...


def write_buffers(file: Writable, buffers: Iterable[Buffer]) -> None:
    """Write these bytes one behind the other to a file open for binary writing, without a copy of them in memory.

    Raises:
        OSError: the file refused; part of them may be written.
    """
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        while len(rest):
            written = file.write(rest)
            if not written:
                raise OSError("the file took no bytes: is it non-blocking?")
            rest = rest[written:]


@dataclass(frozen=True, slots=True)
class EncodedModel:
    """A model ready to be written or sent.

    Attributes:
        header: the header, checked.
        header_bytes: its bytes, up to where the data starts.
        buffers: the whole payload, header first. The tensors' own memory where possible: until the payload is written
            or stored, a change of the model changes the payload.
        meta: the plain side, for the message that announces the payload.
    """

    header: Header
    header_bytes: bytes
    buffers: list[memoryview]
    meta: dict[str, Any]

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        return self.header.total_bytes

    def write_to(self, file: Writable) -> None:
        """Write the payload to a file open for binary writing, without a copy of it in memory.

        Raises:
            OSError: the file refused; part of the payload may be written.
        """
        write_buffers(file, self.buffers)

    def tobytes(self) -> bytes:
        """The payload as one object: for small models, as it copies everything."""
        return b"".join(self.buffers)

    def digest(self) -> str:
        """The payload's digest, 64 hex digits; reads everything."""
        return digest_buffers(self.buffers)


def encode_model(model: FLModel, *, codec: str = "") -> EncodedModel:
    """Describe a model as a payload; tensors are numpy arrays, torch tensors and numbers.

    The same model gives the same bytes. Two names for one tensor (tied weights) are stored under both.

    Args:
        model: the model.
        codec: what float tensors of its params are narrowed by, one of `narrowing.CODED`; "" keeps them.

    Raises:
        ValuesError: a value that the codec cannot hold.
        LayoutError: a tensor of a type that cannot be stored, or two with the same flat name.
        PayloadError: metrics or meta that are not plain data.
        HeaderError: a name that the format or fedloom does not allow.
        ValueError: as `FLModel.validate`.
        TypeError: as `FLModel.validate`.
    """
    plain = plain_side(model)
    description = dict(plain)
    tensors: dict[str, Any] = {}
    if model.params is not None:
        tensors, structure = flatten(model.params)
        if structure is not None:
            description["structure"] = structure
        reserved = next((name for name in tensors if name.startswith(OPTIMIZER_PREFIX)), None)
        if reserved is not None:
            raise LayoutError(f"tensor {reserved!r}: names that start with {OPTIMIZER_PREFIX!r} are optimizer_params'")
    names = list(tensors)
    if model.optimizer_params is not None:
        optimizer, description["optimizer"] = flatten(model.optimizer_params, plain=True)
        tensors |= {OPTIMIZER_PREFIX + name: value for name, value in optimizer.items()}
    torch_made = any(is_torch(value) for value in tensors.values())
    had = narrow_all(tensors, names, codec) if codec else {}
    specs = [(name, *_spec(name, value)) for name, value in tensors.items()]

    place = {name: i for i, (name, _, _) in enumerate(file_order(specs[: len(names)]))}
    order = [place[name] for name in names]
    if order != list(range(len(order))):
        description["order"] = order
    if had:
        description |= {"codec": codec, "coded": positions_of(had, file_order(specs))}
    metadata = {DESCRIPTION: dump_json(description)}
    if torch_made:
        metadata[_FORMAT] = _TORCH_FORMAT
    header, header_bytes = build_header(specs, metadata)
    buffers = [memoryview(header_bytes), *(raw_bytes(tensors[t.name]) for t in header.tensors if t.stop > t.start)]
    return EncodedModel(header, header_bytes, buffers, plain)


def _spec(name: str, value: Any) -> tuple[str, tuple[int, ...]]:
    try:
        return spec_of(value)
    except LayoutError as error:
        raise LayoutError(f"tensor {name!r}: {error}") from None


def decode_model(
    source: Buffer | Path | str,
    *,
    framework: Framework = "numpy",
    copy: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> FLModel:
    """A model out of a payload: bytes, or the path of a file.

    Tensors are views. Those of a path lie in a private mapping: they can be written, and the file does not change.
    Those of a buffer share it, and are read-only if it is; torch has no read-only tensors, so a read-only buffer is
    copied for it. Files of other tools are read too, as FULL params.

    Args:
        source: the whole payload, or where it is.
        framework: what the tensors become; "auto" is torch if it is loaded and the payload was written from torch.
        copy: True gives memory of its own, which needs neither the buffer nor the file any more.
        meta: the plain side that came with the payload, in place of the one in it.

    Raises:
        HeaderError: a header that breaks a rule, or a payload that is cut short or has bytes behind its end.
        PayloadError: a description that is malformed, or a bool that is neither 0 nor 1.
        LayoutError: a structure that does not fit the tensors, or a dtype that the framework does not have.
        OSError: the file cannot be read.
    """
    data = _bytes_of(source, copy)
    return ModelReader(data).read(data, framework, meta)


class ModelReader:
    """A payload's description, looked at once, and the models that are made of its bytes, as `decode_model` makes them.

    Raises:
        HeaderError, PayloadError: as `decode_model`.
    """

    def __init__(self, data: Array) -> None:
        """Of a whole payload's bytes, which are not kept."""
        header = self._header = read_header(data.data, data.size)
        self._plain, self._extra = describe(header)
        self._had = coded_tensors(header, self._extra.get("codec"), self._extra.get("coded"))
        self._described = DESCRIPTION in header.metadata
        self._torch_made = header.metadata.get(_FORMAT) == _TORCH_FORMAT
        self._checked = False
        # of nothing but arrays in their order, beside a plain side of atoms, a model is made in fewer steps
        self._flat: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        nested = any(isinstance(value, (dict, list)) for value in self._plain.values())
        usual = all(t.stop > t.start and t.dtype != "BOOL" for t in header.tensors)
        if usual and not nested and not self._had and not self._extra:
            at = header.data_start
            self._flat = [(t.name, DTYPES[t.dtype].numpy, t.shape, at + t.start) for t in header.tensors]

    def read(self, data: Array, framework: Framework, meta: Mapping[str, Any] | None = None) -> FLModel:
        """A model whose tensors are views of these bytes, as far as `decode_model` says so; the rest is its own.

        Raises:
            PayloadError, LayoutError: as `decode_model`.
        """
        header, extra, had = self._header, self._extra, self._had
        as_torch = framework == "pytorch" or (framework == "auto" and self._torch_made and "torch" in sys.modules)
        if self._flat and self._checked and meta is None and not as_torch:
            views = {name: np.ndarray(shape, kind, data, at) for name, kind, shape, at in self._flat}
            aligned = {name: view if view.flags.aligned else view.copy() for name, view in views.items()}
            return model_of(self._plain, aligned, None, checked=True)
        if as_torch and not data.flags.writeable:
            data = data.copy()
        body = data[header.data_start :]
        params: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for tensor in header.tensors:
            if had and tensor.name.startswith(SCALE_PREFIX):
                continue
            value = (
                _widened(body, header, tensor, extra["codec"], had[tensor.name], as_torch)
                if tensor.name in had
                else _view(body, tensor, as_torch)
            )
            if self._described and tensor.name.startswith(OPTIMIZER_PREFIX):
                optimizer[tensor.name[len(OPTIMIZER_PREFIX) :]] = value
            else:
                params[tensor.name] = value
        if "optimizer" not in extra and optimizer:
            raise LayoutError("the payload has tensors of optimizer_params and no description of them")
        nested = unflatten(_reorder(params, extra.get("order")), extra.get("structure"))
        plain = dict(meta) if meta is not None else {key: deepcopy(value) for key, value in self._plain.items()}
        if self._described and plain.get("params_type") is None and not params:
            nested = None  # a model of metrics alone
        optimizer_params = unflatten(optimizer, extra["optimizer"]) if "optimizer" in extra else None
        model = model_of(plain, nested, optimizer_params, checked=meta is None and self._checked)
        self._checked = self._checked or meta is None
        return model


def layout_of(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each of the params, as `decode_model` gives them.

    Raises:
        PayloadError: the description is malformed.
    """
    extra = describe(header)[1]
    had = coded_tensors(header, extra.get("codec"), extra.get("coded"))
    return {
        t.name: (had.get(t.name, t.dtype), t.shape)
        for t in header.tensors
        if not t.name.startswith(OPTIMIZER_PREFIX) and not (had and t.name.startswith(SCALE_PREFIX))
    }


def describe(header: Header) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a payload's header says beside its tensors: the plain side, and the structure (order, specs).

    Both are empty for a file of another tool.

    Raises:
        PayloadError: the description is malformed.
    """
    text = header.metadata.get(DESCRIPTION)
    if text is None:
        return {}, {}
    plain = parse_json(text)
    return plain, {key: plain.pop(key) for key in _STRUCTURE_KEYS & plain.keys()}


def _bytes_of(source: Buffer | Path | str, copy: bool) -> Array:
    if not isinstance(source, (str, Path)):
        array = np.frombuffer(source, np.uint8)
        return array.copy() if copy else array
    path = Path(source)
    if copy:
        return np.fromfile(path, np.uint8)
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:  # which cannot be mapped
            raise HeaderError(f"{path} is empty; a safetensors file is not")
        return np.frombuffer(_map(file.fileno()), np.uint8)


def _map(descriptor: int) -> mmap.mmap:
    # private and writable, with no swap set aside for pages that nobody writes: a model may be larger than memory
    if not _NORESERVE:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _view(body: Array, tensor: TensorInfo, as_torch: bool) -> Any:
    raw = body[tensor.start : tensor.stop]
    if tensor.dtype == "BOOL" and raw.size and raw.max() > 1:
        raise PayloadError(f"tensor {tensor.name!r} holds a byte {raw.max()}; bools are 0 or 1")
    return (view_torch if as_torch else view_numpy)(raw, tensor.dtype, tensor.shape)


def _widened(body: Array, header: Header, tensor: TensorInfo, codec: str, dtype: str, as_torch: bool) -> Any:
    scales = header.by_name.get(SCALE_PREFIX + tensor.name)
    raw = body[tensor.start : tensor.stop]
    try:
        wide = widened(raw, body[scales.start : scales.stop] if scales is not None else None, codec, dtype)
    except ValuesError as error:
        raise PayloadError(f"tensor {tensor.name!r}: {error}") from None
    return (view_torch if as_torch else view_numpy)(wide, dtype, tensor.shape)


def _reorder(params: dict[str, Any], order: Any) -> dict[str, Any]:
    if order is None:
        return params
    names = list(params)
    places = cast("list[Any]", order) if isinstance(order, list) else []
    if any(type(place) is not int for place in places) or sorted(places) != list(range(len(names))):
        raise PayloadError(f"the payload's order of names is no permutation of {len(names)} places")
    return {names[place]: params[names[place]] for place in places}


def diff(new: FLModel, base: FLModel) -> FLModel:
    """The DIFF model new - base, tensor by tensor in the dtype of ``new`` and in its framework.

    Bools are not subtracted: the new value stands. All else of ``new`` (metrics, meta, rounds) is kept.

    Raises:
        LayoutError: other names, dtypes or shapes than the base's, a model without params, or an integer difference
            that the dtype cannot hold.
    """
    if new.params is None or base.params is None:
        raise LayoutError("a difference needs params on both sides")
    ours, structure = flatten(new.params)
    theirs, _ = flatten(base.params)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise LayoutError(f"{len(odd)} tensors are in one model only, such as {odd[0]!r}: a difference needs both")
    return FLModel(
        params_type=ParamsType.DIFF,
        params=unflatten({name: _subtract(name, value, theirs[name]) for name, value in ours.items()}, structure),
        optimizer_params=new.optimizer_params,
        metrics=new.metrics,
        start_round=new.start_round,
        current_round=new.current_round,
        total_rounds=new.total_rounds,
        meta=new.meta,
    )


def _subtract(name: str, new: Any, base: Any) -> Any:
    if _spec(name, new) != _spec(name, base):
        (dtype, shape), (base_dtype, base_shape) = _spec(name, new), _spec(name, base)
        raise LayoutError(f"tensor {name!r} is {dtype}{list(shape)}; the base's is {base_dtype}{list(base_shape)}")
    dtype = DTYPES[_spec(name, new)[0]]
    if dtype.name == "BOOL":
        return new
    if is_torch(new) and is_torch(base) and dtype.bits > 8 and not is_int(dtype.name):
        return new.detach() - base.detach().to(new.device)
    a, b = as_numpy(new), as_numpy(base)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are refused where results are folded
        if dtype.bits == 8 and not is_int(dtype.name):
            result = (a.astype(np.float32) - b.astype(np.float32)).astype(a.dtype)
        else:
            result = np.asarray(np.subtract(a, b))
    if is_int(dtype.name) and bool(np.any((result < 0) != (a < b))):
        raise LayoutError(f"tensor {name!r}: the difference does not fit {dtype.name}: send it as FULL")
    if not is_torch(new):
        return result
    return view_torch(np.ascontiguousarray(result).reshape(-1).view(np.uint8), dtype.name, result.shape).to(new.device)
