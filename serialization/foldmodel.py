"""From a fold's sums to the new global model: one division and one rounding an element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .crew import each, threads_for
from .dtypes import DTYPES, is_float
from .elements import BLOCK, Scratch, elements_of, largest_magnitude, largest_single
from .errors import LayoutError, ValuesError
from .foldplan import FoldPlan, Kind, PlanTensor
from .model import FLModel, ParamsType, flatten, unflatten
from .segments import STRETCH
from .sums import Sums
from .tensors import as_numpy, raw_bytes, spec_of

Array = NDArray[Any]

#: Writes elements of one tensor from a place on, in the calling thread's scratch; their max|x|.
Fill = Callable[[Scratch, int, Array], float]

#: Types that are not rounded from a float32 master, as they hold at least as much.
_WIDE: Final = frozenset({"F32", "F64"})


@dataclass(frozen=True, slots=True)
class NewModel:
    """A finished aggregate.

    Attributes:
        model: FULL, numpy arrays.
        largest: max|x| a float tensor, in the plan's order; 0 for others.
        master: float32 values of the tensors whose type is narrower.
    """

    model: FLModel
    largest: tuple[float, ...]
    master: dict[str, Array]


def build_model(rounding: Rounding) -> NewModel:
    """The new model, in memory.

    Raises:
        ValuesError: a value that a tensor's type cannot hold.
    """
    for index in rounding.fills:
        rounding.make(index)
    return NewModel(rounding.model(rounding.arrays), tuple(rounding.largest), rounding.master)


def _check_base(plan: FoldPlan, flat: Mapping[str, Any], master: Mapping[str, Any]) -> None:
    names = {tensor.name for tensor in plan.tensors}
    if names != set(flat):
        odd = sorted(names ^ set(flat))
        raise LayoutError(
            f"the base is not the plan's model: {odd[0]!r} and {len(odd) - 1} more are in one of them only"
        )
    for tensor in plan.tensors:
        seen = spec_of(flat[tensor.name])
        if seen != (tensor.dtype, tensor.shape):
            raise LayoutError(
                f"the base's {tensor.name!r} is {seen[0]}{list(seen[1])}, not {tensor.dtype}{list(tensor.shape)}"
            )
        if tensor.name in master and spec_of(master[tensor.name]) != ("F32", tensor.shape):
            raise LayoutError(f"the master of {tensor.name!r} is not F32{list(tensor.shape)}")


class Rounding:
    """How the sums become the new model's tensors: those that are no mean of floats at once, the others when asked.

    Attributes:
        plan: the round's plan.
        base: the base's tensors, flat.
        arrays: tensors by name, as far as they are made.
        fills: by the tensor's index, what writes elements of a mean of floats; from several threads at a time.
        largest: max|x| a tensor, of those that are made.
        master: float32 values of the made tensors whose type is narrower.

    Raises:
        LayoutError: a base or a master that is not the plan's model.
        ValuesError: a value that a tensor's type cannot hold.
    """

    def __init__(
        self,
        plan: FoldPlan,
        sums: Sums,
        kind: Kind | None,
        base: FLModel | Mapping[str, Any],
        master: Mapping[str, Any],
    ) -> None:
        self.plan = plan
        self._sums = sums
        self._diff = kind == "DIFF"
        self._given = base if isinstance(base, FLModel) else FLModel(params=dict(base))
        self.base, self._spec = flatten(self._given.params if self._given.params is not None else {})
        _check_base(plan, self.base, master)
        self._scratches = [Scratch()]
        self.arrays: dict[str, Array] = {}
        self.fills: dict[int, Fill] = {}
        self.largest = [0.0] * len(plan.tensors)
        self.master: dict[str, Array] = {}
        for index, tensor in enumerate(plan.tensors):
            name = tensor.name
            if not sums.records[index].count:
                self.arrays[name] = as_numpy(self.base[name])
                self.largest[index] = plan.base_max[index]
                if name in master:
                    self.master[name] = as_numpy(master[name])
            elif is_float(tensor.dtype):
                self.fills[index] = self._fill(index, tensor, self.base[name], master.get(name))
            else:
                self.arrays[name] = self.ints(index, tensor, self.base[name])

    def model(self, arrays: Mapping[str, Array]) -> FLModel:
        """The model with these tensors, in the base's order and nesting."""
        given = self._given
        return FLModel(
            params_type=ParamsType.FULL,
            params=unflatten({name: arrays[name] for name in self.base}, self._spec),
            start_round=given.start_round,
            current_round=given.current_round,
            total_rounds=given.total_rounds,
        )

    def is_wide(self, index: int) -> bool:
        """Whether a float tensor is written as it is, and not rounded from a float32 master."""
        return self.plan.tensors[index].dtype in _WIDE

    def make(self, index: int) -> None:
        """Make a whole mean of floats.

        Raises:
            ValuesError: a value that its type cannot hold.
        """
        tensor, fill = self.plan.tensors[index], self.fills[index]
        wide = self.is_wide(index)
        out: Array = np.empty(tensor.items, DTYPES[tensor.dtype].numpy if wide else np.float32)
        threads = threads_for(out.nbytes)
        self._scratches += [Scratch() for _ in range(threads - len(self._scratches))]

        def part(worker: int, start: int) -> float:
            return fill(self._scratches[worker], start, out[start : start + STRETCH])

        self.largest[index] = max(each(range(0, tensor.items, STRETCH), part, threads), default=0.0)
        shaped = out.reshape(tensor.shape)
        self.arrays[tensor.name] = shaped if wide else shaped.astype(DTYPES[tensor.dtype].numpy)
        if not wide:
            self.master[tensor.name] = shaped

    def _fill(self, index: int, tensor: PlanTensor, base: Any, master: Any) -> Fill:
        source, dtype = (base, tensor.dtype) if master is None else (master, "F32")
        raw = np.frombuffer(raw_bytes(source), np.uint8) if self._diff and tensor.items else None
        elements = elements_of(dtype)
        most = _largest_of(tensor.dtype)
        self._sums.floats.sums.view(index)  # no block is unwritten: a fill may begin within one

        def fill(scratch: Scratch, start: int, out: Array) -> float:
            largest = 0.0
            for first in range(start, start + out.size, BLOCK):
                target = out[first - start : first - start + BLOCK]
                block = scratch.doubles(target.size)
                self._sums.mean(index, first, block, scratch)
                if raw is not None:
                    part = raw[first * elements.itemsize : (first + target.size) * elements.itemsize]
                    np.add(block, elements.read(first, part, scratch), out=block)
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(target, block, casting="same_kind")
                magnitude = largest_magnitude(block) if target.dtype == np.float64 else largest_single(target)
                if not magnitude <= most:
                    raise ValuesError(
                        f"tensor {tensor.name!r} of the new model reaches {largest_magnitude(block)}, which"
                        f" {tensor.dtype} cannot hold: train with smaller steps, or in a wider type"
                    )
                largest = max(largest, magnitude)
            return largest

        return fill

    def ints(self, index: int, tensor: PlanTensor, base: Any) -> Array:
        """An integer tensor.

        Raises:
            ValuesError: a mean that its type cannot hold.
        """
        flat = as_numpy(base).reshape(-1) if self._diff else None
        try:
            mean = self._sums.int_sum(index).mean(0, tensor.items, self._sums.records[index].weight, flat)
        except ValuesError as error:
            raise ValuesError(f"tensor {tensor.name!r}: {error}") from None
        return mean.reshape(tensor.shape)


def _largest_of(dtype: str) -> float:
    """The largest finite value of a float type; a mean that rounds to it may lie a trifle above."""
    kind = DTYPES[dtype].numpy
    info = cast("Any", ml_dtypes).finfo(kind)
    return float(info.max) * (1.0 + 2.0**-40) if dtype != "F64" else float(info.max)
