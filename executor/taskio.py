"""One attempt's input and output, wherever user code runs: what the agent says of it, the model going in, the result
coming out. No sockets, no processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..serialization.codec import check_plain, decode_fields, encode_fields, pack
from ..serialization.digest import Digester
from ..serialization.errors import CodecError, LayoutError, PayloadError, ValuesError
from ..serialization.messages import INLINE_BYTES
from ..serialization.model import FLModel, ParamsType
from ..serialization.payload import decode_model, diff, encode_model
from .state import SiteState

#: A result's plain side travels in the body of Done, which has 64 KiB for all of its items.
MAX_META_BYTES = 48 * 1024
_SCAN_ITEMS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """An attempt as the agent describes it to whoever works on it."""

    task: str
    attempt: int
    site: str
    job: str
    round: int
    step: int
    name: str
    total_rounds: int | None = None
    payload_path: str = ""
    payload_bytes: bytes | None = None  # the input itself where it came inline
    exchange_format: str = "numpy"
    transfer_type: str = "FULL"
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0  # of this task at this site, see seeding.task_seed
    threads: int = 1
    result_path: str = ""  # where a result over INLINE_BYTES goes
    digest: bool = True
    state_path: str = ""  # the version to start from; "" where there is none
    state_out: str = ""  # the new version's file
    log_path: str = ""  # the site's log; "" where the process writes there already
    cwd: str = ""  # the site's folder; "" where the process is there already

    def to_map(self) -> dict[str, Any]:
        """As it travels on the channel."""
        return encode_fields(self)

    @staticmethod
    def from_map(data: Mapping[str, Any]) -> TaskSpec:
        """Off the channel.

        Raises:
            CodecError: a key is missing or of the wrong type.
        """
        return decode_fields(TaskSpec, data)

    def state(self) -> SiteState:
        """A fresh view of the site's memory for this attempt."""
        return SiteState(Path(self.state_path) if self.state_path else None)

    def __str__(self) -> str:
        return f"task {self.name!r} of round {self.round} at {self.site}"


def input_model(spec: TaskSpec) -> FLModel:
    """The model that user code gets: its own to change, whatever else maps the same payload.

    Its rounds are the task's, since the same payload may serve several; ``config["meta"]`` joins its meta. A task
    without a payload (such as submit_model) has ``params=None``.
    """
    if spec.payload_bytes is not None:
        model = decode_model(bytearray(spec.payload_bytes), framework=_framework(spec.exchange_format))
    elif spec.payload_path:
        model = decode_model(Path(spec.payload_path), framework=_framework(spec.exchange_format))
    else:
        model = FLModel()
    model.current_round = spec.round
    model.total_rounds = spec.total_rounds
    extra = spec.config.get("meta")
    model.meta = dict(model.meta or {}) | (cast("dict[str, Any]", extra) if isinstance(extra, dict) else {})
    return model


def _framework(name: str) -> Any:
    return "pytorch" if name == "pytorch" else "numpy"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A finished attempt's result, in memory when small and otherwise in ``spec.result_path``."""

    size: int
    digest: str
    meta: dict[str, Any]
    data: bytes | None
    path: str
    wrote_state: bool


def write_result(result: object, spec: TaskSpec, state: SiteState | None = None) -> TaskResult:
    """Check what user code returned, take the difference where the job asks for DIFF, and encode it.

    Raises:
        PayloadError: not an FLModel, neither params nor metrics, or values that cannot be stored.
        ValuesError: NaN or Inf; names the tensor or metric.
        LayoutError: DIFF of a key that the received model does not have, or has in another shape.
    """
    model = check_result(result, spec)
    if spec.transfer_type == "DIFF" and model.params is not None and model.params_type == ParamsType.FULL:
        model = _difference(model, spec)
    encoded = encode_model(model)
    try:
        check_plain(encoded.meta)
    except CodecError as error:
        raise PayloadError(f"the result of {spec} cannot travel: {error}") from None
    if (size := len(pack(encoded.meta))) > MAX_META_BYTES:
        raise PayloadError(
            f"metrics and meta of the result of {spec} take {size} bytes; at most {MAX_META_BYTES}:"
            " put arrays into params, or write them to a file"
        )
    wrote_state = state is not None and state.used and bool(spec.state_out) and state.save(Path(spec.state_out))
    digester = Digester() if spec.digest else None
    for buffer in encoded.buffers if digester else ():
        digester.update(buffer)  # pyright: ignore[reportOptionalMemberAccess]
    digest = digester.hexdigest() if digester else ""
    if encoded.size <= INLINE_BYTES:
        return TaskResult(encoded.size, digest, encoded.meta, encoded.tobytes(), "", wrote_state)
    path = Path(spec.result_path)
    with path.open("wb") as file:
        for buffer in encoded.buffers:
            file.write(buffer)
    return TaskResult(encoded.size, digest, encoded.meta, None, str(path), wrote_state)


