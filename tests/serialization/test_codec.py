from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType

import msgpack
import pytest
from fedloom.serialization.codec import MAX_DEPTH, Limit, check_plain, decode_fields, encode_fields, pack, show, unpack
from fedloom.serialization.errors import CodecError
from hypothesis import given
from hypothesis import strategies as st

Key = NewType("Key", str)


@dataclass(frozen=True, slots=True)
class Inner:
    n: Annotated[int, Limit(low=1, high=9)]
    text: Annotated[str, Limit(max_len=3)] = ""


@dataclass(frozen=True, slots=True)
class Outer:
    key: Annotated[Key, Limit(max_len=4, pattern="[a-z]*")]
    inner: Inner | None = None
    items: Annotated[tuple[Inner, ...], Limit(max_len=2)] = ()
    mode: Literal["on", "off"] = "off"
    data: dict[str, Any] = field(default_factory=dict)
    ratio: Annotated[float, Limit(low=0, high=1)] = 0.5
    raw: Annotated[bytes, Limit(max_len=2)] = b""
    flag: bool = False
    wait_s: Annotated[float, Limit(low=0)] | None = None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


# ---------------------------------------------------------------- plain data


@given(PLAIN)
def test_plain_data_there_and_back(value: Any) -> None:
    assert unpack(pack(value)) == value


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (pack(1) + b"\0", "malformed"),
        (pack("abc")[:-1], "malformed"),
        (b"\xa1\xff", "malformed"),
        (b"\xdb\xff\xff\xff\xff", "malformed"),
        (b"\xdd\xff\xff\xff\xff", "malformed"),
        (b"\xdf\xff\xff\xff\xff", "malformed"),
        (b"\x91" * 5000, "malformed|deep"),
        (pack(nested(MAX_DEPTH + 1)), "deep"),
        (msgpack.packb(math.nan), "finite"),
        (msgpack.packb({"a": [-math.inf]}), "finite"),
        (msgpack.packb({1: 2}), "malformed|only text"),
        (msgpack.packb({b"a": 2}), "only text"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extension type 5"),
        (msgpack.packb(msgpack.Timestamp(1)), "Timestamp|extension"),
    ],
)
def test_what_msgpack_would_let_pass(data: bytes, match: str) -> None:
    with pytest.raises(CodecError, match=match):
        unpack(data)


def test_a_limit_for_the_whole() -> None:
    assert unpack(pack("x" * 8), max_bytes=9) == "x" * 8
    with pytest.raises(CodecError, match="9 bytes of msgpack; at most 8"):
        unpack(pack("x" * 8), max_bytes=8)
    assert len(unpack(pack("x" * 100_000), max_bytes=2**20)) == 100_000


def test_takes_buffers() -> None:
    assert unpack(memoryview(pack([1]))) == unpack(bytearray(pack([1]))) == [1]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800", {1, 2}, object(), 1j])
def test_what_cannot_be_packed(value: Any) -> None:
    with pytest.raises(CodecError, match="cannot hold"):
        pack(value)


@pytest.mark.parametrize("value", [math.nan, [math.inf], {1: 2}, {"a": {b"b": 1}}, object(), nested(MAX_DEPTH + 1)])
def test_check_plain(value: Any) -> None:
    with pytest.raises(CodecError):
        check_plain(value)


def test_check_plain_takes_what_travels() -> None:
    check_plain(nested(MAX_DEPTH))
    check_plain({"a": (1, 2.5, None, True, "x", b"y", [{}])})


@given(st.binary(max_size=100))
def test_noise_raises_nothing_else(noise: bytes) -> None:
    with suppress(CodecError):
        decode_fields(Outer, unpack(noise))


def test_show_is_short() -> None:
    assert show("ab") == "'ab'"
    assert len(show("x" * 100_000)) == 80


# ---------------------------------------------------------------- dataclasses


def test_fields_there_and_back() -> None:
    one = Outer(Key("ab"), Inner(3), (Inner(1, "x"), Inner(9)), "on", {"a": [1, {"b": None}]}, 0.25, b"xy", True, 3.0)
    assert decode_fields(Outer, unpack(pack(encode_fields(one)))) == one


def test_defaults_stay_out() -> None:
    assert encode_fields(Outer(Key("ab"), data={"x": 1})) == {"key": "ab", "data": {"x": 1}}
    assert decode_fields(Outer, {"key": "ab"}) == Outer(Key("ab"))


def test_unknown_keys_are_a_newer_minors() -> None:
    assert decode_fields(Outer, {"key": "ab", "later": [1]}) == Outer(Key("ab"))


def test_an_int_stands_for_a_float() -> None:
    ratio = decode_fields(Outer, {"key": "", "ratio": 1}).ratio
    assert type(ratio) is float
    assert ratio == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"key": None}, r"Outer\.key: NoneType where str"),
        ({"key": b"ab"}, "bytes where str"),
        ({"key": "abcde"}, "5 long; at most 4"),
        ({"key": "A"}, "not of the form"),
        ({"key": "a\n"}, "not of the form"),
        ({"inner": 1}, r"Outer\.inner: int where a map"),
        ({"inner": {}}, "'n' is missing"),
        ({"inner": {"n": 0}}, "0 is outside 1 to 9"),
        ({"inner": {"n": 10}}, "outside"),
        ({"inner": {"n": True}}, "bool where int"),
        ({"inner": {"n": 1.0}}, "float where int"),
        ({"inner": {"n": "1"}}, "str where int"),
        ({"inner": {"n": 1, "text": "abcd"}}, "4 long"),
        ({"items": {}}, "where a list"),
        ({"items": [{"n": 1}] * 3}, "3 items; at most 2"),
        ({"items": [None]}, "where a map"),
        ({"mode": "maybe"}, "'maybe'; one of 'on', 'off'"),
        ({"mode": ["on"]}, "one of"),
        ({"mode": True}, "one of"),
        ({"mode": "x" * 10_000}, r"\.\.\.; one of"),
        ({"data": []}, "where a map"),
        ({"data": None}, "where a map"),
        ({"ratio": 1.5}, "outside"),
        ({"ratio": "0.5"}, "str where float"),
        ({"ratio": True}, "bool where float"),
        ({"raw": "ab"}, "str where bytes"),
        ({"raw": b"abc"}, "3 long"),
        ({"flag": 1}, "int where bool"),
        ({"wait_s": -1.0}, "outside"),
    ],
)
def test_every_field_is_typed_and_bounded(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CodecError, match=match) as caught:
        decode_fields(Outer, {"key": "ab", **change})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_a_message_is_a_map(data: Any) -> None:
    with pytest.raises(CodecError, match="where a map belongs"):
        decode_fields(Outer, data)


def test_the_required_ones_are() -> None:
    with pytest.raises(CodecError, match="'key' is missing"):
        decode_fields(Outer, {})


@pytest.mark.parametrize(
    "bad", [{"data": {"a": math.nan}}, {"data": {1: 2}}, {"data": {"a": {2}}}, {"ratio": math.inf}]
)
def test_a_sender_learns_what_no_message_may_hold(bad: dict[str, Any]) -> None:
    with pytest.raises(CodecError):
        encode_fields(Outer(Key("a"), **bad))
