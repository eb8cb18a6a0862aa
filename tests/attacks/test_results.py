"""Results that do not fit, in a real job: each is refused alone, with its site and a reason; the round goes on.

One job of two rounds serves all of these tests: its controller and its job process are real, one honest site trains,
and a stranger answers for all others. In round 0 each of its sites sends something bad, in round 1 something good.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe
from fedloom.recipe.failures import describe, failures_of
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Accept,
    Assign,
    Cancel,
    Done,
    DoneItem,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    TaskRef,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

pytestmark = pytest.mark.process

N = 6
STEPS = "NUM_STEPS_CURRENT_ROUND"
GOOD = np.arange(N, dtype=np.float32)
#: A bad result of a site: its bytes and the plain side that its Done names.
Bad = tuple[bytes, dict[str, Any]]


def model(value: Any = GOOD, *, name: str = "w", **meta: Any) -> Bad:
    encoded = encode_model(FLModel(params={name: value}, meta={STEPS: 1} | meta))
    return encoded.tobytes(), encoded.meta


def weighted(weight: Any) -> Bad:
    """Good tensors; a weight that no honest `FLModel` would hold."""
    data, meta = model()
    return data, meta | {"meta": {STEPS: weight}}


def header(entries: Any, data: bytes = GOOD.tobytes(), *, raw: bytes = b"") -> Bad:
    """A safetensors file with any header."""
    text = raw or json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data, model()[1]


def entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [N], "data_offsets": [0, 4 * N]} | change


def with_value(value: float, at: int = 3) -> Bad:
    array = GOOD.copy()
    array[at] = value
    return model(array)


BAD: dict[str, tuple[Callable[[], Bad], str]] = {
    "no-file": (lambda: (b"not a safetensors file at all", model()[1]), "header of .* bytes; 2 to 16777216"),
    "cut-short": (lambda: (model()[0][:-4], model()[1]), "header describes"),
    "bytes-behind": (lambda: (model()[0] + b"more", model()[1]), "header describes"),
    "header-bomb": (lambda: ((2**40).to_bytes(8, "little") + b"{}" * 30, model()[1]), "header of 1099511627776 bytes"),
    "header-16mib": (lambda: ((2**24 + 1).to_bytes(8, "little") + b"{}", model()[1]), "header of 16777217 bytes; 2 to"),
    "header-over": (
        lambda: ((5000).to_bytes(8, "little") + b"{}", model()[1]),
        "ends within its header|header of 5008",
    ),
    "header-nested": (lambda: header(None, raw=b'{"w":' * 5000 + b"1" + b"}" * 5000), "nested too deep|map"),
    "header-twice": (
        lambda: header(None, raw=b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "'w' twice",
    ),
    "header-keys": (lambda: header({"w": entry(pickle="x")}), r"exactly \['data_offsets', 'dtype', 'shape'\]"),
    "overlap": (
        lambda: header({"w": entry(), "x": entry(data_offsets=[4 * N - 4, 8 * N - 4])}, bytes(8 * N - 4)),
        "overlaps the tensor before it",
    ),
    "hole": (
        lambda: header({"w": entry(), "x": entry(data_offsets=[4 * N + 4, 8 * N + 4])}, bytes(8 * N + 4)),
        "leaves a hole before it",
    ),
    "unknown-dtype": (lambda: header({"w": entry(dtype="PICKLE")}), "dtype 'PICKLE'; allowed are"),
    "half-bytes": (lambda: header({"w": entry(dtype="F4")}), "elements must be whole bytes"),
    "offsets-shape": (lambda: header({"w": entry(shape=[N + 1])}), r"offsets 0 to 24; F32\[7\] has 28 bytes"),
    "negative-shape": (lambda: header({"w": entry(shape=[-6])}), "dimension -6"),
    "huge-shape": (lambda: header({"w": entry(shape=[2**50, 2**50])}), "too large|offsets"),
    "rank-17": (lambda: header({"w": entry(shape=[1] * 17)}), "17 dimensions; at most 16"),
    "tensor-path": (lambda: header({"../../w": entry()}), "is not allowed"),
    "other-name": (lambda: model(name="v"), "'v'|'w'"),
    "one-more": (lambda: header({"w": entry(), "x": entry(data_offsets=[24, 48])}, bytes(8 * N)), "'x'"),
    "other-dtype": (lambda: model(GOOD.astype(np.int32)), "I32"),
    "other-float": (lambda: model(GOOD.astype(np.float64)), "F64"),
    "other-shape": (lambda: model(GOOD[:3]), r"\[3\]"),
    "other-rank": (lambda: model(GOOD.reshape(2, 3)), r"\[2, 3\]"),
    "nan": (lambda: with_value(np.nan), "NaN"),
    "inf": (lambda: with_value(np.inf), "Inf"),
    "minus-inf": (lambda: with_value(-np.inf, N - 1), "Inf"),
    "weight-zero": (lambda: weighted(0), f"{STEPS} of weight-zero is 0; it must be positive"),
    "weight-negative": (lambda: weighted(-5), "is -5; it must be positive"),
    "weight-text": (lambda: weighted("many"), r"'many' \(str\); a positive number belongs there"),
    "weight-bool": (lambda: weighted(True), r"True \(bool\); a positive number"),
    "weight-list": (lambda: weighted([1]), r"\[1\] \(list\); a positive number"),
    "weight-absurd": (lambda: weighted(1e300), r"1e\+300 x its aggregation weight; 2\^-64 to 2\^64 is allowed"),
    "weight-tiny": (lambda: weighted(1e-300), r"2\^-64 to 2\^64 is allowed"),
    "params-type": (lambda: (model()[0], model()[1] | {"params_type": "PICKLE"}), "'PICKLE'; FULL or DIFF belongs"),
    "meta-no-map": (lambda: (model()[0], model()[1] | {"meta": [1]}), "meta or metrics that are no map"),
    "metrics-no-map": (lambda: (model()[0], model()[1] | {"metrics": "all"}), "meta or metrics that are no map"),
}


class Record:
    """What came of the job."""

    def __init__(self, ground: Any, job: str) -> None:
        self.status = ground.ask("job", job)
        self.rounds = ground.ask("rounds", job)["rounds"]
        self.failures = {f["site"]: f for f in self.rounds[0]["failures"]} if self.rounds else {}


class Stranger:
    """Answers for many sites, badly at first."""

    def __init__(self, wire: Any) -> None:
        self.wire = wire

    def answer(self, round_: int) -> None:
        """Take all tasks of a round, and send a result for each: some inline, some as a payload."""
        left = set(BAD)
        while left:
            assign = self.wire.take(Assign, where=lambda m: m.round == round_ and m.items[0].site in BAD)
            self.wire.send(Accept(tuple(TaskRef(i.task, i.attempt) for i in assign.items)))
            for number, item in enumerate(assign.items):
                data, meta = BAD[item.site][0]() if round_ == 0 else model()
                done = DoneItem(item.task, item.attempt, item.site, meta=meta)
                self._send(assign, done, data, as_payload=bool(number % 2))
                left.discard(item.site)

    def _send(self, assign: Assign, item: DoneItem, data: bytes, *, as_payload: bool) -> None:
        if as_payload:
            digest = digest_buffers([data])
            ref = PayloadRef(PayloadId(f"r-{item.task}.{item.attempt}"), len(data), digest)
            self.wire.send(Put(ref, job=assign.job, task=item.task, attempt=item.attempt, ref=1), data)
            self.wire.send(Done(assign.job, assign.gather, (replace(item, payload=ref),)))
        else:
            self.wire.send(Done(assign.job, assign.gather, (replace(item, inline_bytes=len(data)),)), data)


@pytest.fixture(scope="module")
def record(
    _ground: Any, strangers: Callable[..., Any], run_controller: Any, tmp_path_factory: pytest.TempPathFactory
) -> Record:
    """The job, from its submission to its end."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "client.py").write_text("raise SystemExit('the honest site has a function')\n")
    recipe = NumpyFedAvgRecipe(
        name="bad-results",
        model={"w": GOOD},
        min_clients=1,
        num_rounds=2,
        train_script=str(folder / "client.py"),
    )
    exported = recipe.export(folder / "job")
    stranger = Stranger(strangers("executor", *BAD))
    run_controller()
    job = _ground.submit(pack_folder(exported), "bad-results", sites=["honest", *BAD])
    for round_ in range(2):
        stranger.answer(round_)
    stranger.wire.take(Cancel, where=lambda m: m.job == job and m.ended)
    assert not [m for m, _ in stranger.wire._kept if isinstance(m, Stored) and m.refused]
    return Record(_ground, job)


@pytest.mark.parametrize("name", BAD)
def test_refused_with_its_site_and_the_reason(ground: Any, record: Record, name: str) -> None:
    failure = record.failures.get(name)
    assert failure is not None, f"{name} was taken for a result; refused were {sorted(record.failures)}"
    assert failure["code"] == "refused"
    assert re.search(BAD[name][1], failure["text"]), failure["text"]


def test_the_round_goes_on_with_the_others(ground: Any, record: Record) -> None:
    assert record.status["status"] == "FINISHED:COMPLETED", record.status
    first, second = record.rounds
    assert first["results"] == 1, "the honest site alone"
    assert [site["name"] for site in first["sites"]] == ["honest"]
    assert first["weight_sum"] == 1.0
    assert second["results"] == 1 + len(BAD), "a refused result is no stain on its site"
    assert not second["failures"]


def test_what_the_user_sees_names_the_sites(ground: Any, record: Record) -> None:
    text = describe(failures_of(record.rounds))
    for name in sorted(BAD)[:5]:
        assert f"{name} failed in round 1; the job went on without it:" in text
    assert f"so did {', '.join(sorted(BAD)[5:25])}" in text
