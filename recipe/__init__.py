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
    from .failures import SiteFailure
    from .fedavg import FedAvgRecipe, NumpyFedAvgRecipe
    from .job import Job
    from .options import ExchangeFormat, FrameworkType, TransferType
    from .run import Run

__all__ = [
    "Env",
    "ExchangeFormat",
    "FedAvgRecipe",
    "FrameworkType",
    "Job",
    "JobClient",
    "NumpyFedAvgRecipe",
    "ProdEnv",
    "Recipe",
    "Run",
    "SimEnv",
    "SiteFailure",
    "TransferType",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Env": "env",
        "ExchangeFormat": "options",
        "FedAvgRecipe": "fedavg",
        "FrameworkType": "options",
        "Job": "job",
        "JobClient": "client",
        "NumpyFedAvgRecipe": "fedavg",
        "ProdEnv": "env",
        "Recipe": "base",
        "Run": "run",
        "SimEnv": "env",
        "SiteFailure": "failures",
        "TransferType": "options",
    },
)
