"""Round records: what they hold, in which order, and that they fit into their message."""

from __future__ import annotations

from typing import Any

from fedloom.controller.records import MAX_LISTED, MAX_RECORD_BYTES, RoundRecord
from fedloom.serialization.codec import pack
from fedloom.serialization.messages import CloseRule, Commit, JobId, encode
from fedloom.serialization.model import FLModel


def test_a_rounds_record(farm: Any, tools: Any) -> None:
    def train(site: str, round: int, model: FLModel) -> FLModel | Exception:
        return RuntimeError("x" * 5000) if site == "site-2" else tools.steady(site, round, model)

    f = farm()
    f.train = train
    f.order = -1
    gather = f.fed.gather("train", tools.model_of(), round=0, rule=CloseRule(min_clients=2))
    record = RoundRecord(0)
    for result in gather:
        record.add(result)
    data = record.build(gather, {"accuracy": 0.5}, best=True)
    assert (data["round"], data["results"], data["tasks"], data["partials"]) == (0, 2, 3, 0)
    assert data["sites"] == [
        {"name": "site-0", "run_s": 0.5, "metrics": {"accuracy": 0.0}, "weight": 1},
        {"name": "site-1", "run_s": 0.5, "metrics": {"accuracy": 0.0}, "weight": 2},
    ]
    assert data["metrics"] == {"accuracy": 0.5}
    assert data["best"] is True
    assert data["bytes"] > 2 * 64 * 4
    (failure,) = data["failures"]
    assert (failure["site"], failure["code"], len(failure["text"])) == ("site-2", "user_error", 2000)
    assert data["seconds"] >= data["fold_seconds"] >= 0


def test_a_record_fits_into_its_message(farm: Any, tools: Any) -> None:
    f = farm(sites=2)
    gather = f.fed.gather("train", tools.model_of(), round=0)
    results = list(gather)
    record = RoundRecord(0)
    for _ in range(MAX_LISTED):
        for result in results:
            record.add(result)
    assert len(record.sites) == MAX_LISTED
    for entry in record.sites:
        entry["metrics"] = {"note": "n" * 500}
    record.state_lost = ["s" * 250 + str(n) for n in range(1000)]
    data = record.build(gather, {})
    assert len(pack(data)) <= MAX_RECORD_BYTES
    assert data["results"] == 2 * MAX_LISTED
    assert data["sites"]
    encode(Commit(1, JobId("j"), 1, 0, record=data))
