"""What a fold counts beside tensors: results, weights, metric sums; all exact, order-free and invertible.

A result's weight is ``meta["NUM_STEPS_CURRENT_ROUND"]`` times its site's aggregation weight, rounded once to a float64
and from then on exact: an integer in units of 2^-120. Either every result of a round has the key, or none has; without
it each counts as one step. There is no silent default.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple, cast

import structlog

from .errors import FoldError, MixedError, WeightError
from .foldplan import MAX_WEIGHT, MIN_WEIGHT, FoldPlan, Kind
from .intsum import WEIGHT_BITS

log = structlog.get_logger(__name__)

#: Different metric names that one fold takes.
MAX_METRICS: Final = 4096
MAX_METRIC_NAME: Final = 512
#: Bits of a metric's exact sum: far more than any sum of float64 values or 64-bit integers needs.
MAX_METRIC_BITS: Final = 4096
_SHOWN_SITES: Final = 8
_UNIT: Final = 1 << WEIGHT_BITS


class Contribution(NamedTuple):
    """A result's plain side as the fold counts it.

    Attributes:
        site: who sent it.
        kind: FULL or DIFF; None for a result without tensors (metrics only).
        weight: the weight in force, a float64.
        weighted: whether the result named its steps.
        metrics: numeric metrics, exact.
        units: the weight as an integer in units of 2^-120: exact.
    """

    site: str
    kind: Kind | None
    weight: float
    weighted: bool
    metrics: tuple[tuple[str, Fraction], ...]
    units: int


@dataclass(slots=True)
class MetricSum:
    """A metric over the results that have it: the weighted sum, the weights' sum (2^-120), and how many there are."""

    total: Fraction
    weight: int
    count: int


def read_contribution(plan: FoldPlan, site: str, plain: Mapping[str, Any]) -> Contribution:
    """The contribution of a result, out of its plain side.

    Args:
        plan: the round's plan.
        site: who sent it.
        plain: FLModel's plain side: ``params_type``, ``metrics``, ``meta``; other keys do not matter.

    Raises:
        WeightError: a number of steps that is no number, not positive, or absurd.
        FoldError: an unknown params_type, or too many or too long metric names.
    """
    kind = plain.get("params_type")
    kind = getattr(kind, "value", kind)
    if kind not in ("FULL", "DIFF", None):
        raise FoldError(f"result of {site} with params_type {kind!r}; FULL or DIFF belongs there")
    meta: Any = plain.get("meta") or {}
    metrics: Any = plain.get("metrics") or {}
    if not isinstance(meta, Mapping) or not isinstance(metrics, Mapping):
        raise FoldError(f"result of {site} with meta or metrics that are no map")
    weighted = plan.weight_key in meta
    weight = _weight(plan, site, cast("Any", meta)[plan.weight_key] if weighted else 1)
    numerator, denominator = weight.as_integer_ratio()
    units = numerator << (WEIGHT_BITS - denominator.bit_length() + 1)
    return Contribution(site, kind, weight, weighted, _metrics(site, cast("Mapping[Any, Any]", metrics)), units)


def _weight(plan: FoldPlan, site: str, steps: Any) -> float:
    key = plan.weight_key
    if type(steps) in (int, float) and MIN_WEIGHT <= steps <= MAX_WEIGHT and site not in plan.aggregation_weights:
        return float(steps)  # as it comes out below, where exact fractions take longer than adding a small model
    if isinstance(steps, bool) or not isinstance(steps, numbers.Real):
        raise WeightError(f"{key} of {site} is {steps!r} ({type(steps).__name__}); a positive number belongs there")
    if not _is_finite(steps) or _fraction(steps) <= 0:
        raise WeightError(
            f"{key} of {site} is {steps!r}; it must be positive: a site without steps must not send a result"
        )
    exact = _fraction(steps) * Fraction(plan.aggregation_weights.get(site, 1))
    if not MIN_WEIGHT <= exact <= MAX_WEIGHT:
        raise WeightError(f"weight of {site} is {steps!r} x its aggregation weight; 2^-64 to 2^64 is allowed")
    return float(exact)


def _metrics(site: str, metrics: Mapping[Any, Any]) -> tuple[tuple[str, Fraction], ...]:
    if len(metrics) > MAX_METRICS:
        raise FoldError(f"result of {site} with {len(metrics)} metrics; at most {MAX_METRICS}")
    out: list[tuple[str, Fraction]] = []
    for name, value in metrics.items():
        if not isinstance(name, str) or len(name) > MAX_METRIC_NAME:
            raise FoldError(
                f"result of {site} with a metric name that is no text of at most {MAX_METRIC_NAME} characters"
            )
        exact = _number(value)
        if exact is not None:
            out.append((name, exact))
    return tuple(out)


def _number(value: Any) -> Fraction | None:
    """A metric's exact value; None for what has none (text, lists, NaN, Inf)."""
    if not isinstance(value, numbers.Real) or not _is_finite(value):
        return None
    exact = _fraction(value)
    return exact if exact.numerator.bit_length() <= MAX_METRIC_BITS // 4 else None


def _is_finite(value: numbers.Real) -> bool:
    return isinstance(value, numbers.Integral) or math.isfinite(value)


def _fraction(value: numbers.Real) -> Fraction:
    # through int and float: numpy's integers pass for Python's, and would wrap
    return Fraction(int(value) if isinstance(value, numbers.Integral) else float(value))


def ignored_metrics(plain: Mapping[str, Any]) -> list[str]:
    """Names of metrics that are no finite numbers and so are left out."""
    metrics = cast("Mapping[Any, Any]", plain.get("metrics") or {})
    return [str(name) for name, value in metrics.items() if _number(value) is None]


