"""What is trained, by whom, and what must come of it: the sites' pure task, and the model that a calm world makes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fedloom.controller.aggregators.mean import WeightedMean
from fedloom.executor.seeding import task_seed
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.fold import Good
from fedloom.serialization.foldplan import WEIGHT_KEY
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.model import FLModel, ParamsType
from fedloom.serialization.payload import decode_model, encode_model

_FEDAVG = "fedloom.controller.workflows.fedavg.FedAvg"
_CROSS_SITE = "fedloom.controller.workflows.crosssite.CrossSiteEval"
#: Where a site keeps its own model for the evaluation.
_OWN = "own."


@dataclass(frozen=True)
class Scenario:
    """A job and the sites that work on it."""

    singles: int = 2  # sites with an executor each
    pooled: int = 4  # sites of one pool, which sends partials
    rounds: int = 2
    floats: int = 64  # over 8192 they do not fit into a message: chunks
    diff: bool = False
    grows: bool = False  # values leave the first scales: the round is folded again
    spared: int = 0  # so many sites need not answer
    deadline_s: float | None = None
    checkpoint_bytes: int | None = None
    trust_local: bool = False
    power: bool = True
    integrity: str = "digest"
    task_s: float = 0.3
    twins: bool = False  # a second machine that wants to be each of them; what a site remembers does not move
    quota_models: int = 0  # of the spool, in models; 0: no bound
    fails: int = 0  # the last site's code raises so often a round; an operator retries it, or drops it now and then
    scores: bool = False  # behind the training every model is scored at every site; drawn only where asked for
    seed: int = 7

    @property
    def busy_s(self) -> float:
        """About how long the job takes undisturbed."""
        trained = self.rounds * self.task_s * (2.5 if self.pooled > 3 else 1.6)
        return trained + self.scores * (3 + len(self.sites)) * self.task_s * 1.6

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(f"site-{i + 1}" for i in range(self.singles + self.pooled))


VARIANTS: tuple[Scenario, ...] = (
    Scenario(),
    Scenario(singles=3, pooled=0),
    Scenario(singles=1, pooled=3, floats=9000),
    Scenario(singles=3, pooled=0, floats=9000, checkpoint_bytes=60_000),
    Scenario(singles=3, pooled=0, floats=9000, trust_local=True, power=False),
    Scenario(singles=2, pooled=3, checkpoint_bytes=400),
    Scenario(singles=0, pooled=6, diff=True, rounds=3),
    Scenario(singles=2, pooled=2, grows=True),
    Scenario(singles=3, pooled=0, spared=1, deadline_s=2.0),
    Scenario(singles=4, pooled=0, spared=2, deadline_s=1.0, task_s=0.8, floats=9000),
    Scenario(singles=1, pooled=4, trust_local=True, floats=9000, power=False),
    Scenario(singles=2, pooled=3, twins=True),
    Scenario(singles=3, pooled=0, twins=True, floats=9000),
    Scenario(singles=3, pooled=2, floats=9000, quota_models=24, checkpoint_bytes=60_000),
    Scenario(singles=3, pooled=0, scores=True),
    Scenario(singles=1, pooled=2, floats=9000, scores=True),
    Scenario(singles=2, pooled=3, rounds=3, spared=1, task_s=0.8, fails=2),
)


def initial(scenario: Scenario) -> FLModel:
    """The model of the beginning."""
    return FLModel(params={"w": np.linspace(-1, 1, scenario.floats, dtype=np.float32), "b": np.zeros(3, np.float32)})


def make_archive(scenario: Scenario, folder: Path) -> bytes:
    """The job as it is submitted."""
    workflow: dict[str, Any] = {
        "num_rounds": scenario.rounds,
        "min_clients": len(scenario.sites) - scenario.spared,
        "initial_model": "initial.safetensors",
        "params_transfer_type": "DIFF" if scenario.diff else "FULL",
        "deadline_s": scenario.deadline_s,
        "checkpoint_bytes": scenario.checkpoint_bytes,
    }
    spec = JobSpec(
        "simulated",
        (Component(_FEDAVG, workflow), *([Component(_CROSS_SITE)] if scenario.scores else [])),
        (ExecutorSpec(("*",), Component("nobody.Here")),),
        num_rounds=scenario.rounds,
        seed=scenario.seed,
        sites=scenario.sites,
        min_clients=len(scenario.sites) - scenario.spared,
    )
    spec.write(folder)
    app = spec.app_dir(folder)
    app.mkdir(parents=True, exist_ok=True)
    with (app / "initial.safetensors").open("wb") as file:
        encode_model(initial(scenario)).write_to(file)
    return pack_folder(folder)


def work(scenario: Scenario, site: str, round: int, seed: int, model: FLModel, state: Any) -> FLModel:
    """A site's task: pure in payload, seed and state, every bit of which shows in what comes out."""
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}
    for name, value in sorted((model.params or {}).items()):
        step = rng.standard_normal(value.shape, dtype=np.float32) * np.float32(0.1)
        if not scenario.twins:
            step += np.float32(0.5) * state.get(name, np.float32(0))
            state[name] = step
        grown = np.float32(300 if scenario.grows and round == 1 else 1)
        out[name] = step * grown if scenario.diff else (value + step) * grown
        if scenario.scores:
            state[_OWN + name] = out[name]
    return FLModel(
        params=out,
        params_type=ParamsType.DIFF if scenario.diff else ParamsType.FULL,
        metrics={"accuracy": float(np.abs(out["w"]).mean())},
        meta={WEIGHT_KEY: 1 + zlib.crc32(site.encode()) % 7},
        current_round=round,
        total_rounds=scenario.rounds,
    )


