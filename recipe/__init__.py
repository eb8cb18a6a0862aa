"""What a user writes first: recipes, environments to run them in, and the run that comes of it.

Names are loaded when they are first used, so that the command line starts without numpy, torch or ZeroMQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..serialization.lazy import exports

if TYPE_CHECKING:
    from .base import Recipe
    from .client import JobClient
    from .env import Env, ProdEnv, SimEnv
    from .evalrecipes import FedEvalRecipe, NumpyCrossSiteEvalRecipe
    from .evaluation import add_cross_site_evaluation, add_final_global_evaluation
    from .failures import SiteFailure
    from .fedavg import FedAvgRecipe, NumpyFedAvgRecipe
    from .filters import ExcludeVars
    from .job import Job
    from .options import ExchangeFormat, FrameworkType, TransferType
    from .run import Run
    from .tracking import add_experiment_tracking

__all__ = [
    "Env",
    "ExchangeFormat",
    "ExcludeVars",
    "FedAvgRecipe",
    "FedEvalRecipe",
    "FrameworkType",
    "Job",
    "JobClient",
    "NumpyCrossSiteEvalRecipe",
    "NumpyFedAvgRecipe",
    "ProdEnv",
    "Recipe",
    "Run",
    "SimEnv",
    "SiteFailure",
    "TransferType",
    "add_cross_site_evaluation",
    "add_experiment_tracking",
    "add_final_global_evaluation",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Env": "env",
        "ExchangeFormat": "options",
        "ExcludeVars": "filters",
        "FedAvgRecipe": "fedavg",
        "FedEvalRecipe": "evalrecipes",
        "FrameworkType": "options",
        "Job": "job",
        "JobClient": "client",
        "NumpyCrossSiteEvalRecipe": "evalrecipes",
        "NumpyFedAvgRecipe": "fedavg",
        "ProdEnv": "env",
        "Recipe": "base",
        "Run": "run",
        "SimEnv": "env",
        "SiteFailure": "failures",
        "TransferType": "options",
        "add_cross_site_evaluation": "evaluation",
        "add_experiment_tracking": "tracking",
        "add_final_global_evaluation": "evaluation",
    },
)
