"""FLModel, what user code and workflows hand each other, and its nested parameters as flat names.

Flattening joins the path to a tensor with ".": ``{"layer": {"w": x}}`` is stored as ``layer.w``. A flat state dict,
whose names have dots of their own, stays as it is. What the names cannot tell (which dots were levels, integer keys,
lists, tuples) is kept in a *spec*, plain data that travels beside the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, cast

from .codec import show
from .errors import LayoutError
from .tensors import is_number, is_tensor

SEPARATOR: Final = "."
#: Levels of nesting in params, optimizer_params, metrics and meta.
MAX_LEVELS: Final = 16

#: Stands for a tensor in a spec; other maps hold one of the keys below or are maps with text keys.
_TENSOR: Final = "$"
_MAP: Final = "$map"
_TUPLE: Final = "$tuple"
_PLAIN: Final = "$plain"
_MARKS: Final = frozenset({_TENSOR, _MAP, _TUPLE, _PLAIN})


class ParamsType(StrEnum):
    """Whether params are whole values or differences to the model that was received."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass(eq=False, repr=False)
class FLModel:
    """A model with what belongs to it, in either direction.

    Args:
        params_type: FULL or DIFF (the enum or its text); params without a type are FULL.
        params: name to tensor (numpy, torch or number), nested as one likes.
        optimizer_params: tensors and plain values, nested as one likes; an optimizer's `state_dict()` fits.
        metrics: name to number. On a result: the score of the model that was received, before training.
        start_round: the first round's number.
        current_round: this round's number; None outside rounds.
        total_rounds: how many rounds the job has.
        meta: plain data (numbers, text, lists, maps). ``NUM_STEPS_CURRENT_ROUND`` is the result's weight.

    Raises:
        ValueError: a type without params, an unknown type, or a negative round.
        TypeError: metrics or meta that are no dict, or a round that is no int.
    """

    params_type: ParamsType | None = None
    params: Any = None
    optimizer_params: Any = None
    metrics: dict[str, Any] | None = None
    start_round: int | None = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.meta is None:
            self.meta = {}
        self.validate()

    def __repr__(self) -> str:
        # a model ends up in logs: show what it is, never its values
        parts = [self.params_type.value] if self.params_type is not None else []
        if isinstance(self.params, (Mapping, list, tuple)):
            parts.append(f"params of {len(cast('list[Any]', self.params))}")
        for name in ("metrics", "start_round", "current_round", "total_rounds", "meta"):
            value = getattr(self, name)
            if value:
                parts.append(f"{name}={show(value)}")
        return f"FLModel({', '.join(parts)})"

    def validate(self) -> None:
        """Apply the constructor's rules again, as the fields may have been set since.

        Raises:
            ValueError: as the constructor.
            TypeError: as the constructor.
        """
        if self.params_type is not None:
            if type(self.params_type) is not ParamsType:
                self.params_type = ParamsType(self.params_type)
            if self.params is None:
                raise ValueError(f"params_type is {self.params_type.value} but there are no params: set params too")
        elif self.params is not None:
            self.params_type = ParamsType.FULL
        for name in ("metrics", "meta"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, not {type(value).__name__}")
        for name in ("start_round", "current_round", "total_rounds"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name} is {value}; rounds are not negative")


def flatten(params: Any, *, plain: bool = False) -> tuple[dict[str, Any], Any]:
    """Nested tensors as a flat map, and the spec that `unflatten` needs.

    Args:
        params: tensors and numbers in dicts (with text or integer keys), lists and tuples.
        plain: True keeps numbers, text, bools and None as values in the spec; False takes numbers for tensors, which
            they come back as, and refuses the others.

    Returns:
        The flat map in the order of ``params``, and the spec: None if ``params`` was such a map already.

    Raises:
        LayoutError: two tensors with the same flat name, a type that cannot be stored, or over 16 levels.
    """
    if isinstance(params, Mapping):
        pairs = cast("Mapping[Any, Any]", params)
        if all(type(key) is str and (is_tensor(v) or (not plain and is_number(v))) for key, v in pairs.items()):
            return dict(pairs), None
    elif not isinstance(params, (list, tuple)):
        raise LayoutError(f"params are a {type(params).__name__}; a dict of tensors belongs there")
    flat: dict[str, Any] = {}
    return flat, _flatten(params, (), flat, plain)


def _flatten(node: Any, path: tuple[str, ...], flat: dict[str, Any], plain: bool) -> Any:
    if len(path) > MAX_LEVELS:
        raise LayoutError(f"params nested more than {MAX_LEVELS} deep at {SEPARATOR.join(path[:3])}...")
    if is_tensor(node) or (not plain and is_number(node)):
        name = SEPARATOR.join(path)
        if name in flat:
            raise LayoutError(f"two tensors have the flat name {name!r}: rename one of them")
        flat[name] = node
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        pairs = cast("Mapping[Any, Any]", node)
        below = [(_key(key, path), _flatten(value, (*path, str(key)), flat, plain)) for key, value in pairs.items()]
        if all(isinstance(key, str) and key not in _MARKS for key, _ in below):
            return dict(below)
        return {_MAP: [[key, value] for key, value in below]}
    if isinstance(node, (list, tuple)):
        items = cast("list[Any] | tuple[Any, ...]", node)
        listed = [_flatten(value, (*path, str(index)), flat, plain) for index, value in enumerate(items)]
        return {_TUPLE: listed} if isinstance(node, tuple) else listed
    if plain and (node is None or isinstance(node, (bool, int, float, str))):
        return {_PLAIN: node}
    raise LayoutError(f"{SEPARATOR.join(path)!r} is a {type(node).__name__}; tensors and numbers belong there")


def _key(key: Any, path: tuple[str, ...]) -> str | int:
    if type(key) is int:
        return key
    if isinstance(key, str):
        return str.__str__(key)
    raise LayoutError(f"a key under {SEPARATOR.join(path)!r} is a {type(key).__name__}; text or int belongs there")


def unflatten(flat: Mapping[str, Any], spec: Any) -> Any:
    """The nested form of a flat map; the reverse of `flatten`.

    Raises:
        LayoutError: the spec is malformed, or does not name each tensor exactly once.
    """
    if spec is None:
        return dict(flat)
    left = dict(flat)
    nested = _unflatten(spec, left, 0)
    if left:
        raise LayoutError(f"{len(left)} tensors have no place in the model's structure, such as {next(iter(left))!r}")
    return nested


def _unflatten(spec: Any, left: dict[str, Any], level: int) -> Any:
    if level > MAX_LEVELS:
        raise LayoutError(f"structure nested more than {MAX_LEVELS} deep")
    if isinstance(spec, list):
        return [_unflatten(item, left, level + 1) for item in cast("list[Any]", spec)]
    if not isinstance(spec, dict):
        raise LayoutError(f"structure holds a {type(spec).__name__}; only maps and lists belong there")
    pairs = cast("dict[str, Any]", spec)
    mark = next(iter(pairs)) if len(pairs) == 1 else ""
    value = pairs.get(mark)
    if mark == _TENSOR and isinstance(value, str):
        if value not in left:
            raise LayoutError(f"tensor {value!r} of the model's structure is missing, or is named twice")
        return left.pop(value)
    if mark == _PLAIN and (value is None or isinstance(value, (bool, int, float, str))):
        return value
    if mark == _TUPLE and isinstance(value, list):
        return tuple(_unflatten(item, left, level + 1) for item in cast("list[Any]", value))
    if mark == _MAP and isinstance(value, list):
        items = [_pair(item, left, level) for item in cast("list[Any]", value)]
        if len(nested := dict(items)) != len(items):
            raise LayoutError("structure holds a key twice")
        return nested
    if mark in _MARKS:
        raise LayoutError(f"structure holds {mark!r} with a {type(value).__name__}")
    return {key: _unflatten(item, left, level + 1) for key, item in pairs.items()}


def _pair(item: Any, left: dict[str, Any], level: int) -> tuple[str | int, Any]:
    pair = cast("list[Any]", item) if isinstance(item, list) else []
    if len(pair) != 2 or type(pair[0]) not in (str, int):
        raise LayoutError("structure holds a malformed pair; a key and a value belong there")
    return pair[0], _unflatten(pair[1], left, level + 1)
