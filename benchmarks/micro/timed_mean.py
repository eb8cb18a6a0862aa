"""The weighted mean, which also notes when the last result of a round was in. It travels with the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.controller.aggregators import MeanAggregate, WeightedMean
from fedloom.serialization.foldwrite import WrittenModel
from fedloom.serialization.model import FLModel
from workload import note


class TimedMean(WeightedMean):
    """See `WeightedMean`."""

    def start(self, base: Any, plan: Any, *, master: Mapping[str, Any] | None = None) -> MeanAggregate:
        return _Timed(self, base, plan, master)


class _Timed(MeanAggregate):
    def finish(self) -> FLModel:
        note("folded", results=self.count)
        return super().finish()

    def write(self, fd: int) -> WrittenModel:
        note("folded", results=self.count)
        return super().write(fd)
