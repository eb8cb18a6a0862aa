"""One attempt's input and output, wherever user code runs: what the agent says of it, the model going in, the result
coming out. No sockets, no processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..serialization import spans
from ..serialization.codec import decode_fields, encode_fields, pack
from ..serialization.dtypes import is_float
from ..serialization.elements import all_finite
from ..serialization.errors import FedloomError, LayoutError, PayloadError, ValuesError
from ..serialization.messages import INLINE_BYTES
from ..serialization.model import FLModel, ParamsType, flatten
from ..serialization.payload import EncodedModel, ModelReader, decode_model, diff, encode_model
from ..serialization.plain import plain_fields
from ..serialization.tensors import raw_bytes, spec_of
from .filtering import filter_input, filter_output, received_params
from .finite import looked_at, not_finite
from .state import SiteState

Framework = Literal["numpy", "pytorch"]

_SCAN_ITEMS = 32 * 1024
#: Of a result's metrics and meta, which ride in a message's body of 64 KiB.
MAX_META_BYTES = 32 * 1024


@dataclass(slots=True)  # not frozen, which takes three times as long to make: there is one for each task
class TaskSpec:
    """An attempt as the agent describes it to whoever works on it. Nobody changes one."""

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
    settings: dict[str, Any] = field(default_factory=dict[str, Any])  # of the job's own code at this site
    filters: dict[str, Any] = field(default_factory=dict[str, Any])  # by point, as the config has them
    codec: str = ""  # what a result's float tensors are narrowed by, see serialization/narrowing.py
    fold: str = ""  # the gather in whose partial the worker folds the result; "": it goes by itself

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

    @property
    def full_config(self) -> dict[str, Any]:
        """What user code sees: the job's settings for this site, and before them what the workflow gave along."""
        return self.settings | self.config

    def __str__(self) -> str:
        return f"task {self.name!r} of round {self.round} at {self.site}"


def input_model(spec: TaskSpec) -> FLModel:
    """The model that user code gets: its own to change, whatever else maps the same payload.

    Its rounds are the task's, since the same payload may serve several; ``config["meta"]`` joins its meta. A task
    without a payload (such as submit_model) has ``params=None``. The job's input filters have worked on it.

    Raises:
        JobError: a filter is not there. Whatever one of them raises.
    """
    began = spans.start()
    model = filter_input(_decoded(spec, _framework(spec.exchange_format)), spec)
    spans.end("decode", began, site=spec.site, task=spec.task)
    return model


def _decoded(spec: TaskSpec, framework: Framework) -> FLModel:
    if spec.payload_bytes is not None:
        data = np.frombuffer(bytearray(spec.payload_bytes), np.uint8)  # the task's own, to be written
        model = _reader_of(spec.payload_bytes).read(data, framework)
    elif spec.payload_path:
        model = decode_model(Path(spec.payload_path), framework=framework)
    else:
        model = FLModel()
    model.current_round = spec.round
    model.total_rounds = spec.total_rounds
    if isinstance(extra := spec.config.get("meta"), dict):
        model.meta = (model.meta or {}) | cast("dict[str, Any]", extra)
    return model


@lru_cache(maxsize=4)  # that of a round's tasks, which all start from the same, and those of jobs beside it
def _reader_of(data: bytes) -> ModelReader:
    return ModelReader(np.frombuffer(data, np.uint8))


def _framework(name: str) -> Framework:
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
    folded: bool = False  # it is in its worker's partial: what is here beside that is its plain side

    def to_map(self, spec: TaskSpec, run_s: float) -> dict[str, Any]:
        """As it travels on the channel, with the seconds that it took."""
        return {
            "op": "result",
            "task": spec.task,
            "attempt": spec.attempt,
            "size": self.size,
            "digest": self.digest,
            "meta": self.meta,
            "data": self.data,
            "path": self.path,
            "wrote_state": self.wrote_state,
            "run_s": run_s,
            "folded": self.folded,
        }


def encode_result(result: object, spec: TaskSpec, *, look: bool = True) -> EncodedModel:
    """Check what user code returned, take the difference where the job asks for DIFF, filter it, and encode it.

    The job's codec narrows what becomes part of an aggregate: not a site's own model, nor what makes the first model.
    Without ``look`` float tensors are not looked at for NaN and Inf.

    Raises:
        PayloadError: not an FLModel, neither params nor metrics, values that cannot be stored, or more metrics and
            meta than go along with a result.
        ValuesError: NaN or Inf in a tensor, by name.
        LayoutError: a value that is no tensor; DIFF of one that the received model does not have, or has otherwise.
    """
    began = spans.start()
    model = check_result(result, spec, look=look)
    spans.end("check", began, site=spec.site, task=spec.task)
    began = spans.start()
    received = spec.payload_bytes is not None or bool(spec.payload_path)
    # without a received model there is nothing to take a difference to: the round makes the first one of whole values
    wants_diff = spec.transfer_type == "DIFF" and received and spec.config.get("answer") != "params"
    if wants_diff and model.params is not None and model.params_type is ParamsType.FULL:
        model = _difference(model, spec)
    if spec.filters.get("client_output"):
        model = check_result(filter_output(model, spec), spec)
    codec = spec.codec if received and "answer" not in spec.config else ""
    try:
        encoded = encode_model(model, codec=codec)
    except ValuesError as error:
        raise ValuesError(f"the result of {spec}: {error}") from None
    plain = len(pack(encoded.meta))
    if plain > MAX_META_BYTES:
        raise PayloadError(
            f"the metrics and meta of {spec} take {plain} bytes; at most {MAX_META_BYTES} go along with a result: send"
            " arrays as params, and keep histories in the site state"
        )
    spans.end("encode", began, site=spec.site, task=spec.task)
    return encoded


