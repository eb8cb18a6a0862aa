"""msgpack bodies to frozen dataclasses and back: parse, don't validate.

What comes out of `decode_fields` is typed and bounded; nothing else of the wire reaches the rest of the program. A
field's type is its schema. Unknown keys are ignored (a newer minor may send them), missing ones take the field's
default, and a required one that is missing is an error. msgpack alone would let pass duplicate keys, extension types
and NaN: refused, on the way out as on the way in, so that a sender learns of it and not a receiver.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Any, TypeVar

import msgpack

from .errors import CodecError
from .nesting import check_nesting, few_heads, is_whole

T = TypeVar("T")

#: JSON-like data: what a user's settings, metrics and metadata may hold.
Plain = None | bool | int | float | str | bytes | list["Plain"] | dict[str, "Plain"]

MAX_TEXT = 64 * 1024
MAX_ITEMS = 16 * 1024
MAX_DEPTH = 16

#: Of these types a value is plain data as it is.
_ATOMS = frozenset({type(None), bool, int, str, bytes})
#: Packers that nobody uses just now: making one, with its buffer of 256 KiB, costs more than packing a message.
_PACKERS: list[Any] = []
_KEPT_BYTES = 256 * 1024


class Limit:
    """An `Annotated` marker: the largest length of a text, bytes or list, what a text matches, or a number's range."""

    __slots__ = ("high", "low", "max_len", "pattern")

    def __init__(
        self,
        max_len: int | None = None,
        low: float | None = None,
        high: float | None = None,
        pattern: str | None = None,
    ) -> None:
        self.max_len = max_len
        self.low = low
        self.high = high
        self.pattern = None if pattern is None else re.compile(pattern)


def pack(value: object) -> bytes:
    """Plain data as msgpack.

    Raises:
        CodecError: a type, an integer over 64 bits or a text that msgpack cannot hold.
    """
    try:
        packer = _PACKERS.pop()
    except IndexError:
        packer = typing.cast("Any", msgpack.Packer(use_bin_type=True))  # pyright: ignore[reportUnknownMemberType] - no stubs
    try:
        packed: bytes = packer.pack(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise CodecError(f"data that msgpack cannot hold: {error}") from None
    if len(packed) <= _KEPT_BYTES:  # it has grown behind a larger one
        _PACKERS.append(packer)
    return packed


def unpack(data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_TEXT) -> Any:
    """Plain data out of msgpack.

    Raises:
        CodecError: malformed, oversize or trailing bytes, duplicate or non-text keys, extension types, NaN or Inf.
    """
    if len(data) > max_bytes:
        raise CodecError(f"{len(data)} bytes of msgpack; at most {max_bytes} here")
    if not few_heads(data, MAX_DEPTH) and not is_whole(data):
        check_nesting(data, MAX_DEPTH)  # says what is wrong
    try:
        unpacked: Any = msgpack.unpackb(  # pyright: ignore
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_ext,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_array_len=max_bytes,
            max_map_len=max_bytes,
        )
    except CodecError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"malformed msgpack: {error or type(error).__name__}") from None
    check_plain(unpacked)
    return typing.cast("Any", unpacked)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    out = dict(pairs)  # that the keys are text is for `check_plain`
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise CodecError(f"map key {show(next(key for key in keys if keys.count(key) > 1))} twice")
    return out


def _no_ext(code: int, data: bytes) -> Any:
    raise CodecError(f"msgpack extension type {code} ({len(data)} bytes); none is allowed")


def show(value: object) -> str:
    """A value for an error message, cut short: a stranger may have chosen it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_plain(value: Any, depth: int = 0) -> None:
    """Refuse what a message must not hold.

    Raises:
        CodecError: nesting over 16, NaN or Inf, or a type that is not plain data.
    """
    if type(value) not in _ATOMS:
        _check_nested(value, depth)
    elif depth > MAX_DEPTH:
        raise CodecError(f"data nested more than {MAX_DEPTH} deep")


def _check_nested(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodecError(f"data nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        pairs = typing.cast("dict[Any, Any]", value)
        for key in pairs:
            if not isinstance(key, str):
                raise CodecError(f"map key {show(key)}; only text is allowed")
        _check_items(pairs.values(), depth)
    elif isinstance(value, (list, tuple)):
        _check_items(typing.cast("list[Any]", value), depth)
    elif isinstance(value, float):
        _check_finite(value)
    elif not isinstance(value, (int, str, bytes)):
        raise CodecError(f"{type(value).__name__} in a message; allowed are numbers, text, bytes, lists and maps")


def _check_items(items: Collection[Any], depth: int) -> None:
    if items and depth >= MAX_DEPTH:
        raise CodecError(f"data nested more than {MAX_DEPTH} deep")
    for item in items:
        if type(item) is float:
            _check_finite(item)
        elif type(item) not in _ATOMS:
            _check_nested(item, depth + 1)


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise CodecError(f"{value} in a message; numbers must be finite")


def encode_fields(message: Any) -> dict[str, Any]:
    """A dataclass as a map: fields that hold their default stay out, nested dataclasses become maps.

    Raises:
        CodecError: a map of the user's that holds what a message must not, or a number that is not finite.
    """
    out: dict[str, Any] = {}
    for name, default, is_map in _outline(message.__class__):
        value = getattr(message, name)
        if value is default or (not value if is_map else value == default):
            continue
        out[name] = value if type(value) in _ATOMS else _plain(value)
    return out


@cache
def _outline(cls: type[Any]) -> list[tuple[str, Any, bool]]:
    """Of each field its name, its default (or MISSING), and whether an empty map is its default."""
    return [(field.name, field.default, field.default_factory is dict) for field in fields(cls)]


def _plain(value: Any) -> Any:
    if type(value) is float:
        _check_finite(value)
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast("tuple[Any, ...]", value)]
    if isinstance(value, (dict, float)):
        check_plain(value)
        return typing.cast("Any", value)
    return encode_fields(value) if is_dataclass(value) else value


def decode_fields(cls: type[T], data: Any, where: str = "") -> T:
    """A dataclass out of a map.

    Raises:
        CodecError: not a map, a required key missing, a value of the wrong type or out of its bounds.
    """
    try:
        return _decode(cls, data)
    except _Misfit as misfit:
        raise CodecError(f"{where or cls.__name__}{misfit.path}: {misfit.text}") from None


class _Misfit(Exception):
    """A value that does not fit its field; the path to it is put together on the way out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.path = ""


