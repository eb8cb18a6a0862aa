"""What encode_model, decode_model and diff refuse."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from fedloom.serialization.errors import HeaderError, LayoutError, PayloadError
from fedloom.serialization.header import build_header
from fedloom.serialization.model import FLModel, ParamsType
from fedloom.serialization.payload import decode_model, diff, encode_model
from hypothesis import given
from hypothesis import strategies as st

BF16 = np.dtype(ml_dtypes.bfloat16)


def payload(params: Any = None, **fields: Any) -> bytes:
    return encode_model(FLModel(params=params, **fields)).tobytes()


def forged(description: Any, specs: Any = (("w", "F32", (1,)),), data: bytes = b"\0\0\0\0") -> bytes:
    text = description if isinstance(description, str) else json.dumps(description)
    return build_header(specs, {"fedloom": text})[1] + data


# ---------------------------------------------------------------- what is refused on the way out


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"w": np.array(["a"])}, "'w'.*cannot be stored"),
        ({"w": np.array([object()])}, "'w'.*cannot be stored"),
        ({"w": np.zeros(1, np.complex128)}, "'w'.*complex128"),
        ({"w": torch.zeros(1, dtype=torch.complex128)}, "'w'.*complex128"),
        ({"w": torch.eye(2).to_sparse()}, "'w'.*to_dense"),
        ({"w": torch.empty(2, device="meta")}, "'w'.*meta"),
        ({"w": 2**63}, "'w'.*64 bits"),
        ({"w": "text"}, "'w'.*str"),
        ({"__optimizer__.w": np.ones(1)}, "optimizer_params"),
        ([1, "x"], "belong there"),
    ],
)
def test_tensors_that_cannot_be_stored(params: Any, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        encode_model(FLModel(params=params))


def test_a_sharded_tensor_cannot_be_stored() -> None:
    tensor = torch.ones(2)
    tensor.full_tensor = lambda: tensor  # what torch's DTensor has
    with pytest.raises(LayoutError, match="full_tensor"):
        encode_model(FLModel(params={"w": tensor}))


def test_names_that_are_not_allowed() -> None:
    with pytest.raises(HeaderError, match="printable"):
        encode_model(FLModel(params={"a\0": np.ones(1)}))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("meta", {"a": float("inf")}, r"meta\['a'\] is inf"),
        ("meta", {"a": {"b": [1, np.ones(3)]}}, "put tensors into params"),
        ("meta", {"a": torch.ones(2)}, "put tensors into params"),
        ("meta", {1: 2}, "int as key"),
        ("meta", {"a": b"bytes"}, "bytes"),
        ("meta", {"a": 2**64}, "64 bits"),
        ("meta", {"a": 1j}, "complex"),
        ("meta", {"a": "\ud800"}, "surrogate"),
        ("metrics", {"a": object()}, "object"),
        ("metrics", {"a": "x" * 50_000}, "at most 49152"),
    ],
)
def test_plain_sides_that_are_not_plain(field: str, value: Any, match: str) -> None:
    with pytest.raises(PayloadError, match=match):
        encode_model(FLModel(params={"w": np.ones(1)}, **{field: value}))


def test_a_meta_that_holds_itself() -> None:
    loop: dict[str, Any] = {}
    loop["a"] = loop
    with pytest.raises(PayloadError, match="deep"):
        encode_model(FLModel(meta=loop))


# ---------------------------------------------------------------- what is refused on the way in


def test_cut_or_extended_payloads(tmp_path: Path) -> None:
    data = payload({"w": np.ones(3)})
    for bad in (b"", data[:5], data[:-1], data + b"\0"):
        path = tmp_path / "bad"
        path.write_bytes(bad)
        for source in (bad, path):
            with pytest.raises(HeaderError):
                decode_model(source)
    with pytest.raises(FileNotFoundError):
        decode_model(tmp_path / "missing")


@pytest.mark.parametrize(
    "description",
    [
        "",
        "[]",
        "{",
        '{"a":1,"a":2}',
        '{"metrics":{"a":NaN}}',
        '{"metrics":{"a":1e999}}',
        "[" * 100_000,
        {"params_type": "HALF"},
        {"params_type": 1},
        {"params_type": ["FULL"]},
        {"metrics": [1]},
        {"metrics": {"a": 10**400}},
        {"meta": "x"},
        {"meta": {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}},
        {"current_round": -1},
        {"current_round": True},
        {"current_round": "1"},
        {"order": [1]},
        {"order": [True]},
        {"order": [0, 0]},
        {"order": "0"},
        {"structure": {"v": {"$": "v"}}},
        {"structure": []},
        {"structure": 5},
        {"optimizer": {"$": 1}},
        {"optimizer": [{"$": "w"}]},
    ],
)
def test_a_strangers_description(description: Any) -> None:
    with pytest.raises(PayloadError):
        decode_model(forged(description))


def test_optimizer_tensors_without_a_description() -> None:
    with pytest.raises(LayoutError, match="optimizer_params"):
        decode_model(forged({"params_type": "FULL"}, [("__optimizer__.w", "F32", (1,))]))


@pytest.mark.parametrize("framework", ["numpy", "pytorch"])
def test_a_bool_that_is_neither(framework: Any) -> None:
    data = bytearray(payload({"b": np.array([True, False])}))
    data[-1] = 7
    with pytest.raises(PayloadError, match="holds a byte 7"):
        decode_model(data, framework=framework)


@given(st.integers(0, 600), st.integers(0, 255))
def test_a_changed_byte_raises_nothing_else(at: int, value: int) -> None:
    data = bytearray(payload({"b": np.array([True]), "w": np.ones(2)}, metrics={"a": 1}))
    data[at % len(data)] = value
    with suppress(HeaderError, PayloadError):
        decode_model(data)


# ---------------------------------------------------------------- diff


def test_diff_is_new_minus_base_in_kind() -> None:
    new = FLModel(params={"w": np.array([3.0, 5.0], BF16), "n": np.array([7]), "b": np.array([True])}, metrics={"a": 1})
    base = FLModel(params={"w": np.array([1.0, 1.5], BF16), "n": np.array([9]), "b": np.array([False])})
    out = diff(new, base)
    assert out.params_type is ParamsType.DIFF
    assert out.metrics == {"a": 1}
    assert out.params["w"].dtype == BF16
    assert out.params["w"].tolist() == [2.0, 3.5]
    assert out.params["n"].tolist() == [-2]
    assert out.params["b"].tolist() == [True]


def test_diff_of_torch_stays_torch_and_nested() -> None:
    new = {"l": {"w": torch.full((2,), 1.5, dtype=torch.float8_e4m3fn), "s": torch.tensor(3)}, "v": torch.ones(2)}
    base = {"l": {"w": torch.full((2,), 0.5, dtype=torch.float8_e4m3fn), "s": torch.tensor(1)}, "v": np.zeros(2, "f4")}
    new["v"].requires_grad_()
    out = diff(FLModel(params=new), FLModel(params=base)).params
    assert out["l"]["w"].dtype == torch.float8_e4m3fn
    assert out["l"]["w"].float().tolist() == [1.0, 1.0]
    assert out["l"]["s"].item() == 2
    assert out["v"].tolist() == [1, 1]
    assert not out["v"].requires_grad


@pytest.mark.parametrize("base", [{}, {"w": np.ones(2), "v": np.ones(1)}, {"w": np.ones(3)}, {"w": np.ones(2, "f4")}])
def test_diff_needs_the_same_layout(base: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        diff(FLModel(params={"w": np.ones(2)}), FLModel(params=base))


def test_diff_needs_params() -> None:
    with pytest.raises(LayoutError, match="both sides"):
        diff(FLModel(params={"w": np.ones(2)}), FLModel())


@pytest.mark.parametrize(("dtype", "new", "base"), [("u1", 1, 2), ("i1", 100, -100), ("i8", -(2**63), 1)])
def test_diff_never_wraps_around(dtype: str, new: int, base: int) -> None:
    a, b = (FLModel(params={"w": np.array([value], dtype)}) for value in (new, base))
    with pytest.raises(LayoutError, match="does not fit"):
        diff(a, b)
