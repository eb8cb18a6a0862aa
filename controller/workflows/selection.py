"""Which model is the best, and when training may stop: options, and what is remembered of the rounds' scores.

A round's metrics score the model that its sites *received*: the one that the round before committed. So it is that
model which is kept as the best, and that model which meets a stop condition.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...serialization.errors import JobError

Mode = Literal["max", "min"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_MODES: dict[str, Mode] = {">=": "max", ">": "max", "<=": "min", "<": "min"}


@dataclass(frozen=True, slots=True)
class StopCondition:
    """A condition on one metric, such as ``accuracy >= 80``."""

    metric: str
    op: str
    value: float

    @staticmethod
    def parse(text: object) -> StopCondition:
        """Out of a name, an operator and a number with spaces between them.

        Raises:
            JobError: another shape, an unknown operator, or no finite number.
        """
        parts = text.split() if isinstance(text, str) else []
        shape = "'METRIC OP NUMBER' with spaces between, such as 'accuracy >= 80', belongs here"
        if len(parts) != 3:
            raise JobError(f"stop_cond={text!r}; {shape}")
        metric, op, number = parts
        if op not in _OPERATORS:
            raise JobError(f"stop_cond={text!r}: operator {op!r}; one of {', '.join(_OPERATORS)} belongs there")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise JobError(f"stop_cond={text!r}: {number!r} is not a finite number; {shape}")
        return StopCondition(metric, op, value)

    @property
    def mode(self) -> Mode | None:
        """The direction that the operator tells; None for ``=``."""
        return _MODES.get(self.op)

    def met(self, score: float | None) -> bool:
        """Whether a score fulfils it."""
        return score is not None and _OPERATORS[self.op](score, self.value)

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Selection:
    """How models are compared, and when to stop; `of` makes and checks it.

    Attributes:
        key_metric: the metric that compares models.
        mode: "max" where a larger score is better, "min" where a smaller one is.
        stop: the condition that ends training; None: none does.
        patience: rounds without a better score after which training ends; None: it does not.
    """

    key_metric: str = "accuracy"
    mode: Mode = "max"
    stop: StopCondition | None = None
    patience: int | None = None

    @staticmethod
    def of(key_metric: object, key_metric_mode: object, stop_cond: object, patience: object) -> Selection:
        """Out of a recipe's or a job folder's options.

        Raises:
            JobError: a value that is not allowed, or a direction that the stop condition contradicts.
        """
        if not isinstance(key_metric, str) or not key_metric.strip():
            raise JobError(f"key_metric={key_metric!r}; the name of a metric that sites send belongs here")
        stop = None if stop_cond is None else StopCondition.parse(stop_cond)
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
            raise JobError(f"patience={patience!r}; a whole number of rounds, at least 1, belongs here")
        told = stop.mode if stop is not None and stop.metric == key_metric else None
        if key_metric_mode not in ("max", "min", None):
            raise JobError(
                f"key_metric_mode={key_metric_mode!r}; 'max', 'min', or None (as stop_cond's operator says, else 'max')"
                " belongs here"
            )
        if None not in (key_metric_mode, told) and key_metric_mode != told:
            raise JobError(
                f"key_metric_mode={key_metric_mode!r}, but stop_cond={str(stop)!r} stops at a value that is then worse:"
                f" give {told!r}, or no key_metric_mode"
            )
        return Selection(key_metric, "min" if "min" in (key_metric_mode, told) else "max", stop, patience)

    def better(self, score: float, than: float | None) -> bool:
        """Whether a score is better than another, which may not be there yet."""
        return than is None or (score > than if self.mode == "max" else score < than)

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether a round's metrics fulfil the stop condition."""
        return self.stop is not None and self.stop.met(metrics.get(self.stop.metric))

    def unknown(self, metrics: Mapping[str, float]) -> list[str]:
        """The metrics that this needs and a round has not, as long as it has or needs any."""
        wanted = {self.stop.metric} if self.stop is not None else set[str]()
        if self.patience is not None or metrics:
            wanted.add(self.key_metric)
        return sorted(wanted - metrics.keys())


@dataclass(slots=True)
class Scores:
    """What is remembered of the rounds' scores; plain data, that goes through commits.

    Attributes:
        best: the best score of a model that was trained; ``best_round`` committed it.
        leading: the best score at all, the initial model's too, and for how many rounds none was better: patience.
        stopped: why training has ended early; "" while it goes on.
    """

    best: float | None = None
    best_round: int | None = None
    leading: float | None = None
    stale: int = 0
    stopped: str = ""

    @staticmethod
    def of(meta: Mapping[str, Any]) -> Scores:
        """As `to_meta` left it."""
        return Scores(
            meta.get("best"),
            meta.get("best_round"),
            meta.get("leading"),
            int(meta.get("stale") or 0),
            str(meta.get("stopped") or ""),
        )

    def to_meta(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "best": self.best,
            "best_round": self.best_round,
            "leading": self.leading,
            "stale": self.stale,
            "stopped": self.stopped,
        }

    def note(self, selection: Selection, metrics: Mapping[str, float], round: int) -> bool:
        """Take in a round's metrics: whether the model that its sites received is the best so far.

        The model that no round has trained never is. `stopped` says whether there is an end to it.
        """
        score = metrics.get(selection.key_metric)
        best = score is not None and round > 0 and selection.better(score, self.best)
        if best:
            self.best, self.best_round = score, round - 1
        if score is not None:
            if selection.better(score, self.leading):
                self.leading, self.stale = score, 0
            else:
                self.stale += 1
        self.stopped = self._reason(selection, metrics, round)
        return best

    def _reason(self, selection: Selection, metrics: Mapping[str, float], round: int) -> str:
        stop = selection.stop
        if stop is not None and stop.met(score := metrics.get(stop.metric)):
            whose = f"the model of round {round - 1}" if round else "the initial model"
            return f"stop_cond {stop}: {whose} has {stop.metric} = {score:g}"
        if selection.patience is not None and self.stale >= selection.patience:
            return f"patience {selection.patience}: no {selection.key_metric} better than {self.leading:g}"
        return ""
