"""A fold's model written to a file: the bytes of the one in memory, whatever its tensors and threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.serialization import crew
from fedloom.serialization.errors import FoldError, ValuesError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.foldwrite import WrittenModel
from fedloom.serialization.model import FLModel, ParamsType, flatten
from fedloom.serialization.payload import encode_model


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(crew, "_allowed", request.param)
    yield


def params(seed: int) -> dict[str, Any]:
    """Over two blocks of the digest, of which each begins within a tensor's block."""
    rng = np.random.default_rng(seed)
    return {
        "layer": {"w": rng.standard_normal((1234, 2001)).astype(np.float32), "b": rng.standard_normal(70001)},
        "half": rng.standard_normal(40003).astype(np.float16),
        "ints": rng.integers(-9, 100, 77),
        "none": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
        "scalar": np.asarray(rng.standard_normal(), np.float32),
    }


def write(fold: Fold, base: FLModel, path: Path) -> WrittenModel:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return fold.write(base, fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("kind", "exact"), [("FULL", True), ("DIFF", True), ("FULL", False)])
def test_the_file_is_the_model(kind: str, exact: bool, tmp_path: Path) -> None:
    base = FLModel(params=params(0), current_round=3, total_rounds=9)
    fold = Fold(FoldPlan.first(flatten(base.params)[0], tasks=4, exact=exact))
    for seed in (1, 2):
        meta = {"NUM_STEPS_CURRENT_ROUND": seed}
        result = FLModel(params=params(seed), params_type=ParamsType(kind), meta=meta, metrics={"accuracy": 0.5})
        fold.add(encode_model(result).tobytes(), site=f"site-{seed}")
    written = write(fold, base, tmp_path / "model")
    plan, master = fold.next_plan(), fold.master
    model = fold.finish(base)
    assert model.metrics == {"accuracy": 0.5}
    model.metrics = None
    encoded = encode_model(model)
    assert (tmp_path / "model").read_bytes() == encoded.tobytes()
    assert (written.size, written.digest) == (encoded.size, encoded.digest())
    assert plan == fold.next_plan()
    assert list(master) == ["half"]
    assert np.array_equal(master["half"], fold.master["half"])


def test_what_cannot_be_finished_cannot_be_written(tmp_path: Path) -> None:
    base = FLModel(params={"w": np.full(9, 1e38, np.float32)})
    fold = Fold(FoldPlan.first({"w": base.params["w"]}, tasks=2))
    with pytest.raises(FoldError, match="no results"):
        write(fold, base, tmp_path / "model")
    change = FLModel(params={"w": np.full(9, 3e38, np.float32)}, params_type=ParamsType.DIFF)
    fold.add(encode_model(change).tobytes(), site="site-1")
    with pytest.raises(ValuesError, match="'w' of the new model"):
        write(fold, base, tmp_path / "model")
