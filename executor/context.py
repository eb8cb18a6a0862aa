"""What a function task is told beside its model, and how user code is called and its failure told."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import FrameType
from typing import Any, cast

from ..serialization.jobmessages import POINTS_KIND
from ..serialization.model import FLModel
from .points import make_point
from .state import SiteState

Report = Callable[[str, dict[str, Any]], None]


def _no_report(kind: str, data: dict[str, Any]) -> None:
    del kind, data


@dataclass(slots=True)
class TaskContext:
    """One task at one site.

    Attributes:
        seed: of (job seed, round, step, site). Where a worker process runs the function, `random`, numpy and torch are
            set from it already; embedded in a program of yours they are left alone: make generators from it.
        state: what the site remembers between tasks, kept with the result.
        config: what the workflow gave the task along.
    """

    site: str
    job: str
    task: str
    round: int
    total_rounds: int | None
    seed: int
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    state: SiteState = field(default_factory=lambda: SiteState(None))
    report: Report = field(default=_no_report, repr=False)
    _cancelled: bool = field(default=False, repr=False)

    @property
    def cancelled(self) -> bool:
        """True once nobody waits for this result any more: a long function may look and return early."""
        return self._cancelled

    def cancel(self) -> None:
        """Called by the executor."""
        self._cancelled = True

    def log(self, key: str, value: Any, step: int | None = None, data_type: str = "SCALAR") -> None:
        """Keep a value of this site with the job; see `fedloom.client.log`.

        Args:
            step: the point's place on its curve; counted for each key where it is left out.

        Raises:
            CodecError: not plain data, or over 16 KiB.
        """
        point = make_point(key, value, data_type, self.round, {} if step is None else {"global_step": step})
        self.report("event", {"kind": POINTS_KIND, "data": {"points": [point]}})

    def progress(self, done: float, note: str = "") -> None:
        """Tell how much of the task is done, from 0 to 1."""
        self.report("progress", {"done": float(done), "note": note})


TaskFunction = Callable[[FLModel, TaskContext], Any]


def call_function(function: TaskFunction, model: FLModel, context: TaskContext) -> Any:
    """Call a task function, with the context where it has a second parameter; an ``async def`` one gets a loop."""
    result = function(model, context) if _takes_two(function) else cast("Callable[[FLModel], Any]", function)(model)
    if not inspect.iscoroutine(result):
        return result
    import asyncio  # a third of what importing the executor takes

    return asyncio.run(result)


def _takes_two(function: TaskFunction) -> bool:
    try:
        hash(function)
    except TypeError:
        return _has_room_for_two(function)
    return _remembered(function)


def _has_room_for_two(function: TaskFunction) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature: the call itself will tell
        return True
    return True


_remembered = lru_cache(maxsize=64)(_has_room_for_two)  # looking at a signature takes longer than many a task


def user_traceback(error: BaseException) -> str:
    """A traceback without the frames that called user code."""
    trace = error.__traceback__
    own = trace
    while trace is not None and _is_ours(trace.tb_frame):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace or own))


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name in ("runpy", "asyncio.runners", "asyncio.base_events") or name.startswith("fedloom.executor.")
