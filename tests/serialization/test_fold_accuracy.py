"""How near the fold's mean is to a long-double reference, and what happens to values that its scale does not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import FoldError, ValuesError
from fedloom.serialization.fixedpoint import BIAS, LIMIT, MAGIC, FixedSums, ceil_log2, exact_units, exponent_for
from fedloom.serialization.fold import Fold, Good, Rescale
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, encode_model
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = "NUM_STEPS_CURRENT_ROUND"
Params = dict[str, Any]


def encode(params: Params, weight: float | None, kind: str) -> EncodedModel:
    meta = {} if weight is None else {STEPS: weight}
    return encode_model(FLModel(params=params, params_type=kind, meta=meta))  # pyright: ignore[reportArgumentType]


def run(
    base: Params, results: list[Params], weights: list[float] | None = None, kind: str = "FULL", **plan: Any
) -> Fold:
    """Fold, at most twice: what check() gives must do."""
    first = FoldPlan.first(base, tasks=len(results), **plan)
    return run_plan(first, results, weights, kind)[0]


def run_plan(plan: FoldPlan, results: list[Params], weights: list[float] | None, kind: str) -> tuple[Fold, int]:
    for attempt in range(2):
        fold = Fold(plan)
        for index, params in enumerate(results):
            fold.add(encode(params, weights[index] if weights else None, kind), site=f"site-{index}")
        match fold.check():
            case Good():
                return fold, attempt
            case Rescale(plan, _):
                with pytest.raises(FoldError, match="scales do not hold"):
                    fold.finish({})
    raise AssertionError("the plan of a Rescale must be good for the same results")


def reference(results: list[Params], weights: list[float] | None, name: str) -> tuple[Any, float]:
    total = np.zeros(results[0][name].shape, np.longdouble)
    largest = 0.0
    for index, params in enumerate(results):
        values = params[name].astype(np.longdouble)
        total += values * np.longdouble(weights[index] if weights else 1)
        largest = max(largest, float(np.abs(values).max()))
    return total / np.longdouble(sum(weights) if weights else len(results)), largest


def error_bits(fold: Fold, results: list[Params], weights: list[float] | None, name: str) -> float:
    """log2 of the largest error beside the tensor's largest magnitude."""
    expected, largest = reference(results, weights, name)
    worst = float(np.abs(fold.mean(name).astype(np.longdouble) - expected).max())
    return float(np.log2(worst / largest)) if worst else -100.0


def clients(rng: np.random.Generator, base: Params, count: int, spread: float = 0.5) -> list[Params]:
    return [
        {k: (v * (1 + spread * rng.standard_normal(v.shape))).astype(v.dtype) for k, v in base.items()}
        for _ in range(count)
    ]


def test_a_thousand_clients_of_weight_one() -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal(2000).astype(np.float32), "b": 0.3 * rng.standard_normal(50).astype(np.float32)}
    results = clients(rng, base, 1000)
    fold, refolds = run_plan(FoldPlan.first(base, tasks=1000), results, None, "FULL")
    assert refolds == 0  # the first round of an ordinary model needs none
    for name in base:
        assert error_bits(fold, results, None, name) < -28
        mean = fold.finish(base).params[name]
        assert np.array_equal(mean, fold.mean(name).astype(np.float32))
    # the next round knows the magnitudes and that weights are equal: far better
    again, refolds = run_plan(fold.next_plan(), results, None, "FULL")
    assert refolds == 0
    assert all(error_bits(again, results, None, name) < -45 for name in base)


@pytest.mark.parametrize("scale", [1.0, 1.001, 1.999])
def test_a_thousand_equal_results_whose_roundings_all_add_up(scale: float) -> None:
    base = {"w": (scale * np.random.default_rng(8).random(5000)).astype(np.float32)}
    base["w"][0] = scale
    fold, refolds = run_plan(FoldPlan.first(base, tasks=1000), [base] * 1000, None, "FULL")
    assert refolds == 0
    assert error_bits(fold, [base], None, "w") < -28


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_weights_up_to_a_million(kind: str) -> None:
    rng = np.random.default_rng(1)
    base = {"w": rng.standard_normal(3000).astype(np.float32), "b": rng.standard_normal(10)}
    results = clients(rng, base, 200)
    weights = [float(w) for w in 10 ** (6 * rng.random(200))]
    weights[0] = 1e6
    fold, refolds = run_plan(FoldPlan.first(base, tasks=200), results, weights, kind)
    assert refolds == 0
    for name in base:
        assert error_bits(fold, results, weights, name) < -40


