"""Where what scripts log ends up: tracking.jsonl, TensorBoard's files read back with its own reader, other trackers."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe, Recipe, add_experiment_tracking
from fedloom.recipe.client import JobInfo
from fedloom.recipe.points import read_points
from fedloom.recipe.results import event_line, write_results
from fedloom.recipe.tbevents import crc32c
from fedloom.recipe.tracking import TensorBoard, trackers_of
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import JobSpec
from fedloom.serialization.messages import PayloadRef

Events = list[dict[str, Any]]


@dataclass
class Source:
    """A finished job of two rounds, with what its sites logged."""

    archive: bytes
    kept: Events = field(default_factory=Events)
    number: int = 0

    def log(self, site: str, key: str, value: Any, kind: str = "SCALAR", step: int | None = None, **more: Any) -> None:
        point = {"key": key, "value": value, "type": kind, "round": 0, "at": 100.0 + self.number, **more}
        if step is not None:
            point["global_step"] = step
        data = {"stream": "s", "first": self.number, "count": 1, "sites": {site: [[self.number, point]]}}
        self.number += 1
        self.kept.append({"kind": "metric", "site": site, "at": 200.0, "text": "", "data": data})

    def info(self, job_id: str) -> JobInfo:
        ref = PayloadRef("b3-job", len(self.archive), "", "blob")  # type: ignore[arg-type]
        return JobInfo(job_id=job_id, name="tiny", status="FINISHED:COMPLETED", archive=ref, sites=("a", "b"))  # type: ignore[call-arg]

    def rounds(self, job_id: str) -> list[dict[str, Any]]:
        return [{"round": n, "metrics": {"accuracy": 0.5 + n, "name": "no number"}, "sites": []} for n in range(2)]

    def events(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        yield {"kind": "committed", "site": "", "at": 500.0, "text": "", "data": {"round": 0}}
        yield {"kind": "log", "site": "a", "at": 1.0, "text": "printed", "data": {}}
        yield from self.kept

    def fetch(self, ref: PayloadRef, dest: Path) -> Path:
        dest.write_bytes(self.archive)
        return dest


@pytest.fixture
def recipe(here: Path) -> Recipe:
    return NumpyFedAvgRecipe(name="tiny", model=np.zeros(2), min_clients=1, train_script="client.py")


@pytest.fixture
def source_of(tmp_path: Path) -> Callable[[Recipe], Source]:
    return lambda recipe: Source(pack_folder(recipe.export(tmp_path / "exported")))


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Every curve as TensorBoard reads it: step, value and time."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts_of(folder: Path) -> dict[str, list[str]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


# ---------------------------------------------------------------- what stands in the result folder


def test_points_are_lines_and_no_logs(recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path) -> None:
    source = source_of(recipe)
    source.log("a", "loss", 0.5)
    source.log("a", "loss", 0.25)
    source.log("b", "loss", "nan", step=7)
    source.log("b", "loss", 1.0)
    source.log("a", "note", "warm", "TEXT", phase="late")
    out = write_results(source, "tiny-1", tmp_path / "out")
    points = list(read_points(out))
    assert [(p["site"], p["key"], p["value"], p["step"]) for p in points] == [
        ("a", "loss", 0.5, 0),
        ("a", "loss", 0.25, 1),
        ("b", "loss", "nan", 7),
        ("b", "loss", 1.0, 8),
        ("a", "note", "warm", None),
    ]
    assert points[0] == json.loads((out / "tracking.jsonl").read_text().splitlines()[0])
    assert points[0]["at"] == 100.0 and points[0]["round"] == 0 and points[4]["phase"] == "late"
    assert json.loads((out / "summary.json").read_text())["tracking"] == {"points": 5, "lost": 0}
    assert (out / "logs/a.log").read_text() == "printed\n" and not (out / "tb_events").exists()
    assert event_line(source.kept[0]).endswith("metric 1 points: loss")
    del source.kept[1:3]  # events that the broker had no room for
    write_results(source, "tiny-1", out)
    assert json.loads((out / "summary.json").read_text())["tracking"] == {"points": 3, "lost": 2}


def test_no_points_is_no_file(recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path) -> None:
    source = source_of(recipe)
    source.log("a", "loss", 0.5)
    out = write_results(source, "tiny-1", tmp_path / "out")
    source.kept.clear()
    write_results(source, "tiny-1", out)
    assert not (out / "tracking.jsonl").exists() and list(read_points(out)) == []
    assert json.loads((out / "summary.json").read_text())["tracking"] == {"points": 0, "lost": 0}


def test_tensorboard_reads_what_was_written(
    recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path
) -> None:
    add_experiment_tracking(recipe, "tensorboard")
    source = source_of(recipe)
    for step in range(500):
        source.log("a", "loss", 1 / (step + 1), step=10 * step)
    source.log("b", "loss", 2.0)
    source.log("b", "loss", "inf")
    source.log("b", "acc", {"train": 0.5, "test": 0.25}, "SCALARS", 3)
    source.log("b", "metrics", {"f1": 1, "loss": 3.0}, "METRICS", 9)
    source.log("b", "large", 1e300, step=-1)
    source.log("b", "note", "Zeit: später", "TEXT", 2)
    source.log("b", "lr", 0.1, "PARAMETER")
    source.log("b", "params", {"layers": 2}, "PARAMETERS")
    source.log("../up", "loss", 4.0)
    out = write_results(source, "tiny-1", tmp_path / "out")
    folder = out / "tb_events"
    assert sorted(path.name for path in folder.iterdir()) == ["2e2e2f7570", "a", "b", "server"]
    loss = scalars_of(folder / "a")["loss"]
    assert [step for step, _, _ in loss] == [10 * n for n in range(500)]
    assert [value for _, value, _ in loss] == [float(np.float32(1 / (n + 1))) for n in range(500)]
    assert loss[3][2] == 103.0, "the site's time"
    curves = scalars_of(folder / "b")
    assert [(s, v) for s, v, _ in curves["loss"]] == [(0, 2.0), (1, math.inf), (9, 3.0)]
    assert [(s, v) for s, v, _ in curves["acc/train"]] == [(3, 0.5)] and curves["acc/test"][0][1] == 0.25
    assert curves["f1"][0][:2] == (9, 1.0) and curves["large"][0][:2] == (-1, math.inf)
    texts = texts_of(folder / "b")
    assert texts["note"] == ["Zeit: später"] and texts["lr"] == ["0.1"] and "| layers | 2 |" in texts["params"][0]
    server = scalars_of(folder / "server")
    assert list(server) == ["accuracy"] and [(s, v) for s, v, _ in server["accuracy"]] == [(0, 0.5), (1, 1.5)]
    assert server["accuracy"][0][2] == 500.0, "when the round was committed"
    write_results(source, "tiny-1", out)  # again: anew, not added
    assert len(scalars_of(folder / "a")["loss"]) == 500


def test_the_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, and every table of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(struct.pack("32B", *range(32))) == 0x46DD794E


# ---------------------------------------------------------------- what a job says of it


def test_a_job_carries_its_trackers(recipe: Recipe, tmp_path: Path) -> None:
    add_experiment_tracking(recipe, "tensorboard", tracking_config={"tb_folder": "curves"})
    folder = recipe.export(tmp_path / "job")
    (component,) = [one for one in JobSpec.load(folder).components if one.id == "tracking_tensorboard"]
    assert (component.path, component.args) == ("fedloom.recipe.tracking.TensorBoard", {"tb_folder": "curves"})
    assert trackers_of(folder) == [TensorBoard("curves")] and trackers_of(tmp_path / "none") == []
    with pytest.raises(JobError, match=r"tensorboard tracking was added to 'tiny' before"):
        add_experiment_tracking(recipe, "tensorboard")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tracking_type": "tensorbord"}, r"'tensorbord'; one of 'tensorboard', 'mlflow', 'wandb'"),
        ({"tracking_config": {"folder": "x"}}, r"unknown 'folder'; allowed are tb_folder"),
        ({"tracking_config": {"tb_folder": "a/b"}}, "a folder's name"),
        ({"tracking_config": {"tb_folder": 3}}, "tb_folder=3; a text"),
        ({"client_side": True}, "client_side=True.*server's side"),
        ({"server_side": False}, "server_side=False"),
        ({"clients": ["site-1"]}, "clients="),
    ],
)
def test_what_cannot_be_is_said_at_once(recipe: Recipe, given: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        add_experiment_tracking(recipe, **({"tracking_type": "tensorboard"} | given))


@pytest.mark.parametrize(("name", "config"), [("mlflow", {"tracking_uri": "x"}), ("wandb", {"mode": "offline"})])
def test_a_package_that_is_not_here_is_named_with_its_extra(recipe: Recipe, name: str, config: dict[str, str]) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed: nothing is missing")
    with pytest.raises(JobError, match=rf"pip install 'fedloom\[{name}\]'"):
        add_experiment_tracking(recipe, name, config)


def test_a_trackers_failure_is_no_failure_of_the_run_and_only_its_own_runs_are_exported(
    recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service of a tracker may be away; a download of somebody's job must not write to where that job says."""
    calls: list[str] = []

    def init(**given: Any) -> None:
        calls.append(given["name"])
        raise OSError("no service")

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    add_experiment_tracking(recipe, "wandb", {"wandb_args": {"project": "p", "tags": ["t"]}, "process_timeout": 10})
    source = source_of(recipe)
    source.log("a", "loss", 0.5)
    out = write_results(source, "tiny-1", tmp_path / "out")
    assert calls == []
    write_results(source, "tiny-1", out, export=True)
    assert calls == ["tiny-1-a"] and not (out / "tracking_exported.json").exists()


