from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from fedloom.serialization.dtypes import DTYPES
from fedloom.serialization.errors import HeaderError
from fedloom.serialization.header import (
    MAX_HEADER_BYTES,
    MAX_NAME,
    MAX_RANK,
    MAX_TENSORS,
    TensorInfo,
    build_header,
    header_bytes_needed,
    read_header,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as library


def raw(text: str | bytes, data: bytes = b"") -> bytes:
    body = text.encode() if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def refused(header: Any, match: str, data: bytes = b"", total: int | None = None) -> None:
    file = header if isinstance(header, bytes) else raw(json.dumps(header), data)
    with pytest.raises(HeaderError, match=match):
        read_header(file, total)


# ---------------------------------------------------------------- writing


def test_places_tensors_as_the_library_does() -> None:
    arrays = {
        "z": np.zeros(2, np.float32),
        "a": np.zeros((2, 3), np.float16),
        "m": np.zeros(1, np.int64),
        "b": np.zeros(3, np.bool_),
        "y": np.zeros((), np.float32),
        "e": np.zeros((0, 4), np.float64),
        "u": np.zeros(2, np.uint8),
        "i": np.zeros(2, np.int32),
        "c": np.zeros(2, np.complex64),
    }
    theirs = read_header(library.save(arrays))
    ours, _ = build_header(
        (name, next(n for n, d in DTYPES.items() if d.numpy == a.dtype), a.shape) for name, a in arrays.items()
    )
    assert ours.tensors == theirs.tensors
    assert ours.layout_id == theirs.layout_id


def test_what_it_writes_reads_back_equal() -> None:
    specs = [("w", "F32", (3, 4)), ("scalar", "BF16", ()), ("none", "I64", (0, 7)), ("ünïcode/名", "BOOL", (5,))]
    header, text = build_header(specs, {"b": "2", "a": "ä\n1"})
    assert read_header(text) == header
    assert header.data_start == len(text) == header_bytes_needed(text[:8])
    assert header.data_start % 64 == 0
    assert header.data_bytes == 48 + 2 + 5
    assert header.total_bytes == header.data_start + 55
    assert header.by_name["w"] == TensorInfo("w", "F32", (3, 4), 0, 48)
    assert [t.items for t in header.tensors] == [0, 12, 1, 5]


def test_the_same_model_gives_the_same_bytes() -> None:
    specs = [("a", "F32", (1,)), ("b", "F64", (2,)), ("c", "F32", ())]
    assert build_header(specs, {"x": "1", "y": "2"}) == build_header(specs[::-1], {"y": "2", "x": "1"})


def test_layout_id_knows_names_dtypes_and_shapes_only() -> None:
    def layout(*specs: tuple[str, str, tuple[int, ...]], **metadata: str) -> str:
        return build_header(specs, metadata)[0].layout_id

    base = layout(("a", "F32", (2, 3)))
    assert layout(("a", "F32", (2, 3)), note="other") == base
    assert len({base, layout(("b", "F32", (2, 3))), layout(("a", "I32", (2, 3))), layout(("a", "F32", (3, 2)))}) == 4


def test_no_tensors_at_all() -> None:
    header, text = build_header([])
    assert header.tensors == ()
    assert header.total_bytes == len(text)
    assert read_header(text, len(text)) == header
    assert library.load(text) == {}


@pytest.mark.parametrize(
    "spec",
    [
        ("", "F32", (1,)),
        ("a\0b", "F32", (1,)),
        ("a\nb", "F32", (1,)),
        ("../a", "F32", (1,)),
        ("a\\..\\b", "F32", (1,)),
        ("__metadata__", "F32", (1,)),
        ("x" * (MAX_NAME + 1), "F32", (1,)),
        ("\ud800", "F32", (1,)),
        ("a", "F4", (2,)),
        ("a", "f32", (2,)),
        ("a", "F32", (-1,)),
        ("a", "F32", (True,)),
        ("a", "F32", (2**53, 2**53)),
        ("a", "F32", (0, 2**40)),
        ("a", "F32", (1,) * (MAX_RANK + 1)),
    ],
)
def test_writes_nothing_that_it_would_not_read(spec: tuple[str, str, tuple[int, ...]]) -> None:
    with pytest.raises(HeaderError):
        build_header([spec])


def test_refuses_to_write_a_name_twice_or_metadata_that_is_no_text() -> None:
    with pytest.raises(HeaderError, match="twice"):
        build_header([("a", "F32", (1,)), ("a", "F64", (1,))])
    with pytest.raises(HeaderError, match="surrogate"):
        build_header([], {"a": "\ud800"})
    with pytest.raises(HeaderError, match="at most"):
        build_header([], {"a": "x" * MAX_HEADER_BYTES})


# ---------------------------------------------------------------- reading: the frame


@pytest.mark.parametrize("first", [b"", b"1234567"])
def test_needs_eight_bytes(first: bytes) -> None:
    with pytest.raises(HeaderError, match="at least"):
        header_bytes_needed(first)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_length_bombs(length: int) -> None:
    with pytest.raises(HeaderError, match="allowed"):
        header_bytes_needed(length.to_bytes(8, "little"))


def test_the_header_must_be_there_and_fit_the_file() -> None:
    file = raw("{}")
    refused(file[:-1], "all of it is needed")
    refused(file, "in a file of 9", total=9)
    assert read_header(file + b"rest").total_bytes == 10


@pytest.mark.parametrize("text", [" {}", "[]", "\ufeff{}", '"a"', "nul"])
def test_must_start_with_a_brace(text: str) -> None:
    refused(raw(text), "must start with")


@pytest.mark.parametrize(
    "text", ["{ ", "{}x", "{},", '{"a":}', "{\0}", b'{"\xff":1}', b'{"a":"\xc0\x80"}', "{'a':1}", '{"a\n":1}', "{}{}"]
)
def test_must_be_json(text: str | bytes) -> None:
    refused(raw(text), "not JSON")


def test_padding_with_spaces_is_fine() -> None:
    assert read_header(raw("{}      ")).tensors == ()


def test_nesting_is_no_crash() -> None:
    refused(raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too deep")
    refused(raw('{"a":' * 100_000), "too deep|not JSON")


def test_millions_of_lists_are_not_parsed() -> None:
    refused(raw('{"a":[' + "[]," * 2_000_000 + "[]]}"), "lists and maps")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1.0", "1e3", "2E400"])
def test_only_whole_numbers(number: str) -> None:
    refused(raw('{"a":{"dtype":"F32","shape":[' + number + '],"data_offsets":[0,4]}}'), "whole numbers")


def test_numbers_of_many_digits() -> None:
    refused(raw('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}'), "5000 digits")


# ---------------------------------------------------------------- reading: names, keys and types


def test_a_name_twice() -> None:
    one = json.dumps(entry())
    refused(raw('{"a":%s,"a":%s}' % (one, one)), "twice")  # noqa: UP031
    refused(raw('{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}'), "twice")
    refused(raw('{"__metadata__":{},"__metadata__":{"a":"b"}}'), "twice")


@pytest.mark.parametrize("name", ["", "a\0", "\x7f", "a\tb", "../x", "x/../y", "..\\x", "..", "\u202ea", "n" * 513])
def test_odd_names(name: str) -> None:
    refused({name: entry()}, "name")


def test_half_a_surrogate_pair_in_a_name() -> None:
    refused(raw('{"\\ud800":%s}' % json.dumps(entry())), "printable")  # noqa: UP031


@pytest.mark.parametrize("name", ["a", "a.b", "dense/kernel:0", "..a", "a..b", " a ", "重み", "n" * 512])
def test_usual_names(name: str) -> None:
    assert read_header(raw(json.dumps({name: entry()}))).tensors[0].name == name


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "F32",
        [],
        {},
        {"dtype": "F32", "shape": [2]},
        entry(extra=1),
        entry(dtype=None),
        entry(dtype="F33"),
        entry(dtype="F6_E2M3"),
        entry(dtype=["F32"]),
        entry(shape=None),
        entry(shape=2),
        entry(shape={"0": 2}),
        entry(shape=[True, 2]),
        entry(shape=["2"]),
        entry(shape=[-2]),
        entry(shape=[[2]]),
        entry(shape=[1] * 16 + [2]),
        entry(offsets=None),
        entry(offsets=[0]),
        entry(offsets=[0, 8, 8]),
        entry(offsets=[False, 8]),
        entry(offsets=["0", "8"]),
        entry(offsets=[-8, 0]),
        entry(offsets=[8, 0]),
        entry(offsets=[0, 2**64]),
    ],
)
def test_malformed_entries(value: Any) -> None:
    refused({"a": value}, "tensor 'a'")


