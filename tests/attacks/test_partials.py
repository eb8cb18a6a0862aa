"""Partials that lie, in a real job: what cannot be added is left out, and its sites are asked once more, singly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.messages import (
    Accept,
    Assign,
    Cancel,
    Done,
    DoneItem,
    Get,
    PayloadId,
    PayloadRef,
    Stored,
    TaskRef,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

pytestmark = pytest.mark.process

STEPS = "NUM_STEPS_CURRENT_ROUND"
GOOD = np.arange(6, dtype=np.float32)
SITES = ("pool-1", "pool-2")


def result(value: float) -> tuple[bytes, dict[str, Any]]:
    encoded = encode_model(FLModel(params={"w": GOOD + value}, meta={STEPS: 1}))
    return encoded.tobytes(), encoded.meta


def true_partial(plan: FoldPlan, count: int = len(SITES)) -> bytes:
    fold = Fold(plan)
    for number in range(count):
        data, meta = result(number)
        fold.add(data, site=f"pool-{number + 1}", meta=meta)
    buffers, _ = fold.to_partial()
    return b"".join(buffers)


def other_plan(plan: FoldPlan) -> bytes:
    return true_partial(FoldPlan.first({"w": GOOD * 1000}, tasks=7))


def flipped(plan: FoldPlan) -> bytes:
    """Its header says one thing less than it should."""
    data = true_partial(plan)
    return data.replace(b'"count', b'"c0unt', 1)


LIES: dict[str, Callable[[FoldPlan], bytes]] = {
    "no file": lambda plan: b"a sum, honestly",
    "a model": lambda plan: result(1)[0],
    "cut short": lambda plan: true_partial(plan)[:-8],
    "another plan": other_plan,
    "no count": flipped,
    "header bomb": lambda plan: (2**40).to_bytes(8, "little") + bytes(64),
}


class Pool:
    """A pool executor: one partial for all of its sites, then singly if it is asked again."""

    def __init__(self, wire: Any) -> None:
        self.wire = wire
        self.refused: list[Any] = []

    def tasks(self) -> tuple[Assign, list[DoneItem]]:
        items: list[DoneItem] = []
        while len(items) < len(SITES):
            assign = self.wire.take(Assign)
            self.wire.send(Accept(tuple(TaskRef(i.task, i.attempt) for i in assign.items)))
            items += [DoneItem(i.task, i.attempt, i.site, meta=result(0)[1]) for i in assign.items]
        return assign, sorted(items, key=lambda item: item.site)

    def fetch(self, ref: PayloadRef) -> bytes:
        self.wire.send(Get("", ref.id, 0, 0, ref=77))
        return self.wire._take(self.wire._control, Stored, 20.0, lambda m: m.ref == 77)[1]

    def partial(self, make: Callable[[FoldPlan], bytes], number: int) -> None:
        assign, items = self.tasks()
        data = make(FoldPlan.from_bytes(self.fetch(assign.fold)))
        ref = PayloadRef(PayloadId(f"p-{number:032x}"), len(data), digest_buffers([data]))
        self.wire.send(Done(assign.job, assign.gather, tuple(items), ref, len(data)), data)
        self.wire.take(Stored, where=lambda m: len(m.tasks) == len(SITES))  # the broker does not look into payloads

    def singly(self) -> None:
        assign, items = self.tasks()
        assert not assign.partials
        for number, item in enumerate(items):
            data, meta = result(number)
            done = replace(item, inline_bytes=len(data), meta=meta)
            self.wire.send(Done(assign.job, assign.gather, (done,)), data)


def submit(ground: Any, folder: Path, rounds: int) -> str:
    (folder / "client.py").write_text("")
    recipe = NumpyFedAvgRecipe(
        name="partials", model={"w": GOOD}, min_clients=2, num_rounds=rounds, train_script=str(folder / "client.py")
    )
    return ground.submit(pack_folder(recipe.export(folder / "job")), "partials", sites=list(SITES))


def test_partials_that_cannot_be_added(
    ground: Any, wire: Callable[..., Any], tmp_path: Path, run_controller: Any
) -> None:
    """A round each: the model is in the end what honest single results make, and the job's events say why."""
    pool = Pool(wire("executor", *SITES, node="pool/liar", pool="liar"))
    run_controller()
    job = submit(ground, tmp_path, len(LIES))
    for number, lie in enumerate(LIES.values()):
        pool.partial(lie, number)
        pool.singly()
    pool.wire.take(Cancel, where=lambda m: m.job == job and m.ended)
    status = ground.ask("job", job)
    assert status["status"] == "FINISHED:COMPLETED", status
    rounds = ground.ask("rounds", job)["rounds"]
    assert [(r["results"], r["redone"], r["partials"]) for r in rounds] == [(2, 2, 0)] * len(LIES)
    told = [e for e in ground.events(job) if e["kind"] == "partial_refused"]
    assert len(told) == len(LIES) and all("pool-1, pool-2" in e["text"] and "singly" in e["text"] for e in told)
    commit = status["commit"]["model"]
    model = ground.client.fetch(PayloadRef(commit["id"], commit["size"], commit["digest"]))
    assert np.array_equal(decode_model(model).params["w"], GOOD + np.float32(0.5))


def test_a_partial_of_more_results_than_tasks(
    ground: Any, wire: Callable[..., Any], tmp_path: Path, run_controller: Any
) -> None:
    """Nothing tells which of its results were made up: the job ends, and says what it saw."""
    pool = Pool(wire("executor", *SITES, node="pool/many", pool="many"))
    run_controller()
    job = submit(ground, tmp_path, 1)
    pool.partial(lambda plan: true_partial(plan, 9), 1000)
    pool.wire.take(Cancel, where=lambda m: m.job == job and m.ended)
    status = ground.ask("job", job)
    assert status["status"] == "FINISHED:FAILED"
    assert "partials of round 0 hold 9 results, of 2 tasks" in status["reason"], json.dumps(status)
