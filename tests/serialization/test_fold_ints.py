"""Integer tensors: the exact rational mean, halves to even, whatever the weights."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import FoldError, ValuesError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.intsum import IntSum, weight_digits
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model
from hypothesis import given, settings
from hypothesis import strategies as st

UNIT = 1 << 120
TYPES = {"I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32}
TYPES |= {"I64": np.int64, "U64": np.uint64}


def units(weight: float) -> int:
    return int(Fraction(weight) * UNIT)


def add(total: IntSum, values: Any, weight: float, *, subtract: bool = False) -> None:
    digits = weight_digits(units(weight))
    total.begin(digits)
    total.add(0, values, digits, subtract=subtract)


weights = st.one_of(st.integers(1, 10**6).map(float), st.floats(2.0**-64, 2.0**64), st.just(1.0))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TYPES)))
def test_means_are_exact_in_any_order(data: st.DataObject, name: str) -> None:
    info = np.iinfo(TYPES[name])
    edges = st.sampled_from([int(info.min), int(info.max), 0])
    number = st.one_of(edges, st.integers(int(info.min), int(info.max)))
    count = data.draw(st.integers(1, 5))
    rows = [data.draw(st.lists(number, min_size=4, max_size=4)) for _ in range(count)]
    given_weights = [data.draw(weights) for _ in range(count)]
    order = data.draw(st.permutations(range(count)))
    total, other = IntSum(name, 4), IntSum(name, 4)
    for index in order:
        add(total if index % 2 else other, np.array(rows[index], TYPES[name]), given_weights[index])
    total.combine(*other.export())
    # what was added and taken out again leaves nothing
    add(total, np.array(rows[0], TYPES[name]), 0.3)
    add(total, np.array(rows[0], TYPES[name]), 0.3, subtract=True)
    denominator = sum(map(Fraction, given_weights))
    expected = [
        round(sum(Fraction(w) * row[column] for w, row in zip(given_weights, rows, strict=True)) / denominator)
        for column in range(4)
    ]
    assert total.mean(0, 4, int(denominator * UNIT)).tolist() == expected
    straight = IntSum(name, 4)
    for row, weight in zip(rows, given_weights, strict=True):
        add(straight, np.array(row, TYPES[name]), weight)
    lowest, limbs = straight.export()
    again, theirs = total.export()
    assert (lowest, [limb.tolist() for limb in limbs]) == (again, [limb.tolist() for limb in theirs])


@settings(max_examples=40, deadline=None)
@given(
    base=st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5),
    step=st.integers(-(2**20), 2**20),
    given_weights=st.lists(weights, min_size=1, max_size=4),
    dtype=st.sampled_from(["I64", "I32"]),
)
def test_differences_are_rounded_after_the_base_is_added(
    base: list[int], step: int, given_weights: list[float], dtype: str
) -> None:
    values = np.array(base, np.int64) % 2**30 if dtype == "I32" else np.array(base)
    values = values.astype(TYPES[dtype])
    total = IntSum(dtype, len(base))
    for index, weight in enumerate(given_weights):
        add(total, np.full(len(base), step + index, TYPES[dtype]), weight)
    denominator = sum(map(Fraction, given_weights))
    mean = sum(Fraction(w) * (step + i) for i, w in enumerate(given_weights)) / denominator
    assert total.mean(0, len(base), int(denominator * UNIT), values).tolist() == [round(int(v) + mean) for v in values]


def test_halves_go_to_even() -> None:
    total = IntSum("I64", 6)
    add(total, np.array([0, 1, 2, -1, -2, -3]), 1.0)
    add(total, np.array([1, 2, 3, 0, -1, -2]), 1.0)
    assert total.mean(0, 6, 2 * UNIT).tolist() == [0, 2, 2, 0, -2, -2]


def test_carries_are_passed_on_over_many_results() -> None:
    values = np.array([2**62, -(2**62), 2**31 - 1, -1])
    total = IntSum("I64", 4)
    for _ in range(9000):
        add(total, values, 999_999.0)
    assert total.mean(0, 4, units(999_999.0) * 9000).tolist() == values.tolist()
    for _ in range(8999):
        add(total, values, 999_999.0, subtract=True)
    assert total.mean(0, 4, units(999_999.0)).tolist() == values.tolist()


def test_a_mean_that_the_type_cannot_hold() -> None:
    total = IntSum("I8", 1)
    add(total, np.array([100], np.int8), 1.0)
    with pytest.raises(ValuesError, match="-128 to 127"):
        total.mean(0, 1, UNIT, np.array([100], np.int8))


def test_limbs_of_a_stranger_are_checked() -> None:
    total = IntSum("I64", 2)
    with pytest.raises(FoldError, match="limbs"):
        total.combine(13, [np.zeros(2, np.int64)] * 2)
    with pytest.raises(FoldError, match="carries"):
        total.combine(0, [np.array([0, -(2**40)])])
    assert total.export() == (0, [])


@pytest.mark.parametrize("steps", [None, 7, 0.1])
def test_counters_and_embeddings_in_a_fold(steps: float | None) -> None:
    rng = np.random.default_rng(0)
    base = {
        "bn.num_batches_tracked": np.array(10, np.int64),
        "embedding": rng.integers(-(2**63), 2**63 - 1, (3, BLOCK // 2 + 1)),
        "w": np.ones(3, np.float32),
    }
    results = [
        {"bn.num_batches_tracked": np.array(10 + i), "embedding": base["embedding"] // (i + 1), "w": base["w"]}
        for i in range(4)
    ]
    plan = FoldPlan.first(base, tasks=4)
    whole, part, rest = Fold(plan), Fold(plan), Fold(plan)
    for index, params in enumerate(results):
        meta = {} if steps is None else {"NUM_STEPS_CURRENT_ROUND": steps * (index + 1)}
        result = encode_model(FLModel(params=params, meta=meta))
        whole.add(result, site=str(index))
        (part if index in (0, 2) else rest).add(result, site=str(index))
    factors = [Fraction(1)] * 4 if steps is None else [Fraction(steps * (i + 1)) for i in range(4)]
    counter = round(sum(f * (10 + i) for i, f in enumerate(factors)) / sum(factors))
    model = whole.finish(base)
    assert model.params["bn.num_batches_tracked"] == counter
    assert model.params["bn.num_batches_tracked"].shape == ()
    columns = [0, 5, BLOCK // 2]
    for column in columns:
        numbers = [int(params["embedding"][2, column]) for params in results]
        expected = round(sum(f * n for f, n in zip(factors, numbers, strict=True)) / sum(factors))
        assert int(model.params["embedding"][2, column]) == expected
    rest.merge(b"".join(part.to_partial()[0]))
    assert rest.finish(base).params["embedding"].tobytes() == model.params["embedding"].tobytes()
