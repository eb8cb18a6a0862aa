"""A fold's state as a payload: what a pool executor sends for many sites, and what a checkpoint keeps.

A partial is a safetensors file of int64 tensors: a float tensor's raw fixed-point sums under its own name and shape,
an integer tensor's limbs with shape ``[limbs, elements]``. The metadata key ``fedloom.partial`` holds the rest as JSON:
the plan's digest, counts, weights, totals and metric sums, all exact integers in hexadecimal. Merging a partial gives
the same bits as adding its results one by one.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from .dtypes import is_float, is_int
from .elements import Ints
from .envelope import Buffer
from .errors import FoldError, LayoutError
from .feeder import open_source
from .fixedpoint import TOTAL_BITS, FixedSums
from .foldplan import MAX_RESULTS, FoldPlan
from .header import Header, Spec, build_header
from .intsum import MAX_LIMBS, WEIGHT_BITS, check_limbs
from .sums import Record, Sums
from .tally import MAX_METRIC_BITS, MAX_METRIC_NAME, MAX_METRICS, MetricSum, Tally

METADATA_KEY: Final = "fedloom.partial"

_FORMAT: Final = "fedloom-partial/1"
#: Bits of a total or a sum of weights: the largest single one and 2^26 results.
_MAX_BITS: Final = 2304
#: A weight lies in [2^(e-1), 2^e): the e that there are.
_SIZES: Final = (-63, 65)
_UNIT: Final = 1 << WEIGHT_BITS
#: The largest finite float64: no metric's mean is beyond.
_LARGEST: Final = int(sys.float_info.max)
#: A total of w * max|x| is at most so many bits above its weight: no value is beyond 2^900.
_TOTAL_SHIFT: Final = TOTAL_BITS - WEIGHT_BITS + 900
#: An exact integer: hexadecimal digits, and how many zero bits follow them.
_NUMBER: Final = re.compile(r"(-?)([0-9a-f]{1,1200})(?:p([0-9]{1,4}))?")


@dataclass(frozen=True, slots=True)
class Partial:
    """A partial that was read and checked: everything but the sums, which stay in the payload's memory."""

    tally: Tally
    records: dict[int, Record]
    sums: dict[int, list[Ints]]
    lowest: dict[int, int]


def write_partial(digest: str, plan: FoldPlan, sums: Sums, tally: Tally) -> tuple[list[memoryview], int]:
    """A fold's state as buffers, header first, and their size in bytes.

    The buffers are the sums' own memory: nothing may be added until they are sent or written.
    """
    if not isinstance(sums.floats, FixedSums):
        raise FoldError("a running mean has no partials, as its bits depend on the order: use exact=True")
    arrays: dict[str, list[Ints]] = {}
    specs: list[Spec] = []
    records: list[list[Any]] = []
    for index, (tensor, record) in enumerate(zip(plan.tensors, sums.records, strict=True)):
        if not record.count:
            continue
        lowest = 0
        if is_int(tensor.dtype):
            lowest, limbs = sums.int_sum(index).export()
            arrays[tensor.name] = limbs
            specs.append((tensor.name, "I64", (len(limbs), tensor.items)))
        else:
            arrays[tensor.name] = [sums.floats.sums.view(index)]
            specs.append((tensor.name, "I64", tensor.shape))
        weight = "" if record.weight == tally.weight else _hex(record.weight)
        records.append([index, record.count, weight, _hex(record.total), record.over, lowest])
    state = {
        "format": _FORMAT,
        "plan": digest,
        "kind": tally.kind,
        "weighted": tally.weighted,
        "count": tally.count,
        "typed": tally.typed,
        "weight": _hex(tally.weight),
        "sizes": [[size, tally.sizes[size]] for size in sorted(tally.sizes)],
        "metrics": [
            [name, _hex(m.total.numerator), _hex(m.total.denominator), _hex(m.weight), m.count]
            for name, m in sorted(tally.metrics.items())
        ],
        "tensors": records,
        "sites": tally.sites,
    }
    header, head = build_header(specs, {METADATA_KEY: json.dumps(state, separators=(",", ":"))})
    buffers = [memoryview(head)]
    for tensor in header.tensors:
        buffers.extend(memoryview(cast("Any", array)).cast("B") for array in arrays[tensor.name] if array.size)
    return buffers, header.total_bytes


