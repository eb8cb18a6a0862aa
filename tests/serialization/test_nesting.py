from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from fedloom.serialization.codec import MAX_DEPTH, pack, unpack
from fedloom.serialization.errors import CodecError
from fedloom.serialization.nesting import check_nesting, few_heads, is_whole
from hypothesis import given
from hypothesis import strategies as st

#: So many long list heads, in a text here, make every value be looked at item by item.
HEADS = b"\xdc" * (MAX_DEPTH + 2)


@pytest.mark.parametrize(
    "head", [b"\xdc\xff\xff", b"\xdd\x00\x00\xff\xff", b"\xde\xff\xff\xa1a", b"\xdf\x00\x00\xff\xff\xa1a"]
)
def test_nested_heads_take_no_memory(head: bytes) -> None:
    """Undiscovered, a thousand heads of 3 bytes take 80 MB."""
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            unpack(head * 1000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_more_items_than_bytes_are_refused() -> None:
    with pytest.raises(CodecError, match="65535 items promised with 17 bytes left"):
        check_nesting(b"\xdc\xff\xff" + HEADS[:17], MAX_DEPTH)
    with pytest.raises(CodecError, match="nested more than 3 deep"):
        check_nesting(b"\xdc\x00\x01" * 4 + b"\xc0", 3)


def test_whole_values_are_not_looked_at_item_by_item() -> None:
    data = pack([HEADS, [1.5, {"a": b"\xdc\xff\xff"}]])
    assert not few_heads(data, MAX_DEPTH)
    assert is_whole(data)
    assert not any(is_whole(data[:stop]) for stop in range(len(data)))
    with pytest.raises(CodecError, match="nested more than 16 deep"):
        unpack(b"\xdc\x00\x01" * 17 + b"\xc0")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=40,
)


@given(plain, st.sampled_from([0, 1, 200, 300, 70_000]))
def test_what_msgpack_writes_passes(value: Any, size: int) -> None:
    """Every kind of value, looked at closely because of the bytes beside it."""
    data = pack([value, HEADS, "x" * size, bytes(size), [None] * (size % 1000), value])
    check_nesting(data, 64)
    assert msgpack.unpackb(data)[0] == value


@given(st.integers(0, 127), st.binary(max_size=300), plain)
def test_extensions_are_passed_over(kind: int, body: bytes, value: Any) -> None:
    data: bytes = msgpack.packb([msgpack.ExtType(kind, body), HEADS, value])
    check_nesting(data, 64)


@given(st.binary(max_size=200))
def test_noise_raises_nothing_else(noise: bytes) -> None:
    for data in (noise, HEADS + noise, b"\xdc\x00\x20" + noise + HEADS):
        with suppress(CodecError):
            check_nesting(data, MAX_DEPTH)
