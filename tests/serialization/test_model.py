from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fedloom.serialization.errors import LayoutError
from fedloom.serialization.model import FLModel, ParamsType, flatten, unflatten

W = np.arange(6.0).reshape(2, 3)
B = np.ones(3, np.float32)


# ---------------------------------------------------------------- FLModel


def test_params_without_a_type_are_full() -> None:
    model = FLModel(params={"w": W})
    assert model.params_type is ParamsType.FULL
    assert model.meta == {}
    assert model.start_round == 0
    assert model.current_round is None
    assert model.total_rounds is None
    assert model.metrics is None
    assert model.optimizer_params is None


def test_nothing_has_no_type() -> None:
    assert FLModel().params_type is None
    assert FLModel(metrics={"acc": 0.5}).params_type is None


def test_the_type_may_be_its_text() -> None:
    assert FLModel("DIFF", {"w": W}).params_type is ParamsType.DIFF
    assert ParamsType.FULL == "FULL"
    with pytest.raises(ValueError, match="HALF"):
        FLModel("HALF", {"w": W})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ParamsType.FULL, "DIFF"])
def test_a_type_needs_params(kind: Any) -> None:
    with pytest.raises(ValueError, match="no params"):
        FLModel(params_type=kind)


def test_empty_params_are_params() -> None:
    assert FLModel(params={}).params_type is ParamsType.FULL


@pytest.mark.parametrize("bad", [{"metrics": [1]}, {"metrics": 0.5}, {"meta": "x"}, {"current_round": 1.0}])
def test_wrong_types(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        FLModel(**bad)


@pytest.mark.parametrize("field", ["start_round", "current_round", "total_rounds"])
def test_rounds_are_counts(field: str) -> None:
    assert getattr(FLModel(**{field: 3}), field) == 3
    with pytest.raises(ValueError, match="negative"):
        FLModel(**{field: -1})
    with pytest.raises(TypeError, match="bool"):
        FLModel(**{field: True})


def test_every_model_has_a_meta_of_its_own() -> None:
    one, two = FLModel(), FLModel()
    assert one.meta is not None
    one.meta["a"] = 1
    assert two.meta == {}


def test_validate_sees_what_was_set_since() -> None:
    model = FLModel()
    model.params = {"w": W}
    model.validate()
    assert model.params_type is ParamsType.FULL
    model.params = None
    with pytest.raises(ValueError, match="no params"):
        model.validate()


def test_repr_shows_no_values() -> None:
    text = repr(FLModel(params={"w": np.full(3, 123.25)}, metrics={"acc": 0.5}, current_round=2, meta={"k": "v" * 999}))
    assert "123.25" not in text
    assert "acc" in text
    assert "current_round=2" in text
    assert len(text) < 300


# ---------------------------------------------------------------- flatten


def test_a_flat_dict_stays_as_it_is() -> None:
    params = {"z.w": W, "a": B, "n": 3, "s": np.float32(1)}
    flat, spec = flatten(params)
    assert flat == params
    assert list(flat) == list(params)
    assert spec is None
    assert unflatten(flat, spec) == params


def test_nested_dicts_join_with_dots() -> None:
    params = {"layer": {"w": W, "deep": {"b": B}}, "top": B, "empty": {}}
    flat, spec = flatten(params)
    assert list(flat) == ["layer.w", "layer.deep.b", "top"]
    assert flat["layer.w"] is W
    assert unflatten(flat, spec) == params


def test_dots_in_names_and_dots_of_levels_are_told_apart() -> None:
    params = {"a.b": {"c": W}, "a": {"d.e": B}}
    flat, spec = flatten(params)
    assert set(flat) == {"a.b.c", "a.d.e"}
    assert unflatten(flat, spec) == params
    with pytest.raises(LayoutError, match=r"'a\.b'"):
        flatten({"a.b": W, "a": {"b": B}})


def test_lists_tuples_and_integer_keys_come_back() -> None:
    params = {"layers": [W, (B, {0: W, "1": B})], "$": W, "x": {"$map": B}}
    flat, spec = flatten(params)
    assert list(flat) == ["layers.0", "layers.1.0", "layers.1.1.0", "layers.1.1.1", "$", "x.$map"]
    back = unflatten(flat, spec)
    assert back["layers"][1][1] == {0: W, "1": B}
    assert isinstance(back["layers"][1], tuple)
    assert back["$"] is W
    assert back["x"] == {"$map": B}


def test_a_list_of_arrays() -> None:
    flat, spec = flatten([W, B])
    assert list(flat) == ["0", "1"]
    assert unflatten(flat, spec) == [W, B]


def test_plain_values_stay_in_the_spec_where_wanted() -> None:
    state = {
        "state": {0: {"step": W, "on": True}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None}],
    }
    flat, spec = flatten(state, plain=True)
    assert list(flat) == ["state.0.step"]
    assert unflatten(flat, spec) == state
    with pytest.raises(LayoutError, match="NoneType"):
        flatten(state)


def test_refuses_what_no_tensor_is() -> None:
    for odd in ("text", None, {1, 2}, object()):
        with pytest.raises(LayoutError, match="belong there"):
            flatten({"a": {"b": odd}})
    with pytest.raises(LayoutError, match="a dict of tensors"):
        flatten(W)
    with pytest.raises(LayoutError, match="text or int"):
        flatten({(1, 2): W})


def test_refuses_endless_nesting() -> None:
    loop: dict[str, Any] = {"w": W}
    loop["self"] = loop
    with pytest.raises(LayoutError, match="more than 16 deep"):
        flatten(loop)


@pytest.mark.parametrize(
    "spec",
    [
        1,
        "w",
        {},
        {"w": None},
        {"w": {"$": 1}},
        {"w": {"$": "other"}},
        {"a": {"$": "w"}, "b": {"$": "w"}},
        {"$map": [["a"]]},
        {"$map": [[None, {"$": "w"}]]},
        {"$map": [[True, {"$": "w"}]]},
        {"$tuple": {"$": "w"}},
        {"$plain": [1]},
    ],
)
def test_a_strangers_spec_must_name_each_tensor_once(spec: Any) -> None:
    with pytest.raises(LayoutError):
        unflatten({"w": W}, spec)


def test_a_strangers_spec_is_not_deep() -> None:
    spec: Any = {"$": "w"}
    for _ in range(100):
        spec = [spec]
    with pytest.raises(LayoutError, match="deep"):
        unflatten({"w": W}, spec)