@pytest.mark.parametrize("weights", [None, [1e6, 3.0, 250_000.0, 1.0]])
def test_tiny_beside_huge(weights: list[float] | None) -> None:
    rng = np.random.default_rng(2)
    base = {
        "tiny": (1e-8 * rng.standard_normal(500)).astype(np.float32),
        "huge": (1e4 * rng.standard_normal(500)).astype(np.float32),
    }
    results = clients(rng, base, 4)
    fold = run(base, results, weights)
    for name in base:
        assert error_bits(fold, results, weights, name) < (-40 if weights else -25)
        assert fold.finish(base).params[name].any()


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_tensors_that_start_at_zero(kind: str) -> None:
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal(100).astype(np.float32), "bias": np.zeros(100, np.float32)}
    results = [
        {"w": base["w"] * np.float32(0.9), "bias": (1e-5 * rng.standard_normal(100)).astype(np.float32)}
        for _ in range(1000)
    ]
    fold = run(base, results, kind=kind)
    assert error_bits(fold, results, None, "bias") < -28
    zeros = [{"w": base["w"], "bias": base["bias"]}] * 3
    still = run(base, zeros, kind=kind)
    assert isinstance(still.check(), Good)
    assert not still.mean("bias").any()


def test_a_model_of_zeros() -> None:
    base = {"w": np.zeros(10, np.float32)}
    fold, refolds = run_plan(FoldPlan.first(base, tasks=3), [base] * 3, None, "FULL")
    assert refolds == 0
    assert not fold.finish(base).params["w"].any()
    again, _ = run_plan(fold.next_plan(), [base] * 3, None, "FULL")  # zero magnitudes plan a round too
    assert again.count == 3


def test_cancellation() -> None:
    rng = np.random.default_rng(4)
    base = {"w": rng.standard_normal(300).astype(np.float32)}
    half = clients(rng, base, 100)
    results = [sign for params in half for sign in (params, {"w": -params["w"]})]
    fold = run(base, results)
    assert not fold.mean("w").any()  # exactly: halves to even is symmetric
    weights = [float(w) for w in rng.integers(1, 1000, 200)]
    assert error_bits(run(base, results, weights), results, weights, "w") < -35


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
@pytest.mark.parametrize("growth", [100.0, 300.0, 1e6, 1e30])
def test_values_that_grow_within_a_round_are_folded_again(growth: float, kind: str) -> None:
    rng = np.random.default_rng(5)
    base = {"w": rng.standard_normal(500).astype(np.float32), "calm": np.ones(5, np.float32)}
    plan = FoldPlan.first(base, tasks=8)
    calm, _ = run_plan(plan, [base] * 8, [10.0] * 8, kind)
    calm.finish(base)
    plan = calm.next_plan()
    results = clients(rng, base, 8)
    results[5] = {"w": (base["w"] * growth).astype(np.float32), "calm": base["calm"]}
    weights = [10.0] * 8
    fold, refolds = run_plan(plan, results, weights, kind)
    assert error_bits(fold, results, weights, "w") < -45
    assert refolds == (growth > 16 * 64 / 10)  # headroom, and the cap on weights: four times the power of two above 10
    if not refolds:
        return
    calm_q = fold.plan.exponents(fold.kind or "FULL")[0]
    assert calm_q == plan.exponents(fold.kind or "FULL")[0]  # only the tensor that grew has another scale
    # the same set in another order and through a partial: the same decision, the same plan, the same bits
    other = Fold(plan)
    part = Fold(plan)
    for index in (5, 0, 7, 1, 6, 2, 4, 3):
        (part if index % 2 else other).add(encode(results[index], 10.0, kind), site=str(index))
    other.merge(b"".join(part.to_partial()[0]))
    verdict = other.check()
    assert isinstance(verdict, Rescale)
    assert verdict.tensors == ("w",)
    assert verdict.plan.digest == fold.plan.digest


def test_what_was_over_can_be_taken_out() -> None:
    rng = np.random.default_rng(6)
    base = {"w": rng.standard_normal(3 * BLOCK).astype(np.float32)}
    plan = FoldPlan.first(base, tasks=2, weight_cap=1.0)
    fold = Fold(plan)
    fold.add(encode(base, None, "FULL"), site="a")
    before = fold.mean("w").tobytes()
    wild = base["w"].copy()
    wild[BLOCK + 5] = 1e20  # one block of three is over
    fold.add(encode({"w": wild}, None, "FULL"), site="b")
    assert isinstance(fold.check(), Rescale)
    fold.remove(encode({"w": wild}, None, "FULL"), site="b")
    assert isinstance(fold.check(), Good)
    assert fold.mean("w").tobytes() == before


