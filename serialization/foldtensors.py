"""A result added out of the arrays in which it was made: no header is written for it and read again.

Of thousands of small results the describing is most of the work. Only what needs no decision goes this way: numpy
arrays in the model's own names, types and shapes. Everything else, what is wrong with a result among it, is left to
the way over a payload. The bits are the same, since both add the same bytes by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, is_float
from .elements import BLOCK, MAX_VALUE, Bytes, Elements, Floats, Scratch, elements_of, largest_of_few
from .fixedpoint import FixedSums
from .foldplan import FoldPlan
from .sums import Addition, Sums
from .tally import Contribution


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of a tensor, from its first element on."""

    index: int
    raw: Bytes
    elements: Elements | None
    itemsize: int

    def put(self, sink: Addition, scratch: Scratch) -> tuple[float, int]:
        """Give them to a sink: max|x|, and how many elements it took before a bad block."""
        return sink.add(self.index, 0, self.raw, self.elements, scratch) if self.raw.size else (0.0, 0)


def pieces_of(
    plan: FoldPlan, places: Mapping[str, int], folded: tuple[bool, ...], tensors: Mapping[Any, Any]
) -> list[Piece]:
    """A result's tensors where they lie; none where one is not averaged, or is no array whose bytes are a payload's.

    Args:
        plan: the round's plan.
        places: the plan's index of each name.
        folded: whether each of the plan's tensors is averaged.
        tensors: name to tensor, flat.
    """
    out: list[Piece] = []
    for name, value in tensors.items():
        index = places.get(name, -1)
        if index < 0 or not folded[index] or type(value) is not np.ndarray:
            return []
        ours, array = plan.tensors[index], value
        dtype = DTYPES[ours.dtype]
        if array.dtype != dtype.numpy or array.shape != ours.shape or not array.flags.c_contiguous:
            return []
        elements = elements_of(ours.dtype) if is_float(ours.dtype) else None
        out.append(Piece(index, array.reshape(-1).view(np.uint8), elements, dtype.itemsize))
    return out


def add_pieces(
    plan: FoldPlan, sums: Sums, contribution: Contribution, pieces: Sequence[Piece], scratch: Scratch
) -> bool:
    """Add a result's tensors to the sums and count them; False, and nothing was added, where a value is not good."""
    sink = Addition(plan, sums, contribution)
    found: list[float] = []
    for piece in pieces:
        largest, done = piece.put(sink, scratch)
        if done * piece.itemsize < piece.raw.size:
            head = Piece(piece.index, piece.raw[: done * piece.itemsize], piece.elements, piece.itemsize)
            inverse = Addition(plan, sums, contribution, subtract=True)
            for added in (*pieces[: len(found)], head):
                added.put(inverse, scratch)
            return False
        found.append(largest)
    for piece, largest in zip(pieces, found, strict=True):
        sums.settle(piece.index, contribution, largest)
    return True


#: Elements of a small model: its results, their sums and the scratch stay in a core's cache.
_SMALL = 2 * BLOCK
#: index, max|x|, elements
Looked = tuple[int, float, NDArray[Any]]


class SmallModel:
    """How results of a small model of float32 are added: with all that the plan decides worked out once.

    A result is looked at as a whole before any of it is added, so that nothing has to be undone.
    """

    __slots__ = ("_known",)

    def __init__(self, plan: FoldPlan, folded: tuple[bool, ...]) -> None:
        size = max(tensor.items for tensor in plan.tensors)
        singles, doubles = np.empty(size, np.float32), np.empty(size, np.float64)
        self._known: dict[Any, tuple[int, tuple[int, ...], NDArray[Any], Floats]] = {
            tensor.name: (index, tensor.shape, singles[: tensor.items], doubles[: tensor.items])
            for index, tensor in enumerate(plan.tensors)
            if folded[index]
        }

    @staticmethod
    def fits(plan: FoldPlan) -> bool:
        """Whether results by this plan can be added so."""
        small = all(tensor.dtype == "F32" and 0 < tensor.items <= BLOCK for tensor in plan.tensors)
        return small and sum(tensor.items for tensor in plan.tensors) <= _SMALL

    def look(self, tensors: Mapping[Any, Any]) -> list[Looked]:
        """A result's tensors and their magnitudes; none where `pieces_of` has none, or a value is not good."""
        out: list[Looked] = []
        for name, value in tensors.items():
            ours = self._known.get(name)
            if ours is None or type(value) is not np.ndarray:
                return []
            index, shape, singles, _ = ours
            array: NDArray[Any] = value
            if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
                return []
            flat = array.reshape(-1)
            largest = largest_of_few(flat, singles)
            if not largest <= MAX_VALUE:
                return []
            out.append((index, largest, flat))
        return out

    def add(self, plan: FoldPlan, sums: Sums, contribution: Contribution, looked: Sequence[Looked]) -> None:
        """Add a result's tensors to the sums and count them."""
        assert isinstance(sums.floats, FixedSums)
        for index, largest, flat in looked:
            scratch = self._known[plan.tensors[index].name][3]
            sums.floats.add_block(index, flat, largest, contribution.weight, scratch)
            sums.settle(index, contribution, largest)
