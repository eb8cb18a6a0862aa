"""What a fold is held against: results, and what exact arithmetic makes of a set of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import ValuesError
from fedloom.serialization.fixedpoint import BIAS, LIMIT
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.header import read_header
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, encode_model

STEPS = "NUM_STEPS_CURRENT_ROUND"
UNIT = 1 << 120  # a weight's
TOTAL_UNIT = 1 << 1074  # that of a sum of w * max|x|
SITES = {"site-0": 0.5, "site-1": 3.0}  # aggregation weights; all others have 1

#: One tensor of each way to be folded. ``big`` has a second block of two elements.
BASE: dict[str, Any] = {
    "bf16": np.array([0.5, -1.25], ml_dtypes.bfloat16),
    "big": np.full(BLOCK + 2, 0.75, np.float32),
    "carried": np.array([True, False]),
    "f16": np.array([1.5], np.float16),
    "f64": np.array([[0.25, -3.0]]),
    "fp8": np.array([2.0, 0.5], ml_dtypes.float8_e4m3fn),
    "head": np.array([9.0], np.float32),  # excluded
    "i64": np.array([2**62, -5, 0]),
    "none": np.empty((0, 2), np.float32),
    "u8": np.array([200, 3], np.uint8),
}
NAMES = sorted(BASE)
FLOATS = ("bf16", "big", "f16", "f64", "fp8", "none")
INTS = ("i64", "u8")
#: Where a tensor's elements are compared: of the large one both blocks' edges.
PLACES: dict[str, list[int]] = {name: list(range(BASE[name].size)) for name in NAMES}
PLACES["big"] = [0, BLOCK - 1, BLOCK, BLOCK + 1]


@dataclass(frozen=True, eq=False)
class Result:
    """A result as its site sent it, and what the model knows of it."""

    site: str
    kind: str | None
    steps: float | None
    params: dict[str, Any]
    metrics: dict[str, Any]
    encoded: EncodedModel

    @property
    def weight(self) -> float:
        """The weight in force."""
        return float(Fraction(1 if self.steps is None else self.steps) * Fraction(SITES.get(self.site, 1.0)))

    @property
    def meta(self) -> dict[str, Any]:
        """What the model says of its steps."""
        return {} if self.steps is None else {STEPS: self.steps}

    @property
    def data(self) -> bytes:
        """The data section."""
        return self.encoded.tobytes()[self.encoded.header.data_start :]


def make_result(seed: int, kind: str | None, steps: float | None, missing: int, scale: int) -> Result:
    """A result drawn from a seed; ``scale`` is the power of two by which its floats differ from the model's."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for place, name in enumerate(NAMES):
        if missing >> place & 1:
            continue
        base = BASE[name]
        if name in INTS:
            # mostly such that a mean added to the model's value fits the type
            most = (255 if name == "u8" else 2**62) if seed % 11 == 5 else (55 if name == "u8" else 2**61)
            params[name] = rng.integers(0 if name == "u8" else -most, most, base.shape).astype(base.dtype)
        elif name == "carried":
            params[name] = base
        else:
            values = np.ldexp(rng.standard_normal(base.shape), scale)
            if name == "big":
                values[1 : BLOCK - 1] = values[0]  # so that four places tell all
            if seed % 7 == 3:
                values[...] = 0.0
            most = float(ml_dtypes.finfo(base.dtype).max)
            params[name] = np.clip(values, -most, most).astype(base.dtype)
    metrics = {"loss": float(rng.standard_normal())} | ({"rare": int(rng.integers(-9, 9))} if seed % 3 else {})
    model = FLModel(
        params=None if kind is None else params,
        params_type=kind,
        metrics=metrics,
        meta={} if steps is None else {STEPS: steps},
    )
    site = f"site-{seed % 5}"
    return Result(site, kind, steps, {} if kind is None else params, metrics, encode_model(model))


