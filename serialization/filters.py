"""Filters: what changes a model on its way, on four points.

::

    server_output   what the server sends, once a gather       (task_data_filters of the server's config)
    client_input    what comes in at a site                     (task_data_filters of the clients' config)
    client_output   what a site sends, after DIFF was taken     (task_result_filters of the clients' config)
    server_input    that at the server, before it is folded     (task_result_filters of the server's config)

A filter has ``process(model, context)`` and returns the model to go on with, or None for the one it was given. Its
params are a flat map of numpy arrays on every point, whatever user code gets, and its own to change. It is made anew
for each task, so that it keeps no memory.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np

from .component import Component
from .dtypes import from_numpy
from .errors import JobError
from .jobspec import Point
from .model import SEPARATOR, FLModel, flatten
from .tensors import as_numpy, is_number, is_tensor, is_torch, view_torch


@dataclass(frozen=True, slots=True)
class FilterContext:
    """The task that a model belongs to.

    Attributes:
        site: whose result or input it is; ``"server"`` for what goes to all.
        seed: of (job seed, round, step, site): a filter that draws numbers makes its generator from it, so that a task
            that is done again gives the same bytes.
    """

    point: Point
    job: str
    task: str
    round: int
    site: str
    seed: int


class Filter(Protocol):
    """What a filter is; no base class is needed."""

    def process(self, model: FLModel, context: FilterContext) -> FLModel | None:
        """The model to go on with; None for the given one, which may have been changed in place."""
        ...


class ExcludeVars:
    """Leave tensors out.

    Args:
        exclude_vars: a list names them exactly; a text is a regular expression that is searched for in their names.

    Raises:
        JobError: neither, or no regular expression.
    """

    def __init__(self, exclude_vars: Sequence[str] | str | None = None) -> None:
        self.exclude_vars = exclude_vars
        given: object = exclude_vars
        if isinstance(given, list | tuple) and all(isinstance(name, str) for name in cast("Sequence[object]", given)):
            self._names: frozenset[str] = frozenset(cast("Sequence[str]", given))
            self._pattern = None
        elif given is None or isinstance(given, str):
            self._names = frozenset()
            try:
                self._pattern = re.compile(given) if given else None
            except re.error as error:
                raise JobError(f"ExcludeVars: exclude_vars={given!r} is no regular expression: {error}") from None
        else:
            raise JobError(f"ExcludeVars: exclude_vars={given!r}; a list of names, or a regular expression")

    def process(self, model: FLModel, context: FilterContext) -> FLModel | None:
        """The model without them."""
        del context
        if model.params is None:
            return None
        left = {name: value for name, value in model.params.items() if not self._excluded(name)}
        return replace(model, params=left)

    def _excluded(self, name: str) -> bool:
        return name in self._names or (self._pattern is not None and self._pattern.search(name) is not None)


#: Filters that are fedloom's own: they run wherever, and import nothing that a job names.
BUILT_IN: Mapping[str, Callable[..., Any]] = {"fedloom.serialization.filters.ExcludeVars": ExcludeVars}


def make_filter(component: Component) -> Filter:
    """The filter that a component stands for.

    Raises:
        JobError: it cannot be imported or built, or has no ``process``.
    """
    known = BUILT_IN.get(component.path)
    if known is None:
        made = component.build()
    else:
        try:
            made = known(**component.args)
        except TypeError as error:
            raise JobError(f"filter {component.path}: {error}") from None
    if not callable(getattr(made, "process", None)):
        raise JobError(
            f"filter {component.path} is a {type(made).__name__} without process(model, context) -> FLModel | None"
        )
    return made


def apply_filters(components: Sequence[Component], model: FLModel, context: FilterContext) -> FLModel:
    """The model after all of these, in their order; the given one and its tensors are not changed.

    Returns:
        A model whose params are flat numpy arrays, or None where it had none.

    Raises:
        JobError: a filter cannot be made, or returned no model. Whatever a filter raises, with a note that names it.
    """
    params = None
    if model.params is not None:
        params = {name: np.array(as_numpy(value)) for name, value in flatten(model.params)[0].items()}
    passed = replace(model, params=params)
    for component in components:
        filter = make_filter(component)
        try:
            out = cast("object", filter.process(passed, context))
        except Exception as error:
            error.add_note(
                f"in {context.point} filter {component.path}, task {context.task!r} of round {context.round}"
            )
            raise
        if out is None:
            continue
        if not isinstance(out, FLModel):
            raise JobError(f"filter {component.path} returned a {type(out).__name__}; an FLModel or None belongs there")
        passed = out
    if passed.params is None:
        return passed
    return replace(passed, params={n: as_numpy(value) for n, value in flatten(passed.params)[0].items()})


def filter_traceback(error: BaseException) -> str:
    """What a filter raised, as the text that ends the task or the job."""
    if isinstance(error, JobError) and not getattr(error, "__notes__", None):
        return str(error)
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def like(original: Any, flat: Mapping[str, Any]) -> Any:
    """Filtered params in the nesting and the framework of the original ones; what is not in ``flat`` is left out."""
    left = dict(flat)
    kept = _like(original, (), left)
    if kept is _GONE:
        return left
    return {**cast("dict[Any, Any]", kept), **left} if left and isinstance(kept, dict) else kept


_GONE = object()


def _like(node: Any, path: tuple[str, ...], flat: dict[str, Any]) -> Any:
    if is_tensor(node) or is_number(node):
        name = SEPARATOR.join(path)
        if name not in flat:
            return _GONE
        value = as_numpy(flat.pop(name))
        if not is_torch(node):
            return value
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return view_torch(raw if raw.flags.writeable else raw.copy(), from_numpy(value.dtype).name, value.shape)
    if isinstance(node, Mapping):
        pairs = cast("Mapping[Any, Any]", node)
        below = {key: _like(value, (*path, str(key)), flat) for key, value in pairs.items()}
        return {key: value for key, value in below.items() if value is not _GONE}
    items = [
        _like(value, (*path, str(number)), flat)
        for number, value in enumerate(cast("list[Any] | tuple[Any, ...]", node))
    ]
    kept = [value for value in items if value is not _GONE]
    return tuple(kept) if isinstance(node, tuple) else kept
