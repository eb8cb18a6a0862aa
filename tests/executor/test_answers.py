"""What an evaluation needs of a site's answer: metrics alone, or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.executor.taskio import TaskSpec, write_result
from fedloom.serialization.errors import PayloadError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

OWN = {"w": np.ones(3, np.float32)}


def spec(answer: str, tmp_path: Path, **options: Any) -> TaskSpec:
    name = "validate" if answer == "metrics" else "submit_model"
    return TaskSpec("t" * 32, 1, "site-1", "job", 3, 0, name, config={"answer": answer}, **options)


def test_metrics_go_alone(tmp_path: Path) -> None:
    received = encode_model(FLModel(params=OWN)).tobytes()
    sent = FLModel(params={"other": np.full(2, np.nan)}, metrics={"accuracy": 0.5}, optimizer_params={"m": OWN["w"]})
    result = write_result(sent, spec("metrics", tmp_path, payload_bytes=received, transfer_type="DIFF"))
    assert result.meta["metrics"] == {"accuracy": 0.5}
    assert "params_type" not in result.meta
    back = decode_model(bytearray(result.data or b""), framework="numpy")
    assert (back.params, back.optimizer_params) == (None, None)
    assert sent.params is not None, "the script's own object is not changed"
    for metrics in (None, {}):
        with pytest.raises(PayloadError, match=r"flare\.is_evaluate\(\)"):
            write_result(FLModel(params=OWN, metrics=metrics), spec("metrics", tmp_path))


def test_a_sites_own_model_goes_whole(tmp_path: Path) -> None:
    result = write_result(FLModel(params=OWN), spec("params", tmp_path, transfer_type="DIFF"))
    assert result.meta["params_type"] == "FULL"
    back = decode_model(bytearray(result.data or b""), framework="numpy")
    assert np.array_equal(back.params["w"], OWN["w"])
    for wrong, seen in ((FLModel(metrics={"a": 1.0}), "without params"), (FLModel("DIFF", OWN), "with differences")):
        with pytest.raises(PayloadError, match=f"{seen}.*is_submit_model"):
            write_result(wrong, spec("params", tmp_path))