def _decode(cls: type[T], data: Any) -> T:
    if type(data) is not dict and not isinstance(data, Mapping):
        raise _Misfit(f"{type(data).__name__} where a map belongs")
    given = typing.cast("Mapping[str, Any]", data)
    values: dict[str, Any] = {}
    name = ""
    try:
        for name, required, parse in _schema(cls):
            if name in given:
                values[name] = parse(given[name])
            elif required:
                break
        else:
            return cls(**values)
    except _Misfit as misfit:
        misfit.path = f".{name}{misfit.path}"
        raise
    raise _Misfit(f"key {name!r} is missing")


Parser = Callable[[Any], Any]


@cache
def _schema(cls: type[Any]) -> list[tuple[str, bool, Parser]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    out: list[tuple[str, bool, Parser]] = []
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        out.append((field.name, required, _parser(hints[field.name])))
    return out


def _parser(hint: Any, limit: Limit | None = None) -> Parser:
    if isinstance(hint, typing.NewType):
        return _parser(hint.__supertype__, limit)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        base, *extras = typing.get_args(hint)
        return _parser(base, next((e for e in extras if isinstance(e, Limit)), limit))
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        assert len(inner) == 1, f"only `T | None` unions are parsed: {hint}"
        parse = _parser(inner[0], limit)
        return lambda value: None if value is None else parse(value)
    if origin is tuple:
        return _tuple_parser(_parser(typing.get_args(hint)[0]), limit)
    if origin is dict:
        return _dict_parser(_parser(typing.get_args(hint)[1]))
    if origin is typing.Literal:
        return _literal_parser(typing.get_args(hint))
    if is_dataclass(hint):
        return partial(_decode, typing.cast("type[object]", hint))
    if hint is Any:
        return lambda value: value
    return _text_parser(hint, limit) if hint in (str, bytes) else _number_parser(hint, limit)


def _tuple_parser(item: Parser, limit: Limit | None) -> Parser:
    most = MAX_ITEMS if limit is None or limit.max_len is None else limit.max_len

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Misfit(f"{type(value).__name__} where a list belongs")
        items = typing.cast("list[Any]", value)
        if len(items) > most:
            raise _Misfit(f"{len(items)} items; at most {most}")
        return tuple([item(v) for v in items])

    return parse


def _dict_parser(item: Parser) -> Parser:
    def parse(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Misfit(f"{type(value).__name__} where a map belongs")
        out: dict[str, Any] = {}
        for key, v in typing.cast("dict[str, Any]", value).items():
            try:
                out[key] = item(v)
            except _Misfit as misfit:
                misfit.path = f".{key}{misfit.path}"
                raise
        return out

    return parse


def _literal_parser(allowed: tuple[Any, ...]) -> Parser:
    def parse(value: Any) -> Any:
        if value not in allowed:
            raise _Misfit(f"{show(value)}; one of {', '.join(map(repr, allowed))} belongs here")
        return value

    return parse


def _text_parser(hint: Any, limit: Limit | None) -> Parser:
    most = MAX_TEXT if limit is None or limit.max_len is None else limit.max_len
    pattern = limit.pattern if limit else None

    def parse(value: Any) -> Any:
        if type(value) is not hint:
            raise _Misfit(f"{type(value).__name__} where {hint.__name__} belongs")
        if len(value) > most:
            raise _Misfit(f"{len(value)} long; at most {most}")
        if pattern is not None and not pattern.fullmatch(value):
            raise _Misfit(f"{show(value)} is not of the form {pattern.pattern}")
        return value

    return parse


def _number_parser(hint: Any, limit: Limit | None) -> Parser:
    low = limit.low if limit else None
    high = limit.high if limit else None

    def parse(value: Any) -> Any:
        # bool is an int to Python and must not pass for one; an int may stand for a float
        if type(value) is not hint:
            if hint is not float or type(value) is not int:
                raise _Misfit(f"{type(value).__name__} where {hint.__name__} belongs")
            value = float(value)
        if (low is not None and value < low) or (high is not None and value > high):
            raise _Misfit(f"{value} is outside {low} to {high}")
        return value

    return parse
