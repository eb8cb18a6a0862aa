"""A job's codec at a site: what becomes part of an aggregate is narrowed, behind the filters; nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fedloom.executor.script import settings_of
from fedloom.executor.taskio import TaskSpec, encode_result
from fedloom.serialization.component import Component
from fedloom.serialization.errors import JobError, ValuesError
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

RECEIVED = {"w": np.linspace(-1, 1, 600).astype(np.float32), "n": np.arange(3)}


def spec(**options: Any) -> TaskSpec:
    told = {"payload_bytes": encode_model(FLModel(params=RECEIVED)).tobytes(), "codec": "int8"} | options
    return TaskSpec("t" * 32, 1, "site-1", "job", 3, 0, "train", **told)


def test_the_difference_is_narrowed_and_not_the_values() -> None:
    sent = {"w": RECEIVED["w"] + np.float32(1e-4), "n": RECEIVED["n"] + 1}
    encoded = encode_result(FLModel(params=sent), spec(transfer_type="DIFF"))
    assert [t.dtype for t in encoded.header.tensors] == ["I64", "F32", "I8"]
    assert encoded.meta["params_type"] == "DIFF"
    back = decode_model(encoded.tobytes()).params
    assert np.allclose(back["w"], 1e-4, rtol=0.01)
    assert back["n"].tolist() == [1, 1, 1]


def test_filters_see_floats_and_what_they_leave_is_narrowed() -> None:
    chain = [{"path": "fedloom.serialization.filters.ExcludeVars", "args": {"exclude_vars": "n"}}]
    encoded = encode_result(FLModel(params=RECEIVED), spec(filters={"client_output": chain}))
    assert [t.name for t in encoded.header.tensors] == ["__scale__.w", "w"]
    assert decode_model(encoded.tobytes()).params["w"].dtype == np.float32


@pytest.mark.parametrize("options", [{"payload_bytes": None}, {"config": {"answer": "params"}}, {"codec": ""}])
def test_what_no_aggregate_is_made_of_stays_as_it_is(options: dict[str, Any]) -> None:
    encoded = encode_result(FLModel(params=RECEIVED), spec(**options))
    assert [t.dtype for t in encoded.header.tensors] == ["I64", "F32"]


def test_a_value_beyond_the_codec_names_site_and_tensor() -> None:
    big = {"w": np.full(600, 1e6, np.float32)}
    with pytest.raises(ValuesError, match=r"site-1.*'w' reaches 1000000.0, which fp16 cannot hold"):
        encode_result(FLModel(params=big), spec(codec="fp16"))


def test_an_unknown_codec_of_a_job_is_refused() -> None:
    path = "fedloom.executor.script.ScriptExecutor"
    assert settings_of(Component(path, {"task_script_path": "c.py", "codec": "bf16"})).codec == "bf16"
    with pytest.raises(JobError, match="codec='zip'; allowed are None, 'fp16'"):
        settings_of(Component(path, {"task_script_path": "c.py", "codec": "zip"}))
