"""`@flare.train` and `@flare.evaluate`: a task's model goes into a function, and what it returns is the answer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from ..serialization.model import FLModel
from .client_api import current
from .client_context import EVALUATE_NAMES, ClientContext, ClientError


class _Scores:
    """What `@flare.evaluate` found for the task in hand, until `@flare.train` sends it along."""

    def __init__(self) -> None:
        self.task: object = None
        self.metrics: dict[str, Any] | None = None

    def take(self, task: object) -> dict[str, Any] | None:
        found = self.metrics if self.task is task else None
        self.task = self.metrics = None
        return found


_scores = _Scores()


def train(function: Callable[..., FLModel]) -> Callable[..., FLModel]:
    """Make a function the training: its first argument is the received model, and what it returns is sent.

    Metrics that an `evaluate` function found for the same task go along: they describe the received model.

    The decorated function returns the FLModel that was sent, whose params the sending has let go of.

    Raises:
        ClientError: the job is over, or it returned no FLModel.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> FLModel:
        context = current()
        result = _call(function, _received(context, function), args, kwargs)
        if not isinstance(result, FLModel):
            raise ClientError(
                f"@flare.train {_name(function)}() returned {type(result).__name__}; an FLModel belongs here"
            )
        scores = _scores.take(context.open_task)
        if scores is not None and not result.metrics:
            result.metrics = scores
        context.send(result)
        return result

    return wrapper


def evaluate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function the evaluation of the received model, which is its first argument; call it before the training.

    It returns metrics: a dict, an FLModel with metrics, or one number, which is called ``accuracy``. They go with the
    training's result; where the task itself is ``validate``, they are its result and sent at once.

    Raises:
        ClientError: the job is over, or it returned nothing of the kind.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        context = current()
        model = _received(context, function)
        result = _call(function, model, args, kwargs)
        metrics = _metrics(result, function)
        if context.task_name() in EVALUATE_NAMES:
            context.send(FLModel(metrics=metrics))
        else:
            _scores.task, _scores.metrics = context.open_task, metrics
        return result

    return wrapper


def _received(context: ClientContext, function: Callable[..., Any]) -> FLModel:
    model = context.receive()
    if model is None:
        raise ClientError(
            f"{_name(function)}() was called when the job was over: call it within `while flare.is_running():`"
        )
    return model


def _call(function: Callable[..., Any], model: FLModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call with the model as first argument, whatever was given there (``train(input_model=None)`` is usual)."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise ClientError(f"{_name(function)}() takes no argument; its first one is the received model")
    return function(model, *args[1:], **{name: value for name, value in kwargs.items() if name != parameters[0].name})


def _metrics(result: Any, function: Callable[..., Any]) -> dict[str, Any]:
    if isinstance(result, FLModel) and result.metrics:
        return result.metrics
    if isinstance(result, dict) and result:
        return cast("dict[str, Any]", result)
    told: Any = cast("Any", result)
    number = told.item() if callable(getattr(told, "item", None)) else told
    if isinstance(number, int | float) and not isinstance(number, bool):
        return {"accuracy": number}
    kind: str = type(told).__name__
    raise ClientError(f"@flare.evaluate {_name(function)}() returned {kind}; a dict of metrics belongs here")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "function")
