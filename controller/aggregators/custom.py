"""Aggregators of users: objects that are handed one result after another and then make the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import structlog

from ...serialization.dtypes import DTYPES, is_float, is_int
from ...serialization.errors import JobError, LayoutError, MixedError, ValuesError
from ...serialization.foldplan import WEIGHT_KEY
from ...serialization.model import FLModel, ParamsType, flatten, unflatten
from ...serialization.tensors import as_numpy, spec_of

#: The key of a result's meta that names its site.
CLIENT_NAME = "client_name"


@runtime_checkable
class TakesModels(Protocol):
    """What a custom aggregator must have; `ModelAggregator` is a base for one, and is not needed."""

    def accept_model(self, model: FLModel) -> bool | None:
        """A site's result; False refuses it."""
        ...

    def aggregate_model(self) -> FLModel:
        """The new global model (FULL), or what is added to it (DIFF), out of what was accepted."""
        ...

    def reset_stats(self) -> None:
        """Forget the round before."""
        ...


class ModelAggregator(ABC):
    """A base for aggregators that want each result as a model.

    In each round `reset_stats` is called first, then `accept_model` with the results in the order of their sites' names
    (so that the same results give the same model), then `aggregate_model`. It runs in the job's process, which may be
    replaced by another at any time: what it must keep from round to round, it gives in ``state_dict()`` (tensors and
    plain values, nested as one likes) and gets back in ``load_state_dict(state)``, where it has the two.

    A result's ``meta["client_name"]`` is its site, ``meta["NUM_STEPS_CURRENT_ROUND"]`` what the site counted.
    """

    @abstractmethod
    def accept_model(self, model: FLModel) -> bool | None:
        """A site's result; False refuses it."""

    @abstractmethod
    def aggregate_model(self) -> FLModel:
        """The new global model (FULL), or what is added to it (DIFF), out of what was accepted."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Forget the round before."""

    def debug(self, message: str) -> None:
        """Say something in the job's log."""
        self._logger.debug(message)

    def info(self, message: str) -> None:
        """Say something in the job's log."""
        self._logger.info(message)

    def warning(self, message: str) -> None:
        """Say something in the job's log."""
        self._logger.warning(message)

    def error(self, message: str) -> None:
        """Say something in the job's log."""
        self._logger.error(message)

    @property
    def _logger(self) -> Any:
        return structlog.get_logger(type(self).__name__)  # nothing else shows lines below a warning in the job's log


def state_of(aggregator: object) -> Any:
    """What an aggregator keeps from round to round; None where it keeps nothing."""
    make = getattr(aggregator, "state_dict", None)
    return make() if callable(make) else None


def restore(aggregator: object, state: Any) -> None:
    """Give an aggregator back what `state_of` had of it."""
    load = getattr(aggregator, "load_state_dict", None)
    if state is not None and callable(load):
        load(state)


class KindCheck:
    """That the results of a round are all FULL or all DIFF."""

    def __init__(self) -> None:
        self._first: tuple[str, str] | None = None

    def add(self, kind: str, site: str) -> None:
        """A result's kind.

        Raises:
            MixedError: another kind than those before.
        """
        if self._first is None:
            self._first = (kind, site)
        elif kind != self._first[0]:
            raise MixedError(
                f"result of {site} is {kind}, but that of {self._first[1]} is {self._first[0]}: all sites of a round"
                " must send the same params_type"
            )


def new_model(aggregator: object, base: FLModel | None) -> FLModel:
    """The next global model, out of what an aggregator made of a round, in the layout of the last.

    Tensors that it leaves out keep their global values. FULL values replace, DIFF values are added; types narrower than
    float64 are rounded once.

    Args:
        aggregator: has taken the round's results.
        base: the model that the sites received; None in a first round that began without one.

    Raises:
        JobError: what it made is no FLModel with params; a DIFF where there is nothing to add it to.
        LayoutError: a tensor that the model does not have, or has in another shape.
        ValuesError: NaN, Inf, or a value that a tensor's type cannot hold.
    """
    who = f"aggregator {type(aggregator).__name__}"
    made = cast("object", cast("TakesModels", aggregator).aggregate_model())
    if not isinstance(made, FLModel) or made.params is None:
        what = "an FLModel without params" if isinstance(made, FLModel) else type(made).__name__
        raise JobError(f"{who}: aggregate_model() returned {what}; an FLModel with params belongs there")
    flat, structure = flatten(made.params)
    diff = made.params_type is ParamsType.DIFF
    if base is None:
        if diff:
            raise JobError(f"{who} returned DIFF params in a round without a global model: FULL ones belong there")
        arrays = {name: _checked(as_numpy(value), name, who) for name, value in flat.items()}
        return FLModel(params=unflatten(arrays, structure), metrics=made.metrics)
    ours, structure = flatten(base.params)
    if strange := next((name for name in flat if name not in ours), None):
        raise LayoutError(f"{who} returned a tensor {strange!r}, which is not in the model")
    params = {name: _next_value(name, value, flat.get(name), who, diff) for name, value in ours.items()}
    return FLModel(params=unflatten(params, structure), metrics=made.metrics)


def _next_value(name: str, base: Any, made: Any, who: str, diff: bool) -> Any:
    if made is None:
        return as_numpy(base)
    (dtype, shape), (_, seen) = spec_of(base), spec_of(made)
    if seen != shape:
        raise LayoutError(f"{who} returned {name!r} as {list(seen)}; in the model it is {list(shape)}")
    value = as_numpy(made)
    kind = DTYPES[dtype].numpy
    if diff and dtype != "BOOL":
        value = as_numpy(base).astype(np.float64) + value.astype(np.float64)
    if is_int(dtype) and value.dtype.kind not in "iub":
        value = np.rint(_checked(value, name, who).astype(np.float64))
    with np.errstate(over="ignore"):  # what overflows is found as Inf
        return _checked(np.asarray(value).astype(kind, copy=False), name, who)


def _checked(array: Any, name: str, who: str) -> Any:
    if is_float(spec_of(array)[0]) and not bool(np.isfinite(array).all()):
        raise ValuesError(f"{who} returned a tensor {name!r} with NaN, Inf or values that its type cannot hold")
    return array


def weighted_metrics(plain_sides: list[Mapping[str, Any]]) -> tuple[dict[str, float], float, bool]:
    """Each numeric metric's mean over the results that have it, the sum of the weights, and whether they are equal.

    Weighted by ``NUM_STEPS_CURRENT_ROUND`` where all results have it as a positive number, else all alike: what the
    weights mean is the aggregator's affair. Exact sums, rounded once.
    """
    steps = [_steps(plain) for plain in plain_sides]
    equal = any(step is None for step in steps)
    weights = [Fraction(1) if equal or step is None else step for step in steps]
    sums: dict[str, list[Fraction]] = {}
    for plain, weight in zip(plain_sides, weights, strict=True):
        for name, value in cast("Mapping[str, Any]", plain.get("metrics") or {}).items():
            if isinstance(value, int | float) and np.isfinite(value):
                total = sums.setdefault(name, [Fraction(0), Fraction(0)])
                total[0] += weight * Fraction(value)
                total[1] += weight
    means = {name: float(total / weight) for name, (total, weight) in sorted(sums.items())}
    return means, float(sum(weights, Fraction(0))), equal


def _steps(plain: Mapping[str, Any]) -> Fraction | None:
    value = cast("Mapping[str, Any]", plain.get("meta") or {}).get(WEIGHT_KEY)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
        return None
    return Fraction(value)
