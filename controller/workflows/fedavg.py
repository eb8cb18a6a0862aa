"""Federated averaging (McMahan et al., arXiv:1602.05629, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...serialization.errors import JobError
from ...serialization.foldplan import FoldPlan
from ...serialization.messages import CloseRule
from ...serialization.model import FLModel, ParamsType, flatten
from ..aggregators.base import Aggregate, Aggregator
from ..aggregators.mean import WeightedMean
from ..federation import Federation
from ..folding import Folding
from ..records import RoundRecord
from ..workflow import Workflow

#: Results to plan for where the number of sites is not known before they connect; more do no harm.
MOST_TASKS = 2048

_MASTER = "master."
_PLAN = "plan"


class FedAvg(Workflow):
    """Rounds of: send the global model, fold the sites' results into their weighted mean, commit it.

    Args:
        num_rounds: how many.
        min_clients: results that a round needs; every site of the job takes part unless ``sample`` is given.
        initial_model: file name of the initial global model in the job's app folder.
        params_transfer_type: "FULL" or "DIFF": what the sites are told to send. What they do send decides.
        aggregation_weights: a factor a site on its weight.
        exclude_vars: regular expression; matching tensors keep their global values.
        key_metric: the metric by which the best model is kept; larger is better.
        sample: draw so many sites a round; 0: all.
        aggregator: how results become a model; the weighted mean by default.
        deadline_s: close a round after so long if ``min_clients`` results are there, else fail it.
        sites_s: how long to wait for ``min_clients`` sites to connect, and for a lost one to return.
        checkpoint_bytes: payload bytes between checkpoints of a round's aggregate.

    Raises:
        JobError: an option out of its range.
    """

    def __init__(
        self,
        *,
        num_rounds: int,
        min_clients: int,
        initial_model: str | None = None,
        params_transfer_type: str = "FULL",
        aggregation_weights: Mapping[str, float] | None = None,
        exclude_vars: str | None = None,
        key_metric: str = "accuracy",
        sample: int = 0,
        aggregator: Aggregator | None = None,
        deadline_s: float | None = None,
        sites_s: float = 60.0,
        checkpoint_bytes: int | None = None,
        task: str = "train",
    ) -> None:
        if num_rounds < 1 or min_clients < 1:
            raise JobError(f"num_rounds={num_rounds}, min_clients={min_clients}: both are at least 1")
        if params_transfer_type not in ParamsType.__members__:
            raise JobError(f"params_transfer_type={params_transfer_type!r}; FULL or DIFF")
        self.num_rounds = num_rounds
        self.initial_model = initial_model
        self.key_metric = key_metric
        self.sample = sample
        self.task = task
        self.rule = CloseRule(min_clients=min_clients, deadline_s=deadline_s, sites_s=sites_s)
        self.checkpoint_bytes = checkpoint_bytes
        self.aggregator: Aggregator = aggregator or WeightedMean(
            aggregation_weights=aggregation_weights, exclude_vars=exclude_vars
        )

    def run(self, fed: Federation) -> None:
        """All rounds that are not committed yet."""
        model = fed.model(self.initial_model)
        memory = _Memory.of(fed.state())
        model_ref = fed.put_model(model)
        for round in fed.rounds(self.num_rounds):
            record = RoundRecord(round)
            plan = self.aggregator.plan(model, tasks=self.sample or fed.site_count or MOST_TASKS, previous=memory.plan)
            associative = self.aggregator.associative
            gather = fed.gather(
                self.task,
                model_ref,
                round=round,
                sample=self.sample,
                rule=self.rule,
                fold=fed.put_blob(plan.to_bytes()) if associative else None,
                partials=associative and self.rule.deadline_s is None,
                config={"total_rounds": self.num_rounds},
            )
            fold = self.aggregator.start(model, plan, master=memory.master)
            fold = Folding(fed, gather, fold, record, checkpoint_bytes=self.checkpoint_bytes).run()
            received, model = model_ref, fold.finish()
            scored = fold.metrics
            model.metrics = None
            best = memory.note(scored.get(self.key_metric), round)
            memory.after(fold)
            model_ref = fed.commit(
                model,
                round=round,
                best=received if best else None,
                state=memory.encode(),
                record=record.build(
                    gather, scored, weight_sum=float(fold.weight_sum), equal_weights=fold.equal_weights, best=best
                ),
            )
            # one aggregate in memory, not two, and the model as pages of its file where that can be mapped
            del fold
            model = fed.mapped(model_ref) or model


class _Memory:
    """What FedAvg carries from round to round, all of it through commits: scales, float32 masters, the best score."""

    def __init__(self) -> None:
        self.plan: FoldPlan | None = None
        self.master: dict[str, Any] = {}
        self.best: float | None = None
        self.best_round: int | None = None

    @staticmethod
    def of(state: FLModel | None) -> _Memory:
        """As `encode` left it."""
        memory = _Memory()
        if state is None:
            return memory
        flat, _ = flatten(state.params)
        memory.plan = FoldPlan.from_bytes(np.asarray(flat[_PLAN], np.uint8).tobytes())
        memory.master = {name.removeprefix(_MASTER): v for name, v in flat.items() if name.startswith(_MASTER)}
        meta = state.meta or {}
        memory.best, memory.best_round = meta.get("best"), meta.get("best_round")
        return memory

    def encode(self) -> FLModel:
        """As a payload's model."""
        assert self.plan is not None
        params: dict[str, Any] = {_PLAN: np.frombuffer(self.plan.to_bytes(), np.uint8)}
        params |= {_MASTER + name: value for name, value in self.master.items()}
        return FLModel(params=params, meta={"best": self.best, "best_round": self.best_round})

    def after(self, fold: Aggregate) -> None:
        """The next round's scales and masters."""
        self.plan = fold.next_plan()
        self.master = dict(fold.master)

    def note(self, score: float | None, round: int) -> bool:
        """Whether the model that the sites received, and scored, is the best so far. The untrained one never is."""
        if score is None or round == 0 or (self.best is not None and score <= self.best):
            return False
        self.best, self.best_round = score, round - 1
        return True
