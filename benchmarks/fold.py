"""How fast the exact fold is: GB/s of input on one thread, and its ratio to a float32 ``acc += w * x`` in the same run.

    python benchmarks/fold.py [--mib 256] [--runs 5]

Both read a result of one large tensor that is in memory; the medians of the runs are printed. The float32 loop goes
through a scratch block of 1 MiB, which is the fastest that numpy offers, and checks nothing; the fold finds NaN, Inf
and max|x| too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, decode_model, encode_model

TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
}
PLAIN_BLOCK = 256 * 1024


def main() -> None:
    """Print a line a case, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of a result in MiB")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    size = options.mib * 1024 * 1024
    rng = np.random.default_rng(0)
    values = rng.standard_normal(size // 4, np.float32)
    plain = median_rate(plain_sum(values), size, options.runs)
    figures: dict[str, float] = {"plain_f32_gb_s": plain}
    for name, kind in TYPES.items():
        count = size // np.dtype(kind).itemsize
        array = np.resize(values * np.float32(1000 if name == "I64" else 1), count).astype(kind)
        rate = median_rate(add_of(encode_model(FLModel(params={"w": array}))), array.nbytes, options.runs)
        figures[f"fold_{name.lower()}_gb_s"] = rate
    many = {f"layer.{index}": values[:1000] for index in range(1000)}
    seconds = median_seconds(add_of(encode_model(FLModel(params=many))), options.runs)
    figures["us_a_small_tensor"] = seconds * 1e6 / len(many)
    figures["fold_to_plain"] = figures["fold_f32_gb_s"] / plain
    figures |= partial_and_finish(values, options.runs)
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:8.2f}")


def plain_sum(values: np.ndarray[Any, Any]) -> Callable[[], object]:
    """``acc += w * x`` in float32."""
    acc = np.zeros_like(values)
    scratch = np.empty(PLAIN_BLOCK, np.float32)
    weight = np.float32(3)

    def run() -> None:
        for start in range(0, values.size, PLAIN_BLOCK):
            block = values[start : start + PLAIN_BLOCK]
            product = scratch[: block.size]
            np.multiply(block, weight, out=product)
            part = acc[start : start + PLAIN_BLOCK]
            np.add(part, product, out=part)

    return run


def add_of(result: EncodedModel) -> Callable[[], object]:
    """One result into a fold, again and again."""
    blob = result.tobytes()
    base = decode_base(result, blob)
    fold = Fold(FoldPlan.first(base, tasks=1000))
    meta = {"meta": {"NUM_STEPS_CURRENT_ROUND": 3}}
    return lambda: fold.add(blob, site="site-1", meta=meta)


def decode_base(result: EncodedModel, blob: bytes) -> dict[str, Any]:
    """The result as the global model that it belongs to."""
    return decode_model(blob, framework="numpy", meta=result.meta).params


def partial_and_finish(values: np.ndarray[Any, Any], runs: int) -> dict[str, float]:
    """Merging a partial, and making the new model: GB/s of the model's float32 bytes."""
    base = {"w": values}
    plan = FoldPlan.first(base, tasks=1000)
    fold = Fold(plan)
    fold.add(encode_model(FLModel(params=base)), site="site-1")
    blob = b"".join(fold.to_partial()[0])
    return {
        "merge_gb_s": median_rate(lambda: fold.merge(blob), values.nbytes, runs),
        "finish_gb_s": median_rate(lambda: fold.finish(base), values.nbytes, runs),
    }


def median_seconds(run: Callable[[], object], runs: int) -> float:
    """Seconds of a call, after one that is not counted."""
    run()
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def median_rate(run: Callable[[], object], size: int, runs: int) -> float:
    """GB/s of a call that reads so many bytes."""
    return size / median_seconds(run, runs) / 1e9


if __name__ == "__main__":
    main()
