"""`initial_ckpt`: every format, relative and absolute, with a model and without, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.controller.checkpoints import fit, read_checkpoint
from fedloom.recipe import FedAvgRecipe, NumpyFedAvgRecipe
from fedloom.serialization.errors import JobError
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)}


class Danger:
    """What no checkpoint may bring along: an object, whose class the file names."""


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "train_conf": {"lr": 1}, "meta_props": None},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 1.0}},
    ],
)
def test_torch_files(tmp_path: Path, suffix: str, wrap: Any) -> None:
    path = tmp_path / f"start{suffix}"
    torch.save(wrap(STATE), path)
    read = read_checkpoint(path)
    assert list(read) == ["weight", "bias"]
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in STATE.items())


def test_torch_files_of_the_old_format(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["weight"], STATE["weight"])


def test_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]]))
    read = read_checkpoint(tmp_path / "a.npy")
    assert list(read) == ["numpy_key"]
    assert read["numpy_key"].dtype == np.float32
    np.save(tmp_path / "b.npy", np.ones(2, np.float64))
    assert read_checkpoint(tmp_path / "b.npy")["numpy_key"].dtype == np.float64
    np.savez(tmp_path / "c.npz", w=np.ones(2), steps=np.array(3))
    assert {name: value.dtype.kind for name, value in read_checkpoint(tmp_path / "c.npz").items()} == {
        "w": "f",
        "steps": "i",
    }
    np.savez(tmp_path / "d.npz", np.ones(2))
    assert list(read_checkpoint(tmp_path / "d.npz")) == ["numpy_key"]
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "e.safetensors")
    assert list(read_checkpoint(tmp_path / "e.safetensors")) == ["w"]


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("x.pt", lambda path: torch.save(Danger(), path), "only tensors and plain data are read"),
        ("x.pt", lambda path: torch.save({"model": Danger()}, path), "only tensors and plain data are read"),
        ("x.pt", lambda path: torch.save([torch.ones(1)], path), "holds a list; a state dict belongs there"),
        ("x.pt", lambda path: torch.save({"w": torch.ones(1), "lr": "3"}, path), "'lr' is a str; a state dict has"),
        ("x.pt", lambda path: torch.save({}, path), "holds no tensors"),
        ("x.pt", lambda path: path.write_bytes(b"not a checkpoint"), "is no file of torch.save"),
        ("x.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "cannot be read as .npy"),
        ("x.npy", lambda path: path.write_bytes(b""), "cannot be read as .npy"),
        ("x.npz", lambda path: path.write_bytes(b"PK\x03\x04"), "cannot be read as .npz"),
        ("x.safetensors", lambda path: path.write_bytes(b"\xff" * 20), "cannot be read as .safetensors"),
        ("x.safetensors", lambda path: path.write_bytes(b""), "cannot be read as .safetensors"),
        ("x.onnx", lambda path: path.write_bytes(b""), "a file that ends in .npy, .npz, .safetensors, .pt"),
        ("gone.npy", lambda path: None, "there is no such file on this machine"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, make: Any, text: str) -> None:
    make(tmp_path / name)
    with pytest.raises(JobError) as caught:
        read_checkpoint(tmp_path / name)
    assert text in str(caught.value)
    assert name in str(caught.value)


def test_values_in_the_models_layout() -> None:
    base = {"b": np.zeros(2, np.float32), "a": np.zeros((1, 2), np.float16)}
    made = fit({"a": np.ones((1, 2)), "b": torch.full((2,), 2.0, dtype=torch.bfloat16)}, base, "it")
    assert [(name, value.dtype.name, value.ravel().tolist()) for name, value in made.items()] == [
        ("b", "float32", [2, 2]),
        ("a", "float16", [1, 1]),
    ]
    assert list(fit({"numpy_key": np.ones(2)}, {"coef": np.zeros(2)}, "it")) == ["coef"]
    with pytest.raises(JobError) as caught:
        fit({"a": np.ones((2, 1)), "c": np.ones(1)}, base, "it")
    assert "it does not fit the model: 'b' is not in the checkpoint; 'c' is not in the model; 'a' is [2, 1] there" in (
        str(caught.value)
    )


def test_a_relative_path_travels(here: Path) -> None:
    torch.save({"model": torch.nn.Linear(3, 2).state_dict()}, here / "start.pt")
    wanted = torch.load(here / "start.pt", weights_only=True)["model"]
    for model in (None, torch.nn.Linear(3, 2)):
        made = FedAvgRecipe(model=model, initial_ckpt="start.pt", min_clients=1, train_script="client.py")
        assert made.job.workflows[0].args["initial_model"] == "initial_model.safetensors"
        assert "initial_ckpt" not in made.job.workflows[0].args
        params = made.job.params
        assert params is not None
        assert {name: torch.as_tensor(value).tolist() for name, value in params.items()} == {
            name: value.tolist() for name, value in wanted.items()
        }
    with pytest.raises(JobError, match=r"'weight' is \[2, 3\] there and \[2, 4\] in the model"):
        FedAvgRecipe(model=torch.nn.Linear(4, 2), initial_ckpt="start.pt", min_clients=1, train_script="client.py")
    with pytest.raises(JobError, match=r"initial_ckpt='gone.pt' not found: looked for .*absolute path"):
        FedAvgRecipe(initial_ckpt="gone.pt", min_clients=1, train_script="client.py")


def test_an_absolute_path_is_the_servers(here: Path, tmp_path: Path) -> None:
    gone = tmp_path / "only there.npy"
    made = NumpyFedAvgRecipe(initial_ckpt=str(gone), min_clients=1, train_script="client.py")
    assert made.job.workflows[0].args["initial_ckpt"] == str(gone)
    assert made.job.params is None
    np.save(gone, np.ones(3, np.float32))  # where it is here too, what can be checked is
    made = NumpyFedAvgRecipe(model=[0, 0, 0], initial_ckpt=str(gone), min_clients=1, train_script="client.py")
    assert made.job.params is not None
    with pytest.raises(JobError, match="does not fit the model"):
        NumpyFedAvgRecipe(model=[0, 0], initial_ckpt=gone, min_clients=1, train_script="client.py")
    with pytest.raises(JobError, match=r"a file that ends in \.npy"):
        NumpyFedAvgRecipe(initial_ckpt="/models/start.h5", min_clients=1, train_script="client.py")
