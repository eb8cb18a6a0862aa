"""What works on tasks: the agent, its hosts and slots, the Client API, and embedded executors.

Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..serialization.lazy import exports

if TYPE_CHECKING:
    from .function import Executor, FLModel, TaskContext

__all__ = [
    "Executor",
    "FLModel",
    "TaskContext",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Executor": "function",
        "FLModel": "function",
        "TaskContext": "function",
    },
)
