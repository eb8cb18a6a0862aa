from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization.dtypes import BLOCK_ITEMS, DTYPES, from_numpy, is_float, is_int, widen
from fedloom.serialization.errors import LayoutError

FLOATS = [name for name in DTYPES if is_float(name)]


def test_every_type_has_whole_bytes_and_finds_itself() -> None:
    for name, entry in DTYPES.items():
        assert entry.name == name
        assert entry.bits == 8 * entry.itemsize == 8 * entry.numpy.itemsize
        assert from_numpy(entry.numpy) is entry


def test_wide_types_come_first() -> None:
    sizes = [entry.itemsize for entry in DTYPES.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_kinds() -> None:
    assert [n for n in DTYPES if is_int(n)] == ["U64", "I64", "U32", "I32", "U16", "I16", "I8", "U8"]
    assert set(FLOATS) >= {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
    for odd in ("BOOL", "C64", "F4", "nonsense"):
        assert not is_float(odd)
        assert not is_int(odd)


def test_byte_order_and_platform_names_do_not_matter() -> None:
    assert from_numpy(np.dtype(">f4")).name == "F32"
    assert from_numpy(np.dtype("longlong")).name == "I64"
    assert from_numpy(np.dtype(ml_dtypes.bfloat16)).name == "BF16"


@pytest.mark.parametrize("dtype", ["O", "U4", "S4", "M8[s]", "c16", "V8", "longdouble"])
def test_types_without_a_place_are_refused(dtype: str) -> None:
    with pytest.raises(LayoutError, match="cannot be stored"):
        from_numpy(np.dtype(dtype))


@pytest.mark.parametrize("out_type", [np.float32, np.float64])
@pytest.mark.parametrize("name", FLOATS)
def test_widen_gives_the_value_of_every_code(name: str, out_type: type) -> None:
    entry = DTYPES[name]
    if entry.bits <= 16:
        raw = np.arange(2**entry.bits, dtype=np.uint16 if entry.bits == 16 else np.uint8)
    else:
        values = np.random.default_rng(1).standard_normal(5000) * 1e30
        raw = np.concatenate([values, [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(entry.numpy)
    out = np.full(raw.size, 7, out_type)
    with np.errstate(over="ignore", invalid="ignore"):
        widen(raw.view(np.uint8), name, out)
        wanted = raw.view(entry.numpy).astype(out_type)
    assert np.array_equal(out, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(out)[out == 0], np.signbit(wanted)[out == 0])


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E4M3"])
def test_widen_over_many_blocks_and_unaligned_bytes(name: str) -> None:
    entry = DTYPES[name]
    values = np.random.default_rng(2).standard_normal(2 * BLOCK_ITEMS + 17).astype(entry.numpy)
    raw = np.zeros(values.nbytes + 1, np.uint8)[1:]
    raw[:] = values.view(np.uint8)
    out = np.empty(values.size, np.float64)
    widen(raw, name, out)
    assert np.array_equal(out, values.astype(np.float64))


def test_widen_nothing() -> None:
    for name in FLOATS:
        widen(np.empty(0, np.uint8), name, np.empty(0, np.float64))


def test_widen_refuses_what_does_not_fit() -> None:
    with pytest.raises(LayoutError, match="only floats"):
        widen(np.zeros(4, np.uint8), "I32", np.zeros(1))
    with pytest.raises(LayoutError, match="8 belong there"):
        widen(np.zeros(7, np.uint8), "F32", np.zeros(2))
    with pytest.raises(LayoutError, match="float32 and float64"):
        widen(np.zeros(8, np.uint8), "F32", np.zeros(2, np.int64))
