"""Results added out of the arrays in which they were made: as over a payload, or not at all."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization.fold import Fold, FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

BASE = {
    "a": np.zeros(40_000, np.float32),
    "b": np.zeros((3, 5), ml_dtypes.bfloat16),
    "d": np.zeros((), np.float64),
    "e": np.zeros((0, 4), np.float32),
    "n": np.zeros(7, np.int64),
}


def made(number: int, names: str = "abden", steps: float | None = 3) -> FLModel:
    rng = np.random.default_rng(number)
    params = {name: np.asarray(rng.normal(size=BASE[name].shape) * 9).astype(BASE[name].dtype) for name in names}
    meta = {} if steps is None else {"NUM_STEPS_CURRENT_ROUND": steps}
    return FLModel(params=params, metrics={"loss": float(rng.random())}, meta=meta)


def state(fold: Fold) -> bytes:
    return b"".join(fold.to_partial()[0])


def both(results: list[FLModel], plan: FoldPlan) -> tuple[Fold, Fold]:
    apart, direct = Fold(plan), Fold(plan)
    for i, result in enumerate(results):
        encoded = encode_model(result)
        apart.add(encoded.tobytes(), site=f"site-{i}", meta=encoded.meta)
        assert direct.add_tensors(result.params, site=f"site-{i}", meta=encoded.meta)
    return apart, direct


@pytest.mark.parametrize("weights", [None, {"site-1": 0.3}])
def test_the_bits_are_those_of_payloads(weights):
    plan = FoldPlan.first(BASE, tasks=9, aggregation_weights=weights)
    results = [made(1), made(3, "ab", 0.1), made(4, "n", 1e-9), made(5, "aed", 7)]
    odd = [made(2, steps=2**60 + 1), made(6, steps=2.0**-64)]  # some of it is over the scale
    apart, direct = both(results + odd, plan)
    assert state(apart) == state(direct) and direct.count == 6
    apart, direct = both(results, plan)
    model = direct.finish(BASE)
    assert encode_model(model).tobytes() == encode_model(apart.finish(BASE)).tobytes()
    assert direct.magnitudes() == apart.magnitudes()


def test_what_is_not_plain_to_add_is_left_to_the_payload_and_leaves_no_trace():
    plan = FoldPlan.first(BASE, tasks=9, exclude="^b$")
    _, fold = both([made(1, "aden"), made(2, "aden")], plan)
    before, good = state(fold), made(3, "aden")
    meta = encode_model(good).meta
    late = good.params["a"].copy()
    late[39_000] = np.nan  # in the second block, behind tensors that are in
    order = {"n": good.params["n"], "d": good.params["d"], "a": late}
    far = dict(order, a=good.params["a"], d=np.float64(1e300) * np.ones(()))
    shape, dtype = {"a": late[:10]}, {"a": late.astype(np.float64)}
    strided = {"a": np.zeros(80_000, np.float32)[::2]}
    others = [{}, {"b": BASE["b"]}, {"x": late}, {"d": 1.0}, {"a": late.tolist()}, {1: late}]
    for tensors in (order, far, shape, dtype, strided, *others):
        assert not fold.add_tensors(tensors, site="site-0", meta=meta)
        assert state(fold) == before
    for plain in ({"params_type": "DIFF"} | {"meta": meta["meta"]}, {"params_type": "FULL"}, {"meta": {}}):
        assert not fold.add_tensors(good.params, site="site-0", meta=plain)
        assert state(fold) == before
    assert not Fold(FoldPlan.first(BASE, tasks=9, exact=False)).add_tensors(good.params, site="s", meta=meta)
    assert not Fold(FoldPlan.first(BASE, tasks=9, codec="fp16")).add_tensors(good.params, site="s", meta=meta)
    assert fold.add_tensors(good.params, site="site-9", meta=meta) and state(fold) != before


def test_a_small_model_of_float32_has_a_way_of_its_own_and_the_same_bits():
    base = {"a": np.zeros(2000, np.float32), "b": np.zeros((3, 5), np.float32)}
    plan = FoldPlan.first(base, tasks=9)

    def small(number: int, names: str = "ab", steps: float = 3, factor: float = 9.0) -> FLModel:
        rng = np.random.default_rng(number)
        params = {name: (rng.normal(size=base[name].shape) * factor).astype(np.float32) for name in names}
        return FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": steps})

    results = [small(1, "b"), small(2), small(3, factor=0.0), small(4, "a", 2**60 + 1), small(5, steps=0.1)]
    apart, direct = both([*results, small(6, factor=1e-40), small(7, factor=1e30)], plan)
    assert state(apart) == state(direct) and direct.count == 7
    before, meta = state(direct), encode_model(results[0]).meta
    for bad in (np.nan, -np.inf):
        late = {"a": results[1].params["a"], "b": np.full((3, 5), bad, np.float32)}
        assert not direct.add_tensors(late, site="site-0", meta=meta) and state(direct) == before
    assert not direct.add_tensors({"b": base["b"].T.copy()}, site="site-0", meta=meta)
    assert not direct.add_tensors({"a": base["a"]}, site="site-0", meta={"params_type": "DIFF"})
    assert state(direct) == before
