"""The largest magnitude of a run and its values, found on the bytes, are those that the types themselves give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fedloom.serialization.dtypes import DTYPES, is_float
from fedloom.serialization.elements import Scratch, elements_of
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = [name for name in DTYPES if is_float(name)]


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(FLOATS), data=st.data())
def test_largest_magnitude_of_any_codes(name: str, data: st.DataObject) -> None:
    entry = DTYPES[name]
    count = data.draw(st.integers(1, 40))
    raw = np.frombuffer(
        data.draw(st.binary(min_size=count * entry.itemsize, max_size=count * entry.itemsize)), np.uint8
    )
    with np.errstate(invalid="ignore"):
        wide = raw.view(entry.numpy).astype(np.float64)
    elements, scratch = elements_of(name), Scratch()
    found, values = elements.look(0, raw, scratch)
    if np.isfinite(wide).all():
        assert found == np.abs(wide).max()
    else:
        assert not found < math.inf
    with np.errstate(invalid="ignore"):
        read = (elements.read(0, raw, scratch) if values is None else values).astype(np.float64)
    assert np.array_equal(read, wide, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in FLOATS if DTYPES[name].bits <= 16])
def test_every_code_alone(name: str) -> None:
    entry, scratch = DTYPES[name], Scratch()
    elements = elements_of(name)
    every = np.arange(1 << entry.bits, dtype=f"u{entry.itemsize}")
    with np.errstate(invalid="ignore"):
        wide = every.view(entry.numpy).astype(np.float32)
    for code in every[:: 1 if entry.bits == 8 else 257]:
        found, _ = elements.look(0, np.array([code]).view(np.uint8), scratch)
        value = abs(float(wide[int(code)]))
        assert found == value or (math.isnan(value) and not found < math.inf)
    codes = elements.codes(every.view(np.uint8))
    assert (codes is None) == (name == "BF16")
    if codes is not None:
        assert np.array_equal(elements.values()[codes], wide, equal_nan=True)
