"""How a round's results become the next global model."""

from __future__ import annotations

from .base import Aggregate, Aggregator
from .custom import ModelAggregator
from .mean import MeanAggregate, WeightedMean

__all__ = ["Aggregate", "Aggregator", "MeanAggregate", "ModelAggregator", "WeightedMean"]
