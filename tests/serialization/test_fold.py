"""The fold's promises: same set, same bits; whole or not at all; weights and metrics exact; mistakes named."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import FoldError, HeaderError, LayoutError, PayloadError, ValuesError, WeightError
from fedloom.serialization.fold import Fold, Good, Rescale
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.header import read_header
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, encode_model
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = "NUM_STEPS_CURRENT_ROUND"


def encode(params: dict[str, Any], steps: Any = None, **fields: Any) -> EncodedModel:
    meta = {} if steps is None else {STEPS: steps}
    return encode_model(FLModel(params=params, meta=meta, **fields))


def add(fold: Fold, params: dict[str, Any], steps: Any = None, site: str = "site-1", **fields: Any) -> None:
    fold.add(encode(params, steps, **fields), site=site)


def bits(fold: Fold) -> str:
    buffers, size = fold.to_partial()
    assert sum(map(len, buffers)) == size
    state = json.loads(read_header(buffers[0]).metadata["fedloom.partial"])
    del state["sites"]  # the few that errors show
    return hashlib.sha256(json.dumps(state).encode() + b"".join(buffers[1:])).hexdigest()


def same(a: FLModel, b: FLModel) -> bool:
    assert a.params.keys() == b.params.keys()
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in ((a.params[name], b.params[name]) for name in a.params)
    )


def make_round(seed: int, results: int = 9) -> tuple[dict[str, Any], list[EncodedModel]]:
    """A model of every kind of tensor, and results; some of them lack some tensors."""
    rng = np.random.default_rng(seed)
    base: dict[str, Any] = {
        "big": rng.standard_normal(BLOCK + 777).astype(np.float32),
        "bf16": rng.standard_normal((31, 7)).astype(ml_dtypes.bfloat16),
        "fp16": rng.standard_normal(65).astype(np.float16),
        "f64": rng.standard_normal((3, 5)),
        "count": np.array(3, np.int64),
        "ids": rng.integers(-(2**62), 2**62, 40),
        "small": rng.integers(-100, 100, 9).astype(np.int8),
        "flag": np.array([True, False]),
        "none": np.empty((0, 4), np.float32),
    }
    out: list[EncodedModel] = []
    for index in range(results):
        params = {
            name: value
            if value.dtype == bool
            else value + rng.integers(0, 9, value.shape).astype(value.dtype)
            if value.dtype.kind == "i"
            else (value.astype(np.float64) + 0.3 * rng.standard_normal(value.shape)).astype(value.dtype)
            for name, value in base.items()
        }
        if index % 3 == 1:
            del params["f64"], params["ids"]
        metrics = {"loss": float(rng.random()), **({"rare": index} if index % 4 == 0 else {})}
        out.append(encode(params, float(rng.random() * 1000) + 0.01, metrics=metrics))
    return base, out


def fold_of(plan: FoldPlan, results: list[EncodedModel]) -> Fold:
    fold = Fold(plan)
    for index, result in enumerate(results):
        fold.add(result, site=f"site-{index}")
    return fold


# --- order and grouping ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_same_set_same_bits_in_any_order_and_grouping(data: st.DataObject) -> None:
    base, results = make_round(1)
    plan = FoldPlan.first(base, tasks=len(results))
    expected = fold_of(plan, results)
    order = data.draw(st.permutations(range(len(results))))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(results), max_size=len(results)))
    total = Fold(plan)
    partials = [Fold(plan) for _ in range(3)]
    for index in order:
        target = partials[groups[index] - 1] if groups[index] else total
        target.add(results[index], site=f"site-{index}")
    for partial in partials:
        if partial.count:
            total.merge(b"".join(partial.to_partial()[0]))
    assert bits(total) == bits(expected)
    assert same(total.finish(base), expected.finish(base))
    assert total.metrics == expected.metrics
    assert total.weight_sum == expected.weight_sum
    assert total.magnitudes() == expected.magnitudes()
    assert total.next_plan().digest == expected.next_plan().digest


@settings(max_examples=15, deadline=None)
@given(taken=st.lists(st.integers(0, 8), unique=True, max_size=8), back=st.booleans())
def test_what_is_taken_out_leaves_no_trace(taken: list[int], back: bool) -> None:
    base, results = make_round(2)
    plan = FoldPlan.first(base, tasks=len(results))
    fold = fold_of(plan, results)
    for index in taken:
        fold.remove(results[index], site=f"site-{index}")
    if back:
        for index in reversed(taken):
            fold.add(results[index], site=f"site-{index}")
    left = results if back else [result for index, result in enumerate(results) if index not in taken]
    expected = fold_of(plan, left)
    assert bits(fold) == bits(expected)
    assert same(fold.finish(base), expected.finish(base))


def test_all_taken_out_is_an_empty_fold_of_either_kind() -> None:
    base = {"w": np.ones(5, np.float32)}
    plan = FoldPlan.first(base, tasks=2)
    fold = Fold(plan)
    add(fold, base, 3)
    fold.remove(encode(base, 3), site="site-1")
    assert fold.count == 0
    assert fold.kind is None
    add(fold, {"w": np.full(5, 0.5, np.float32)}, params_type="DIFF")
    assert fold.finish(base).params["w"].tolist() == [1.5] * 5


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1000, 400_000), min_size=1, max_size=9))
def test_chunks_of_any_size_give_the_same_bits(cuts: list[int]) -> None:
    base, results = make_round(3, results=2)
    plan = FoldPlan.first(base, tasks=2)
    expected = fold_of(plan, results)
    fold = Fold(plan)
    feeders = [fold.start(result.header, site=f"site-{i}", meta=result.meta) for i, result in enumerate(results)]
    data = [result.tobytes()[result.header.data_start :] for result in results]
    at = 0
    while any(feeder.missing for feeder in feeders):  # both at once, in turns
        for feeder, part in zip(feeders, data, strict=True):
            size = cuts[at % len(cuts)]
            at += 1
            feeder.feed(feeder.position, part[feeder.position : feeder.position + size])
    with pytest.raises(FoldError, match="half in"):
        fold.check()
    for feeder in feeders:
        feeder.finish()
    assert bits(fold) == bits(expected)


def test_bytes_files_and_encoded_models_are_the_same(tmp_path: Path) -> None:
    base, results = make_round(4, results=3)
    plan = FoldPlan.first(base, tasks=3)
    fold = Fold(plan)
    path = tmp_path / "a result"
    path.write_bytes(results[0].tobytes())
    fold.add(path, site="site-0", meta=results[0].meta)
    fold.add(results[1].tobytes(), site="site-1")  # says itself what its plain side is
    fold.add(memoryview(results[2].tobytes()), site="site-2")
    assert bits(fold) == bits(fold_of(plan, results))
    odd = memoryview(b"?" + results[2].tobytes())[1:]  # not aligned
    fold.remove(odd, site="site-2")
    fold.add(odd, site="site-2")
    assert bits(fold) == bits(fold_of(plan, results))


# --- bad results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5 * BLOCK, -1])
def test_a_bad_value_anywhere_leaves_no_trace(bad: float, place: int) -> None:
    base = {"a": np.ones(100, np.float32), "n": np.array(7), "z": np.zeros(6 * BLOCK + 5, np.float32)}
    plan = FoldPlan.first(base, tasks=4)
    fold = Fold(plan)
    add(fold, base, 2)
    before = bits(fold)
    params = {"a": base["a"] * 3, "n": np.array(9), "z": np.full(6 * BLOCK + 5, 0.01, np.float32)}
    params["z"][place] = bad
    with pytest.raises(ValuesError, match=r"site-9.*'z'.*NaN, Inf"):
        add(fold, params, 5, site="site-9", metrics={"loss": 1})
    assert bits(fold) == before
    assert fold.count == 1
    assert fold.metrics == {}
    # and the same fed in pieces: the feeder says what it wants again
    encoded = encode(params, 5)
    data = encoded.tobytes()[encoded.header.data_start :]
    feeder = fold.start(encoded.header, site="site-9", meta=encoded.meta)
    with pytest.raises(ValuesError):
        for start in range(0, len(data), 100_000):
            feeder.feed(start, data[start : start + 100_000])
    undo = feeder.undo()
    if undo is not None:
        with pytest.raises(FoldError, match="half in"):
            fold.to_partial()
        while undo.missing:
            undo.feed(undo.position, data[undo.position : undo.position + 77_777])
        undo.finish()
    assert bits(fold) == before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64])
def test_nan_of_every_float_type_is_found(dtype: Any) -> None:
    base = {"w": np.ones(50, dtype)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    bad = base["w"].copy()
    bad[33] = np.nan
    with pytest.raises(ValuesError):
        add(fold, {"w": bad})
    assert fold.count == 0


def test_a_result_can_be_given_up_half_way() -> None:
    base, results = make_round(5, results=2)
    fold = Fold(FoldPlan.first(base, tasks=2))
    fold.add(results[0], site="site-0")
    before = bits(fold)
    data = results[1].tobytes()[results[1].header.data_start :]
    feeder = fold.start(results[1].header, site="site-1", meta=results[1].meta)
    feeder.feed(0, data[: len(data) // 2])
    with pytest.raises(FoldError, match="not whole"):
        feeder.finish()
    with pytest.raises(FoldError, match="are next"):
        feeder.feed(0, data)
    undo = feeder.undo()
    assert undo is not None
    undo.feed(0, data)  # takes what it needs
    undo.finish()
    assert bits(fold) == before
    with pytest.raises(FoldError, match="closed"):
        feeder.feed(0, data)
    untouched = fold.start(results[1].header, site="site-1", meta=results[1].meta)
    assert untouched.undo() is None
    assert bits(fold) == before


def test_layout_mistakes_are_named() -> None:
    base = {"w": np.ones((2, 3), np.float32), "n": np.array(1)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    for params, said in [
        ({"w": np.ones((3, 2), np.float32)}, r"site-1.*'w' is F32\[3, 2\], the model's is F32\[2, 3\]"),
        ({"w": np.ones((2, 3))}, r"'w' is F64\[2, 3\]"),
        ({"v": np.ones(1, np.float32), **base}, "'v' is not in the model"),
        ({"n": np.array(1, np.int32)}, r"'n' is I32\[\]"),
    ]:
        with pytest.raises(LayoutError, match=said):
            add(fold, params)
    with pytest.raises(HeaderError):
        fold.add(encode(base).tobytes()[:-1], site="site-1")
    with pytest.raises(PayloadError):
        fold.add(Path("/nonexistent/result"), site="site-1")
    assert fold.count == 0


# --- kinds, weights, metrics ----------------------------------------------------------------------


def test_full_and_diff_do_not_mix() -> None:
    base = {"w": np.ones(3, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    add(fold, base)
    with pytest.raises(FoldError, match=r"site-2 is DIFF, but those of site-1 are FULL"):
        add(fold, base, site="site-2", params_type="DIFF")
    assert fold.count == 1


@pytest.mark.parametrize("steps", [0, -1, True, "7", math.nan, math.inf, [1], 2.0**70, 1e-30, 10**400])
def test_steps_that_are_no_weight_are_refused(steps: Any) -> None:
    base = {"w": np.ones(3, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    with pytest.raises(WeightError, match="site-1"):
        fold.add(encode(base), site="site-1", meta={"meta": {STEPS: steps}})
    assert fold.count == 0


def test_steps_from_some_only_is_an_error_that_names_both() -> None:
    base = {"w": np.ones(3, np.float32)}
    for first, second in ((4, None), (None, 4)):
        fold = Fold(FoldPlan.first(base, tasks=3))
        add(fold, base, first, site="a")
        add(fold, base, first, site="b")
        having, lacking = ("a, b", "c") if first else ("c", "a, b")
        with pytest.raises(WeightError, match=f"{having} sent a number of steps and {lacking} did not"):
            add(fold, base, second, site="c")
        assert fold.count == 2
        assert fold.equal_weights is (first is None)


def test_no_steps_anywhere_is_equal_weights_and_a_cap_of_one() -> None:
    base = {"w": np.zeros(2, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    add(fold, {"w": np.array([1, 2], np.float32)}, site="a")
    add(fold, {"w": np.array([3, 4], np.float32)}, site="b")
    assert fold.equal_weights
    assert fold.weight_sum == 2
    assert fold.finish(base).params["w"].tolist() == [2, 3]
    assert fold.magnitudes().weight_cap == 1.0


def test_weights_are_steps_times_the_sites_factor() -> None:
    base = {"w": np.zeros(1, np.float64)}
    fold = Fold(FoldPlan.first(base, tasks=2, aggregation_weights={"a": 0.25}))
    add(fold, {"w": np.array([8.0])}, 4, site="a")
    add(fold, {"w": np.array([2.0])}, 2, site="b")
    assert fold.weight_sum == 3
    assert fold.finish(base).params["w"].tolist() == [4.0]
    assert fold.magnitudes().weight_cap == 4 * 4.0  # four times the power of two above 2


def test_equal_values_come_out_as_they_went_in_whatever_the_weights() -> None:
    value = np.array([1.0, -0.1, 3.3e-3], np.float32)
    fold = Fold(FoldPlan.first({"w": value}, tasks=50))
    rng = np.random.default_rng(0)
    for index in range(50):
        add(fold, {"w": value}, float(rng.random() * 1e5) + 1, site=str(index))
    assert fold.finish({"w": value}).params["w"].tobytes() == value.tobytes()


def test_each_tensor_has_its_own_denominator_and_absent_ones_keep_the_base() -> None:
    base = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32), "c": np.full(1, 9, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    add(fold, {"a": np.full(1, 2, np.float32), "b": np.full(1, 5, np.float32)}, 1, site="x")
    add(fold, {"a": np.full(1, 6, np.float32)}, 3, site="y")
    params = fold.finish(base).params
    assert [params[name].tolist() for name in "abc"] == [[5], [5], [9]]
    assert params["c"] is base["c"]


def test_excluded_tensors_keep_the_base_and_need_not_be_finite() -> None:
    base = {"head.w": np.ones(2, np.float32), "body.w": np.ones(2, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=1, exclude="^head"))
    add(fold, {"head.w": np.full(2, np.nan, np.float32), "body.w": np.full(2, 4, np.float32)})
    params = fold.finish(base).params
    assert params["head.w"].tolist() == [1, 1]
    assert params["body.w"].tolist() == [4, 4]


def test_optimizer_tensors_of_a_result_are_passed_over() -> None:
    base = {"w": np.ones(2, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=1))
    add(fold, base, optimizer_params={"m": np.full(3, np.nan, np.float32)})
    assert fold.finish(base).params.keys() == {"w"}


def test_metrics_are_weighted_over_those_that_have_them() -> None:
    base = {"w": np.ones(1, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=3))
    add(fold, base, 1, site="a", metrics={"acc": 0.5, "n": 3, "ok": True, "note": "hello"})
    add(fold, base, 3, site="b", metrics={"acc": 0.75, "n": 5, "ok": False, "loss": math.nan})
    add(fold, base, 4, site="c", metrics={"acc": 1.0})
    assert fold.metrics == {"acc": (0.5 + 3 * 0.75 + 4) / 8, "n": 4.5, "ok": 0.25}
    assert fold.finish(base).metrics == fold.metrics


def test_metric_sums_are_exact() -> None:
    base = {"w": np.ones(1, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=30))
    values = [1e16, 1.0, -1e16, 0.1] * 5
    for index, value in enumerate(values):
        add(fold, base, 3, site=str(index), metrics={"m": value})
    assert fold.metrics["m"] == float(sum(map(Fraction, values)) / len(values))


def test_results_without_tensors_count_for_metrics() -> None:
    base = {"w": np.ones(1, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    fold.add(None, site="a", meta={"metrics": {"acc": 1}, "meta": {STEPS: 1}})
    add(fold, base, 3, site="b", metrics={"acc": 0}, params_type="DIFF")
    assert fold.metrics == {"acc": 0.25}
    assert fold.finish(base).params["w"].tolist() == [2]
    fold.remove(None, site="a", meta={"metrics": {"acc": 1}, "meta": {STEPS: 1}})
    assert fold.metrics == {"acc": 0}


# --- finishing ------------------------------------------------------------------------------------


def test_bools_are_carried_over_and_nesting_is_kept() -> None:
    base = FLModel(params={"a": {"w": np.zeros(2, np.float32)}, "m": np.array([True])}, current_round=4, total_rounds=9)
    flat = {"a.w": np.full(2, 3, np.float32), "m": np.array([False])}
    fold = Fold(FoldPlan.first({"a.w": base.params["a"]["w"], "m": base.params["m"]}, tasks=1))
    add(fold, flat)
    model = fold.finish(base)
    assert model.params["a"]["w"].tolist() == [3, 3]
    assert model.params["m"].tolist() == [True]
    assert (model.current_round, model.total_rounds, model.params_type) == (4, 9, "FULL")


def test_narrow_types_keep_a_float32_master() -> None:
    base = {"w": np.full(3, 1.0, ml_dtypes.bfloat16)}
    plan = FoldPlan.first(base, tasks=1)
    master: dict[str, Any] = {}
    for _ in range(16):  # each step is too small for bf16, all together are not
        fold = Fold(plan)
        add(fold, {"w": np.full(3, 2.0**-10, ml_dtypes.bfloat16)}, params_type="DIFF")
        assert isinstance(fold.check(), Good)
        model = fold.finish(base, master=master)
        base, master, plan = model.params, fold.master, fold.next_plan()
    assert master["w"].tolist() == [1 + 2.0**-6] * 3
    assert base["w"].astype(np.float32).tolist() == [1 + 2.0**-6] * 3


def test_a_value_that_the_type_cannot_hold_is_refused() -> None:
    base = {"w": np.full(2, 60000, np.float16)}
    fold = Fold(FoldPlan.first(base, tasks=1))
    add(fold, base, params_type="DIFF")
    with pytest.raises(ValuesError, match=r"'w'.*120000.*F16"):
        fold.finish(base)


def test_torch_models_are_folded_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    base = {"w": torch.ones(4, 3).T, "h": torch.zeros(5, dtype=torch.bfloat16), "n": torch.tensor(2)}
    fold = Fold(FoldPlan.first(base, tasks=2))
    for value in (1, 2):
        add(fold, {"w": base["w"] * value, "h": base["h"] + value, "n": base["n"] * value}, site=str(value))
    params = fold.finish(base).params
    assert params["w"].tolist() == [[1.5] * 4] * 3
    assert params["h"].astype(np.float32).tolist() == [1.5] * 5
    assert params["n"].tolist() == 3


def test_nothing_to_finish_and_a_wrong_base() -> None:
    base = {"w": np.ones(2, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=1))
    with pytest.raises(FoldError, match="no results"):
        fold.finish(base)
    with pytest.raises(FoldError, match="holds none"):
        fold.remove(encode(base), site="a")
    add(fold, base)
    with pytest.raises(FoldError, match="after finish"):
        fold.magnitudes()
    with pytest.raises(LayoutError):
        fold.finish({"v": np.ones(2, np.float32)})
    with pytest.raises(LayoutError):
        fold.finish({"w": np.ones(3, np.float32)})


def test_header_of_a_payload_is_all_that_start_needs() -> None:
    base, results = make_round(6, results=1)
    blob = results[0].tobytes()
    fold = Fold(FoldPlan.first(base, tasks=1))
    header = read_header(blob)
    feeder = fold.start(header, site="a")
    feeder.feed(0, blob[header.data_start :])
    feeder.finish()
    assert fold.count == 1
    assert not isinstance(fold.check(), Rescale)
