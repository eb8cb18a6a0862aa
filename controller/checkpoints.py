"""Checkpoints that a user names: files of numpy, safetensors and torch as parameters by name.

The one module that calls `torch.load`, and only with ``weights_only=True``: for a file on this machine that a user
names, never for bytes that were received. No format here runs code of the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np

from ..serialization.dtypes import DTYPES
from ..serialization.errors import JobError, PayloadError, WireError
from ..serialization.model import flatten
from ..serialization.payload import decode_model
from ..serialization.tensors import as_numpy, is_number, is_tensor, spec_of

#: What a file without names for its tensors is called: where numpy clients find their array in ``params``.
NUMPY_KEY = "numpy_key"
SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Read without torch: what may lie in a job, which anybody may have made.
PLAIN_SUFFIXES = (".npy", ".npz", ".safetensors")
#: Keys under which checkpoints of torch keep the parameters beside other things.
_NESTED = ("model", "state_dict", "model_state_dict")
_SHOWN = 3


def check_suffix(path: Path, what: str) -> None:
    """Refuse a file of which the ending says that it cannot be read.

    Raises:
        JobError: names the endings that can.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise JobError(f"{what}={str(path)!r}; a file that ends in {', '.join(SUFFIXES)} belongs here")


def check_travelling(path: Path, what: str) -> None:
    """Refuse what a job must not carry: a file beside it, and one of torch's.

    Raises:
        JobError: says what to do instead.
    """
    if ".." in path.parts:
        raise JobError(f"{what}={str(path)!r} leads out of the job's folder; name a file in it, or an absolute path")
    if path.suffix.lower() not in PLAIN_SUFFIXES:
        raise JobError(
            f"{what}={str(path)!r}: a file that travels with a job ends in {', '.join(PLAIN_SUFFIXES)}; others are read"
            " where they lie, by an absolute path. Or save it again: safetensors.torch.save_file(state_dict, ...)"
        )


def read_checkpoint(path: Path, what: str = "initial_ckpt") -> dict[str, Any]:
    """The parameters in a checkpoint, flat: numpy arrays, or torch tensors out of torch's files.

    Tensors are mappings of the file where the format allows it, so that looking at names and shapes reads little.

    - ``.npy``: one array, `NUMPY_KEY`; integers become float32.
    - ``.npz``: its arrays by name; a single one without a name is `NUMPY_KEY`.
    - ``.safetensors``: its tensors.
    - ``.pt``, ``.pth``, ``.bin``, ``.ckpt``: a state dict, also one under ``model``, ``state_dict`` or
      ``model_state_dict``.

    Args:
        path: the file.
        what: the option that names it, for errors.

    Raises:
        JobError: no such file, another ending, or contents that are no parameters.
    """
    check_suffix(path, what)
    if not path.is_file():
        raise JobError(f"{what}={str(path)!r}: there is no such file on this machine")
    try:
        match path.suffix.lower():
            case ".npy":
                params = {NUMPY_KEY: _floats(np.load(path, mmap_mode="r", allow_pickle=False))}
            case ".npz":
                params = _archive(path)
            case ".safetensors":
                params = dict(flatten(decode_model(path).params)[0])
            case _:
                params = _torch(path, what)
    except (OSError, ValueError, EOFError, BadZipFile, PayloadError, WireError) as error:
        raise JobError(f"{what}={str(path)!r} cannot be read as {path.suffix}: {_first_line(error)}") from None
    if not params:
        raise JobError(f"{what}={str(path)!r} holds no tensors")
    return params


def fit(params: Mapping[str, Any], base: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A checkpoint's values in the layout of a model: its order of names and its dtypes, as numpy arrays.

    Args:
        params: the checkpoint's tensors.
        base: the model's, flat.
        what: the checkpoint, for errors.

    Raises:
        JobError: other names or shapes; up to three are named.
    """
    if len(base) == len(params) == 1 and NUMPY_KEY in params:  # a file that has no name for its array
        params = {next(iter(base)): params[NUMPY_KEY]}
    wrong = [f"{name!r} is not in the checkpoint" for name in base if name not in params]
    wrong += [f"{name!r} is not in the model" for name in params if name not in base]
    for name in base:
        if name in params and (seen := spec_of(params[name])[1]) != (ours := spec_of(base[name])[1]):
            wrong.append(f"{name!r} is {list(seen)} there and {list(ours)} in the model")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise JobError(
            f"{what} does not fit the model: {'; '.join(wrong[:_SHOWN])}{more}. Give the checkpoint of this model, or"
            " leave out `model`, and the checkpoint alone is the initial model"
        )
    return {name: _as(params[name], spec_of(value)[0]) for name, value in base.items()}


def _as(value: Any, dtype: str) -> Any:
    array = as_numpy(value)
    return array if spec_of(array)[0] == dtype else array.astype(DTYPES[dtype].numpy)


def _floats(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype.kind in "biu" else array


def _archive(path: Path) -> dict[str, Any]:
    with path.open("rb") as source, np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {NUMPY_KEY: _floats(arrays["arr_0"])} if list(arrays) == ["arr_0"] else arrays


def _torch(path: Path, what: str) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise JobError(
            f"{what}={str(path)!r} needs torch, which is not installed here: pip install 'fedloom[torch]', or save the"
            " parameters as .safetensors"
        ) from None
    unsafe: type[Exception] = cast("Any", torch.serialization).pickle.UnpicklingError  # what weights_only refuses
    try:
        try:
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before 2020 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, unsafe, AttributeError, KeyError, TypeError) as error:
        raise JobError(
            f"{what}={str(path)!r} holds more than parameters, or is no file of torch.save: only tensors and plain data"
            f" are read, since anything else could run code. Save model.state_dict() ({_first_line(error)})"
        ) from None
    return _state_dict(loaded, path, what)


def _state_dict(loaded: Any, path: Path, what: str) -> dict[str, Any]:
    for _ in _NESTED:
        if not isinstance(loaded, Mapping):
            break
        outer = cast("Mapping[Any, Any]", loaded)
        inner = next((outer[key] for key in _NESTED if key in outer), None)
        if not isinstance(inner, Mapping):
            break
        loaded = cast("Any", inner)
    if not isinstance(loaded, Mapping):
        raise JobError(f"{what}={str(path)!r} holds a {type(loaded).__name__}; a state dict belongs there")
    pairs = cast("Mapping[Any, Any]", loaded)
    for name, value in pairs.items():
        if not isinstance(name, str) or not (is_tensor(value) or is_number(value)):
            raise JobError(
                f"{what}={str(path)!r}: {name!r} is a {type(value).__name__}; a state dict has tensors by name. It may"
                f" also lie under one of {', '.join(map(repr, _NESTED))}"
            )
    return dict(pairs)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
