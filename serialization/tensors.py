"""Tensors of numpy and torch as bytes, and bytes as tensors, without copies where none is needed.

torch is never imported for its own sake: what a user hands over is a torch tensor only if torch is loaded already, and
`view_torch` is called only for those who asked for torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from .dtypes import DTYPES, Array, from_numpy
from .errors import LayoutError

if TYPE_CHECKING:
    import torch

#: torch's names of the element types.
TORCH_NAMES: Final[dict[str, str]] = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_BY_TORCH: Final = {f"torch.{theirs}": ours for ours, theirs in TORCH_NAMES.items()}


def is_torch(value: object) -> bool:
    """Whether this is a torch tensor; never imports torch."""
    # a module that is being imported by another thread has no Tensor yet
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def is_tensor(value: object) -> bool:
    """Whether this is a numpy array, a numpy scalar or a torch tensor."""
    return isinstance(value, (np.ndarray, np.generic)) or is_torch(value)


def is_number(value: object) -> bool:
    """Whether this is a plain number or bool, which can be stored as a tensor without dimensions."""
    return isinstance(value, (bool, int, float))


def spec_of(value: Any) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and the shape of a tensor or number; looks at no element.

    Raises:
        LayoutError: a type, layout or device of which the bytes cannot be taken.
    """
    if is_torch(value):
        return _torch_spec(value)
    if is_number(value):
        return from_numpy(_number(value).dtype).name, ()
    array = cast("Array | np.generic", value)
    return from_numpy(array.dtype).name, array.shape


def raw_bytes(value: Any) -> memoryview:
    """The tensor's elements in C order, little endian, as bytes: its own memory where it lies like that already.

    As long as the view is in use, a change of the tensor is a change of the bytes. Tensors on a device are copied to
    the CPU; strided ones are copied.

    Raises:
        LayoutError: as `spec_of`.
    """
    if is_torch(value):
        return _torch_raw(value).data
    array = as_numpy(value)
    wanted = from_numpy(array.dtype).numpy
    if array.dtype != wanted:
        array = array.astype(wanted)  # the other byte order
    # reshape copies where it must; viewed as bytes because memoryview knows neither bfloat16 nor fp8
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def as_numpy(value: Any) -> Array:
    """A tensor or number as a numpy array, of an `ml_dtypes` type where numpy has none; shares CPU memory.

    Raises:
        LayoutError: as `spec_of`.
    """
    if is_torch(value):
        name, shape = _torch_spec(value)
        return view_numpy(_torch_raw(value), name, shape)
    if is_number(value):
        return _number(value)
    array = np.asarray(value)
    from_numpy(array.dtype)
    return array


def view_numpy(raw: Array, name: str, shape: tuple[int, ...]) -> Array:
    """Bytes (1-D uint8) as a numpy array of this dtype and shape; a copy only where the bytes are not aligned."""
    kind = DTYPES[name].numpy
    array = raw.view(kind).reshape(shape)
    return array if array.flags.aligned else array.copy()


def view_torch(raw: Array, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Writable bytes (1-D uint8) as a CPU tensor of this dtype and shape, of which it shares the memory. Imports torch.

    Raises:
        LayoutError: this version of torch has no such dtype.
    """
    import torch

    kind = getattr(torch, TORCH_NAMES[name], None)
    if kind is None:
        raise LayoutError(f"torch {torch.__version__} has no {TORCH_NAMES[name]}: upgrade it, or ask for numpy")
    if raw.size == 0:
        return torch.empty(shape, dtype=kind)
    if raw.ctypes.data % DTYPES[name].itemsize:
        raw = raw.copy()
    flat = torch.from_numpy(raw)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(kind).reshape(shape)


def _number(value: Any) -> Array:
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise LayoutError(f"the integer {value} needs more than 64 bits")
    if isinstance(value, bool):
        return np.asarray(value, np.bool_)
    return np.asarray(value, np.int64 if isinstance(value, int) else np.float64)


def _torch_spec(value: Any) -> tuple[str, tuple[int, ...]]:
    import torch

    tensor = cast("torch.Tensor", value)
    name = _BY_TORCH.get(str(tensor.dtype))
    if name is None:
        raise LayoutError(f"{tensor.dtype} cannot be stored; allowed are {', '.join(_BY_TORCH)}: convert it first")
    if tensor.layout != torch.strided:
        raise LayoutError(f"a {tensor.layout} tensor cannot be stored: call .to_dense() first")
    if hasattr(tensor, "full_tensor"):
        raise LayoutError("a tensor that is sharded over processes cannot be stored: call .full_tensor() first")
    if tensor.device.type == "meta":
        raise LayoutError("a tensor on the meta device has no values: materialise it first")
    return name, tuple(tensor.shape)


def _torch_raw(value: Any) -> Array:
    import torch

    _torch_spec(value)
    tensor = cast("torch.Tensor", value).detach()
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    dense = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()
