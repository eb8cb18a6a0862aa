"""FedAvg's options over the real core: early ends, checkpoints, no initial model, aggregators of users."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.controller.aggregators import ModelAggregator, WeightedMean
from fedloom.controller.collecting import STUCK_S, RoomWatch
from fedloom.controller.workflows.fedavg import FedAvg
from fedloom.serialization.errors import GatherError, JobError, LayoutError, MixedError, ValuesError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model


def flow(f: Any, tools: Any, *, initial: bool = True, **options: Any) -> FedAvg:
    path = f.fed.app_dir / "initial.safetensors"
    if initial:
        with path.open("wb") as file:
            encode_model(tools.model_of()).write_to(file)
        options["initial_model"] = path.name
    return FedAvg(**{"num_rounds": 3, "min_clients": 3, **options})


def records(f: Any) -> list[dict[str, Any]]:
    return [record for _, _, record in f.world.journal.records(f.fed.job, 0, 100)]


def model(f: Any, which: str = "model") -> Any:
    ref = getattr(f.world.core.state.jobs.jobs[f.fed.job].commit, which)
    return None if ref is None else decode_model(f.world.core.state.spool.read(ref.id, 1 << 20)).params["w"]


def plus_one(site: str, round: int, received: FLModel) -> FLModel:
    """Adds one, and scores what it received: its first value, from 0 on."""
    start = np.zeros(64, np.float32) if received.params is None else received.params["w"]
    return FLModel(params={"w": start + np.float32(1)}, metrics={"accuracy": float(start[0])})


def zeros(f: Any, tools: Any, **options: Any) -> FedAvg:
    with (f.fed.app_dir / "zeros.safetensors").open("wb") as file:
        encode_model(FLModel(params={"w": np.zeros(64, np.float32)})).write_to(file)
    return FedAvg(**{"num_rounds": 10, "min_clients": 3, "initial_model": "zeros.safetensors", **options})


# ---------------------------------------------------------------- early ends


def test_a_stop_condition_ends_with_the_model_that_meets_it(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = plus_one
    zeros(f, tools, stop_cond="accuracy >= 2").run(f.fed)
    made = records(f)
    assert [record["metrics"]["accuracy"] for record in made] == [0, 1, 2]
    assert [record.get("stopped_early") for record in made] == [
        None,
        None,
        "stop_cond accuracy >= 2: the model of round 1 has accuracy = 2",
    ]
    assert model(f)[0] == model(f, "best")[0] == 2


@pytest.mark.parametrize("dies_in", ["gather", "commit"])
def test_a_process_that_takes_over_does_not_train_on(farm: Any, tools: Any, dies_in: str) -> None:
    f = farm()
    f.train = plus_one
    original = getattr(f.fed, dies_in)

    def dying(*args: Any, **options: Any) -> Any:
        got = original(*args, **options)
        if options["round"] == 2:
            raise KeyboardInterrupt
        return got

    setattr(f.fed, dies_in, dying)
    with pytest.raises(KeyboardInterrupt):
        zeros(f, tools, stop_cond="accuracy >= 2").run(f.fed)
    for _ in range(2):  # and the one after that neither
        f.die()
        f.process()
        zeros(f, tools, stop_cond="accuracy >= 2").run(f.fed)
        assert len(records(f)) == 3
        assert len(f.calls) == 9
        assert model(f)[0] == 2


def test_patience_ends_with_the_last_model_and_survives_a_crash(farm: Any, tools: Any) -> None:
    def worse(site: str, round: int, received: FLModel) -> FLModel:
        trained = plus_one(site, round, received)
        return FLModel(params=trained.params, metrics={"loss": abs(received.params["w"][0] - 2.0)})

    f = farm()
    f.train = worse
    options = {"key_metric": "loss", "key_metric_mode": "min", "patience": 2}
    zeros(f, tools, num_rounds=4, **options).run(f.fed)
    f.die()
    f.process()
    zeros(f, tools, **options).run(f.fed)
    made = records(f)
    assert [record["metrics"]["loss"] for record in made] == [2, 1, 0, 1, 2]
    assert made[-1]["stopped_early"] == "patience 2: no loss better than 0"
    assert (model(f)[0], model(f, "best")[0]) == (5, 2)


def test_a_metric_that_no_site_sends_is_said_once(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = plus_one
    said: list[str] = []
    f.fed.event = lambda kind, text="", **more: said.append(f"{kind}: {text}")
    zeros(f, tools, num_rounds=3, stop_cond="f1 >= 1").run(f.fed)
    assert len(said) == 1
    assert said[0].startswith("metric_missing: no result has the metric f1")
    assert said[0].endswith("accuracy")


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_this_machine_is_read_when_the_job_starts(farm: Any, tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "start.npz"
    np.savez(path, w=np.full(64, 7, np.float64))
    f = farm()
    f.train = plus_one
    flow(f, tools, initial_ckpt=str(path), num_rounds=1).run(f.fed)
    assert model(f).dtype == np.float32  # the model's, where there is one
    assert model(f)[0] == 8
    path.unlink()  # what is committed goes before it
    f.die()
    f.process()
    flow(f, tools, initial_ckpt=str(path), num_rounds=2).run(f.fed)
    assert model(f)[0] == 9


def test_checkpoints_that_cannot_be_used(farm: Any, tools: Any, tmp_path: Path) -> None:
    f = farm()
    with pytest.raises(JobError, match="by its absolute path"):
        flow(f, tools, initial_ckpt="start.npz")
    with pytest.raises(JobError, match="no such file on this machine"):
        flow(f, tools, initial_ckpt=str(tmp_path / "gone.npz")).run(f.fed)
    np.savez(tmp_path / "other.npz", w=np.zeros(3, np.float32), v=np.zeros(1))
    with pytest.raises(JobError, match=r"'v' is not in the model; 'w' is \[3\] there and \[64\] in the model"):
        flow(f, tools, initial_ckpt=str(tmp_path / "other.npz")).run(f.fed)


# ---------------------------------------------------------------- no initial model


def own_models(site: str, round: int, received: FLModel) -> FLModel:
    """A site starts from a model of its own where it gets none."""
    number = int(site.rpartition("-")[2])
    rng = np.random.default_rng([number, round])
    start = rng.standard_normal(64).astype(np.float32) if received.params is None else received.params["w"]
    step = rng.standard_normal(64).astype(np.float32)
    return FLModel(params={"w": start + step}, meta={"NUM_STEPS_CURRENT_ROUND": number + 1})


@pytest.mark.parametrize("singly", [False, True])
def test_without_a_model_the_first_mean_is_the_model(farm: Any, tools: Any, singly: bool) -> None:
    results: list[Any] = []
    for order, dies in itertools.product((1, -1), (False, True)):
        f = farm()
        f.train, f.order, f.singly = own_models, order, singly
        if dies:
            gather = f.fed.gather

            def dying(*args: Any, gather: Any = gather, **options: Any) -> Any:
                next(iter(gather(*args, **options)))
                raise KeyboardInterrupt

            f.fed.gather = dying
            with pytest.raises(KeyboardInterrupt):
                flow(f, tools, initial=False).run(f.fed)
            f.die()
            f.process()
        flow(f, tools, initial=False).run(f.fed)
        results.append(model(f).tobytes())
        assert [record["results"] for record in records(f)] == [3, 3, 3]
        assert records(f)[0]["weight_sum"] == 6
    assert len(set(results)) == 1


def test_the_first_site_by_name_sets_the_layout(farm: Any, tools: Any) -> None:
    def train(site: str, round: int, received: FLModel) -> FLModel:
        if site == "site-1" and received.params is None:
            return FLModel(params={"w": np.ones(64, np.float32), "extra": np.ones(1, np.float32)})
        return plus_one(site, round, received)

    for order in (1, -1):
        f = farm()
        f.train, f.order = train, order
        flow(f, tools, initial=False, min_clients=2).run(f.fed)
        failures = records(f)[0]["failures"]
        assert [failure["site"] for failure in failures] == ["site-1"]
        assert "result of site-1 does not fit that of site-0" in failures[0]["text"]
        assert "'extra' is unknown" in failures[0]["text"]
        assert model(f)[0] == 3
    f = farm()
    f.train = train
    with pytest.raises(GatherError, match="2 good results of 3\nsite-1: result of site-1 does not fit that of site-0"):
        flow(f, tools, initial=False).run(f.fed)


def test_a_first_site_whose_result_is_no_model_is_passed_over(farm: Any, tools: Any) -> None:
    def train(site: str, round: int, received: FLModel) -> FLModel:
        if site == "site-0" and received.params is None:
            return FLModel(params_type="DIFF", params={"w": np.ones(64, np.float32)})
        return plus_one(site, round, received)

    f = farm()
    f.train = train
    flow(f, tools, initial=False, min_clients=2, num_rounds=1).run(f.fed)
    assert "site-0 holds DIFF params, in a round that began without" in records(f)[0]["failures"][0]["text"]
    assert model(f)[0] == 1


def test_a_round_without_a_model_is_no_score(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = lambda site, round, received: FLModel(
        params=plus_one(site, round, received).params, metrics={"accuracy": 9.0 if received.params is None else 1.0}
    )
    flow(f, tools, initial=False, stop_cond="accuracy >= 5").run(f.fed)
    assert [record["best"] for record in records(f)] == [False, True, False]


# ---------------------------------------------------------------- aggregators of users


class Median(ModelAggregator):
    """The middle one, and the sites in the order in which it got them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def reset_stats(self) -> None:
        self.models: list[FLModel] = []

    def accept_model(self, model: FLModel) -> bool | None:
        assert model.meta is not None
        if model.metrics and model.metrics.get("broken"):
            return False
        self.models.append(model)
        return None

    def aggregate_model(self) -> FLModel:
        self.seen.append(tuple(model.meta["client_name"] for model in self.models if model.meta))
        stacked = np.stack([model.params["w"] for model in self.models])
        return FLModel(params_type=self.models[0].params_type, params={"w": np.median(stacked, axis=0)})


