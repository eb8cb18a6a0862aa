"""The running state of a fold a tensor: its sum, its denominator, and the exact totals that judge the scale.

Beside the sum proper each tensor has four integers: how many results had it, the sum of their weights, the total of
``w * max|x|`` and how many were over (too large for the scale, and so in the totals but not in the sum). They are
exact, order-free and invertible, and whether the scale was good is decided on them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, is_float, is_int
from .elements import Bytes, Elements, Floats, Ints, Scratch, scan
from .fixedpoint import FixedSums, exact_units, exponent_from_total, in_range, is_fine, is_over
from .floatsums import FloatSums
from .foldplan import FoldPlan, Kind
from .intsum import WEIGHT_BITS, Digits, IntSum, weight_digits
from .tally import Contribution


@dataclass(slots=True)
class Record:
    """What is known of one tensor's sum.

    Attributes:
        count: results that had the tensor.
        weight: the sum of their weights, in units of 2^-120.
        total: the sum of w * max|x|, in units of 2^-1074; 0 for integer tensors.
        over: results that were too large for the scale.
    """

    count: int = 0
    weight: int = 0
    total: int = 0
    over: int = 0

    def add(self, other: Record, sign: int = 1) -> None:
        """Add another record, or take it out with ``sign`` -1."""
        self.count += sign * other.count
        self.weight += sign * other.weight
        self.total += sign * other.total
        self.over += sign * other.over


class Sums:
    """All sums of a fold, by the index of the tensor in the plan."""

    def __init__(self, plan: FoldPlan, spare: NDArray[Any] | None = None) -> None:
        self._plan = plan
        self.folded = plan.folded()
        dtypes = tuple(t.dtype for t in plan.tensors)
        active = zip(plan.tensors, self.folded, strict=True)
        sizes = tuple(t.items if folded and is_float(t.dtype) else 0 for t, folded in active)
        self.floats: FixedSums | FloatSums = (FixedSums if plan.exact else FloatSums)(dtypes, sizes, spare)
        self.ints: dict[int, IntSum] = {}
        self.records = [Record() for _ in plan.tensors]

    @property
    def nbytes(self) -> int:
        """Memory of the float sums in bytes, once results are in."""
        return self.floats.sums.nbytes

    def use(self, kind: Kind) -> None:
        """Take the scales of this kind of results; before the first addition."""
        self.floats.exponents = self._plan.exponents(kind)

    def int_sum(self, index: int) -> IntSum:
        """The sum of an integer tensor."""
        if index not in self.ints:
            tensor = self._plan.tensors[index]
            self.ints[index] = IntSum(tensor.dtype, tensor.items)
        return self.ints[index]

    def record_of(self, index: int, contribution: Contribution, largest: float) -> Record:
        """What one result with this max|x| adds to a tensor's record."""
        tensor = self._plan.tensors[index]
        if not is_float(tensor.dtype) or not self._plan.exact:
            return Record(1, contribution.units)
        over = is_over(largest, contribution.weight, self.floats.exponents[index])
        return Record(1, contribution.units, exact_units(largest * contribution.weight), int(over))

    def settle(self, index: int, contribution: Contribution, largest: float, *, subtract: bool = False) -> None:
        """Count a result of which all elements of a tensor were added (or taken out)."""
        self.records[index].add(self.record_of(index, contribution, largest), -1 if subtract else 1)
        if isinstance(self.floats, FloatSums):
            self.floats.settle(index, contribution.weight)

    def better_scales(self, kind: Kind) -> dict[int, int]:
        """New exponents for the tensors whose scale was too large or too small for what came; empty when all were good.

        Too large: a result was over, or the sum could have wrapped. Too small: rounding could show beside the results'
        magnitude, or for DIFF beside the model's, which the sum is added to.
        """
        if not self._plan.exact:
            return {}
        out: dict[int, int] = {}
        for index, record in enumerate(self.records):
            if not record.total:
                continue
            exponent = self.floats.exponents[index]
            better = exponent_from_total(record.total)
            if record.over or not in_range(record.total, exponent):
                out[index] = better
                continue
            seen = record.total
            if kind == "DIFF":
                seen = max(seen, (exact_units(self._plan.base_max[index]) * record.weight) >> WEIGHT_BITS)
            if not is_fine(seen, record.count, exponent) and better > exponent:
                out[index] = better
        return out

    def magnitude(self, index: int) -> float:
        """The weighted mean of the results' max|x|; 0 where there are none."""
        record = self.records[index]
        if not record.total:
            return 0.0
        # units of 2^-1074 over units of 2^-120
        return record.total / (record.weight << (1074 - WEIGHT_BITS))

    def mean(self, index: int, start: int, out: Floats, scratch: Scratch | None = None) -> None:
        """Write the weighted mean of a float tensor's elements from ``start`` on."""
        record = self.records[index]
        self.floats.mean(index, start, record.count, record.weight / (1 << WEIGHT_BITS), out, scratch)

    def is_float(self, index: int) -> bool:
        """Whether a tensor is one of floats."""
        return is_float(self._plan.tensors[index].dtype)

    def mean_of(self, index: int) -> Floats:
        """A whole float tensor's weighted mean, in its shape."""
        out = np.empty(self._plan.tensors[index].items, np.float64)
        self.mean(index, 0, out)
        return out.reshape(self._plan.tensors[index].shape)

    def combine(self, index: int, record: Record, sums: list[Ints], lowest: int, *, subtract: bool = False) -> None:
        """Add (or take out) a partial's tensor: a float tensor's raw sums, or an integer tensor's limbs."""
        if not isinstance(self.floats, FixedSums):
            raise TypeError("float sums cannot be combined")
        self.records[index].add(record, -1 if subtract else 1)
        if is_int(self._plan.tensors[index].dtype):
            self.int_sum(index).combine(lowest, sums, subtract=subtract)
        elif sums:
            self.floats.combine(index, sums[0], subtract=subtract)