def read_partial(source: Buffer | Path, digest: str, plan: FoldPlan, folded: tuple[bool, ...]) -> Partial:
    """Read and check a partial.

    Raises:
        FoldError: no partial, one of another plan, or counts that cannot be.
        LayoutError: tensors that do not fit the plan.
        PayloadError: a file that cannot be read.
        HeaderError: bytes that are no safetensors file.
    """
    header, data = open_source(source)
    state = _State(header)
    if state.get("plan", str) != digest:
        raise FoldError(
            f"a partial of plan {state.get('plan', str)[:16]}; this round's is {digest[:16]}:"
            " its tasks must be done again"
        )
    tally = state.tally()
    records, lowest = state.records(len(plan.tensors), tally)
    places = {tensor.name: tensor for tensor in header.tensors}
    if len(places) != len(records):
        raise LayoutError(f"a partial with {len(places)} tensors and records of {len(records)}")
    sums: dict[int, list[Ints]] = {}
    for index in records:
        ours = plan.tensors[index]
        theirs = places.get(ours.name)
        whole = is_int(ours.dtype)
        if theirs is None or not folded[index] or theirs.dtype != "I64":
            raise LayoutError(f"a partial without sums of {ours.name!r}, which it counts")
        if whole and records[index].total:
            raise FoldError(f"a partial with a total of magnitudes for the integers {ours.name!r}")
        fits = (
            theirs.shape[1:] == (ours.items,) and theirs.shape[0] <= MAX_LIMBS if whole else theirs.shape == ours.shape
        )
        if not fits:
            raise LayoutError(
                f"a partial with {ours.name!r} of shape {list(theirs.shape)}; the model's is {list(ours.shape)}"
            )
        flat = cast("Ints", np.frombuffer(data[theirs.start : theirs.stop], np.uint8).view("<i8"))
        rows = theirs.shape[0] if whole else 1
        sums[index] = [flat[row * ours.items : (row + 1) * ours.items] for row in range(rows)]
        if whole:
            check_limbs(lowest[index], sums[index])
        if is_float(ours.dtype) and records[index].total == 0 and records[index].over:
            raise FoldError(f"a partial with results over the scale of {ours.name!r} that add up to nothing")
    return Partial(tally, records, sums, lowest)


