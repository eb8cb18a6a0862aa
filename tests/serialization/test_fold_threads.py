"""Large results: several threads give the bits of one, bad values leave no trace, and float sums start over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization import crew
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import FoldError, ValuesError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import EncodedModel, encode_model

STEPS = "NUM_STEPS_CURRENT_ROUND"
RNG = np.random.default_rng(3)
#: Over 8 MiB, several stretches, tensors of each way to be read.
BASE: dict[str, Any] = {
    "f16": RNG.standard_normal(65536 * 17).astype(np.float16),  # large enough for a table
    "f32": RNG.standard_normal(16 * BLOCK * 3 + 777).astype(np.float32),
    "f64": RNG.standard_normal(BLOCK + 5),
    "bf16": RNG.standard_normal(3 * BLOCK).astype(ml_dtypes.bfloat16),
    "fp8": RNG.standard_normal(BLOCK + 1).astype(ml_dtypes.float8_e4m3fnuz),
    "n": np.arange(70_000),
}


@pytest.fixture
def threads() -> Iterator[None]:
    crew.allow(2)
    yield
    crew.allow(1)


def result(steps: int, **params: Any) -> EncodedModel:
    return encode_model(FLModel(params=BASE | params, meta={STEPS: steps}))


def payload(fold: Fold) -> bytes:
    return b"".join(fold.to_partial()[0])


def test_threads_do_not_change_bits(threads: None) -> None:
    plan = FoldPlan.first(BASE, tasks=3)
    bad = BASE["f32"].copy()
    bad[5 * BLOCK + 3] = np.nan  # early: other stretches are in before it is found
    many, one = Fold(plan), Fold(plan)
    for fold, allowed in ((many, 2), (one, 1)):
        crew.allow(allowed)
        fold.add(result(3), site="a")
        with pytest.raises(ValuesError, match=rf"'f32' holds NaN.* from {5 * BLOCK} on"):
            fold.add(result(2, f32=bad), site="b")
        fold.add(result(7, f32=BASE["f32"] * np.float32(0.5)), site="c")
        made = fold.finish(BASE).params
        assert made["n"].tobytes() == BASE["n"].tobytes()
    assert payload(many) == payload(one)
    assert not [t for t in threading.enumerate() if t.name.startswith("fold-")]


@pytest.mark.parametrize("allowed", [1, 2])
def test_float_sums_start_over_behind_a_bad_file(tmp_path: Path, threads: None, allowed: int) -> None:
    crew.allow(allowed)
    plan = FoldPlan.first(BASE, tasks=4, exact=False)
    bad = BASE["f32"].copy()
    bad[-1] = np.inf  # all but the last block would be in
    parts = {"a": result(3), "bad": result(9, f32=bad), "c": result(5, f32=-BASE["f32"]), "worse": result(1, f32=bad)}
    for site, part in parts.items():
        (tmp_path / site).write_bytes(part.tobytes())
    fold, good = Fold(plan), Fold(plan)
    for site in parts:
        if site in ("bad", "worse"):
            with pytest.raises(ValuesError, match=f"result of {site}"):
                fold.add(tmp_path / site, site=site)
        else:
            fold.add(tmp_path / site, site=site)
            good.add(parts[site], site=site)
    assert fold.count == 2
    made, expected = fold.finish(BASE).params, good.finish(BASE).params
    for name in BASE:
        assert made[name].tobytes() == expected[name].tobytes(), name
    assert np.allclose(made["f32"], BASE["f32"] * -0.25, atol=1e-6)


def test_a_file_that_is_gone_when_the_sums_start_over_ends_the_fold(tmp_path: Path) -> None:
    base = {"w": np.ones(5, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2, exact=False))
    for site, value in (("a", 1.0), ("b", np.nan)):
        blob = encode_model(FLModel(params={"w": np.full(5, value, np.float32)})).tobytes()
        (tmp_path / site).write_bytes(blob)
    fold.add(tmp_path / "a", site="a")
    (tmp_path / "a").unlink()
    with pytest.raises(FoldError, match="cannot be read again"):
        fold.add(tmp_path / "b", site="b")
    with pytest.raises(FoldError, match="cannot be read again"):
        fold.finish(base)


def test_the_first_error_of_several_threads_is_raised() -> None:
    def work(worker: int, task: int) -> int:
        if task == 3:
            raise KeyError(task)
        return task * 2

    assert crew.each(range(3), work, 2) == [0, 2, 4]
    with pytest.raises(KeyError, match="3"):
        crew.each(range(50), work, 2)


@pytest.mark.parametrize("exact", [True, False])
def test_used_memory_changes_no_bit(exact: bool) -> None:
    plan = FoldPlan.first(BASE, tasks=4, exact=exact)
    floats = sum(value.size for name, value in BASE.items() if name != "n")
    bad = BASE["f32"].copy()
    bad[5 * BLOCK + 3] = np.nan
    half = encode_model(FLModel(params={"f32": BASE["f32"] * np.float32(3)}, meta={STEPS: 2}))
    made: list[bytes] = []
    for spare in (None, np.full(floats, -7, np.int64 if exact else np.float32), np.full(3, 1.0)):
        fold, other = Fold(plan, spare=spare), Fold(plan)
        with pytest.raises(ValuesError):
            fold.add(result(2, f32=bad), site="b")  # writes some blocks, and takes them out again
        fold.add(half, site="c")
        if exact:
            other.add(result(3, bf16=BASE["bf16"] * 0), site="a")
            fold.merge(payload(other))
            fold.remove(half, site="c")
            made.append(payload(fold))
        else:
            fold.add(result(3), site="a")
        made.append(b"".join(value.tobytes() for value in fold.finish(BASE).params.values()))
        fold.accumulator.release()
        with pytest.raises(FoldError, match="serves the next fold"):
            fold.finish(BASE)
    assert len(set(made)) == (2 if exact else 1)
