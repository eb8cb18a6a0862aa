"""Filters, wherever they run: the chain, ExcludeVars, and the way back into user code's own shape."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization.component import Component
from fedloom.serialization.errors import JobError
from fedloom.serialization.filters import BUILT_IN, ExcludeVars, FilterContext, apply_filters, like, make_filter
from fedloom.serialization.model import FLModel

CONTEXT = FilterContext("client_output", "job-1", "train", 2, "site-1", 7)
EXCLUDE = next(iter(BUILT_IN))


@pytest.fixture
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of filters of a job's own; its name."""
    name = f"filters_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(
        "from dataclasses import replace\n"
        "class Double:\n"
        "    def process(self, model, context):\n"
        "        for value in model.params.values():\n"
        "            value *= 2\n"
        "class Add:\n"
        "    def __init__(self, by):\n"
        "        self.by = by\n"
        "    def process(self, model, context):\n"
        "        return replace(model, params={k: v + self.by for k, v in model.params.items()})\n"
        "class Fails:\n"
        "    def process(self, model, context):\n"
        "        raise ZeroDivisionError(f'at {context.site}')\n"
        "class Text:\n"
        "    def process(self, model, context):\n"
        "        return 'model'\n"
        "class Nothing:\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_a_chain_works_in_order_on_a_copy(filters: str) -> None:
    weights = np.ones(3, np.float32)
    model = FLModel(params={"a": {"b": weights}, "n": 3}, metrics={"x": 1.0}, meta={"k": 1})
    double, add = Component(f"{filters}.Double"), Component(f"{filters}.Add", {"by": 1})
    one = apply_filters([double, add], model, CONTEXT)
    other = apply_filters([add, double], model, CONTEXT)
    assert one.params["a.b"].tolist() == [3.0] * 3 and other.params["a.b"].tolist() == [4.0] * 3
    assert one.params["n"].dtype == np.int64 and int(one.params["n"]) == 7
    assert (one.metrics, one.meta) == ({"x": 1.0}, {"k": 1})
    assert weights.tolist() == [1.0] * 3 and model.params["n"] == 3


def test_errors_name_the_filter(filters: str) -> None:
    with pytest.raises(ZeroDivisionError, match="at site-1") as caught:
        apply_filters([Component(f"{filters}.Fails")], FLModel(params={"a": 1.0}), CONTEXT)
    assert f"in client_output filter {filters}.Fails, task 'train' of round 2" in caught.value.__notes__
    with pytest.raises(JobError, match=r"Text returned a str; an FLModel or None belongs there"):
        apply_filters([Component(f"{filters}.Text")], FLModel(params={"a": 1.0}), CONTEXT)
    with pytest.raises(JobError, match=r"Nothing without process\(model, context\)"):
        make_filter(Component(f"{filters}.Nothing"))


def test_exclude_vars() -> None:
    model = FLModel(params={"head.w": np.ones(2), "body.w": np.ones(2), "body.w.2": np.ones(1)})

    def left(value: Any) -> list[str]:
        return list(apply_filters([Component(EXCLUDE, {"exclude_vars": value})], model, CONTEXT).params)

    assert left(["body.w"]) == ["head.w", "body.w.2"]
    assert left("body") == ["head.w"]
    assert left("w$") == ["body.w.2"]
    assert left(None) == left("") == list(model.params)
    assert ExcludeVars("x").process(FLModel(metrics={"a": 1.0}), CONTEXT) is None
    for wrong in ("(", 3, [1]):
        with pytest.raises(JobError, match=r"ExcludeVars: exclude_vars="):
            ExcludeVars(wrong)  # type: ignore[arg-type]


def test_what_is_built_in_builds_nothing_that_a_job_names() -> None:
    """Such filters run in programs of other people's, where a job's config must not import anything."""
    inner = {"path": "os.system", "args": {"command": "exit 3"}}
    with pytest.raises(JobError, match=r"exclude_vars=\{'path': 'os.system'"):
        make_filter(Component(EXCLUDE, {"exclude_vars": inner}))
    with pytest.raises(JobError, match="unexpected keyword argument 'exclude'"):
        make_filter(Component(EXCLUDE, {"exclude": "x"}))


def test_back_into_the_nesting_of_the_original() -> None:
    original = {"a": [np.ones(1), (np.ones(2), 5)], "b": {"c": np.ones(3), 4: np.ones(4)}}
    flat = {"a.0": np.zeros(1), "a.1.1": np.array(9), "b.4": np.zeros(4), "new": np.zeros(1)}
    back = like(original, flat)
    assert list(back) == ["a", "b", "new"]
    assert back["a"][0].tolist() == [0.0] and isinstance(back["a"][1], tuple) and int(back["a"][1][0]) == 9
    assert list(back["b"]) == [4]


def test_back_into_torch() -> None:
    torch = pytest.importorskip("torch")
    half = np.array([1.5, 2.5], ml_dtypes.bfloat16)
    back = like({"w": torch.zeros(2, dtype=torch.bfloat16), "gone": torch.zeros(1)}, {"w": half})
    assert list(back) == ["w"] and back["w"].dtype == torch.bfloat16 and back["w"].tolist() == [1.5, 2.5]