def check_result(result: object, spec: TaskSpec) -> FLModel:
    """The result with its tensors on the CPU and its metrics as plain numbers; the caller's own model is not changed.

    Raises:
        PayloadError: not an FLModel, neither params nor metrics, or None among the values.
        ValuesError: NaN or Inf.
    """
    if not isinstance(result, FLModel):
        raise PayloadError(f"{spec} returned {type(result).__name__}; an FLModel with params or metrics belongs here")
    if result.params is None and result.metrics is None:
        raise PayloadError(f"the result of {spec} has neither params nor metrics: fill one of them")
    params = None if result.params is None else _checked_map(result.params, "params", spec)
    optimizer = None if result.optimizer_params is None else _checked_map(result.optimizer_params, "optimizer_params", spec)
    metrics = None if result.metrics is None else _plain(result.metrics, "metrics", spec)
    meta = _plain(dict(result.meta or {}), "meta", spec)
    return FLModel(
        params_type=result.params_type if params is not None else None,
        params=params,
        optimizer_params=optimizer,
        metrics=cast("dict[str, Any] | None", metrics),
        start_round=result.start_round,
        current_round=spec.round if result.current_round is None else result.current_round,
        total_rounds=spec.total_rounds if result.total_rounds is None else result.total_rounds,
        meta=cast("dict[str, Any]", meta),
    )


def _difference(model: FLModel, spec: TaskSpec) -> FLModel:
    """``model`` minus what was received, which is read again: user code may have changed its copy in place."""
    if spec.payload_bytes is None and not spec.payload_path:
        raise LayoutError(f"{spec} came without a model, so there is nothing to take the difference to: send FULL params")
    assert model.params is not None
    framework = "pytorch" if _any_torch(model.params) else "numpy"
    source = Path(spec.payload_path) if spec.payload_bytes is None else bytearray(spec.payload_bytes)
    base = decode_model(source, framework=framework)
    base.params = _restrict(base.params or {}, model.params, "")
    return diff(model, base)


def _restrict(base: Mapping[str, Any], like: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those entries of ``base`` that ``like`` has: a site may send a part of the model."""
    out: dict[str, Any] = {}
    for key, value in like.items():
        if key not in base:
            raise LayoutError(f"params[{where + key!r}] is not in the received model, so it has no difference to it")
        out[key] = _restrict(base[key], cast("Mapping[str, Any]", value), f"{where}{key}.") if isinstance(value, Mapping) else base[key]
    return out


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _any_torch(params: Mapping[str, Any]) -> bool:
    return any(_any_torch(cast("Mapping[str, Any]", v)) if isinstance(v, Mapping) else _is_torch(v) for v in params.values())


def _checked_map(values: Mapping[str, Any], where: str, spec: TaskSpec) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{where}[{key!r}]"
        if isinstance(value, Mapping):
            out[key] = _checked_map(cast("Mapping[str, Any]", value), place, spec)
        elif value is None:
            raise PayloadError(f"{place} of the result of {spec} is None; a tensor belongs here")
        elif _is_torch(value):
            out[key] = _finite_torch(value, place, spec)
        else:
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
            if array.dtype == object or array.dtype.kind in "USmMV" and array.dtype.itemsize > 2:
                raise PayloadError(f"{place} of the result of {spec} is a {type(value).__name__}; a tensor belongs here")
            out[key] = _finite_numpy(cast("np.ndarray[Any, Any]", array), place, spec)
    return out


def _finite_numpy(array: np.ndarray[Any, Any], place: str, spec: TaskSpec) -> np.ndarray[Any, Any]:
    if array.dtype.kind in "biu" or array.size == 0:
        return array
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()
    for start in range(0, flat.size, _SCAN_ITEMS):
        try:
            finite = bool(np.isfinite(flat[start : start + _SCAN_ITEMS]).all())
        except TypeError:  # a dtype without isfinite has no NaN to look for, or the encoder refuses it by name
            return array
        if not finite:
            raise _not_finite(place, spec)
    return array


def _finite_torch(tensor: Any, place: str, spec: TaskSpec) -> Any:
    import torch

    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # fp8 has no isfinite
        if not bool(torch.isfinite(wide).all()):
            raise _not_finite(place, spec)
    return tensor.cpu()


def _not_finite(place: str, spec: TaskSpec) -> ValuesError:
    return ValuesError(
        f"{place} of the result of {spec} holds NaN or Inf; it would spoil the aggregate:"
        " lower the learning rate, clip gradients, or check the data"
    )


def _plain(value: Any, where: str, spec: TaskSpec) -> Any:
    """Numbers of numpy and torch as Python's; refuses what is not finite."""
    if _is_torch(value) or isinstance(value, np.ndarray | np.generic):
        value = value.item() if math.prod(value.shape) == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValuesError(f"{where} of the result of {spec} is {value}; numbers must be finite")
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}[{key!r}]", spec) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", spec) for i, item in enumerate(cast("list[Any]", value))]
    return value