def test_many_large_results_never_wrap() -> None:
    base = {"w": np.ones(4, np.float32)}
    plan = FoldPlan.first(base, tasks=1, weight_cap=1.0)  # a scale for one result
    results = [{"w": np.full(4, 15.9, np.float32)}] * 3000  # each in range, all together beyond 2^62
    fold = Fold(plan)
    encoded = encode(results[0], None, "FULL")
    for index in range(3000):
        fold.add(encoded, site=str(index))
    verdict = fold.check()
    assert isinstance(verdict, Rescale)
    again = Fold(verdict.plan)
    for index in range(3000):
        again.add(encoded, site=str(index))
    assert isinstance(again.check(), Good)
    assert again.finish(base).params["w"].tolist() == results[0]["w"].tolist()


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e-45, 1e-150, 1e150, 1e270])
def test_float64_at_its_ends(value: float) -> None:
    base = {"w": np.ones(3)}
    results = [{"w": np.array([value, -value, 0.0])}, {"w": np.array([value, value, value])}]
    fold = run(base, results, [1.0, 1.0])
    mean = fold.mean("w")
    if value >= 2.0**-870:  # below, the smallest unit shows
        assert mean.tolist() == pytest.approx([value, 0.0, value / 2], rel=2.0**-48, abs=0)
    fold.finish(base)
    fold.next_plan()


def test_beyond_any_scale_is_refused() -> None:
    base = {"w": np.ones(3)}
    fold = Fold(FoldPlan.first(base, tasks=1))
    with pytest.raises(ValuesError, match=r"2\^900"):
        fold.add(encode({"w": np.full(3, 1e300)}, None, "FULL"), site="a")
    assert fold.count == 0


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float32, np.float64]
)
def test_every_float_type_is_widened_exactly(dtype: Any) -> None:
    rng = np.random.default_rng(7)
    base = {"w": rng.standard_normal(BLOCK + 100).astype(dtype)}
    results = clients(rng, base, 20)
    weights = [float(w) for w in rng.integers(1, 100, 20)]
    fold = run(base, results, weights)
    expected, largest = reference(results, weights, "w")
    assert float(np.abs(fold.mean("w") - expected).max()) < largest * 2.0**-32
    out = fold.finish(base).params["w"]
    assert out.dtype == base["w"].dtype
    wide = fold.mean("w").astype(np.float32) if out.dtype.itemsize < 4 else fold.mean("w")
    assert out.tobytes() == wide.astype(dtype).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60), min_size=1, max_size=12),
    scale=st.integers(-40, 0),
)
def test_block_arithmetic_is_rounding_to_even(values: list[float], scale: int) -> None:
    sums = FixedSums(["F64"], [1])
    sums.exponents = (scale,)
    expected = 0
    for value in values:
        largest, done = sums.add(0, 0, np.array([value]).view(np.uint8), 1.0)
        assert (largest, done) == (abs(value), 1)
        scaled = value * 2.0**scale
        expected += round(scaled) if abs(scaled) <= LIMIT else 0
    held = int(sums.sums.view(0)[0]) - len(values) * BIAS
    assert (held + 2**63) % 2**64 - 2**63 == expected


@pytest.mark.parametrize("edge", [LIMIT, -LIMIT, LIMIT - 0.5, 0.5, 1.5, -0.5, -2.5, 0.0, -0.0])
def test_the_edges_of_the_trick(edge: float) -> None:
    assert np.array([edge + MAGIC]).view(np.int64)[0] - BIAS == round(edge)


@settings(max_examples=100, deadline=None)
@given(magnitude=st.floats(1e-200, 1e200), cap=st.floats(1e-6, 1e9), tasks=st.integers(1, 10**7))
def test_scales_are_the_largest_that_fit(magnitude: float, cap: float, tasks: int) -> None:
    q = exponent_for(magnitude, cap, tasks)
    bound = exact_units(magnitude * cap) * 16
    one, many = (2**51 << 1074), (2**62 << 1074)

    def fits(exponent: int) -> bool:
        scaled = (bound << exponent if exponent >= 0 else bound >> -exponent) if exponent < 2000 else 0
        # a sum of two rounded-up logarithms may give one bit away
        return scaled <= one and scaled * (1 << ceil_log2(float(tasks))) <= many

    assert fits(q)
    assert not fits(q + 2)