def submit(model: FLModel, state: Any) -> FLModel:
    """A site's own model."""
    assert model.params is None
    return FLModel(params={name: state[_OWN + name] for name in ("w", "b")})


def score(site: str, params: Any) -> dict[str, float]:
    """What a site makes of a model: another number for each pair of them."""
    return {"score": float(np.sum(np.asarray(params["w"], np.float64))) * (1 + zlib.crc32(site.encode()) % 7)}


class Reference:
    """What the committed models must be, given whose results each round was closed with."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, ...]] = {}
        self._params: dict[Any, list[Any]] = {}
        self._own: dict[Any, dict[str, Any]] = {}

    def matrix(self, scenario: Scenario, closed: Sequence[Sequence[str]], best: int) -> dict[str, dict[str, Any]]:
        """Every site's scores of the last model, of the one that round ``best`` received, and of the sites' own."""
        self.models(scenario, closed)
        key = (scenario, tuple(tuple(sorted(sites)) for sites in closed))
        models = {"SRV_model": self._params[key][-1], "SRV_best_model": self._params[key][best - 1], **self._own[key]}
        return {site: {name: score(site, params) for name, params in models.items()} for site in scenario.sites}

    def models(self, scenario: Scenario, closed: Sequence[Sequence[str]]) -> tuple[str, ...]:
        """The payload id of the model that each round commits."""
        key = (scenario, tuple(tuple(sorted(sites)) for sites in closed))
        if key not in self._known:
            self._known[key] = self._fold(scenario, key[1], self._params.setdefault(key, []), key)
        return self._known[key]

    def _fold(
        self, scenario: Scenario, closed: tuple[tuple[str, ...], ...], params: list[Any], key: Any
    ) -> tuple[str, ...]:
        mean = WeightedMean()
        model = decode_model(encode_model(initial(scenario)).tobytes(), framework="numpy")
        states: dict[str, dict[str, Any]] = {}
        plan = None
        out: list[str] = []
        for round, sites in enumerate(closed):
            plan = mean.plan(model, tasks=len(scenario.sites), previous=plan)
            fold = mean.start(model, plan)
            results: list[tuple[str, Any]] = []
            for site in sites:
                seed = task_seed(scenario.seed, round, 0, site)
                result = work(scenario, site, round, seed, model, states.setdefault(site, {}))
                results.append((site, encode_model(result)))
                self._own.setdefault(key, {})[site] = result.params
            while True:
                for site, encoded in results:
                    fold.add(encoded.tobytes(), site=site, meta=encoded.meta)
                verdict = fold.check()
                if isinstance(verdict, Good):
                    break
                fold = fold.again(verdict.plan)
            model = fold.finish()
            model.metrics = None
            plan = fold.next_plan()
            encoded = encode_model(model)
            out.append(f"b3-{digest_buffers(encoded.buffers)}")
            model = decode_model(encoded.tobytes(), framework="numpy")
            params.append(model.params)
        return tuple(out)