@pytest.mark.parametrize("metadata", [None, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"": "x"}, {"\0": "x"}])
def test_metadata_is_text(metadata: Any) -> None:
    refused({"__metadata__": metadata}, "__metadata__")


@pytest.mark.process
def test_too_many_tensors() -> None:
    one = json.dumps(entry(shape=[0], offsets=[0, 0]), separators=(",", ":"))
    refused(raw("{" + ",".join(f'"{i:x}":{one}' for i in range(MAX_TENSORS + 1)) + "}"), "200001 tensors")


# ---------------------------------------------------------------- reading: the layout


def test_offsets_must_hold_the_shape() -> None:
    refused({"a": entry(offsets=[0, 4])}, "has 8 bytes")
    refused({"a": entry(shape=[2**31, 2**31, 2**31], offsets=[0, 0])}, "too large|has ")
    refused({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, "too large")  # 0 modulo 2^64
    refused({"a": entry(shape=[0, 2**40], offsets=[0, 0])}, "too large")


def test_no_hole_no_overlap() -> None:
    refused({"a": entry(offsets=[8, 16])}, "hole")
    refused({"a": entry(), "b": entry(offsets=[16, 24])}, "hole")
    refused({"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps")
    refused({"a": entry(), "b": entry()}, "overlaps")


def test_elements_are_aligned() -> None:
    refused({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}, "not a multiple of 4")


def test_the_end_is_the_files_end() -> None:
    header = {"a": entry()}
    file = raw(json.dumps(header), b"12345678")
    assert read_header(file, len(file)).total_bytes == len(file)
    refused(file + b"9", "whose header describes", total=len(file) + 1)
    refused(file[:-1], "whose header describes", total=len(file) - 1)
    refused(raw("{}", b"x"), "whose header describes", total=11)


def test_order_in_the_json_does_not_matter() -> None:
    header = read_header(
        raw(json.dumps({"b": entry(offsets=[8, 16]), "e": entry(shape=[0], offsets=[8, 8]), "a": entry()}))
    )
    assert [t.name for t in header.tensors] == ["a", "e", "b"]


# ---------------------------------------------------------------- against the library and against noise

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(["F32", "F16", "I64", "U8", "BOOL"]), SHAPES), max_size=8))
def test_the_library_reads_what_we_write(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    header, text = build_header((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    loaded = library.load(text + bytes(header.data_bytes))
    assert {name: (a.dtype, a.shape) for name, a in loaded.items()} == {
        name: (DTYPES[dtype].numpy, shape) for name, (dtype, shape) in tensors.items()
    }


@given(st.binary(max_size=200), st.booleans())
def test_noise_raises_nothing_else(noise: bytes, framed: bool) -> None:
    with suppress(HeaderError):
        read_header(raw(b"{" + noise) if framed else noise)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JUNK, JUNK, JUNK, JUNK)
def test_odd_values_raise_nothing_else(dtype: Any, shape: Any, offsets: Any, metadata: Any) -> None:
    file = {"__metadata__": metadata, "a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    with suppress(HeaderError):
        read_header(raw(json.dumps(file)))