class Tally:
    """Counts and exact sums over the results of a fold."""

    def __init__(self) -> None:
        self.count = 0
        #: the sum of all weights, in units of 2^-120
        self.weight = 0
        #: how many results have a weight in [2^(e-1), 2^e), by e
        self.sizes: dict[int, int] = {}
        self.metrics: dict[str, MetricSum] = {}
        self.kind: Kind | None = None
        #: how many results have a kind; the others hold metrics alone
        self.typed = 0
        self.weighted: bool | None = None
        self._sites: list[str] = []  # a few who set kind and weighted, to be named in errors

    @property
    def weight_sum(self) -> Fraction:
        """The sum of the weights."""
        return Fraction(self.weight, _UNIT)

    @property
    def equal(self) -> bool:
        """Whether no result named its steps, so that all count alike (but for aggregation weights)."""
        return self.weighted is False

    def means(self) -> dict[str, float]:
        """Each metric's weighted mean over the results that have it."""
        return {
            name: _to_float(metric.total * _UNIT / metric.weight)
            for name, metric in sorted(self.metrics.items())
            if metric.weight
        }

    def largest_weight(self) -> float:
        """A bound on the largest weight: the power of two above it; 0 without results."""
        return math.ldexp(1.0, max(self.sizes)) if self.sizes else 0.0

    def check_kind(self, kind: Kind | None, weighted: bool, who: str) -> None:
        """Refuse what may not be added to the results that are here.

        Raises:
            MixedError: FULL and DIFF in one round, or some results with steps and some without.
        """
        if None not in (kind, self.kind) and kind != self.kind:
            raise MixedError(
                f"result of {who} is {kind}, but those of {self._examples()} are {self.kind}:"
                " all sites of a round must send the same params_type"
            )
        if self.weighted is not None and weighted != self.weighted:
            have, lack = (who, self._examples()) if weighted else (self._examples(), who)
            raise MixedError(
                f"{have} sent a number of steps and {lack} did not: either all results of a round carry"
                " NUM_STEPS_CURRENT_ROUND in meta, or none does"
            )

    def add(self, contribution: Contribution) -> None:
        """Count a result.

        Raises:
            FoldError: as `check_kind`, or more metric names than a fold takes.
        """
        self.check_kind(contribution.kind, contribution.weighted, contribution.site)
        fresh = [name for name, _ in contribution.metrics if name not in self.metrics]
        if fresh and len(self.metrics) + len(fresh) > MAX_METRICS:
            raise MixedError(f"over {MAX_METRICS} different metric names in a round; sites must use the same names")
        self.kind, self.weighted = self.kind or contribution.kind, contribution.weighted
        self._show([contribution.site])
        self._count(contribution, 1)

    def remove(self, contribution: Contribution) -> None:
        """Take a result's count out again."""
        self._count(contribution, -1)
        self._forget()

    def _count(self, contribution: Contribution, sign: int) -> None:
        units = sign * contribution.units
        self.count += sign
        self.typed += sign * (contribution.kind is not None)
        self.weight += units
        add_to(self.sizes, math.frexp(contribution.weight)[1], sign)
        for name, value in contribution.metrics:
            self._count_metric(name, value * Fraction(units, _UNIT), units, sign)

    def _count_metric(self, name: str, total: Fraction, weight: int, count: int) -> None:
        metric = self.metrics.setdefault(name, MetricSum(Fraction(0), 0, 0))
        metric.total += total
        metric.weight += weight
        metric.count += count
        if not metric.count:
            del self.metrics[name]

    def combine(self, other: Tally, sign: int = 1) -> None:
        """Add another tally, or take it out with ``sign`` -1.

        Raises:
            FoldError: as `add`.
        """
        if other.weighted is None:
            return
        self.check_kind(other.kind, other.weighted, other._examples())
        if len(self.metrics.keys() | other.metrics.keys()) > MAX_METRICS:
            raise FoldError(f"over {MAX_METRICS} different metric names in a round; sites must use the same names")
        self.kind, self.weighted = self.kind or other.kind, other.weighted
        self._show(other._sites)
        self.count += sign * other.count
        self.typed += sign * other.typed
        self.weight += sign * other.weight
        for size, number in other.sizes.items():
            add_to(self.sizes, size, sign * number)
        for name, metric in other.metrics.items():
            self._count_metric(name, sign * metric.total, sign * metric.weight, sign * metric.count)
        self._forget()

    def _forget(self) -> None:
        """What the results that were taken out said of the round goes with the last of them."""
        if not self.typed:
            self.kind = None
        if not self.count:
            self.weighted = None
            self._sites.clear()

    @property
    def sites(self) -> list[str]:
        """A few of the sites that are in it: for messages only."""
        return list(self._sites)

    @sites.setter
    def sites(self, names: list[str]) -> None:
        self._sites = []
        self._show(names)

    def _show(self, names: list[str]) -> None:
        # the first by name, not by arrival: the same results make the same partial
        if len(self._sites) < _SHOWN_SITES or min(names, default="") < self._sites[-1]:
            self._sites = sorted({*self._sites, *names})[:_SHOWN_SITES]

    def _examples(self) -> str:
        shown = ", ".join(self._sites) or "others"
        more = self.count - len(self._sites)
        return f"{shown} and {more} more" if more > 0 and self._sites else shown


def add_to(counts: dict[int, int], key: int, number: int) -> None:
    """Add to a counter that forgets what is zero."""
    left = counts.get(key, 0) + number
    if left:
        counts[key] = left
    else:
        counts.pop(key, None)


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
