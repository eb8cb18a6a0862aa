from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from fedloom.serialization.digest import digest_buffers, digest_file
from fedloom.serialization.dtypes import DTYPES
from fedloom.serialization.header import read_header
from fedloom.serialization.model import FLModel, ParamsType
from fedloom.serialization.payload import decode_model, describe, encode_model
from fedloom.serialization.tensors import TORCH_NAMES, raw_bytes
from hypothesis import given
from hypothesis import strategies as st

BF16 = np.dtype(ml_dtypes.bfloat16)


def numpy_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {
        name: rng.integers(0, 2 if name == "BOOL" else 100, (3, 5)).astype(entry.numpy)
        for name, entry in DTYPES.items()
    }
    params["none"] = np.empty((0, 4), np.float32)
    params["scalar"] = np.array(2.5, np.float16)
    params["strided"] = rng.standard_normal((4, 6))[::2, ::3]
    params["fortran"] = np.asfortranarray(rng.standard_normal((3, 2)))
    params["big-endian"] = np.arange(3, dtype=">i4")
    params["exact"] = np.array([2**63 - 1, -(2**63), 2**53 + 1])
    return params


def torch_params() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    params = {
        name: torch.randint(0, 2, (4, 2)).to(getattr(torch, kind))
        for name, kind in TORCH_NAMES.items()
        if name != "F8_E8M0"
    }
    params["none"] = torch.empty(2, 0, 3, dtype=torch.bfloat16)
    params["scalar"] = torch.tensor(7)
    params["strided"] = torch.randn(6, 4).t()
    params["slice"] = torch.randn(10)[3:7]
    params["expanded"] = torch.randn(1, 3).expand(5, 3)
    params["channels"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    params["grad"] = torch.nn.Parameter(torch.randn(2))
    params["conj"] = torch.randn(3, dtype=torch.complex64).conj()
    return params


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(raw_bytes(a)) == bytes(raw_bytes(b))


def payload(params: Any = None, **fields: Any) -> bytes:
    return encode_model(FLModel(params=params, **fields)).tobytes()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("source", ["bytes", "bytearray", "memoryview", "path", "copy", "path copy"])
def test_numpy_round_trip(source: str, tmp_path: Path) -> None:
    params = numpy_params()
    data = payload(params)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    given_: Any = {"bytearray": bytearray(data), "memoryview": memoryview(data), "path": path, "path copy": str(path)}
    model = decode_model(given_.get(source, data), framework="numpy", copy="copy" in source)
    assert model.params_type is ParamsType.FULL
    assert list(model.params) == list(params)
    for name, array in params.items():
        back = model.params[name]
        assert back.dtype == array.dtype.newbyteorder("<")
        assert back.shape == array.shape
        assert np.array_equal(back, array)
        assert back.flags.writeable == (source not in ("bytes", "memoryview"))


@pytest.mark.parametrize("source", ["bytes", "bytearray", "path"])
def test_torch_round_trip(source: str, tmp_path: Path) -> None:
    params = torch_params()
    data = payload(params)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    given_: Any = {"bytes": data, "bytearray": bytearray(data), "path": path}[source]
    for framework in ("pytorch", "auto"):
        model = decode_model(given_, framework=framework)
        assert list(model.params) == list(params)
        for name, tensor in params.items():
            assert same(model.params[name], tensor), name
    model.params["slice"].add_(1)  # writable, without a warning or a fault
    assert path.read_bytes() == data


def test_torch_written_numpy_read() -> None:
    params = torch_params()
    model = decode_model(payload(params), framework="numpy")
    assert model.params["BF16"].dtype == BF16
    assert np.array_equal(model.params["strided"], params["strided"].numpy())


def test_numpy_written_auto_read_stays_numpy() -> None:
    model = decode_model(payload({"w": np.ones(3)}), framework="auto")
    assert isinstance(model.params["w"], np.ndarray)


def test_tied_weights_keep_both_names() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    state = net.state_dict()
    back = decode_model(payload(state), framework="pytorch").params
    assert list(back) == list(state)
    net.load_state_dict(back)
    assert same(back["0.weight"], back["1.weight"])


def test_numbers_become_tensors_without_dimensions() -> None:
    back = decode_model(payload({"i": 2**62 + 1, "f": 0.1, "b": True, "s": np.float32(0.5)})).params
    assert {name: (str(a.dtype), a.shape, a.item()) for name, a in back.items()} == {
        "i": ("int64", (), 2**62 + 1),
        "f": ("float64", (), 0.1),
        "b": ("bool", (), True),
        "s": ("float32", (), 0.5),
    }


def test_nested_params_come_back_nested() -> None:
    params = {
        "enc": {"w": np.ones(2), "b": np.zeros(1, np.int32)},
        "dec": [np.ones(3, BF16), (np.ones(1),)],
        "none": {},
    }
    data = payload(params)
    assert [t.name for t in read_header(data).tensors] == ["dec.1.0", "enc.w", "enc.b", "dec.0"]
    back = decode_model(data).params
    assert list(back) == ["enc", "dec", "none"]
    assert isinstance(back["dec"][1], tuple)
    assert np.array_equal(back["enc"]["b"], np.zeros(1, np.int32))
    assert back["dec"][0].dtype == BF16


def test_an_optimizers_state_comes_back() -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = decode_model(payload(net.state_dict(), optimizer_params=state), framework="pytorch")
    assert list(back.params) == ["weight", "bias"]
    assert back.optimizer_params["param_groups"] == state["param_groups"]
    assert same(back.optimizer_params["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    torch.optim.AdamW(net.parameters()).load_state_dict(back.optimizer_params)


@pytest.mark.parametrize("optimizer", [{}, {"lr": 0.1}, {"m": np.ones(2)}, {"m": {"w": np.ones(2)}, "step": 3}])
def test_small_optimizer_params(optimizer: dict[str, Any]) -> None:
    back = decode_model(payload({"w": np.ones(1)}, optimizer_params=optimizer)).optimizer_params
    assert repr(back) == repr(optimizer)


def test_the_plain_side_comes_back() -> None:
    model = FLModel(
        params_type="DIFF",
        params={"w": np.ones(1)},
        metrics={"acc": np.float32(0.5), "loss": torch.tensor(2.0), "n": np.int64(3), "nan": float("nan"), "ok": True},
        start_round=2,
        current_round=5,
        total_rounds=9,
        meta={"NUM_STEPS_CURRENT_ROUND": np.int32(17), "tags": ("a", ["b"], {"c": None}), "ü": "名"},
    )
    encoded = encode_model(model)
    assert encoded.meta == {
        "params_type": "DIFF",
        "metrics": {"acc": 0.5, "loss": 2.0, "n": 3, "nan": "nan", "ok": True},
        "start_round": 2,
        "current_round": 5,
        "total_rounds": 9,
        "meta": {"NUM_STEPS_CURRENT_ROUND": 17, "tags": ["a", ["b"], {"c": None}], "ü": "名"},
    }
    assert describe(encoded.header) == (encoded.meta, {})
    back = decode_model(encoded.tobytes())
    assert back.params_type is ParamsType.DIFF
    assert back.metrics is not None
    assert np.isnan(back.metrics.pop("nan"))
    assert back.metrics == {"acc": 0.5, "loss": 2.0, "n": 3, "ok": True}
    assert (back.start_round, back.current_round, back.total_rounds) == (2, 5, 9)
    assert back.meta == encoded.meta["meta"]


def test_metrics_alone() -> None:
    encoded = encode_model(FLModel(metrics={"acc": 1}, start_round=None))
    back = decode_model(encoded.tobytes())
    assert (back.params, back.params_type, back.metrics, back.start_round) == (None, None, {"acc": 1}, None)
    assert encoded.buffers == [encoded.header_bytes]


def test_empty_params_stay_params() -> None:
    back = decode_model(payload({}))
    assert back.params == {}
    assert back.params_type is ParamsType.FULL


def test_the_messages_plain_side_wins() -> None:
    data = payload({"w": np.ones(1)}, metrics={"a": 1}, current_round=1)
    back = decode_model(data, meta={"params_type": "DIFF", "metrics": {"a": 2}})
    assert back.params_type is ParamsType.DIFF
    assert back.metrics == {"a": 2}
    assert back.current_round is None


@given(
    st.lists(
        st.tuples(
            st.text("abcxyz._/", min_size=1, max_size=6).filter(lambda s: ".." not in s),
            st.sampled_from(list(DTYPES)),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=6,
        unique_by=lambda item: item[0],
    )
)
def test_any_layout_round_trips(items: list[tuple[str, str, list[int]]]) -> None:
    params = {name: np.ones(shape, DTYPES[dtype].numpy) for name, dtype, shape in items}
    encoded = encode_model(FLModel(params=params))
    data = encoded.tobytes()
    assert encoded.size == len(data)
    back = decode_model(bytearray(data)).params
    assert list(back) == list(params)
    assert all(
        back[n].dtype == a.dtype and back[n].shape == a.shape and (back[n] == a).all() for n, a in params.items()
    )


# ---------------------------------------------------------------- the library


def test_the_library_reads_ours(tmp_path: Path) -> None:
    params = torch_params()
    encoded = encode_model(FLModel(params=params))
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        encoded.write_to(file)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == params.keys()
    assert all(same(loaded[name], tensor) for name, tensor in params.items())
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert json.loads(opened.metadata()["fedloom"])["params_type"] == "FULL"
        assert [t.name for t in encoded.header.tensors] == opened.offset_keys()
        assert same(opened.get_tensor("BF16"), params["BF16"])


def test_the_library_reads_our_numpy() -> None:
    params = {n: a for n, a in numpy_params().items() if not n.startswith(("F8", "BF16"))}
    loaded = safetensors.numpy.load(payload(params))
    assert all(np.array_equal(loaded[name], array) for name, array in params.items())


def test_we_read_the_librarys(tmp_path: Path) -> None:
    params = {name: tensor.detach().contiguous().resolve_conj() for name, tensor in torch_params().items()}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(params, path, {"format": "pt", "epoch": "3"})
    for source in (path, path.read_bytes()):
        model = decode_model(source, framework="pytorch")
        assert model.params_type is ParamsType.FULL
        assert model.start_round == 0
        assert model.params.keys() == params.keys()
        assert all(same(model.params[name], tensor) for name, tensor in params.items())


def test_another_tools_reserved_names_are_just_names() -> None:
    data = safetensors.numpy.save({"__optimizer__.m": np.ones(2)})
    model = decode_model(data)
    assert list(model.params) == ["__optimizer__.m"]
    assert model.optimizer_params is None


# ---------------------------------------------------------------- memory


def test_encoding_shares_the_tensors_memory() -> None:
    array = np.zeros(5, np.float32)
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    encoded = encode_model(FLModel(params={"a": array, "t": tensor}))
    array[2] = 1
    tensor[1] = 1
    back = decode_model(encoded.tobytes(), framework="pytorch").params
    assert back["a"].tolist() == [0, 0, 1, 0, 0]
    assert back["t"].tolist() == [0, 1, 0, 0]


def test_decoding_shares_the_buffer_and_copies_where_asked() -> None:
    data = bytearray(payload({"w": np.zeros(4)}))
    for framework in ("numpy", "pytorch"):
        views = decode_model(data, framework=framework).params
        own = decode_model(data, framework=framework, copy=True).params
        data[-1] = 0x40
        assert views["w"][3] == 2
        assert own["w"][3] == 0
        data[-1] = 0


def test_a_mapped_file_is_private_and_outlives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m"
    data = payload({"w": np.zeros(4)})
    path.write_bytes(data)
    model = decode_model(path)
    path.unlink()
    path.write_bytes(b"other")
    model.params["w"] += 1
    assert model.params["w"].sum() == 4
    assert model.params["w"].ctypes.data % 64 == 0


def test_unaligned_files_are_read() -> None:
    text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    data = bytearray(len(text).to_bytes(8, "little") + text + np.array([1, 2], np.float32).tobytes())
    assert (8 + len(text)) % 4
    assert decode_model(data).params["w"].tolist() == [1, 2]
    assert decode_model(data, framework="pytorch").params["w"].tolist() == [1, 2]


def test_the_same_model_gives_the_same_bytes_and_digest(tmp_path: Path) -> None:
    encoded = encode_model(FLModel(params=numpy_params(), metrics={"a": 1.5}))
    again = encode_model(FLModel(params=numpy_params(), metrics={"a": 1.5}))
    assert encoded.tobytes() == again.tobytes()
    path = tmp_path / "m"
    path.write_bytes(encoded.tobytes())
    assert encoded.digest() == digest_file(path) == digest_buffers([path.read_bytes()])


def test_write_to_goes_on_after_short_writes() -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.got = b""

        def write(self, data: memoryview, /) -> int:  # type: ignore[override]
            self.got += bytes(data[:7])
            return min(7, len(data))

    encoded = encode_model(FLModel(params={"w": np.arange(50.0), "v": np.ones(3, np.int8)}))
    slow = Slow()
    encoded.write_to(slow)
    assert slow.got == encoded.tobytes()

    class Full(io.RawIOBase):
        def write(self, data: memoryview, /) -> None:  # type: ignore[override]
            return None

    with pytest.raises(OSError, match="no bytes"):
        encoded.write_to(Full())


def test_torch_is_not_imported_unless_asked_for() -> None:
    code = """if True:
        import sys
        import numpy as np
        from fedloom.serialization.payload import FLModel, decode_model, diff, encode_model
        model = FLModel(params={"w": np.ones(2), "n": {"b": np.ones(1)}}, metrics={"a": np.float32(1)})
        back = decode_model(encode_model(model).tobytes(), framework="auto")
        diff(back, model)
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
