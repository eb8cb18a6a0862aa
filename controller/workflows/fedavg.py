"""Federated averaging (McMahan et al., arXiv:1602.05629, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import structlog

from ...serialization.errors import JobError
from ...serialization.foldplan import FoldPlan
from ...serialization.memory import give_back
from ...serialization.messages import INLINE_BYTES, CloseRule, PayloadRef
from ...serialization.model import FLModel, ParamsType, flatten
from ..aggregators.base import Aggregator
from ..aggregators.custom import TakesModels, restore, state_of
from ..aggregators.mean import WeightedMean
from ..checkpoints import fit, read_checkpoint
from ..federation import Federation
from ..gather import Gather
from ..records import RoundRecord
from ..workflow import Workflow
from .fedavg_rounds import Outcome, aggregate, fold, fold_first
from .selection import Scores, Selection

log = structlog.get_logger(__name__)

#: Results to plan for where the number of sites is not known before they connect; more do no harm.
MOST_TASKS = 2048

_MASTER = "master."
_PLAN = "plan"


class FedAvg(Workflow):
    """Rounds of: send the global model, fold the sites' results into their weighted mean, commit it.

    Args:
        num_rounds: how many, unless training ends early.
        min_clients: results that a round needs; every site of the job takes part unless ``sample`` is given.
        initial_model: file name of the initial global model in the job's app folder. Without it, and without a
            checkpoint, the first round's sites get no model, and the mean of what they send is the first one.
        initial_ckpt: absolute path of a checkpoint on this machine, read when the job starts; its values go before
            those of ``initial_model``, whose layout it must have.
        params_transfer_type: "FULL" or "DIFF": what the sites are told to send. What they do send decides.
        aggregation_weights: a factor a site on its weight.
        exclude_vars: regular expression; matching tensors keep their global values.
        exact: as `WeightedMean`: False is a float32 running mean, whose bits depend on the order of arrival.
        key_metric: the metric by which the best model is kept.
        key_metric_mode: "max" or "min"; None: as the operator of a ``stop_cond`` on it says, else "max".
        stop_cond: end when the received model scores so, such as "accuracy >= 80"; it is then the job's model.
        patience: end after so many rounds without a better score.
        best_model_filename: another name for the best model in the result folder.
        sample: draw so many sites a round; 0: all.
        aggregator: how results become a model: one of fedloom's aggregators, or an object with ``accept_model``,
            ``aggregate_model`` and ``reset_stats``; the weighted mean by default.
        aggregator_format: what such an object gets: "numpy" arrays or "pytorch" tensors.
        memory_gc_rounds: give free memory back to the system after every so many rounds; 0: never.
        deadline_s: close a round after so long if ``min_clients`` results are there, else fail it.
        straggler_patience: once ``min_clients`` results are there, wait for the others so many times as long as those
            took; None: until each has come or failed.
        after_quorum_s: at most so many seconds, likewise.
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
        initial_ckpt: str | None = None,
        params_transfer_type: str = "FULL",
        aggregation_weights: Mapping[str, float] | None = None,
        exclude_vars: str | None = None,
        exact: bool = True,
        codec: str = "",
        key_metric: str = "accuracy",
        key_metric_mode: str | None = None,
        stop_cond: str | None = None,
        patience: int | None = None,
        best_model_filename: str | None = None,
        sample: int = 0,
        aggregator: Aggregator | TakesModels | None = None,
        aggregator_format: Literal["numpy", "pytorch"] = "numpy",
        memory_gc_rounds: int = 0,
        deadline_s: float | None = None,
        straggler_patience: float | None = None,
        after_quorum_s: float | None = None,
        sites_s: float = 60.0,
        checkpoint_bytes: int | None = None,
        task: str = "train",
    ) -> None:
        if num_rounds < 1 or min_clients < 1:
            raise JobError(f"num_rounds={num_rounds}, min_clients={min_clients}: both are at least 1")
        if params_transfer_type not in ParamsType.__members__:
            raise JobError(f"params_transfer_type={params_transfer_type!r}; FULL or DIFF")
        if aggregator_format not in ("numpy", "pytorch"):
            raise JobError(f"aggregator_format={aggregator_format!r}; 'numpy' or 'pytorch'")
        if initial_ckpt is not None and not Path(initial_ckpt).is_absolute():
            raise JobError(
                f"initial_ckpt={initial_ckpt!r}: a job names a checkpoint of the controller's machine, by its absolute"
                " path; a recipe turns a relative one into the job's initial model"
            )
        self.num_rounds = num_rounds
        self.initial_model = initial_model
        self.initial_ckpt = initial_ckpt
        self.selection = Selection.of(key_metric, key_metric_mode, stop_cond, patience)
        self.best_model_filename = best_model_filename
        self.sample = sample
        self.task = task
        self.rule = CloseRule(min_clients, deadline_s, after_quorum_s, sites_s, straggler_patience)
        self.checkpoint_bytes = checkpoint_bytes
        self.memory_gc_rounds = memory_gc_rounds
        self.aggregator_format: Literal["numpy", "pytorch"] = aggregator_format
        self.aggregator = _aggregator(aggregator) or WeightedMean(
            aggregation_weights=aggregation_weights, exclude_vars=exclude_vars, exact=exact, codec=codec
        )
        self._said_missing = False

    def run(self, fed: Federation) -> None:
        """All rounds that are not committed yet."""
        memory = _Memory.of(fed.state())
        if memory.scores.stopped:  # by the process that had the job before
            return
        restore(self.aggregator, memory.aggregator)
        model = self._start(fed)
        model_ref = None if model is None else fed.put_model(model)
        for round in fed.rounds(self.num_rounds):
            record = RoundRecord(round)
            gather, outcome = self._round(fed, model, model_ref, record, memory)
            received, model = model_ref, outcome.model
            model.metrics = None
            # metrics of a round without a model are the score of nothing that could be kept
            best = received is not None and memory.scores.note(self.selection, outcome.metrics, round)
            if received is not None:
                self._say_missing(fed, outcome.metrics)
            memory.after(outcome, state_of(self.aggregator))
            met = received is not None and self.selection.met(outcome.metrics)
            model_ref = fed.commit(
                # the model that met the condition, not one that nobody has scored
                received if met and received is not None else outcome.ref or model,
                round=round,
                best=received if best else None,
                state=memory.encode(),
                record=record.build(
                    gather,
                    outcome.metrics,
                    weight_sum=outcome.weight_sum,
                    equal_weights=outcome.equal_weights,
                    best=best,
                    **self._more(memory.scores),
                ),
                wait=False,
            )
            # one aggregate in memory, not two, and the model as pages of its file where that can be mapped
            del outcome
            if memory.scores.stopped:
                log.info("stopped_early", job=fed.job, round=round, reason=memory.scores.stopped)
                fed.event("stopped_early", memory.scores.stopped)
                return
            if model_ref.size > INLINE_BYTES:
                model = fed.mapped(model_ref) or model
            if self.memory_gc_rounds and (round + 1) % self.memory_gc_rounds == 0:
                give_back()

    def _start(self, fed: Federation) -> FLModel | None:
        """The last committed model, else the initial one; None where there is none."""
        if fed.commit_ref is not None and fed.commit_ref.model is not None:
            return fed.model()
        given = fed.model(self.initial_model) if self.initial_model else None
        if self.initial_ckpt is None:
            return given
        path = Path(self.initial_ckpt)
        params = read_checkpoint(path)
        base = params if given is None else flatten(given.params)[0]
        return FLModel(params=fit(params, base, f"initial_ckpt={str(path)!r}"))

    def _round(
        self, fed: Federation, model: FLModel | None, ref: PayloadRef | None, record: RoundRecord, memory: _Memory
    ) -> tuple[Gather, Outcome]:
        """Gather, and make the next model of it."""
        if isinstance(self.aggregator, TakesModels):
            gather = self._gather(fed, ref, record.round)
            return gather, aggregate(fed, gather, self.aggregator, model, record, self.aggregator_format)
        if model is None:
            gather = self._gather(fed, None, record.round)
            return gather, fold_first(fed, gather, self.aggregator, record)
        plan = self.aggregator.plan(model, tasks=self.sample or fed.site_count or MOST_TASKS, previous=memory.plan)
        gather = self._gather(fed, ref, record.round, plan if self.aggregator.associative else None)
        empty = self.aggregator.start(model, plan, master=memory.master)
        return gather, fold(fed, gather, empty, record, self.checkpoint_bytes)

    def _gather(self, fed: Federation, ref: PayloadRef | None, round: int, plan: FoldPlan | None = None) -> Gather:
        return fed.gather(
            self.task,
            ref,
            round=round,
            sample=self.sample,
            rule=self.rule,
            fold=None if plan is None else plan.to_bytes(),
            partials=plan is not None and self.rule.waits_for_all,
            config={"total_rounds": self.num_rounds},
        )

    def _say_missing(self, fed: Federation, metrics: Mapping[str, float]) -> None:
        """Once: a metric that the options need is not in the results, so that nothing can come of them."""
        missing = self.selection.unknown(metrics)
        if missing and not self._said_missing:
            self._said_missing = True
            has = ", ".join(metrics) or "none"
            text = f"no result has the metric {', '.join(missing)}, so no best model and no early end come of it: {has}"
            log.warning("metric_missing", job=fed.job, missing=missing, metrics=sorted(metrics))
            fed.event("metric_missing", text)

    def _more(self, scores: Scores) -> dict[str, Any]:
        """What a record has in some jobs only."""
        more: dict[str, Any] = {}
        if scores.stopped:
            more["stopped_early"] = scores.stopped
        if self.best_model_filename:
            more["best_model_filename"] = self.best_model_filename
        return more


