"""The plan of a round's fold: the model's layout and one scale a tensor, fixed before the first result is added.

Everyone who adds results of a round (the controller, pool executors) adds by the same plan, or their sums could not be
put together. The broker journals it with the gather; it travels as a blob. Scales come from magnitudes: in the first
round the global model's, later those that the round before had (`Magnitudes`), FULL and DIFF apart.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast

import numpy as np

from .codec import pack, show, unpack
from .digest import digest_buffers
from .dtypes import DTYPES, is_float, is_int
from .elements import MAX_VALUE, Scratch, elements_of, scan
from .envelope import Buffer
from .errors import CodecError, FoldError, LayoutError, ValuesError, WeightError
from .fixedpoint import Q_MAX, Q_MIN, RESOLUTION_BITS, RESULT_BITS, exponent_for
from .header import MAX_DATA_BYTES, MAX_RANK, MAX_TENSORS
from .narrowing import CODED
from .tensors import raw_bytes, spec_of

Kind = Literal["FULL", "DIFF"]

#: The meta key that holds a result's number of steps, which is its weight.
WEIGHT_KEY: Final = "NUM_STEPS_CURRENT_ROUND"
#: The largest weight that the first round expects. With the headroom a weight of 10^6 may still come with four times
#: the expected magnitude; and with all weights 1 there are 28 bits below that, so that no error reaches 2^-28.
FIRST_WEIGHT_CAP: Final = 2.0**18
#: With more results a total of 2^51 units would be under 2^24 units a result, and no scale good.
MAX_RESULTS: Final = 1 << (RESULT_BITS - RESOLUTION_BITS - 1)
MAX_PLAN_BYTES: Final = 256 * 1024 * 1024
#: Weights outside are absurd; between them the arithmetic is exact.
MIN_WEIGHT: Final = 2.0**-64
MAX_WEIGHT: Final = 2.0**64

_FORMAT: Final = "fedloom-fold/1"
#: That of a plan with a codec: a party that knows none must not fold by it.
_CODED_FORMAT: Final = "fedloom-fold/2"
#: A tensor's expected magnitude in the first round is at least this part of the model's largest, and this at all.
_LEAST_PART: Final = 2.0**-6
_LEAST: Final = 2.0**-10


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """A tensor of the global model: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """What a finished round says about the next one's scales.

    Attributes:
        kind: whether the results were FULL or DIFF.
        results: the weighted mean of the results' max|x| a tensor; 0 for one that no result had.
        base: max|x| a tensor of the new global model.
        weight_cap: the largest weight to expect next: four times this round's, or 1 where all weights are equal.
    """

    kind: Kind
    results: tuple[float, ...]
    base: tuple[float, ...]
    weight_cap: float


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """How a round's results are added. Immutable; equal plans have equal bytes and digests.

    Attributes:
        tensors: the global model's layout, sorted by name.
        q_full, q_diff: a tensor's scale for FULL and for DIFF results is 2^q.
        r_full, r_diff: the magnitudes that these were chosen for, R.
        base_max: max|x| of the global model a tensor.
        weight_cap: the largest weight that the scales were chosen for. A larger one is allowed.
        tasks: the most results that the scales were chosen for. More are allowed.
        aggregation_weights: a site's factor on its weight; 1 for a site that is not named.
        exclude: tensors of which the name holds a match of this pattern keep their global values; "" excludes none.
        weight_key: the meta key of a result's number of steps.
        exact: False for a float32 running mean, which depends on the order and has no partials.
        codec: in which F32 and F64 tensors of results may come beside their own type; "" for none.
    """

    tensors: tuple[PlanTensor, ...]
    q_full: tuple[int, ...]
    q_diff: tuple[int, ...]
    r_full: tuple[float, ...]
    r_diff: tuple[float, ...]
    base_max: tuple[float, ...]
    weight_cap: float = FIRST_WEIGHT_CAP
    tasks: int = 1
    aggregation_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    exclude: str = ""
    weight_key: str = WEIGHT_KEY
    exact: bool = True
    codec: str = ""

    def __post_init__(self) -> None:
        sites: Mapping[Any, Any] = self.aggregation_weights
        for site, weight in sites.items():
            if type(weight) not in (int, float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise WeightError(
                    f"aggregation weight {weight!r} of {site}; a positive number from 2^-64 to 2^64 belongs there."
                    " To leave a site out, give the round's sites without it"
                )
        try:
            re.compile(self.exclude)
        except (re.error, OverflowError, RecursionError) as error:
            raise FoldError(f"exclude pattern {self.exclude!r} is not a regular expression: {error}") from None
        if not 0.0 < self.weight_cap < math.inf:
            raise FoldError(f"weight cap {self.weight_cap}; a positive number belongs there")
        if not 1 <= self.tasks <= MAX_RESULTS:
            raise FoldError(f"a round of {self.tasks} tasks; 1 to {MAX_RESULTS} can be folded")

    @staticmethod
    def first(
        base: Mapping[str, Any],
        *,
        tasks: int,
        weight_cap: float = FIRST_WEIGHT_CAP,
        aggregation_weights: Mapping[str, float] | None = None,
        exclude: str | None = None,
        weight_key: str = WEIGHT_KEY,
        exact: bool = True,
        codec: str = "",
    ) -> FoldPlan:
        """The plan of a job's first round, from the global model alone.

        A tensor's expected magnitude is its own, at least 2^-6 of the model's and 2^-10: what starts at zero (biases,
        LoRA) will not stay there.

        Args:
            base: the global model, flat: name to array (numpy or torch). Its values are looked at once.
            tasks: the most results that the round may have.
            weight_cap: the largest weight to expect.
            aggregation_weights, exclude, weight_key, exact, codec: as the attributes.

        Raises:
            LayoutError: a tensor that cannot be averaged (complex numbers), or no tensors.
            ValuesError: NaN or Inf in the global model.
            FoldError: a bad option.
        """
        if not base:
            raise LayoutError("a model without tensors; there is nothing to aggregate")
        scratch = Scratch()
        tensors = tuple(_plan_tensor(name, base[name]) for name in sorted(base))
        base_max = tuple(_max_of(tensor, base[tensor.name], scratch) for tensor in tensors)
        least = max(_LEAST_PART * max(base_max), _LEAST)
        magnitudes = tuple(max(value, least) for value in base_max)
        return FoldPlan(
            tensors,
            q_full=(),
            q_diff=(),
            r_full=magnitudes,
            r_diff=magnitudes,
            base_max=base_max,
            weight_cap=weight_cap,
            aggregation_weights=dict(aggregation_weights or {}),
            exclude=exclude or "",
            weight_key=weight_key,
            exact=exact,
            codec=codec,
        ).sized(tasks)

    def sized(self, tasks: int) -> FoldPlan:
        """The same plan for a round of so many tasks, with the scales chosen anew from its magnitudes."""
        return replace(
            self,
            tasks=tasks,
            q_full=tuple(exponent_for(r, self.weight_cap, tasks) for r in self.r_full),
            q_diff=tuple(exponent_for(r, self.weight_cap, tasks) for r in self.r_diff),
        )

    def next(self, magnitudes: Magnitudes, *, tasks: int | None = None) -> FoldPlan:
        """The next round's plan, from what this round found.

        A tensor that no result had, and the other kind, keep the magnitudes they have.

        Raises:
            FoldError: magnitudes of another model.
        """
        if not len(magnitudes.results) == len(magnitudes.base) == len(self.tensors):
            raise FoldError(f"magnitudes of {len(magnitudes.results)} tensors for a plan of {len(self.tensors)}")
        known = self.r_full if magnitudes.kind == "FULL" else self.r_diff
        found = tuple(new or old for new, old in zip(magnitudes.results, known, strict=True))
        return replace(
            self,
            r_full=found if magnitudes.kind == "FULL" else self.r_full,
            r_diff=found if magnitudes.kind == "DIFF" else self.r_diff,
            base_max=magnitudes.base,
            weight_cap=magnitudes.weight_cap,
        ).sized(tasks or self.tasks)

    def rescaled(self, kind: Kind, exponents: Mapping[int, int]) -> FoldPlan:
        """The same plan with other scales for some tensors (by index): what a round is folded again with."""
        old = self.exponents(kind)
        new = tuple(exponents.get(index, q) for index, q in enumerate(old))
        return replace(self, q_full=new) if kind == "FULL" else replace(self, q_diff=new)

    def exponents(self, kind: Kind) -> tuple[int, ...]:
        """q a tensor, for this kind of results."""
        return self.q_full if kind == "FULL" else self.q_diff

    def folded(self) -> tuple[bool, ...]:
        """Whether each tensor is averaged: numbers that the pattern does not exclude. Bools are carried over."""
        excluded = re.compile(self.exclude) if self.exclude else None
        return tuple(t.dtype != "BOOL" and not (excluded and excluded.search(t.name)) for t in self.tensors)

    @property
    def digest(self) -> str:
        """64 hex digits, equal for equal plans: the digest of `to_bytes`."""
        return digest_buffers([self.to_bytes()])

    def to_bytes(self) -> bytes:
        """The plan as a msgpack blob."""
        return pack(
            {
                "format": _CODED_FORMAT if self.codec else _FORMAT,
                "names": [t.name for t in self.tensors],
                "dtypes": [t.dtype for t in self.tensors],
                "shapes": [list(t.shape) for t in self.tensors],
                "q_full": np.asarray(self.q_full, "<i2").tobytes(),
                "q_diff": np.asarray(self.q_diff, "<i2").tobytes(),
                "r_full": np.asarray(self.r_full, "<f8").tobytes(),
                "r_diff": np.asarray(self.r_diff, "<f8").tobytes(),
                "base_max": np.asarray(self.base_max, "<f8").tobytes(),
                "weight_cap": float(self.weight_cap),
                "tasks": self.tasks,
                "sites": [[site, float(self.aggregation_weights[site])] for site in sorted(self.aggregation_weights)],
                "exclude": self.exclude,
                "weight_key": self.weight_key,
                "exact": self.exact,
            }
            | ({"codec": self.codec} if self.codec else {})
        )

    @staticmethod
    def from_bytes(data: Buffer) -> FoldPlan:
        """The plan out of `to_bytes`.

        Raises:
            CodecError: bytes that are no plan.
        """
        fields = _Fields(unpack(data, max_bytes=MAX_PLAN_BYTES))
        if fields.get("format", str) not in (_FORMAT, _CODED_FORMAT):
            raise CodecError(
                f"a fold plan of format {fields.get('format', str)!r}; this version reads {_FORMAT!r} and"
                f" {_CODED_FORMAT!r}"
            )
        tensors = fields.tensors()
        count = len(tensors)
        try:
            return FoldPlan(
                tensors,
                q_full=fields.exponents("q_full", count),
                q_diff=fields.exponents("q_diff", count),
                r_full=fields.magnitudes("r_full", count),
                r_diff=fields.magnitudes("r_diff", count),
                base_max=fields.magnitudes("base_max", count),
                weight_cap=fields.get("weight_cap", float),
                tasks=fields.get("tasks", int),
                aggregation_weights=fields.sites(),
                exclude=fields.get("exclude", str),
                weight_key=fields.get("weight_key", str),
                exact=fields.get("exact", bool),
                codec=fields.codec(),
            )
        except FoldError as error:
            raise CodecError(f"fold plan: {error}") from None


class _Fields:
    """A decoded map, read field by field with its types and bounds."""

    def __init__(self, data: Any) -> None:
        if type(data) is not dict:
            raise CodecError(f"fold plan: {type(data).__name__} where a map belongs")
        self._data = cast("dict[str, Any]", data)

    def get(self, name: str, kind: type[Any]) -> Any:
        value = self._data.get(name)
        if type(value) is not kind:
            raise CodecError(f"fold plan: {name} is a {type(value).__name__}; {kind.__name__} belongs there")
        return value

    def codec(self) -> str:
        if self.get("format", str) == _FORMAT:
            return ""
        codec: str = self.get("codec", str)
        if codec not in CODED:
            raise CodecError(f"fold plan: codec {show(codec)}; allowed are {', '.join(CODED)}")
        return codec

    def tensors(self) -> tuple[PlanTensor, ...]:
        names, dtypes, shapes = (cast("list[Any]", self.get(key, list)) for key in ("names", "dtypes", "shapes"))
        if not 0 < len(names) == len(dtypes) == len(shapes) <= MAX_TENSORS:
            raise CodecError(f"fold plan: {len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes")
        tensors = tuple(_tensor(*entry) for entry in zip(names, dtypes, shapes, strict=True))
        if any(a.name >= b.name for a, b in itertools.pairwise(tensors)):
            raise CodecError("fold plan: tensors are not sorted by name, or one is there twice")
        return tensors

    def exponents(self, name: str, count: int) -> tuple[int, ...]:
        values = self._array(name, "<i2", count)
        if any(not Q_MIN <= q <= Q_MAX for q in values):
            raise CodecError(f"fold plan: {name} is outside {Q_MIN} to {Q_MAX}")
        return values

    def magnitudes(self, name: str, count: int) -> tuple[float, ...]:
        values = self._array(name, "<f8", count)
        if any(not 0.0 <= value <= MAX_VALUE for value in values):
            raise CodecError(f"fold plan: {name} holds a magnitude outside 0 to 2^900")
        return values

    def sites(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for entry in self.get("sites", list):
            match entry:
                case [str() as site, float() as weight] if site not in out:
                    out[site] = weight
                case _:
                    raise CodecError("fold plan: sites are pairs of a name and a weight, each name once")
        return out

    def _array(self, name: str, kind: str, count: int) -> tuple[Any, ...]:
        data: bytes = self.get(name, bytes)
        dtype = np.dtype(kind)
        if len(data) != count * dtype.itemsize:
            raise CodecError(f"fold plan: {name} has {len(data)} bytes; {count * dtype.itemsize} belong there")
        return tuple(np.frombuffer(data, dtype).tolist())


def _tensor(name: Any, dtype: Any, shape: Any) -> PlanTensor:
    dims: Sequence[Any] = cast("Sequence[Any]", shape) if type(shape) is list else (None,)
    seen = f"tensor {show(name)} with dtype {show(dtype)} and shape {show(dims)}"
    if (
        type(name) is not str
        or type(dtype) is not str
        or dtype not in DTYPES
        or len(dims) > MAX_RANK
        or any(type(dim) is not int or not 0 <= dim <= MAX_DATA_BYTES for dim in dims)
    ):
        raise CodecError(f"fold plan: {seen}")
    tensor = PlanTensor(name, dtype, tuple(dims))
    if tensor.items * DTYPES[dtype].itemsize > MAX_DATA_BYTES:
        raise CodecError(f"fold plan: {seen} is too large")
    return tensor


def _plan_tensor(name: str, value: Any) -> PlanTensor:
    dtype, shape = spec_of(value)
    if not is_float(dtype) and not is_int(dtype) and dtype != "BOOL":
        raise LayoutError(
            f"tensor {name!r} is {dtype}, which cannot be averaged: store real and imaginary parts as floats"
        )
    return PlanTensor(name, dtype, shape)


def _max_of(tensor: PlanTensor, value: Any, scratch: Scratch) -> float:
    if not is_float(tensor.dtype) or not tensor.items:
        return 0.0
    raw = np.frombuffer(raw_bytes(value), np.uint8)
    largest, good = scan(0, raw, elements_of(tensor.dtype), scratch)
    if good < tensor.items:
        raise ValuesError(f"the global model's tensor {tensor.name!r} holds NaN, Inf or a value beyond 2^900")
    return largest
