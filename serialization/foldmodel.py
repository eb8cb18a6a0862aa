"""From a fold's sums to the new global model: one division and one rounding an element."""

from __future__ import annotations

from collections.abc import Mapping
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


def build_model(
    plan: FoldPlan,
    sums: Sums,
    kind: Kind | None,
    base: FLModel | Mapping[str, Any],
    master: Mapping[str, Any],
) -> NewModel:
    """The new model out of the sums and the base.

    Raises:
        LayoutError: a base or a master that is not the plan's model.
        ValuesError: a value that a tensor's type cannot hold.
    """
    given = base if isinstance(base, FLModel) else FLModel(params=dict(base))
    flat, spec = flatten(given.params if given.params is not None else {})
    _check_base(plan, flat, master)
    builder = _Builder(sums, diff=kind == "DIFF")
    arrays: dict[str, Array] = {}
    largest: list[float] = []
    for index, tensor in enumerate(plan.tensors):
        name = tensor.name
        if not sums.records[index].count:
            arrays[name] = as_numpy(flat[name])
            largest.append(plan.base_max[index])
            if name in master:
                builder.master[name] = as_numpy(master[name])
        elif is_float(tensor.dtype):
            arrays[name], found = builder.floats(index, tensor, flat[name], master.get(name))
            largest.append(found)
        else:
            arrays[name] = builder.ints(index, tensor, flat[name])
            largest.append(0.0)
    params = unflatten({name: arrays[name] for name in flat}, spec)
    model = FLModel(
        params_type=ParamsType.FULL,
        params=params,
        start_round=given.start_round,
        current_round=given.current_round,
        total_rounds=given.total_rounds,
    )
    return NewModel(model, tuple(largest), builder.master)


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


class _Builder:
    """Makes tensors block by block, in scratch that all of them share, and large ones in several threads."""

    def __init__(self, sums: Sums, *, diff: bool) -> None:
        self.master: dict[str, Array] = {}
        self._sums = sums
        self._diff = diff
        self._scratches = [Scratch()]

    def floats(self, index: int, tensor: PlanTensor, base: Any, master: Any) -> tuple[Array, float]:
        """A float tensor and its max|x|."""
        wide = tensor.dtype in _WIDE
        out: Array = np.empty(tensor.items, DTYPES[tensor.dtype].numpy if wide else np.float32)
        source, dtype = (base, tensor.dtype) if master is None else (master, "F32")
        raw = np.frombuffer(raw_bytes(source), np.uint8) if self._diff and tensor.items else None
        elements = elements_of(dtype)
        most = _largest_of(tensor.dtype)

        def make(worker: int, start: int) -> float:
            scratch = self._scratches[worker]
            largest = 0.0
            for first in range(start, min(start + STRETCH, tensor.items), BLOCK):
                last = min(first + BLOCK, tensor.items)
                block = scratch.doubles(last - first)
                self._sums.mean(index, first, block, scratch)
                if raw is not None:
                    part = raw[first * elements.itemsize : last * elements.itemsize]
                    np.add(block, elements.read(first, part, scratch), out=block)
                target = out[first:last]
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

        threads = threads_for(out.nbytes)
        self._scratches += [Scratch() for _ in range(threads - len(self._scratches))]
        largest = max(each(range(0, tensor.items, STRETCH), make, threads), default=0.0)
        shaped = out.reshape(tensor.shape)
        if wide:
            return shaped, largest
        self.master[tensor.name] = shaped
        return shaped.astype(DTYPES[tensor.dtype].numpy), largest

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