class Momentum(Median):
    """Keeps a velocity from round to round."""

    velocity: Any = None

    def aggregate_model(self) -> FLModel:
        step = super().aggregate_model().params["w"]
        self.velocity = step if self.velocity is None else step + 0.5 * self.velocity
        return FLModel(params_type="DIFF", params={"w": self.velocity})

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity, "rounds": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.velocity = state["velocity"]


def test_a_custom_aggregator_gets_results_in_the_order_of_site_names(farm: Any, tools: Any) -> None:
    outcomes: list[Any] = []
    for order in (1, -1):
        f = farm()
        f.order = order
        median = Median()
        flow(f, tools, aggregator=median).run(f.fed)
        assert median.seen == [("site-0", "site-1", "site-2")] * 3
        assert records(f)[-1]["metrics"] == {"accuracy": 2.0}
        assert records(f)[-1]["weight_sum"] == 6
        outcomes.append(model(f).tobytes())
    assert outcomes[0] == outcomes[1]
    expected = tools.model_of().params["w"]
    for round in range(3):
        sent = [tools.steady(site, round, FLModel(params={"w": expected})).params["w"] for site in f.names]
        expected = np.median(np.stack(sent), axis=0).astype(np.float32)
    assert outcomes[0] == expected.tobytes()


def differences(site: str, round: int, received: FLModel) -> FLModel:
    trained = own_models(site, round, received)
    return FLModel(params_type="DIFF", params={"w": trained.params["w"] - received.params["w"]})


