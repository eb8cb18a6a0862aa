"""What an aggregator is: a rule that plans a round, and the aggregate that takes the round's results.

An aggregator holds options and no state of a round, so that a controller that takes a job over makes the same one from
the job's folder. Aggregators compose by holding one another: a server optimizer starts its inner aggregator's aggregate
and steps with what that finishes with.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ...serialization.envelope import Buffer
from ...serialization.feeder import Feeder, Source
from ...serialization.fold import Good, Rescale
from ...serialization.foldplan import FoldPlan
from ...serialization.foldwrite import WrittenModel
from ...serialization.header import Header
from ...serialization.model import FLModel

Model = FLModel | Mapping[str, Any]


class Aggregate(Protocol):
    """One round's aggregate. Results go in as they arrive; the model comes out once."""

    @property
    def plan(self) -> FoldPlan:
        """The plan by which results are added; executors need it for partials."""
        ...

    def add(self, source: Source | None, *, site: str, meta: Mapping[str, Any] | None = None) -> None:
        """Add a whole result; after an error nothing of it is in. As `Fold.add`."""
        ...

    def begin(self, header: Header, *, site: str, meta: Mapping[str, Any] | None = None) -> Feeder:
        """Add a result that comes in pieces. As `Fold.start`."""
        ...

    def merge(self, source: Buffer | Path) -> None:
        """Add a partial. Raises FoldError where the aggregator is not associative."""
        ...

    def to_partial(self) -> tuple[list[memoryview], int]:
        """The state as a partial, for a checkpoint. Raises FoldError where the aggregator is not associative."""
        ...

    def check(self) -> Good | Rescale:
        """Whether it can be finished, or everything must be added again, to `again` with the plan that this gives."""
        ...

    def again(self, plan: FoldPlan) -> Aggregate:
        """An empty aggregate of the same round by another plan."""
        ...

    def finish(self) -> FLModel:
        """The new global model, numpy arrays."""
        ...

    def next_plan(self, *, tasks: int | None = None) -> FoldPlan:
        """After `finish`: the next round's plan, to be committed with the model."""
        ...

    @property
    def master(self) -> Mapping[str, Any]:
        """After `finish`: float32 values behind narrower tensors, to be committed with the model."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """Weighted means of the results' metrics."""
        ...

    @property
    def weight_sum(self) -> Fraction:
        """The exact sum of the results' weights."""
        ...

    @property
    def equal_weights(self) -> bool:
        """Whether no result named its steps, so that each counts as one."""
        ...

    @property
    def count(self) -> int:
        """How many results are in."""
        ...


@runtime_checkable
class WritesModel(Protocol):
    """An aggregate that can write its model to a file in place of `Aggregate.finish`, which then need not hold it."""

    def write(self, fd: int) -> WrittenModel:
        """The new global model's payload, in an empty file that is open for writing. As `Fold.write`."""
        ...


class Aggregator(Protocol):
    """A rule for making one model of many results."""

    @property
    def associative(self) -> bool:
        """Whether executors may add results up before sending them: order and grouping do not change a bit."""
        ...

    def plan(self, base: Model, *, tasks: int, previous: FoldPlan | None = None) -> FoldPlan:
        """The plan of a round of up to so many tasks.

        Args:
            base: the global model.
            tasks: the most results that the round may have.
            previous: what `Aggregate.next_plan` gave in the round before; None in the first round.
        """
        ...

    def start(self, base: Model, plan: FoldPlan, *, master: Mapping[str, Any] | None = None) -> Aggregate:
        """An empty aggregate for the round of this model.

        Args:
            base: the global model that the sites receive.
            plan: the round's plan.
            master: float32 values behind the model's narrower tensors, as the round before left them.
        """
        ...
