"""A job's filters at a site: around user code, in the process that runs it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..serialization.component import Component
from ..serialization.filters import FilterContext, apply_filters, like
from ..serialization.jobspec import Point
from ..serialization.model import FLModel

if TYPE_CHECKING:
    from .taskio import TaskSpec


class _Received(threading.local):
    """What a filter made of the last task's input in this thread: the difference is taken to that."""

    def __init__(self) -> None:
        self.attempt: tuple[str, int] | None = None
        self.params: dict[str, Any] | None = None


_received = _Received()


def filter_input(model: FLModel, spec: TaskSpec) -> FLModel:
    """What user code gets: in the nesting and the framework that it would have without filters."""
    _received.attempt = _received.params = None
    if not spec.filters.get("client_input"):
        return model
    passed = _apply(model, spec, "client_input")
    if passed.params is None:
        return passed
    if spec.transfer_type == "DIFF":  # user code may change what it gets in place
        _received.attempt = (spec.task, spec.attempt)
        _received.params = {name: np.array(value) for name, value in passed.params.items()}
    return replace(passed, params=like(model.params or {}, passed.params))


def received_params(model: FLModel, spec: TaskSpec) -> dict[str, Any]:
    """What user code got, as flat arrays: kept from then, else made from the input again.

    Args:
        model: the input as it came, whose own arrays nobody has changed.
    """
    if not spec.filters.get("client_input"):
        return cast("dict[str, Any]", model.params or {})
    if _received.attempt == (spec.task, spec.attempt) and _received.params is not None:
        return _received.params
    return cast("dict[str, Any]", _apply(model, spec, "client_input").params or {})


def filter_output(model: FLModel, spec: TaskSpec) -> FLModel:
    """What leaves the site; the caller's own tensors are not changed."""
    return _apply(model, spec, "client_output")


def _apply(model: FLModel, spec: TaskSpec, point: Point) -> FLModel:
    found = spec.filters.get(point) or ()
    components = [Component.parse(item, f"{point} filter {number}") for number, item in enumerate(found)]
    context = FilterContext(point, spec.job, spec.name, spec.round, spec.site, spec.seed)
    return apply_filters(components, model, context)