def test_mlflow_has_a_run_a_site(recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra fedloom[mlflow], which dev does not have")
    add_experiment_tracking(recipe, "mlflow", {"kw_args": {"experiment_name": "mine"}})
    source = source_of(recipe)
    for step in range(3):
        source.log("a", "loss", 1.0 - step, "METRIC", step)
    source.log("a", "lr", 0.1, "PARAMETER")
    source.log("a", "tags", {"who": "me"}, "TAGS")
    source.log("a", "notes/a.txt", "a text", "TEXT", artifact=True)
    out = write_results(source, "tiny-1", tmp_path / "out", export=True)
    write_results(source, "tiny-1", out, export=True)  # again: not twice
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {run.info.run_name for run in runs} == {"tiny-1-a", "tiny-1-server"} and len(runs) == 2
    (run,) = [run for run in runs if run.data.tags["site"] == "a"]
    assert run.data.params == {"lr": "0.1"} and run.data.tags["who"] == "me"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (0, 1.0),
        (1, 0.0),
        (2, -1.0),
    ]


def test_wandb_keeps_its_runs_for_later(recipe: Recipe, source_of: Callable[[Recipe], Source], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra fedloom[wandb], which dev does not have")
    add_experiment_tracking(recipe, "wandb")
    source = source_of(recipe)
    source.log("a", "loss", 1.0, step=5)
    source.log("a", "acc", 1.0, step=1)
    out = write_results(source, "tiny-1", tmp_path / "out", export=True)
    assert len(list((out / "wandb").glob("offline-run-*/*.wandb"))) == 2  # the site's and the server's
