"""Plans: made of a model, carried on from round to round, equal on both sides; and partials that do not fit."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from fedloom.serialization.codec import pack
from fedloom.serialization.errors import CodecError, FedloomError, FoldError, LayoutError, ValuesError, WeightError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldpartial import METADATA_KEY
from fedloom.serialization.foldplan import FoldPlan, Magnitudes
from fedloom.serialization.header import build_header, read_header
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

BASE = {
    "w": np.array([[1.0, -4.0]], np.float32),
    "b": np.zeros(3, ml_dtypes.bfloat16),
    "n": np.array(5),
    "m": np.array([True]),
}


def make_plan(**options: Any) -> FoldPlan:
    return FoldPlan.first(BASE, tasks=10, **options)


def test_first_scales_come_from_the_model() -> None:
    plan = make_plan(weight_cap=1.0)
    assert [tensor.name for tensor in plan.tensors] == ["b", "m", "n", "w"]
    assert plan.base_max == (0.0, 0.0, 0.0, 4.0)
    assert plan.r_full == (4 / 64, 4 / 64, 4 / 64, 4.0)
    # 16 * 4 * 2^q <= 2^51 (and 10 times that <= 2^62)
    assert plan.q_full[3] == plan.q_diff[3] == 45
    assert make_plan().q_full[3] == 45 - 18
    assert make_plan(weight_cap=1.0).sized(1 << 20).q_full[3] == 45 - 9
    assert FoldPlan.first({"w": np.zeros(2, np.float32)}, tasks=1).r_full == (2.0**-10,)


def test_bytes_and_digest() -> None:
    plan = make_plan(aggregation_weights={"b": 2, "a": 0.5}, exclude="^head", exact=False)
    again = FoldPlan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.digest == plan.digest
    assert len(plan.digest) == 64
    assert make_plan(aggregation_weights={"a": 0.5, "b": 2}, exclude="^head", exact=False).digest == plan.digest
    assert make_plan().digest != plan.digest
    shuffled = dict(reversed(BASE.items()))
    assert FoldPlan.first(shuffled, tasks=10).digest == make_plan().digest


def test_what_cannot_be_planned() -> None:
    with pytest.raises(LayoutError, match="without tensors"):
        FoldPlan.first({}, tasks=1)
    with pytest.raises(LayoutError, match="'c' is C64"):
        FoldPlan.first({"c": np.ones(2, np.complex64)}, tasks=1)
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(ValuesError, match="'w'"):
            FoldPlan.first({"w": np.array([1.0, bad])}, tasks=1)
    for weight in (0, -1, True, float("nan"), "2"):
        with pytest.raises(WeightError, match="site-3"):
            make_plan(aggregation_weights={"site-3": weight})
    with pytest.raises(FoldError, match="regular expression"):
        make_plan(exclude="(")
    with pytest.raises(FoldError, match="tasks"):
        make_plan().sized(0)
    with pytest.raises(FoldError, match="cap"):
        make_plan(weight_cap=0.0)


def test_the_next_plan_knows_only_what_was_seen() -> None:
    plan = make_plan()
    found = Magnitudes("DIFF", results=(0.0, 0.0, 0.0, 0.5), base=(0.25, 0.0, 0.0, 5.0), weight_cap=8.0)
    after = plan.next(found, tasks=20)
    assert after.r_diff == (4 / 64, 4 / 64, 4 / 64, 0.5)
    assert after.r_full == plan.r_full
    assert after.base_max == found.base
    assert (after.tasks, after.weight_cap) == (20, 8.0)
    assert after.q_diff[3] == 51 - 4 - 2
    assert after.q_full[3] == 51 - 4 - 5
    with pytest.raises(FoldError, match="magnitudes of 1"):
        plan.next(Magnitudes("FULL", (1.0,), (1.0,), 1.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "fedloom-fold/2"),
        ("names", ["b", "m", "w", "n"]),
        ("names", ["b", "b", "n", "w"]),
        ("names", ["b"]),
        ("names", None),
        ("dtypes", ["F32", "F32", "F32", "F4"]),
        ("shapes", [[1], [1], [1], [-1]]),
        ("shapes", [[1], [1], [1], 7]),
        ("q_full", b"\xff\x7f" * 4),
        ("q_diff", b"12"),
        ("r_full", b"\x00\x00\x00\x00\x00\x00\xf0\x7f" * 4),
        ("base_max", b"\x00\x00\x00\x00\x00\x00\xf0\xbf" * 4),
        ("weight_cap", -1.0),
        ("tasks", 2**40),
        ("tasks", True),
        ("sites", [["a", 0.0]]),
        ("sites", [["a", 1.0], ["a", 1.0]]),
        ("exclude", "("),
        ("exact", 1),
    ],
)
def test_bytes_that_are_no_plan(key: str, value: Any) -> None:
    fields: dict[str, Any] = msgpack.unpackb(make_plan().to_bytes())
    fields[key] = value
    with pytest.raises(CodecError, match=r"plan|NaN|finite"):
        FoldPlan.from_bytes(pack(fields))


def test_bytes_that_are_nothing() -> None:
    for data in (b"", b"\xc1", pack([]), make_plan().to_bytes()[:-1]):
        with pytest.raises(CodecError):
            FoldPlan.from_bytes(data)


# --- partials that do not fit ---------------------------------------------------------------------


def partial_of(plan: FoldPlan, **fields: Any) -> bytes:
    fold = Fold(plan)
    for index in range(2):
        meta = {"NUM_STEPS_CURRENT_ROUND": index + 1}
        model = FLModel(params=BASE, meta=meta, metrics={"acc": 0.5}, **fields)
        fold.add(encode_model(model), site=f"site-{index}")
    return b"".join(fold.to_partial()[0])


def test_partials_of_another_plan_or_kind_are_refused() -> None:
    plan = make_plan()
    fold = Fold(plan)
    with pytest.raises(FoldError, match="plan"):
        fold.merge(partial_of(make_plan(weight_cap=3.0)))
    fold.merge(partial_of(plan))
    with pytest.raises(FoldError, match="DIFF"):
        fold.merge(partial_of(plan, params_type="DIFF"))
    with pytest.raises(FoldError, match="no partial"):
        fold.merge(encode_model(FLModel(params=BASE)).tobytes())
    assert fold.count == 2
    fold.unmerge(partial_of(plan))
    assert fold.count == 0
    with pytest.raises(FoldError, match="does not fit"):
        fold.unmerge(partial_of(plan))


def test_an_empty_fold_is_a_checkpoint_too() -> None:
    plan = make_plan()
    fold = Fold(plan)
    fold.merge(b"".join(Fold(plan).to_partial()[0]))
    assert fold.count == 0
    fold.merge(partial_of(plan))
    assert fold.count == 2


@pytest.mark.parametrize(
    "change",
    [
        {"format": "fedloom-partial/9"},
        {"kind": "HALF"},
        {"weighted": None},
        {"count": -1},
        {"count": True},
        {"count": 2**40},
        {"weight": "0"},
        {"weight": "-3"},
        {"weight": "zz"},
        {"weight": "1p99999"},
        {"weight": "f" * 1200},
        {"sizes": [[1, 5]]},
        {"sizes": [[99, 2]]},
        {"sizes": [["a", 2]]},
        {"metrics": [["acc", "1", "0", "1", 2]]},
        {"metrics": [["acc", "1", "1", "1", 9]]},
        {"metrics": [["acc", "1"]]},
        {"metrics": [["acc", "1", "1", "1", 2]] * 2},
        {"tensors": []},
        {"tensors": [[0, 2, "", "1", 0, 0]] * 2},
        {"tensors": [[99, 2, "", "1", 0, 0]]},
        {"tensors": [[3, 7, "", "1", 0, 0]]},
        {"tensors": [[3, 2, "f" * 200, "1", 0, 0]]},
        {"tensors": [[3, 2, "", "1", 3, 0]]},
        {"tensors": [[0, 2, "", "1", 0, 0], [1, 2, "", "1", 0, 0], [3, 2, "", "1", 0, 0]]},
        {"tensors": "none"},
    ],
)
def test_malformed_partials_change_nothing(change: dict[str, Any]) -> None:
    plan = make_plan()
    blob = partial_of(plan)
    header = read_header(blob)
    state = json.loads(header.metadata[METADATA_KEY]) | change
    specs = [(t.name, t.dtype, t.shape) for t in header.tensors]
    _, head = build_header(specs, {METADATA_KEY: json.dumps(state)})
    fold = Fold(plan)
    with pytest.raises(FedloomError):
        fold.merge(head + blob[header.data_start :])
    assert fold.count == 0
    assert b"".join(fold.to_partial()[0]) == b"".join(Fold(plan).to_partial()[0])


def test_partials_with_other_tensors_are_refused() -> None:
    plan = make_plan()
    header = read_header(partial_of(plan))
    for dtype, shape in (("I64", (2, 1)), ("F64", (1, 2))):
        specs = [(t.name, *((dtype, shape) if t.name == "w" else (t.dtype, t.shape))) for t in header.tensors]
        other, head = build_header(specs, header.metadata)
        with pytest.raises(LayoutError, match="'w'"):
            Fold(plan).merge(head + bytes(other.data_bytes))
