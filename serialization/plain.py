"""A model's plain side: everything of it that is not a tensor, as data that msgpack and JSON can both carry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn, cast

from .codec import check_plain, pack
from .errors import CodecError, PayloadError
from .model import FLModel, ParamsType
from .tensors import is_tensor

#: A message has 64 KiB for one or more plain sides and what describes them.
MAX_PLAIN_BYTES: Final = 48 * 1024
#: Levels of nesting in a user's metrics and meta; the message around them needs some of its 16.
MAX_LEVELS: Final = 8

#: Of these types nothing is a tensor.
_USUAL: Final = frozenset({int, float, str, dict, list})
_NOT_FINITE: Final = frozenset({"nan", "inf", "-inf"})


def plain_side(model: FLModel) -> dict[str, Any]:
    """``params_type``, ``metrics``, ``meta`` and the rounds of a model, without those that hold their default.

    Scalars of numpy and torch become numbers, tuples lists. A metric that is not finite becomes text ("nan", "inf",
    "-inf"): it is shown, and no mean is taken of it.

    Raises:
        PayloadError: a value that is not plain data, NaN or Inf in meta, or over 48 KiB in all.
        ValueError: as `FLModel.validate`.
        TypeError: as `FLModel.validate`.
    """
    out = plain_fields(model)
    size = len(pack(out))
    if size > MAX_PLAIN_BYTES:
        raise PayloadError(f"metrics and meta of {size} bytes; at most {MAX_PLAIN_BYTES}: put large data into params")
    return out


def plain_fields(model: FLModel) -> dict[str, Any]:
    """As `plain_side`, of any size."""
    model.validate()
    out: dict[str, Any] = {}
    if model.params_type is not None:
        out["params_type"] = model.params_type.value
    if model.metrics is not None:
        out["metrics"] = _plain(model.metrics, "metrics", 0, finite=False)
    if model.meta:
        out["meta"] = _plain(model.meta, "meta", 0, finite=True)
    if model.start_round != 0:
        out["start_round"] = model.start_round
    if model.current_round is not None:
        out["current_round"] = model.current_round
    if model.total_rounds is not None:
        out["total_rounds"] = model.total_rounds
    return out


def model_of(plain: Mapping[str, Any], params: Any, optimizer_params: Any, *, checked: bool = False) -> FLModel:
    """A model from its plain side, which may be a stranger's, and its tensors.

    Args:
        plain: the plain side.
        params, optimizer_params: the tensors, nested.
        checked: whether such a plain side has been through here.

    Raises:
        PayloadError: the plain side is malformed, or says FULL or DIFF where there are no params.
    """
    try:
        if not checked:
            check_plain(dict(plain))
            pack(dict(plain))  # JSON, unlike a message, could hold an integer of any size
        kind = plain.get("params_type")
        if params is not None and kind is None:
            kind = ParamsType.FULL
        metrics: Any = plain.get("metrics")
        if isinstance(metrics, dict):
            pairs = cast("dict[str, Any]", metrics).items()
            metrics = {key: float(v) if isinstance(v, str) and v in _NOT_FINITE else v for key, v in pairs}
        return FLModel(
            params_type=kind,
            params=params if kind is not None else None,
            optimizer_params=optimizer_params,
            metrics=metrics,
            start_round=plain.get("start_round", 0),
            current_round=plain.get("current_round"),
            total_rounds=plain.get("total_rounds"),
            meta=plain.get("meta"),
        )
    except (ValueError, TypeError, CodecError) as error:
        raise PayloadError(f"the payload's description is malformed: {error}") from None


def dump_json(value: Any) -> str:
    """Plain data as compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json(text: str) -> dict[str, Any]:
    """A JSON map out of a stranger's payload.

    Raises:
        PayloadError: not JSON, not a map, a key twice, NaN, or nested too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_float, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the payload's description is not JSON: {error or 'nested too deep'}") from None
    if not isinstance(value, dict):
        raise PayloadError(f"the payload's description is a {type(value).__name__}; a map belongs there")
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise PayloadError("the payload's description has a key twice")
    return out


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text[:40])  # JSON has no largest number


def _no_constant(name: str) -> NoReturn:
    raise PayloadError(f"the payload's description holds {name}; numbers must be finite")


def _plain(value: Any, where: str, level: int, *, finite: bool) -> Any:
    if level > MAX_LEVELS:
        raise PayloadError(f"{where} is nested more than {MAX_LEVELS} deep")
    if type(value) not in _USUAL and is_tensor(value) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _whole(int(value), where)
    if isinstance(value, float):
        return _finite(float(value), where, finite)
    if isinstance(value, str):
        return _text(str.__str__(value), where)
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, item in cast("Mapping[Any, Any]", value).items():
            if not isinstance(key, str):
                raise PayloadError(f"{where} has a {type(key).__name__} as key; only text is allowed")
            out[_text(str.__str__(key), where)] = _plain(item, f"{where}[{key!r}]", level + 1, finite=finite)
        return out
    if isinstance(value, (list, tuple)):
        items = enumerate(cast("list[Any] | tuple[Any, ...]", value))
        return [_plain(item, f"{where}[{index}]", level + 1, finite=finite) for index, item in items]
    advice = ": put tensors into params or optimizer_params" if is_tensor(value) else ""
    raise PayloadError(
        f"{where} is a {type(value).__name__}; numbers, text, bools, None, lists and maps belong there{advice}"
    )


def _whole(value: int, where: str) -> int:
    if not -(2**63) <= value < 2**63:
        raise PayloadError(f"{where} needs more than 64 bits: write it as text")
    return value


def _finite(value: float, where: str, finite: bool) -> float | str:
    if math.isfinite(value):
        return value
    if finite:
        raise PayloadError(f"{where} is {value}; numbers must be finite: leave it out, or write it as text")
    return str(value)


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PayloadError(f"{where} holds half a surrogate pair; only Unicode text is allowed") from None
    return value