def state_of(fold: Fold) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A fold's bookkeeping, and each tensor's exact sum at its places (floats: with the bias taken off)."""
    buffers, _ = fold.to_partial()
    payload = b"".join(buffers)
    header = read_header(payload, len(payload))
    state = json.loads(header.metadata["fedloom.partial"])
    del state["sites"]  # the few that errors show
    records = {fold.plan.tensors[entry[0]].name: entry[1:] for entry in state["tensors"]}
    sums: dict[str, list[int]] = {}
    for tensor in header.tensors:
        raw = payload[header.data_start + tensor.start : header.data_start + tensor.stop]
        limbs = np.frombuffer(raw, "<i8").reshape(tensor.shape if tensor.name in INTS else (1, -1))
        count, lowest = records[tensor.name][0], records[tensor.name][4]
        if tensor.name == "big":
            assert (limbs[0][: BLOCK - 1] == limbs[0][0]).all()
        if tensor.name in INTS:
            shifts = [1 << 24 * (lowest + row) for row in range(len(limbs))]
            sums[tensor.name] = [
                sum(int(limb[at]) * shift for limb, shift in zip(limbs, shifts, strict=True))
                for at in PLACES[tensor.name]
            ]
        else:
            sums[tensor.name] = [wrap(int(limbs[0][at]) - count * BIAS) for at in PLACES[tensor.name]]
    return state, sums


def wrap(value: int) -> int:
    """An integer in the ring modulo 2^64, as a signed one."""
    return (value + 2**63) % 2**64 - 2**63


def number(text: str) -> int:
    """An integer as partials write it."""
    digits, _, zeros = text.partition("p")
    return int(digits, 16) << int(zeros or 0)


@dataclass
class Totals:
    """What exact arithmetic says about one tensor over a set of results."""

    count: int = 0
    weight: Fraction = Fraction(0)
    total: Fraction = Fraction(0)
    over: int = 0
    sums: list[int] = field(default_factory=list)  # of round(x * w * 2^q), or of x * w in units of 2^-120
    exact: list[Fraction] = field(default_factory=list)  # of x * w


def totals_of(plan: FoldPlan, results: list[Result], name: str, kind: str) -> Totals:
    """One tensor's sums over the results that have it."""
    index = NAMES.index(name)
    exponent = (plan.q_full if kind == "FULL" else plan.q_diff)[index]
    places = PLACES[name]
    out = Totals(sums=[0] * len(places), exact=[Fraction(0)] * len(places))
    for result in results:
        if name not in result.params:
            continue
        weight = Fraction(result.weight)
        out.count += 1
        out.weight += weight
        values = result.params[name].reshape(-1)
        if name in INTS:
            for place, at in enumerate(places):
                out.sums[place] += int(values[at]) * int(weight * UNIT)
                out.exact[place] += int(values[at]) * weight
            continue
        wide = values.astype(np.float64)
        largest = max((abs(float(wide[at])) for at in places), default=0.0)
        out.total += Fraction(largest * result.weight)
        out.over += math.ldexp(result.weight, exponent) * largest > LIMIT
        for place, at in enumerate(places):
            out.exact[place] += Fraction(float(wide[at])) * weight
            block = [abs(float(wide[p])) for p in places if p // BLOCK == at // BLOCK]
            scale = math.ldexp(result.weight, exponent)
            if max(block) * scale <= LIMIT:  # a block that is over adds nothing
                out.sums[place] += round(Fraction(float(wide[at]) * scale))
    return out


def all_totals(plan: FoldPlan, results: list[Result], kind: str) -> dict[str, Totals]:
    """The totals of every tensor that some result has."""
    found = {name: totals_of(plan, results, name, kind) for name in (*FLOATS, *INTS)}
    return {name: totals for name, totals in found.items() if totals.count}


def better_scales(plan: FoldPlan, totals: dict[str, Totals], kind: str) -> dict[str, int]:
    """What check() must say: the tensors whose scale does not suit these totals, and the largest that does."""
    out: dict[str, int] = {}
    for name in FLOATS:
        found = totals.get(name)
        if found is None or not found.total:
            continue
        index = NAMES.index(name)
        q = (plan.q_full if kind == "FULL" else plan.q_diff)[index]
        better = max(-950, min(900, 51 - ceil_log2(found.total)))
        base = Fraction(plan.base_max[index]) * found.weight if kind == "DIFF" else Fraction(0)
        coarse = max(found.total, base) < found.count * Fraction(2) ** (24 - q)
        if found.over or found.total > Fraction(2) ** (62 - q) or (coarse and better > q):
            out[name] = better
    return out


def ceil_log2(value: Fraction) -> int:
    """The smallest e with value <= 2^e."""
    guess = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while Fraction(2) ** guess < value:
        guess += 1
    return guess


def bits_of(fold: Fold, base: dict[str, Any]) -> Any:
    """The new model's bits, or that a type cannot hold it."""
    try:
        model = fold.finish(base)
    except ValuesError:
        return ValuesError
    return (
        {name: (value.dtype, value.tobytes()) for name, value in model.params.items()},
        model.metrics,
        fold.magnitudes(),
    )


def payload_of(fold: Fold) -> bytes:
    """A fold as a partial."""
    return b"".join(fold.to_partial()[0])


def negative(result: Result) -> FLModel:
    """The same magnitudes with the other sign: other sums, equal totals."""
    params = {name: -value if name in FLOATS else value for name, value in result.params.items()}
    return FLModel(
        params=None if result.kind is None else params,
        params_type=result.kind,  # type: ignore[arg-type]
        metrics=result.metrics,
        meta=result.meta,
    )


def means_of(results: list[Result]) -> dict[str, float]:
    """Each metric's weighted mean over the results that have it."""
    out: dict[str, float] = {}
    for name in ("loss", "rare"):
        have = [r for r in results if name in r.metrics]
        if have:
            weight = sum(Fraction(r.weight) for r in have)
            out[name] = float(sum(Fraction(r.metrics[name]) * Fraction(r.weight) for r in have) / weight)
    return out