def plain_result(result: object, spec: TaskSpec) -> tuple[dict[Any, Any], dict[str, Any]] | None:
    """The tensors, flat, and the plain side of a result that is to be folded as it is; the tensors are not looked at.

    None where `encode_result` has to see to it: anything that is filtered, narrowed, subtracted, asked for in another
    form, or wrong.
    """
    if not isinstance(result, FLModel) or type(result.params) is not dict or result.optimizer_params is not None:
        return None
    diff_wanted = spec.transfer_type == "DIFF" and result.params_type is not ParamsType.DIFF
    if diff_wanted or spec.codec or "answer" in spec.config or spec.filters.get("client_output"):
        return None
    try:
        plain = plain_fields(result)
        rounds = {"current_round": spec.round, "total_rounds": spec.total_rounds}
        own = {name: plain.pop(name, value) for name, value in rounds.items()}
        plain |= {name: value for name, value in own.items() if value is not None}
        return (cast("dict[Any, Any]", result.params), plain) if len(pack(plain)) <= MAX_META_BYTES else None
    except (FedloomError, ValueError, TypeError):
        return None


def write_result(result: object, spec: TaskSpec, state: SiteState | None = None) -> TaskResult:
    """What user code returned as a result to be sent. Raises as `encode_result`."""
    plain = spec.transfer_type != "DIFF" and not spec.codec and not spec.filters.get("client_output")
    encoded = encode_result(result, spec, look=not plain)
    began = spans.start()
    digest = encoded.digest() if spec.digest else ""
    data, path = None, ""
    parts = looked_at(encoded, spec) if plain else encoded.buffers
    if encoded.size <= INLINE_BYTES:
        data = b"".join(parts)
    else:
        path = spec.result_path
        with Path(path).open("wb") as file:
            file.writelines(parts)
    spans.end("write", began, site=spec.site, task=spec.task)
    return TaskResult(encoded.size, digest, encoded.meta, data, path, save_state(state, spec))


def save_state(state: SiteState | None, spec: TaskSpec) -> bool:
    """Whether the attempt has written the site's next version."""
    return state is not None and state.used and bool(spec.state_out) and state.save(Path(spec.state_out))


def check_result(result: object, spec: TaskSpec, *, look: bool = True) -> FLModel:
    """The result with the task's rounds where it names none; the caller's own object is not changed.

    Without ``look``, values of float types are not looked at.

    ``config["answer"]`` says what a workflow needs of it: "metrics", which go alone, or "params", whole values.

    Raises:
        PayloadError: not an FLModel, neither params nor metrics, or not what the workflow needs. LayoutError: None, or
            another value that is no tensor. ValuesError: NaN or Inf in a tensor.
    """
    if not isinstance(result, FLModel):
        raise PayloadError(f"{spec} returned {type(result).__name__}; an FLModel with params or metrics belongs here")
    if result.params is None and result.metrics is None:
        raise PayloadError(f"the result of {spec} has neither params nor metrics: fill one of them")
    result = _wanted(result, spec)
    try:
        if result.params is not None:
            for name, value in flatten(result.params)[0].items():
                if (look or not is_float(spec_of(value)[0])) and not _is_finite(value):
                    raise not_finite(name, spec)
        return replace(
            result,
            current_round=spec.round if result.current_round is None else result.current_round,
            total_rounds=spec.total_rounds if result.total_rounds is None else result.total_rounds,
        )
    except LayoutError as error:
        raise LayoutError(f"the result of {spec}: {error}") from None
    except (ValueError, TypeError) as error:
        raise PayloadError(f"the result of {spec}: {error}") from None


def _wanted(result: FLModel, spec: TaskSpec) -> FLModel:
    """What the workflow needs of a result, see `check_result`."""
    match spec.config.get("answer"):
        case "metrics":
            if not result.metrics:
                raise PayloadError(
                    f"{spec} was answered without metrics: where flare.is_evaluate() is true, score the received model"
                    " and send flare.FLModel(metrics={...})"
                )
            return replace(result, params_type=None, params=None, optimizer_params=None)
        case "params":
            if result.params is None or result.params_type is ParamsType.DIFF:
                seen = "without params" if result.params is None else "with differences"
                raise PayloadError(
                    f"{spec} was answered {seen}: where flare.is_submit_model() is true, send the site's own model,"
                    " flare.FLModel(params=...), whole"
                )
        case _:
            pass
    return result


def _difference(model: FLModel, spec: TaskSpec) -> FLModel:
    """``model`` minus what was received, which is read again: user code may have changed its copy in place."""
    received, _ = flatten(received_params(_decoded(spec, "numpy"), spec))
    names = flatten(model.params)[0]
    if strange := next((name for name in names if name not in received), None):
        raise LayoutError(
            f"tensor {strange!r} of the result of {spec} is not in the received model: it has no difference"
        )
    try:
        # a site may send a part of the model: only that part of the received one takes part
        return diff(model, FLModel(params={name: received[name] for name in names}))
    except LayoutError as error:
        raise LayoutError(f"the result of {spec}: {error}") from None


def _is_finite(value: Any) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return True
        tensor = value.detach()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():  # looked at where and as it lies
            wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # torch has no isfinite for fp8
            return bool(torch.isfinite(wide).all())
        return _bytes_are_finite(tensor)
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return True
    flat = array.reshape(-1)
    return bool(np.isfinite(flat).all()) if flat.size <= _SCAN_ITEMS else _bytes_are_finite(flat)


def _bytes_are_finite(value: Any) -> bool:
    return all_finite(np.frombuffer(raw_bytes(value), np.uint8), spec_of(value)[0])
