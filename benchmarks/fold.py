"""How fast the fold is: GB/s of input, and its ratio to the same arithmetic in numpy without the fold around it.

    python benchmarks/fold.py [--mib 256] [--runs 5] [--threads 2] [--json]

Both add one result of one large tensor. *Mapped*: input and sums are in memory already. *First touch*: the file is in
the page cache and mapped anew, and the sums begin empty. The arithmetic's blocks are the fold's, and it does the
element operations alone; the fold also finds NaN, Inf and max|x|, keeps what judges the scale, and can take a result
out again. Ratios are of one thread each, in the same run; the fold's rate with more threads is beside them. Medians.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from fedloom.serialization import crew
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.fixedpoint import MAGIC
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.narrowing import GROUP
from fedloom.serialization.payload import EncodedModel, decode_model, encode_model

TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.float32,  # in the int8 codec
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F64": np.float64,
}
TARGETS = {"mapped": 0.8, "first_touch": 0.5}
META = {"meta": {"NUM_STEPS_CURRENT_ROUND": 3}}
Run = Callable[[], object]


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of a result in MiB")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="threads of the last column")
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    values = np.random.default_rng(0).standard_normal(options.mib * 1024 * 1024 // 4, np.float32)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types:
            count = values.nbytes // (1 if name == "INT8" else np.dtype(TYPES[name]).itemsize)
            array = np.resize(values, count).astype(TYPES[name])
            encoded = encode_model(FLModel(params={"w": array}), codec="int8" if name == "INT8" else "")
            path = Path(folder) / "result.safetensors"
            with path.open("wb") as file:
                encoded.write_to(file)
            for mode in ("exact", "float32"):
                for memory in TARGETS:
                    case = Case(encoded, path, name, mode == "exact", memory == "first_touch")
                    rates = case.rates(options.runs, options.threads)
                    key = f"{name.lower()}_{mode}_{memory}"
                    figures |= {f"{key}_{what}": rate for what, rate in rates.items()}
                    if not options.json:
                        show(name, mode, memory, rates, options.threads)
    figures |= others(values, options.runs, options.threads)
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
        return
    for key in [key for key in figures if key.startswith(("merge", "finish", "us_"))]:
        print(f"{key:32} {figures[key]:8.2f}")


def show(name: str, mode: str, memory: str, rates: dict[str, float], threads: int) -> None:
    """A line of the table."""
    ratio = rates["fold"] / rates["arithmetic"]
    print(
        f"{name:8} {mode:8} {memory:12} fold {rates['fold']:6.2f} GB/s   arithmetic {rates['arithmetic']:6.2f}"
        f"   ratio {ratio:5.2f} (target {TARGETS[memory]:.2f})   {threads} threads {rates['threaded']:6.2f}",
        flush=True,
    )


class Case:
    """One type, mode and state of the memory."""

    def __init__(self, encoded: EncodedModel, path: Path, dtype: str, exact: bool, fresh: bool) -> None:
        self.encoded, self.path, self.dtype, self.exact, self.fresh = encoded, path, dtype, exact, fresh
        self.blob = encoded.tobytes()
        base = decode_model(self.blob, framework="numpy", meta=encoded.meta).params
        self.plan = FoldPlan.first(base, tasks=1000, exact=exact, codec="int8" if dtype == "INT8" else "")

    def rates(self, runs: int, threads: int) -> dict[str, float]:
        """GB/s of the arithmetic, of the fold on one thread, and of the fold on several."""
        size = self.encoded.header.data_bytes
        arithmetic, fold = self.arithmetic(), self.fold()
        # in turns, so that what else the machine does in the meantime touches both
        times: dict[str, list[float]] = {"arithmetic": [], "fold": [], "threaded": []}
        for turn in range(runs + 1):
            for name, run, allowed in (("arithmetic", arithmetic, 1), ("fold", fold, 1), ("threaded", fold, threads)):
                crew.allow(allowed)
                seconds = timed(run)
                if turn:
                    times[name].append(seconds)
        crew.allow(1)
        return {name: size / statistics.median(taken) / 1e9 for name, taken in times.items()}

    def fold(self) -> Run:
        """One result into a fold."""
        if self.fresh:
            return lambda: Fold(self.plan).add(self.path, site="site-1", meta=META)
        fold = Fold(self.plan)
        return lambda: fold.add(self.blob, site="site-1", meta=META, kept=True)

    def arithmetic(self) -> Run:
        """The same element operations, and nothing else."""
        kind = np.int64 if self.exact else np.float32
        items = self.plan.tensors[0].items
        scale = 3 * 2.0 ** self.plan.q_full[0] if self.exact else np.float32(3)
        add = add_blocks(self.dtype, self.exact, scale)
        start = self.encoded.header.data_start + self.encoded.header.tensors[-1].start
        scales = self.encoded.header.data_start
        if not self.fresh:
            sums, raw = np.zeros(items, kind), np.frombuffer(self.blob, np.uint8)
            return lambda: add(raw[start:], sums, raw[scales:start])

        def run() -> None:
            with self.path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            raw = np.frombuffer(view, np.uint8)
            add(raw[start:], np.zeros(items, kind), raw[scales:start])

        return run


def add_blocks(dtype: str, exact: bool, scale: Any) -> Callable[[Any, Any, Any], None]:
    """``sums += scale * x`` over blocks: float32, or the integers of the exact fold."""
    step = BLOCK if exact else 2 * BLOCK  # each at its best
    narrow = np.empty(step, np.float32)
    wide = np.empty(BLOCK, np.float64)
    bits = wide.view(np.int64)
    item = 1 if dtype == "INT8" else np.dtype(TYPES[dtype]).itemsize
    code = {1: np.uint8, 2: np.uint16}.get(item)
    table: Any = None
    if code is not None and dtype not in ("BF16", "INT8"):
        every = np.arange(1 << 8 * item, dtype=code).view(TYPES[dtype]).astype(np.float32)
        with np.errstate(invalid="ignore"):
            table = (every.astype(np.float64) * scale + MAGIC).view(np.int64) if exact else every

    def widened(part: Any, out: Any, group_scales: Any) -> Any:
        if dtype in ("F32", "F64"):
            return part.view(TYPES[dtype])
        if dtype == "INT8":
            np.copyto(out, part.view(np.int8))
            groups = out.reshape(-1, GROUP)
            np.multiply(groups, group_scales[:, None], out=groups)
        elif dtype == "BF16":
            words = out.view(np.uint32)
            np.copyto(words, part.view(np.uint16))
            np.left_shift(words, 16, out=words)
        else:
            np.take(table, part.view(code), out=out, mode="clip")
        return out

    def add(raw: Any, sums: Any, scales: Any) -> None:
        scales = scales.view(np.float32)
        for first in range(0, sums.size, step):
            target = sums[first : first + step]
            part = raw[first * item : (first + target.size) * item]
            if exact and table is not None:
                found = bits[: target.size]
                np.take(table, part.view(code), out=found, mode="clip")
                np.add(target, found, out=target)
                continue
            group_scales = scales[first // GROUP : (first + target.size) // GROUP]
            values = widened(part, narrow[: target.size], group_scales)
            if not exact:
                product = wide.view(np.float32)[: target.size]
                np.multiply(values, scale, out=product, casting="same_kind")
                np.add(target, product, out=target)
                continue
            scaled = wide[: target.size]
            if dtype == "F64":
                np.multiply(values, scale, out=scaled)
            else:
                np.copyto(scaled, values)
                np.multiply(scaled, scale, out=scaled)
            np.add(scaled, MAGIC, out=scaled)
            np.add(target, bits[: target.size], out=target)

    return add


def others(values: np.ndarray[Any, Any], runs: int, threads: int) -> dict[str, float]:
    """Merging a partial and making the new model, in GB/s of the model's float32 bytes; and a small tensor's cost."""
    base = {"w": values}
    plan = FoldPlan.first(base, tasks=1000)
    fold = Fold(plan)
    for site in ("site-1", "site-2", "site-3"):
        fold.add(encode_model(FLModel(params=base)), site=site)
    other = Fold(plan)
    blob = b"".join(fold.to_partial()[0])
    out: dict[str, float] = {"merge_gb_s": rate_of(lambda: other.merge(blob), values.nbytes, runs)}
    sums = np.zeros(values.size, np.int64)

    def divide() -> None:
        new = np.empty(values.size, np.float32)
        wide, whole = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.int64)
        for first in range(0, sums.size, BLOCK):
            part = sums[first : first + BLOCK]
            np.subtract(part, 12345, out=whole[: part.size])
            np.divide(whole[: part.size], 3.0, out=wide[: part.size])
            np.copyto(new[first : first + BLOCK], wide[: part.size], casting="same_kind")

    out["finish_arithmetic_gb_s"] = rate_of(divide, values.nbytes, runs)
    out["finish_gb_s"] = rate_of(lambda: fold.finish(base), values.nbytes, runs)
    out["finish_ratio"] = out["finish_gb_s"] / out["finish_arithmetic_gb_s"]
    crew.allow(threads)
    out["finish_threaded_gb_s"] = rate_of(lambda: fold.finish(base), values.nbytes, runs)
    crew.allow(1)
    many = {f"layer.{index}": values[:1000] for index in range(1000)}
    small, result = Fold(FoldPlan.first(many, tasks=1000)), encode_model(FLModel(params=many)).tobytes()
    out["us_a_small_tensor"] = 1e-3 / rate_of(lambda: small.add(result, site="s"), len(many), runs)
    return out


def timed(run: Run) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rate_of(run: Run, size: int, runs: int) -> float:
    """GB/s of a call that reads so many bytes, the first one not counted."""
    run()
    return size / statistics.median(timed(run) for _ in range(runs)) / 1e9


if __name__ == "__main__":
    main()
