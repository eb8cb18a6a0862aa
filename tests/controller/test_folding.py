"""Folding a gather: refusals, checkpoints and replays, scales that were not good. Over the real core and fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fedloom.controller.aggregators import WeightedMean
from fedloom.controller.folding import Folding
from fedloom.controller.records import RoundRecord
from fedloom.serialization.errors import FoldError, GatherError, WeightError
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.messages import CloseRule
from fedloom.serialization.model import FLModel, ParamsType


class Round:
    """One round on a farm, as FedAvg does it."""

    def __init__(self, f: Any, base: FLModel, **rule: Any) -> None:
        self.f = f
        self.base = base
        self.rule = CloseRule(**rule)
        self.aggregator = WeightedMean()
        self.plan: FoldPlan = self.aggregator.plan(base, tasks=len(f.names))
        self.record = RoundRecord(0)

    def fold(self, **options: Any) -> Folding:
        gather = self.f.fed.gather(
            "train",
            self.base,
            round=0,
            rule=self.rule,
            fold=self.f.fed.put_blob(self.plan.to_bytes()),
            partials=self.f.partial is not None,
        )
        self.record = RoundRecord(0)
        return Folding(self.f.fed, gather, self.aggregator.start(self.base, self.plan), self.record, **options)

    def bits(self, **options: Any) -> bytes:
        return bytes(self.fold(**options).run().finish().params["w"])


def test_order_of_arrival_changes_no_bit(farm: Any, tools: Any) -> None:
    bits: set[bytes] = set()
    for order in (1, -1):
        f = farm()
        f.order = order
        f.singly = order < 0
        bits.add(Round(f, tools.model_of(), min_clients=3).bits())
    assert len(bits) == 1


BAD = {
    "nan": lambda good: good * np.float32(np.nan),
    "nan at the end": lambda good: np.append(good[:-1], np.float32(np.nan)),
    "shape": lambda good: good[:3],
    "dtype": lambda good: good.astype(np.float64),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("singly", [False, True], ids=["inline", "streamed"])
def test_bad_results_leave_no_trace(farm: Any, tools: Any, bad: str, singly: bool) -> None:
    def train(site: str, round: int, model: FLModel) -> FLModel:
        result = tools.steady(site, round, model)
        if site == "site-1":
            result.params["w"] = BAD[bad](result.params["w"])
        return result

    f = farm()
    f.train, f.singly = train, singly
    turn = Round(f, tools.model_of(), min_clients=2)
    folding = turn.fold()
    got = bytes(folding.run().finish().params["w"])
    assert [failure.site for failure in folding.refused] == ["site-1"]
    assert turn.record.results == 2
    other = farm()
    other.train = lambda site, round, model: ValueError() if site == "site-1" else tools.steady(site, round, model)
    assert Round(other, tools.model_of(), min_clients=2).bits() == got
    strict = farm()
    strict.train = train
    with pytest.raises(GatherError, match="2 good results of 3") as caught:
        Round(strict, tools.model_of(), min_clients=3).bits()
    assert "site-1" in str(caught.value)


@pytest.mark.parametrize("singly", [False, True], ids=["inline", "streamed"])
def test_float_sums_take_whole_results_and_no_checkpoints(farm: Any, tools: Any, singly: bool) -> None:
    exact = np.frombuffer(Round(farm(sites=4), tools.model_of(), min_clients=4).bits(), np.float32)
    f = farm(sites=4)
    f.singly = singly
    turn = Round(f, tools.model_of(), min_clients=4)
    turn.aggregator = WeightedMean(exact=False)
    turn.plan = turn.aggregator.plan(turn.base, tasks=4)
    assert np.allclose(np.frombuffer(turn.bits(checkpoint_bytes=1), np.float32), exact, rtol=1e-6)
    assert turn.record.results == 4


def test_what_is_no_single_sites_fault_ends_the_job(farm: Any, tools: Any) -> None:
    def mixed_weights(site: str, round: int, model: FLModel) -> FLModel:
        result = tools.steady(site, round, model)
        if site == "site-1":
            result.meta = {}
        return result

    def mixed_kinds(site: str, round: int, model: FLModel) -> FLModel:
        result = tools.steady(site, round, model)
        result.params_type = ParamsType.DIFF if site == "site-1" else ParamsType.FULL
        return result

    for train, error in ((mixed_weights, WeightError), (mixed_kinds, FoldError)):
        f = farm()
        f.train = train
        with pytest.raises(error):
            Round(f, tools.model_of(), min_clients=2).bits()


@pytest.mark.parametrize("singly", [False, True])
@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_checkpoint_and_replay_give_the_same_bits(farm: Any, tools: Any, dies_at: int, singly: bool) -> None:
    calm = Round(farm(sites=4), tools.model_of(), min_clients=4).bits()
    f = farm(sites=4)
    f.singly = singly
    turn = Round(f, tools.model_of(), min_clients=4)
    folding = turn.fold(checkpoint_bytes=1)
    taken = 0
    checkpoint = f.fed.checkpoint

    def dying(*args: Any) -> None:
        nonlocal taken
        checkpoint(*args)
        taken += 1
        if taken == dies_at:
            raise KeyboardInterrupt

    f.fed.checkpoint = dying
    with pytest.raises(KeyboardInterrupt):
        folding.run()
    f.die()
    f.process()
    assert turn.bits(checkpoint_bytes=1) == calm
    assert turn.record.results == 4
    assert len(f.calls) == 4, "no site works twice"


def test_replay_with_a_checkpoint_of_hundreds(farm: Any, tools: Any) -> None:
    """The checkpoint's items fill several messages; the payload is in them all, and counts once."""
    f = farm(sites=300)
    for executor in f.executors:
        executor.got.clear()
    turn = Round(f, tools.model_of(), min_clients=300)
    folding = turn.fold(checkpoint_bytes=1 << 40)
    bits = bytes(folding.run().finish().params["w"])
    folding._checkpoint()
    f.die()
    f.process()
    replay = turn.fold(checkpoint_bytes=1)
    aggregate = replay.run()
    assert aggregate.count == 300
    assert bytes(aggregate.finish().params["w"]) == bits
    assert turn.record.results == turn.record.in_partials == 300


