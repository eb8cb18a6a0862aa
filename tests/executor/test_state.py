from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from fedloom.executor.state import SiteState, StateStore, load_state, save_state, version_name
from fedloom.serialization.errors import PayloadError


def test_tensors_and_values_come_back_as_they_were(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    values = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 4)),
        "optimizer": optimizer.state_dict(),
        "plain": [None, True, 3, -2.5, float("inf"), "text", b"bytes", (1, (2,)), {}],
        "deep": {1: {"x": OrderedDict(a=torch.arange(3))}},
    }
    save_state(values, tmp_path / "v")
    back = load_state(tmp_path / "v")
    assert back.keys() == values.keys() and back["plain"] == values["plain"]
    assert back["array"].dtype == np.int16 and np.array_equal(back["array"], values["array"])
    assert back["half"].dtype == torch.bfloat16 and back["scalar"] == 2.5 and back["empty"].shape == (0, 4)
    assert torch.equal(back["deep"][1]["x"]["a"], torch.arange(3))
    other = torch.optim.Adam(model.parameters())
    other.load_state_dict(back["optimizer"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_loaded_version_may_be_changed_in_place_and_stays_as_it_is(tmp_path):
    save_state({"m": np.zeros(4)}, tmp_path / "v")
    state = SiteState(tmp_path / "v")
    assert not state.used
    state["m"] += 1
    assert state.used and state.save(tmp_path / "w")
    assert load_state(tmp_path / "v")["m"].sum() == 0 and load_state(tmp_path / "w")["m"].sum() == 4


def test_what_nobody_looked_at_is_not_written(tmp_path):
    assert not SiteState(None).save(tmp_path / "v")
    empty = SiteState(None)
    assert "x" not in empty and not empty.save(tmp_path / "v")
    save_state({"x": 1}, tmp_path / "a")
    cleared = SiteState(tmp_path / "a")
    cleared.clear()
    assert cleared.save(tmp_path / "b") and load_state(tmp_path / "b") == {}


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {True: 1}, lambda: None, {"a": {"b": {1, 2}}}])
def test_what_cannot_be_kept_is_named(tmp_path, value):
    with pytest.raises(PayloadError, match="'mine'"):
        save_state({"mine": value}, tmp_path / "v")
    assert not list(tmp_path.iterdir())


def test_a_list_that_holds_itself(tmp_path):
    loop: list = []
    loop.append(loop)
    with pytest.raises(PayloadError, match="nested"):
        save_state({"x": loop}, tmp_path / "v")


def test_a_damaged_version_is_told(tmp_path):
    from fedloom.serialization.errors import FedloomError

    (tmp_path / "v").write_bytes(b"no state at all")
    with pytest.raises(FedloomError):
        load_state(tmp_path / "v")
    save_state({"x": np.zeros(3)}, tmp_path / "v")
    data = (tmp_path / "v").read_bytes()
    (tmp_path / "v").write_bytes(data.replace(b'["n"', b'["q"'))
    with pytest.raises(PayloadError, match="not a site state"):
        load_state(tmp_path / "v")


def test_the_store_removes_all_versions_but_those_asked_for(tmp_path):
    store = StateStore(tmp_path)
    assert not store.has_any("s", "j")
    names = [version_name(f"t{i}", 1) for i in range(4)]
    for name in names:
        save_state({"x": 1}, store.path("s", "j", name))
    save_state({"x": 1}, store.path("s", "other", names[0]))
    cut = [store.folder("s", "j") / f".{name}.part" for name in names[:2]]
    for path in cut:
        path.write_bytes(b"an executor died here, or is at work")
    store.keep_only("s", "j", {names[1], names[3], "not.1"})
    assert store.has_any("s", "j")
    assert {p.name for p in store.folder("s", "j").iterdir()} == {names[1], names[3], cut[1].name}
    store.discard("s", "j", names[3])
    assert {p.name for p in store.folder("s", "j").iterdir()} == {names[1], cut[1].name}
    store.forget("j", ("s", "elsewhere"))
    assert not store.folder("s", "j").exists() and store.has_any("s", "other")
    for bad in ("", "../x", ".hidden", "a/b"):
        with pytest.raises(PayloadError):
            store.path("s", "j", bad)
