"""A finished run's points handed to MLflow and Weights & Biases: a run a site, and one for the server's rounds."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .points import Point, read_points, scalars, to_number

if TYPE_CHECKING:
    from .tracking import MLflow, WandB

SERVER = "server"
#: MLflow's API takes so many metrics in one call.
_BATCH = 1000


def export(
    folder: Path, job_id: str, records: Iterable[Mapping[str, Any]], at: Mapping[int, float], to: MLflow | WandB
) -> None:
    """Hand over a result folder's points and its rounds' metrics.

    Raises:
        ImportError: the package is not installed. Whatever the package raises.
    """
    from .tracking import MLflow

    sites = list(dict.fromkeys(point["site"] or SERVER for point in _all(folder, records, at)))
    target = _MLflowRuns(folder, job_id, to) if isinstance(to, MLflow) else _WandBRuns(folder, job_id, to)
    for site in sites:  # each reads the file anew: memory holds one batch
        target.write(site, (point for point in _all(folder, records, at) if (point["site"] or SERVER) == site))


def _all(folder: Path, records: Iterable[Mapping[str, Any]], at: Mapping[int, float]) -> Iterator[Point]:
    yield from read_points(folder)
    for record in records:
        told: dict[str, Any] = record.get("metrics") or {}
        metrics = {name: value for name, value in told.items() if to_number(value) is not None}
        if metrics:
            number = int(record["round"])
            common: Point = {"site": "", "key": "metrics", "type": "METRICS", "round": number}
            yield common | {"value": metrics, "step": number, "at": at.get(number, 0.0)}


def _job_name(folder: Path, job_id: str) -> str:
    try:
        return str(json.loads((folder / "job" / "meta.json").read_text("utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return job_id


def _texts(point: Point) -> dict[str, Any]:
    """The parameters or tags of a point."""
    value = point["value"]
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {point["key"]: value}


class _MLflowRuns:
    def __init__(self, folder: Path, job_id: str, to: MLflow) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        uri, place = to.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), to.artifact_location or None
        if not uri:  # a database: MLflow has given up its stores of plain files
            uri, place = f"sqlite:///{folder / 'mlflow.db'}", place or (folder / "mlflow_artifacts").as_uri()
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._to = to
        self._prefix = to.run_name or job_id
        name = to.experiment_name or _job_name(folder, job_id)
        experiment: Any = self._client.get_experiment_by_name(name)
        self._experiment: str = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(name, artifact_location=place)
        )
        for key, value in to.experiment_tags.items():
            self._client.set_experiment_tag(self._experiment, key, value)

    def write(self, site: str, points: Iterator[Point]) -> None:
        """One site's run."""
        client, new = self._client, self._entities
        tags = {**self._to.run_tags, "site": site}
        run: str = client.create_run(self._experiment, tags=tags, run_name=f"{self._prefix}-{site}").info.run_id
        waiting: list[Any] = []
        for point in points:
            when = int(float(point["at"]) * 1000)
            waiting += [new.Metric(name, value, when, point["step"] or 0) for name, value in scalars(point)]
            match point["type"]:
                case "PARAMETER" | "PARAMETERS":
                    params: list[Any] = [new.Param(name, str(value)) for name, value in _texts(point).items()]
                    client.log_batch(run, params=params)
                case "TAG" | "TAGS":
                    client.log_batch(run, tags=[new.RunTag(name, str(value)) for name, value in _texts(point).items()])
                case "TEXT" if point["value"]:
                    client.log_text(run, str(point["value"]), point["key"])
                case _:
                    pass
            while len(waiting) >= _BATCH:
                client.log_batch(run, metrics=waiting[:_BATCH])
                del waiting[:_BATCH]
        if waiting:
            client.log_batch(run, metrics=waiting)
        client.set_terminated(run)


class _WandBRuns:
    def __init__(self, folder: Path, job_id: str, to: WandB) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._folder = folder
        self._to = to
        self._job_id = job_id
        self._project = to.project or _job_name(folder, job_id)

    def write(self, site: str, points: Iterator[Point]) -> None:
        """One site's run."""
        given: dict[str, Any] = {"group": self._job_id, "name": f"{self._job_id}-{site}", **self._to.wandb_args}
        run: Any = self._wandb.init(
            project=self._project, mode=self._to.mode, dir=str(self._folder), reinit="finish_previous", **given
        )
        try:
            steps: dict[str, str] = {}
            for point in points:
                numbers = dict(scalars(point))
                if numbers:
                    # each key has a step of its own: W&B's own step only ever grows, over all keys
                    for name in numbers:
                        if name not in steps:
                            steps[name] = f"{name}/step"
                            run.define_metric(name, step_metric=steps[name])
                    run.log({**numbers, **{steps[name]: point["step"] or 0 for name in numbers}})
                elif point["type"] in ("PARAMETER", "PARAMETERS"):
                    run.config.update(_texts(point), allow_val_change=True)
                elif point["value"] is not None:
                    for name, value in _texts(point).items():
                        run.summary[name] = value
        finally:
            run.finish()