class _State:
    """The decoded metadata, read field by field with its types and bounds."""

    def __init__(self, header: Header) -> None:
        text = header.metadata.get(METADATA_KEY)
        if text is None:
            raise FoldError(f"a payload without {METADATA_KEY!r} in its metadata; it is no partial")
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FoldError(f"a partial with malformed metadata: {error}") from None
        if type(data) is not dict or cast("dict[str, Any]", data).get("format") != _FORMAT:
            raise FoldError(f"a partial that is not of format {_FORMAT!r}")
        self._data = cast("dict[str, Any]", data)

    def get(self, name: str, kind: type[Any]) -> Any:
        value = self._data.get(name)
        if type(value) is not kind:
            raise FoldError(f"a partial with {name} of type {type(value).__name__}; {kind.__name__} belongs there")
        return value

    def tally(self) -> Tally:
        tally = Tally()
        kind, weighted = self._data.get("kind"), self._data.get("weighted")
        if kind not in ("FULL", "DIFF", None) or weighted not in (True, False, None):
            raise FoldError(f"a partial of kind {kind!r}, weighted {weighted!r}")
        if not (weighted is None or isinstance(weighted, bool)):
            raise FoldError(f"a partial with {weighted!r} for weighted")
        tally.kind, tally.weighted = kind, weighted
        tally.count = _count(self.get("count", int), "results", MAX_RESULTS)
        tally.typed = _count(self.get("typed", int), "results", tally.count)
        if (kind is None) != (tally.typed == 0):
            raise FoldError(f"a partial of kind {kind!r} with {tally.typed} results of a kind")
        tally.weight = _natural(self.get("weight", str), "weight")
        if (weighted is None) != (tally.count == 0) or (tally.weight == 0) != (tally.count == 0):
            raise FoldError(
                f"a partial of {tally.count} results with a weight of {tally.weight}, weighted {weighted!r}"
            )
        for entry in self.get("sizes", list):
            match entry:
                case [int() as size, int() as number] if _SIZES[0] <= size <= _SIZES[1] and size not in tally.sizes:
                    tally.sizes[size] = _count(number, "weights", tally.count)
                case _:
                    raise FoldError("a partial with malformed weight sizes")
        if sum(tally.sizes.values()) != tally.count:
            raise FoldError(f"a partial of {tally.count} results with {sum(tally.sizes.values())} weights")
        below = sum(number << (WEIGHT_BITS + size) for size, number in tally.sizes.items())
        if tally.count and not below // 2 <= tally.weight < below:
            raise FoldError(f"a partial of {tally.count} results whose weights cannot add up to {_hex(tally.weight)}")
        for entry in self.get("metrics", list):
            self._metric(tally, entry)
        if len(tally.metrics) > MAX_METRICS:
            raise FoldError(f"a partial with {len(tally.metrics)} metrics; at most {MAX_METRICS}")
        tally.sites = [_text(site, "site", 256) for site in self.get("sites", list)[:8]]
        return tally

    def _metric(self, tally: Tally, entry: Any) -> None:
        match entry:
            case [str() as name, str() as top, str() as bottom, str() as weight, int() as number]:
                name = _text(name, "metric", MAX_METRIC_NAME)
                denominator = _natural(bottom, name)
                # sums of floats and integers: with other denominators a fold's sum could grow without end
                if not name or name in tally.metrics or denominator.bit_count() != 1:
                    raise FoldError(f"a partial with a malformed metric {name[:64]!r}")
                total = Fraction(_integer(top, name), denominator)
                units, count = _natural(weight, name), _count(number, name, tally.count)
                if not 0 < units <= tally.weight or not count or abs(total) * _UNIT > units * _LARGEST:
                    raise FoldError(f"a partial with a sum of the metric {name[:64]!r} that its results cannot have")
                tally.metrics[name] = MetricSum(total, units, count)
            case _:
                raise FoldError("a partial with a malformed metric")

    def records(self, tensors: int, tally: Tally) -> tuple[dict[int, Record], dict[int, int]]:
        records: dict[int, Record] = {}
        lowest: dict[int, int] = {}
        for entry in self.get("tensors", list):
            match entry:
                case [int() as index, int() as count, str() as weight, str() as total, int() as over, int() as low]:
                    if isinstance(index, bool) or not 0 <= index < tensors or index in records or count < 1:
                        raise FoldError(f"a partial with a malformed record of tensor {index}")
                    units = _natural(weight, "weight") if weight else tally.weight
                    count = _count(count, "results", tally.typed)
                    # weights are positive: some of the results have less than all of the weight
                    if not 0 < units <= tally.weight or (units == tally.weight) != (count == tally.count):
                        raise FoldError(f"a partial in which the weight of tensor {index} is not part of the whole")
                    total_units = _natural(total, "total")
                    if total_units > units << _TOTAL_SHIFT:
                        raise FoldError(f"a partial in which the values of tensor {index} are beyond 2^900")
                    records[index] = Record(count, units, total_units, _count(over, "over", count))
                    lowest[index] = _count(low, "limb", MAX_LIMBS)
                case _:
                    raise FoldError("a partial with a malformed record")
        return records, lowest


def _text(value: Any, what: str, most: int) -> str:
    # JSON can spell half a surrogate pair, which no log, message or file could hold
    if type(value) is not str or len(value) > most or any("\ud800" <= char <= "\udfff" for char in value):
        raise FoldError(f"a partial with a malformed name of a {what}; text of at most {most} characters belongs there")
    return value


def _hex(value: int) -> str:
    """An integer in few characters: sums of floats have long tails of zero bits."""
    zeros = (value & -value).bit_length() - 1 if value else 0
    return f"{value >> zeros:x}p{zeros}" if zeros > 4 else f"{value:x}"


def _integer(text: str, what: str) -> int:
    found = _NUMBER.fullmatch(text)
    zeros = int(found[3] or 0) if found else 0
    if found is None or zeros > 2 * MAX_METRIC_BITS:
        raise FoldError(f"a partial with a malformed number for {what[:64]}")
    value = int(found[2], 16) << zeros
    return -value if found[1] else value


def _natural(text: str, what: str) -> int:
    value = _integer(text, what)
    if not 0 <= value < 1 << (_MAX_BITS if what in ("weight", "total") else 2 * MAX_METRIC_BITS):
        raise FoldError(f"a partial with {value.bit_length()} bits for {what[:64]}; at most {_MAX_BITS}, not negative")
    return value


def _count(value: int, what: str, most: int) -> int:
    if isinstance(value, bool) or not 0 <= value <= most:
        raise FoldError(f"a partial with {value} for {what[:64]}; 0 to {most} is allowed")
    return value
