"""An aggregator of one's own, written for NVFLARE: the median of the sites' arrays."""

from __future__ import annotations

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator


class Median(ModelAggregator):
    def __init__(self) -> None:
        super().__init__()
        self.models: list[FLModel] = []

    def accept_model(self, model: FLModel) -> None:
        self.models.append(model)

    def aggregate_model(self) -> FLModel:
        self.info(f"the median of {len(self.models)} results")
        names = self.models[0].params
        middle = {name: np.median([model.params[name] for model in self.models], axis=0) for name in names}
        return FLModel(params=middle, params_type=self.models[0].params_type)

    def reset_stats(self) -> None:
        self.models = []