def test_no_checkpoint_between_the_parts_of_a_partial(farm: Any, tools: Any) -> None:
    f = farm(sites=300, pool=True)
    turn = Round(f, tools.model_of(), min_clients=300)
    f.partial = turn.plan
    covered: list[int] = []
    checkpoint = f.fed.checkpoint
    f.fed.checkpoint = lambda gather, ref, count: (covered.append(count), checkpoint(gather, ref, count))
    aggregate = turn.fold(checkpoint_bytes=1).run()
    assert aggregate.count == 300
    assert covered == []


# ---------------------------------------------------------------- scales


def grown(tools: Any, factor: float) -> Any:
    def train(site: str, round: int, model: FLModel) -> FLModel:
        result = tools.steady(site, round, model)
        result.params["w"] = result.params["w"] * np.float32(factor)
        return result

    return train


@pytest.mark.parametrize("factor", [1e9, 1e-9])
def test_refold_from_single_results(farm: Any, tools: Any, factor: float) -> None:
    f = farm()
    f.train = grown(tools, factor)
    turn = Round(f, tools.model_of(), min_clients=3)
    got = turn.fold().run().finish().params["w"]
    assert turn.record.refolds == 1
    assert turn.record.redone == 0
    expected = np.zeros(64)
    for number, site in enumerate(f.names):
        expected += f.train(site, 0, tools.model_of()).params["w"].astype(np.float64) * (number + 1) / 6
    assert np.allclose(got, expected, rtol=1e-5, atol=0)


def test_refold_asks_for_what_only_a_partial_had(farm: Any, tools: Any) -> None:
    calm = farm()
    calm.train = grown(tools, 1e9)
    bits = Round(calm, tools.model_of(), min_clients=3).bits()
    f = farm(pool=True)
    f.train = grown(tools, 1e9)
    turn = Round(f, tools.model_of(), min_clients=3)
    f.partial = turn.plan
    assert turn.bits() == bits
    assert (turn.record.refolds, turn.record.redone, turn.record.results) == (1, 3, 3)
    assert sorted(f.calls) == sorted((name, 0) for name in f.names * 2)


def test_refold_behind_a_checkpoint_redoes_what_it_covers_but_not_what_was_refused(farm: Any, tools: Any) -> None:
    def train(site: str, round: int, model: FLModel) -> FLModel:
        result = grown(tools, 1e9)(site, round, model)
        if site == "site-0":
            result.params["w"] = result.params["w"] * np.float32(np.nan)
        return result

    calm = farm(sites=4)
    calm.train = train
    bits = Round(calm, tools.model_of(), min_clients=3).bits()
    f = farm(sites=4)
    f.train = train
    turn = Round(f, tools.model_of(), min_clients=3)
    assert turn.bits(checkpoint_bytes=1) == bits
    assert f.calls.count(("site-0", 0)) == 1
    assert len(f.calls) > 4
    assert turn.record.refolds == 1