class Addition:
    """The sink that adds one result to the sums, or takes it out."""

    __slots__ = ("_begun", "_checked", "_contribution", "_digits", "_plan", "_subtract", "_sums")

    def __init__(
        self, plan: FoldPlan, sums: Sums, contribution: Contribution, *, subtract: bool = False, checked: bool = False
    ) -> None:
        self._plan = plan
        self._sums = sums
        self._contribution = contribution
        self._digits: Digits = ()
        self._subtract = subtract
        self._checked = checked  # a `Scan` has been over the values
        self._begun: set[int] = set()
        sums.floats.sums.ready()  # so that threads find the array there

    def add(self, index: int, start: int, raw: Bytes, elements: Elements | None, scratch: Scratch) -> tuple[float, int]:
        """Add elements from ``start`` on: max|x|, and how many were added; fewer than given before one that is bad."""
        floats, weight = self._sums.floats, self._contribution.weight
        if elements is not None:
            if isinstance(floats, FloatSums):
                return floats.add(index, start, raw, weight, elements, scratch, checked=self._checked)
            return floats.add(index, start, raw, weight, subtract=self._subtract, elements=elements, scratch=scratch)
        total = self._sums.int_sum(index)
        if index not in self._begun:
            self._digits = self._digits or weight_digits(self._contribution.units)
            total.begin(self._digits)
            self._begun.add(index)
        values = raw.view(DTYPES[self._plan.tensors[index].dtype].numpy)
        total.add(start, values, self._digits, subtract=self._subtract)
        return 0.0, values.size


class Scan:
    """The sink that adds nothing and only looks for NaN, Inf and values beyond 2^900."""

    __slots__ = ("_plan",)

    def __init__(self, plan: FoldPlan) -> None:
        self._plan = plan

    def add(self, index: int, start: int, raw: Bytes, elements: Elements | None, scratch: Scratch) -> tuple[float, int]:
        """As `Addition.add`, without adding."""
        if elements is None:
            return 0.0, raw.size // DTYPES[self._plan.tensors[index].dtype].itemsize
        return scan(start, raw, elements, scratch)