def test_what_an_aggregator_keeps_goes_through_commits(farm: Any, tools: Any) -> None:
    outcomes: list[Any] = []
    for crash in (False, True):
        f = farm()
        f.train = differences
        if crash:
            flow(f, tools, num_rounds=2, aggregator=Momentum()).run(f.fed)
            f.die()
            f.process()
        flow(f, tools, num_rounds=4, aggregator=Momentum()).run(f.fed)
        outcomes.append(model(f).tobytes())
    assert outcomes[0] == outcomes[1]


def test_a_custom_aggregator_makes_the_first_model_too(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = plus_one
    flow(f, tools, initial=False, aggregator=Median()).run(f.fed)
    assert model(f)[0] == 3


def test_results_that_an_aggregator_refuses_are_failures(farm: Any, tools: Any) -> None:
    def train(site: str, round: int, received: FLModel) -> FLModel:
        trained = plus_one(site, round, received)
        match site:
            case "site-0":
                return FLModel(params=trained.params, metrics={"broken": 1.0})
            case "site-1":
                return FLModel(params={"w": np.ones(3, np.float32), "v": np.ones(1, np.float32)})
            case _:
                return trained

    f = farm()
    f.train = train
    flow(f, tools, min_clients=1, num_rounds=1, aggregator=Median()).run(f.fed)
    texts = {failure["site"]: failure["text"] for failure in records(f)[0]["failures"]}
    assert texts["site-0"] == "Median did not accept it"
    assert "result of site-1 does not fit the model: 'v' is unknown; 'w' is F32[3] and not F32[64]" in texts["site-1"]
    assert records(f)[0]["results"] == 1
    f = farm()
    f.train = train
    with pytest.raises(GatherError, match="1 good results of 2\nsite-0: Median did not accept it"):
        flow(f, tools, min_clients=2, num_rounds=1, aggregator=Median()).run(f.fed)


@pytest.mark.parametrize("aggregator", [None, Median])
def test_full_among_diff_names_the_sites(farm: Any, tools: Any, aggregator: Callable[[], Any] | None) -> None:
    f = farm()
    f.train = lambda site, round, received: (differences if site == "site-2" else plus_one)(site, round, received)
    with pytest.raises(MixedError, match=r"result of site-2 is DIFF, but .*site-0.* FULL") as caught:
        flow(f, tools, aggregator=aggregator and aggregator()).run(f.fed)
    assert "all sites of a round must send the same params_type" in str(caught.value)


class Made(Median):
    """Makes what it is told."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def aggregate_model(self) -> FLModel:
        return self.made


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        (None, JobError, "aggregate_model() returned NoneType; an FLModel with params belongs there"),
        (FLModel(metrics={"a": 1}), JobError, "returned an FLModel without params"),
        (FLModel(params={"v": np.ones(64)}), LayoutError, "a tensor 'v', which is not in the model"),
        (FLModel(params={"w": np.ones(3)}), LayoutError, "'w' as [3]; in the model it is [64]"),
        (FLModel(params={"w": np.full(64, np.nan)}), ValuesError, "'w' with NaN"),
        (FLModel(params={"w": np.full(64, 1e300)}), ValuesError, "values that its type cannot hold"),
    ],
)
def test_what_an_aggregator_makes_is_checked(farm: Any, tools: Any, made: Any, error: Any, text: str) -> None:
    f = farm()
    with pytest.raises(error) as caught:
        flow(f, tools, aggregator=Made(made)).run(f.fed)
    assert "aggregator Made" in str(caught.value)
    assert text in str(caught.value)


def test_fedloom_aggregators_and_what_is_none(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = plus_one
    flow(f, tools, aggregator=WeightedMean(exclude_vars="w")).run(f.fed)
    assert np.array_equal(model(f), tools.BASE)
    with pytest.raises(JobError, match="aggregator dict has neither accept_model"):
        flow(f, tools, aggregator={"accept_model": 1})


def test_uploads_that_wait_for_room_for_too_long() -> None:
    watch = RoomWatch()
    assert not watch.stuck(1, 100)
    assert not watch.stuck(2, 100 + STUCK_S)
    watch.moved()
    assert not watch.stuck(2, 101 + STUCK_S)
    assert not watch.stuck(0, 102 + 2 * STUCK_S)
    assert not watch.stuck(1, 103 + 2 * STUCK_S)
    assert watch.stuck(1, 104 + 3 * STUCK_S)


def test_memory_is_given_back_after_every_so_many_rounds(farm: Any, tools: Any) -> None:
    f = farm()
    f.train = plus_one
    collections: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(info["generation"])

    gc.disable()  # so that none is by chance
    gc.callbacks.append(note)
    try:
        zeros(f, tools, num_rounds=5, memory_gc_rounds=2).run(f.fed)
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert collections == [2, 2]
