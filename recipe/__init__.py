"""What a user writes first: recipes, environments to run them in, and the run that comes of it.

Names are loaded when they are first used, so that the command line starts without numpy, torch or ZeroMQ.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOMES = {
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
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
