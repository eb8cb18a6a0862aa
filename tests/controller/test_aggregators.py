"""Aggregators: rounds by plan, checkpoints through partials, refolds, and the float32 running mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.controller.aggregators import Aggregate, Aggregator, WeightedMean
from fedloom.serialization.errors import FoldError, ValuesError
from fedloom.serialization.fold import Fold, Good, Rescale
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, encode_model
from structlog.testing import capture_logs

STEPS = "NUM_STEPS_CURRENT_ROUND"


def results_of(base: dict[str, Any], count: int, seed: int, steps: bool = True) -> list[EncodedModel]:
    rng = np.random.default_rng(seed)
    out: list[EncodedModel] = []
    for index in range(count):
        params = {name: (v + 0.1 * rng.standard_normal(v.shape)).astype(v.dtype) for name, v in base.items()}
        meta = {STEPS: index + 1} if steps else {}
        out.append(encode_model(FLModel(params=params, meta=meta, metrics={"acc": index / 10})))
    return out


def start(aggregator: Aggregator, base: dict[str, Any], plan: FoldPlan) -> Aggregate:
    """Through the protocols, so that the types are checked against them."""
    return aggregator.start(base, plan)


BASE = {"w": np.linspace(-1, 1, 50, dtype=np.float32), "h": np.ones(7, ml_dtypes.bfloat16)}


def test_rounds_one_after_another(tmp_path: Path) -> None:
    aggregator = WeightedMean()
    assert aggregator.associative
    model: dict[str, Any] = dict(BASE)
    plan = aggregator.plan(FLModel(params=model), tasks=6)
    master: dict[str, Any] = {}
    for number in range(3):
        aggregate = aggregator.start(FLModel(params=model, current_round=number), plan, master=master)
        expected = np.zeros(50)
        for index, result in enumerate(results_of(model, 6, number)):
            path = tmp_path / f"r-{number}.{index}"
            path.write_bytes(result.tobytes())
            aggregate.add(path, site=f"site-{index}", meta=result.meta)
            expected += np.frombuffer(bytes(result.buffers[1]), np.float32) * (index + 1.0) / 21
        assert aggregate.count == 6
        assert aggregate.check() == Good()
        finished = aggregate.finish()
        assert finished.params["w"] == pytest.approx(expected, abs=1e-6)
        assert finished.current_round == number
        assert finished.metrics == {"acc": pytest.approx(70 / 210)}
        assert aggregate.weight_sum == 21
        assert not aggregate.equal_weights
        model, master = finished.params, aggregate.master
        assert master["h"].dtype == np.float32
        # the next plan travels in the commit, and may be for another number of tasks
        plan = aggregator.plan(model, tasks=6 + number, previous=FoldPlan.from_bytes(aggregate.next_plan().to_bytes()))
        assert plan.tasks == 6 + number


def test_checkpoint_and_restore_give_the_same_bits(tmp_path: Path) -> None:
    aggregator = WeightedMean()
    plan = aggregator.plan(BASE, tasks=8)
    results = results_of(BASE, 8, 1)
    whole = start(aggregator, BASE, plan)
    first = start(aggregator, BASE, plan)
    for index, result in enumerate(results):
        whole.add(result, site=str(index))
        if index < 5:
            first.add(result, site=str(index))
    checkpoint = tmp_path / "p-1"
    with checkpoint.open("wb") as file:
        file.writelines(first.to_partial()[0])
    # the controller dies; another one makes the same aggregator and goes on
    second = start(WeightedMean(), BASE, FoldPlan.from_bytes(plan.to_bytes()))
    second.merge(checkpoint)
    pool = Fold(plan)  # the last ones come through an executor's partial
    for index in (7, 5, 6):
        pool.add(results[index], site=str(index))
    second.merge(b"".join(pool.to_partial()[0]))
    for name in BASE:
        assert second.finish().params[name].tobytes() == whole.finish().params[name].tobytes()
    assert second.metrics == whole.metrics
    assert second.next_plan() == whole.next_plan()


def test_a_refold_starts_again_with_the_plan_it_is_given() -> None:
    aggregator = WeightedMean()
    aggregate = aggregator.start(BASE, aggregator.plan(BASE, tasks=2))
    grown = encode_model(FLModel(params={"w": BASE["w"] * np.float32(1e9)}))
    aggregate.add(grown, site="a")
    with pytest.raises(FoldError, match="again"):
        aggregate.finish()
    verdict = aggregate.check()
    assert isinstance(verdict, Rescale)
    again = aggregate.again(verdict.plan)
    again.add(grown, site="a")
    assert again.check() == Good()
    assert np.array_equal(again.finish().params["w"], BASE["w"] * np.float32(1e9))


def test_equal_weights_are_said_once_a_job() -> None:
    aggregator = WeightedMean()
    with capture_logs() as logs:
        for _ in range(2):
            aggregate = aggregator.start(BASE, aggregator.plan(BASE, tasks=2))
            for index, result in enumerate(results_of(BASE, 2, 1, steps=False)):
                aggregate.add(result, site=str(index))
            aggregate.finish()
            assert aggregate.equal_weights
    assert [entry["event"] for entry in logs] == ["equal_weights"]
    assert STEPS in logs[0]["reason"]


def test_options_reach_the_plan_and_do_not_change() -> None:
    aggregator = WeightedMean(aggregation_weights={"a": 3.0}, exclude_vars="^h", weight_key="n")
    plan = aggregator.plan(BASE, tasks=2)
    assert (plan.aggregation_weights, plan.exclude, plan.weight_key) == ({"a": 3.0}, "^h", "n")
    aggregate = aggregator.start(BASE, plan)
    for site, value in (("a", 4.0), ("b", 8.0)):
        params = {"w": np.full(50, value, np.float32)}
        aggregate.add(encode_model(FLModel(params=params, meta={"n": 1})), site=site)
    finished = aggregate.finish()
    assert finished.params["w"].tolist() == [5.0] * 50
    assert finished.params["h"] is BASE["h"]
    with pytest.raises(FoldError, match="options"):
        WeightedMean().plan(BASE, tasks=2, previous=aggregate.next_plan())


def test_running_mean_is_near_and_all_or_nothing() -> None:
    aggregator = WeightedMean(exact=False)
    assert not aggregator.associative
    base = {"w": np.zeros(70_000, np.float32), "d": np.zeros(9), "h": np.zeros(5, np.float16), "n": np.array(3)}
    rng = np.random.default_rng(0)
    rows = [{k: (10 * rng.standard_normal(v.shape)).astype(v.dtype) for k, v in base.items()} for _ in range(20)]
    aggregate = aggregator.start(base, aggregator.plan(base, tasks=20))
    exact = WeightedMean().start(base, WeightedMean().plan(base, tasks=20))
    for index, row in enumerate(rows):
        bad = row | {"w": np.append(row["w"][:-1], np.float32(np.nan))}
        with pytest.raises(ValuesError, match="NaN"):
            aggregate.add(encode_model(FLModel(params=bad, meta={STEPS: index + 1})), site="bad")
        for each in (aggregate, exact):
            each.add(encode_model(FLModel(params=row, meta={STEPS: index + 1})), site=str(index))
    assert aggregate.count == 20
    assert aggregate.check() == Good()
    means, expected = aggregate.finish().params, exact.finish().params
    for name in ("w", "d"):
        assert float(np.abs(means[name] - expected[name]).max()) < 1e-5
    assert float(np.abs(means["h"].astype(float) - expected["h"]).max()) < 1e-2
    assert means["n"] == expected["n"]
    assert aggregate.metrics == exact.metrics
    assert aggregate.next_plan().exact is False
    row = encode_model(FLModel(params=rows[0], meta={STEPS: 1}))
    with pytest.raises(FoldError, match="exact=True"):
        aggregate.to_partial()
    with pytest.raises(FoldError, match="exact=True"):
        aggregate.remove(row, site="0")
    with pytest.raises(FoldError, match="exact=True"):
        aggregate.begin(row.header, site="0")
    with pytest.raises(FoldError, match="exact=True"):
        aggregate.merge(b"")
