"""Where the tensors of a result lie in its data section, and whether they are the plan's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from .dtypes import DTYPES, is_float
from .elements import BLOCK, Bytes, Elements, Scratch, elements_of
from .errors import LayoutError
from .foldplan import FoldPlan
from .header import Header
from .narrowing import CODED, SCALE_PREFIX, WIDE, Grouped, scales_of
from .payload import OPTIMIZER_PREFIX

#: Elements of a float tensor that a thread takes at a time: whole blocks.
STRETCH: Final = 16 * BLOCK


class Sink(Protocol):
    """What takes a result's elements: those of a float tensor from several threads at a time."""

    def add(self, index: int, start: int, raw: Bytes, elements: Elements | None, scratch: Scratch) -> tuple[float, int]:
        """Take elements of a tensor from ``start`` on: max|x|, and how many were taken before a bad block.

        Args:
            index: the tensor's place in the plan.
            start: the first element, a multiple of `BLOCK`.
            raw: the elements' bytes.
            elements: how they are read; None for integers.
            scratch: the calling thread's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A tensor's bytes in a result's data section.

    Attributes:
        index: its place in the plan; -1 for one that is not folded.
        elements: how floats are read; None for integers.
        scales: what these bytes are the scales of, where they are scales.
    """

    index: int
    name: str
    start: int
    stop: int
    itemsize: int
    elements: Elements | None
    scales: Grouped | None = None


def match_layout(
    plan: FoldPlan, places: Mapping[str, int], folded: tuple[bool, ...], header: Header, who: str
) -> list[Segment]:
    """Where a result's tensors belong. A result may lack tensors, but not have others than the model.

    Args:
        plan: the round's plan.
        places: the plan's index of each name.
        folded: whether each of the plan's tensors is averaged.
        header: the result's header.
        who: the site, for messages.

    Raises:
        LayoutError: an unknown name, or another dtype or shape than the model's or the codec's; up to three are named.
    """
    out: list[Segment] = []
    wrong: list[str] = []
    scaled: dict[str, Grouped] = {}
    for tensor in header.tensors:
        index = places.get(tensor.name, -1)
        scales: Grouped | None = None
        elements = elements_of(tensor.dtype) if is_float(tensor.dtype) else None
        if index >= 0:
            ours = plan.tensors[index]
            grouped = scaled.pop(tensor.name, None)
            coded = ours.dtype in WIDE and bool(plan.codec) and tensor.dtype == CODED[plan.codec]
            if coded and tensor.dtype == "I8":
                elements = grouped
                if grouped is None:
                    wrong.append(f"{tensor.name!r} is I8 and its scales do not lie before it")
            if tensor.shape != ours.shape or not (coded or tensor.dtype == ours.dtype):
                seen, allowed = f"{tensor.dtype}{list(tensor.shape)}", f"{ours.dtype}{list(ours.shape)}"
                wrong.append(f"{tensor.name!r} is {seen}, the model's is {allowed}")
            if not folded[index]:
                index = -1
        elif plan.codec == "int8" and tensor.name.startswith(SCALE_PREFIX):
            name = tensor.name[len(SCALE_PREFIX) :]
            items = plan.tensors[places[name]].items if name in places else 0
            if (tensor.dtype, tensor.shape) == ("F32", (scales_of(items),)):
                scales = scaled[name] = Grouped(items)
            else:
                wrong.append(f"{tensor.name!r} is {tensor.dtype}{list(tensor.shape)}, which no tensor's scales are")
        elif not tensor.name.startswith(OPTIMIZER_PREFIX):
            wrong.append(f"{tensor.name!r} is not in the model")
        size = DTYPES[tensor.dtype].itemsize
        out.append(Segment(index, tensor.name, tensor.start, tensor.stop, size, elements, scales))
    wrong += [f"{SCALE_PREFIX + name!r} has no I8 tensor behind it" for name in scaled]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        codec = f", or in the job's codec {plan.codec}" if plan.codec else ""
        raise LayoutError(
            f"result of {who} does not fit the model: {'; '.join(wrong[:3])}{more}."
            f" Send tensors with the names, dtypes and shapes that were received{codec}"
        )
    return out


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive elements of a tensor: of floats as many as a thread takes at a time, of integers all."""

    segment: Segment
    start: int
    raw: Bytes

    def put(self, sink: Sink, scratch: Scratch) -> tuple[float, int]:
        """Give the elements to a sink; what it returns."""
        return sink.add(self.segment.index, self.start, self.raw, self.segment.elements, scratch)

    def head(self, count: int) -> Stretch:
        """The first ``count`` of the elements."""
        return Stretch(self.segment, self.start, self.raw[: count * self.segment.itemsize])


def stretches_of(segments: list[Segment], pieces: Sequence[memoryview], stop: int) -> list[Stretch]:
    """The tensors' bytes up to ``stop``, in their order."""
    out: list[Stretch] = []
    rest = iter(pieces)
    piece, begin = np.empty(0, np.uint8), 0
    for segment in segments:
        last = min(segment.stop, stop)
        while begin + piece.size < last:
            begin += piece.size
            piece = np.frombuffer(next(rest), np.uint8)
        step = STRETCH * segment.itemsize if segment.elements is not None else max(1, last - segment.start)
        for first in range(segment.start, last, step):
            raw = piece[first - begin : min(first + step, last) - begin]
            out.append(Stretch(segment, (first - segment.start) // segment.itemsize, raw))
    return out
