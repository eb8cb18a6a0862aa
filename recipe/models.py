"""The initial global model, out of what a job script gives: a module, arrays, a checkpoint's path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from ..serialization.errors import JobError
from .code import script_folders
from .components import sources

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class InitialModel:
    """What a job starts from.

    Attributes:
        params: what travels with the job: arrays or tensors by name; None where nothing does.
        checkpoint: an absolute path that the job's process reads when the job starts; "" where there is none.
        modules: sources of the model's classes.
    """

    params: Params | None = None
    checkpoint: str = ""
    modules: tuple[Path, ...] = ()


def with_checkpoint(
    given: str | Path | None, params: Params | None, modules: list[Path], *, option: str = "initial_ckpt"
) -> InitialModel:
    """The initial model, with the checkpoint's values where one is named.

    A relative path is looked for beside the job script and read now: its values travel with the job. An absolute one is
    a file of the machine that the job's process will run on; where it is here as well, it is looked at now.

    Args:
        given: the checkpoint's path, or None.
        params: the model's, or None.
        modules: sources of the model's classes.
        option: what the path was given as, for errors.

    Raises:
        JobError: a file that is missing or cannot be read, or that does not fit the model.
    """
    if given is None:
        return InitialModel(params, "", tuple(modules))
    if not isinstance(cast("object", given), str | Path) or not str(given).strip():
        raise JobError(f"{option}={given!r}; the path of a checkpoint belongs here")
    from ..controller.checkpoints import check_suffix, fit, read_checkpoint

    path = Path(given).expanduser()
    check_suffix(path, option)
    if not path.is_absolute():
        found = _beside_the_script(path, option)
        values = read_checkpoint(found, option)
        if params is not None:
            values = fit(values, _flat(params), f"{option}={str(found)!r}")
        return InitialModel(values, "", tuple(modules))
    if path.is_file():
        values = read_checkpoint(path, option)
        if params is not None:
            fit(values, _flat(params), f"{option}={str(path)!r}")
    return InitialModel(params, str(path), tuple(modules))


def _beside_the_script(path: Path, option: str) -> Path:
    candidates = [folder / path for folder in script_folders()]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        where = " or ".join(str(candidate) for candidate in candidates)
        raise JobError(
            f"{option}={str(path)!r} not found: looked for {where}. A file that only the server has is named by its"
            " absolute path"
        )
    return found


def _flat(params: Params) -> Params:
    from ..serialization.model import flatten

    return flatten(params)[0]


def torch_model(model: Any) -> tuple[Params | None, list[Path]]:
    """A torch model's parameters and buffers, and the source files of its classes; no model has none of either.

    Args:
        model: a module, a map of tensors or arrays by name, or ``{"class_path": "module.Class", "args": {...}}``.

    Raises:
        JobError: something else, or a model without tensors.
    """
    if model is None:
        return None, []
    if isinstance(model, Mapping):
        entry = cast("Mapping[str, Any]", model)
        if "class_path" in entry:
            model = _build(entry)
        elif not entry:
            raise JobError("model={}: a model has at least one tensor")
        else:
            return dict(entry), []
    if inspect.isclass(model):
        raise JobError(f"model={model.__name__} is a class; give an instance: model={model.__name__}()")
    if not hasattr(model, "state_dict") or not hasattr(model, "modules"):
        raise JobError(
            f"model is a {type(model).__name__}; a torch.nn.Module instance or a map of arrays by name belongs here"
        )
    from .base import torch_params

    params = torch_params(model)
    if not params:
        raise JobError(f"model {type(model).__name__} has no parameters and no buffers: nothing to train together")
    return params, sources({type(part).__module__ for part in model.modules()})


def numpy_model(model: Any) -> tuple[Params | None, list[Path]]:
    """An array as the parameters of numpy clients, under ``numpy_key``; a map of arrays keeps its names.

    Args:
        model: a list of numbers (float32), an array (floats keep their dtype, integers become float32), or a map.

    Raises:
        JobError: something else.
    """
    import numpy as np

    from ..controller.checkpoints import NUMPY_KEY

    if isinstance(model, Mapping) and model:
        return dict(cast("Mapping[str, Any]", model)), []
    if not isinstance(model, list | tuple | np.ndarray | np.generic):
        if model is None or isinstance(model, Mapping):
            return torch_model(model)
        raise JobError(f"model is a {type(model).__name__}; a list of numbers or a numpy array belongs here")
    try:
        array: Any = np.asarray(cast("Any", model))
        if array.dtype.kind in "biu" or not isinstance(model, np.ndarray | np.generic):
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise JobError(f"model is not an array of numbers: {error}") from None
    if array.dtype.kind != "f" or not array.size:
        raise JobError(f"model is {array.size} values of {array.dtype}; numbers belong here, at least one")
    return {NUMPY_KEY: array}, []


def _build(entry: Mapping[str, Any]) -> Any:
    """A model out of ``{"class_path": "module.Class", "args": {...}}``."""
    if unknown := entry.keys() - {"class_path", "args"}:
        raise JobError(f"model: unknown key {min(unknown)!r}; allowed are 'class_path' and 'args'")
    module, _, name = str(entry["class_path"]).rpartition(".")
    try:
        return getattr(import_module(module), name)(**dict(entry.get("args") or {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise JobError(f"model: class_path {entry['class_path']!r} cannot be built: {error}") from None