def _aggregator(given: object) -> Aggregator | TakesModels | None:
    if given is None or isinstance(given, TakesModels):
        return given
    if all(callable(getattr(given, name, None)) for name in ("plan", "start")):
        return cast("Aggregator", given)
    raise JobError(
        f"aggregator {type(given).__name__} has neither accept_model(), aggregate_model() and reset_stats(), nor plan()"
        " and start()"
    )


class _Memory:
    """What FedAvg carries from round to round, all of it through commits: scales, float32 masters, scores."""

    def __init__(self) -> None:
        self.plan: FoldPlan | None = None
        self.master: dict[str, Any] = {}
        self.scores = Scores()
        self.aggregator: Any = None

    @staticmethod
    def of(state: FLModel | None) -> _Memory:
        """As `encode` left it."""
        memory = _Memory()
        if state is None:
            return memory
        flat, _ = flatten(state.params if state.params is not None else {})
        if _PLAN in flat:
            memory.plan = FoldPlan.from_bytes(np.asarray(flat[_PLAN], np.uint8).tobytes())
        memory.master = {name.removeprefix(_MASTER): v for name, v in flat.items() if name.startswith(_MASTER)}
        memory.scores = Scores.of(state.meta or {})
        memory.aggregator = state.optimizer_params
        return memory

    def encode(self) -> FLModel:
        """As a payload's model."""
        params: dict[str, Any] = {_MASTER + name: value for name, value in self.master.items()}
        if self.plan is not None:
            params[_PLAN] = np.frombuffer(self.plan.to_bytes(), np.uint8)
        return FLModel(params=params or None, optimizer_params=self.aggregator, meta=self.scores.to_meta())

    def after(self, outcome: Outcome, aggregator: Any) -> None:
        """The next round's scales, masters and what a custom aggregator keeps."""
        self.plan = outcome.plan
        self.master = dict(outcome.master)
        self.aggregator = aggregator
