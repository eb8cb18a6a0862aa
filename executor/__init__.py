"""What works on tasks: the agent, its hosts and slots, the Client API, and embedded executors.

Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .function import Executor, FLModel, TaskContext

__all__ = [
    "Executor",
    "FLModel",
    "TaskContext",
]

_HOMES = {
    "Executor": "function",
    "FLModel": "function",
    "TaskContext": "function",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
