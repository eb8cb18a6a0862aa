"""FedAvg's aggregator: the mean of the results, weighted by steps (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import structlog

from ...serialization.accumulator import Accumulator
from ...serialization.envelope import Buffer
from ...serialization.errors import FoldError
from ...serialization.feeder import Feeder, Source
from ...serialization.fold import Fold, Good, Rescale
from ...serialization.foldplan import WEIGHT_KEY, FoldPlan
from ...serialization.foldwrite import WrittenModel
from ...serialization.header import Header
from ...serialization.model import FLModel, flatten
from ...serialization.narrowing import check_codec
from .base import Model

log = structlog.get_logger(__name__)


class WeightedMean:
    """Each tensor's mean over the results that have it, weighted by steps times the site's aggregation weight.

    Args:
        aggregation_weights: a site's factor on its weight; 1 for those not named.
        exclude_vars: a regular expression; tensors that it is found in keep their global values.
        exact: True adds in fixed point: the same results give the same bits in any order, on any number of workers,
            through partials or not. False keeps a float32 running mean: half the memory, but the bits depend on the
            order of arrival, and there are neither partials nor checkpoints.
        weight_key: the meta key of a result's steps. Missing from all results of a round means equal weights.
        codec: ``"fp16"``, ``"bf16"`` or ``"int8"``, in which float tensors of results may come beside their own type.

    Raises:
        JobError: an unknown codec.
        FoldError: a bad pattern or weight, when the first round is planned.
    """

    def __init__(
        self,
        *,
        aggregation_weights: Mapping[str, float] | None = None,
        exclude_vars: str | None = None,
        exact: bool = True,
        weight_key: str = WEIGHT_KEY,
        codec: str = "",
    ) -> None:
        self._aggregation_weights = dict(aggregation_weights or {})
        self._exclude_vars = exclude_vars
        self._exact = exact
        self._weight_key = weight_key
        self._codec = check_codec(codec)
        self._said_equal = False
        #: the sums of the round before, of which the next takes the memory: new pages cost more than the sums
        self.used: Accumulator | None = None

    @property
    def associative(self) -> bool:
        """Whether executors may send partials: where the sums are exact."""
        return self._exact

    def plan(self, base: Model, *, tasks: int, previous: FoldPlan | None = None) -> FoldPlan:
        """The plan of a round of up to so many tasks.

        Args:
            base: the global model; looked at in the first round only.
            tasks: the most results that the round may have.
            previous: what `MeanAggregate.next_plan` gave in the round before; None in the first round.

        Raises:
            FoldError: a bad option, or a previous plan that was made with others.
            LayoutError: a model without tensors, or with some that cannot be averaged.
            ValuesError: NaN or Inf in the model.
        """
        if previous is None:
            return FoldPlan.first(
                _flat(base),
                tasks=tasks,
                aggregation_weights=self._aggregation_weights,
                exclude=self._exclude_vars,
                weight_key=self._weight_key,
                exact=self._exact,
                codec=self._codec,
            )
        mine = (self._aggregation_weights, self._exclude_vars or "", self._weight_key, self._exact, self._codec)
        seen = (previous.exclude, previous.weight_key, previous.exact, previous.codec)
        if (dict(previous.aggregation_weights), *seen) != mine:
            raise FoldError(
                "the round before was planned with other options of the aggregator; a job keeps its options"
            )
        return previous.sized(tasks)

    def start(self, base: Model, plan: FoldPlan, *, master: Mapping[str, Any] | None = None) -> MeanAggregate:
        """An empty mean for the round of this model; `master` as `Fold.finish` takes it."""
        return MeanAggregate(self, base, plan, master)

    def say_equal(self, results: int) -> None:
        """Log once a job that no result names its steps."""
        if not self._said_equal:
            self._said_equal = True
            log.info("equal_weights", results=results, reason=f"no result has {self._weight_key} in its meta")


class MeanAggregate:
    """One round of a `WeightedMean`: a `Fold` that knows its base."""

    def __init__(self, owner: WeightedMean, base: Model, plan: FoldPlan, master: Mapping[str, Any] | None) -> None:
        self._owner = owner
        self._base = base
        self._master = master
        used, owner.used = owner.used, None
        self._fold = Fold(plan, spare=used.release() if used is not None else None)

    @property
    def plan(self) -> FoldPlan:
        """The plan by which results are added."""
        return self._fold.plan

    def add(self, source: Source | None, *, site: str, meta: Mapping[str, Any] | None = None) -> None:
        """Add a whole result; see `Fold.add`."""
        self._fold.add(source, site=site, meta=meta)

    def remove(self, source: Source | None, *, site: str, meta: Mapping[str, Any] | None = None) -> None:
        """Take a result out again; see `Fold.remove`."""
        self._fold.remove(source, site=site, meta=meta)

    def begin(self, header: Header, *, site: str, meta: Mapping[str, Any] | None = None) -> Feeder:
        """Add a result that comes in pieces; see `Fold.start`."""
        return self._fold.start(header, site=site, meta=meta)

    def merge(self, source: Buffer | Path) -> None:
        """Add a partial; see `Fold.merge`."""
        self._fold.merge(source)

    def to_partial(self) -> tuple[list[memoryview], int]:
        """The state as a partial; see `Fold.to_partial`."""
        return self._fold.to_partial()

    def check(self) -> Good | Rescale:
        """Whether the scales were good; see `Fold.check`."""
        return self._fold.check()

    def again(self, plan: FoldPlan) -> MeanAggregate:
        """An empty mean of the same round, by the plan of a `Rescale`; this one is done with."""
        self._owner.used = self._fold.accumulator
        return MeanAggregate(self._owner, self._base, plan, self._master)

    def finish(self) -> FLModel:
        """The new global model; see `Fold.finish`. The sums are there until the next round starts."""
        model = self._fold.finish(self._base, master=self._master)
        self._finished()
        return model

    def write(self, fd: int) -> WrittenModel:
        """The new global model as a payload in a file; see `Fold.write`. All else is as after `finish`."""
        written = self._fold.write(self._base, fd, master=self._master)
        self._finished()
        return written

    def _finished(self) -> None:
        self._owner.used = self._fold.accumulator
        if self._fold.equal_weights:
            self._owner.say_equal(self._fold.count)

    def next_plan(self, *, tasks: int | None = None) -> FoldPlan:
        """After `finish`: the next round's plan."""
        return self._fold.next_plan(tasks=tasks)

    @property
    def master(self) -> dict[str, Any]:
        """After `finish`: float32 values behind narrower tensors."""
        return self._fold.master

    @property
    def metrics(self) -> dict[str, float]:
        """Weighted means of the results' metrics."""
        return self._fold.metrics

    @property
    def weight_sum(self) -> Fraction:
        """The exact sum of the results' weights."""
        return self._fold.weight_sum

    @property
    def equal_weights(self) -> bool:
        """Whether no result named its steps."""
        return self._fold.equal_weights

    @property
    def count(self) -> int:
        """How many results are in."""
        return self._fold.count


def _flat(model: Model) -> Mapping[str, Any]:
    if isinstance(model, FLModel):
        return flatten(model.params if model.params is not None else {})[0]
    return model
