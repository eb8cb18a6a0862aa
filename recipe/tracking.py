"""Experiment tracking: where what scripts log ends up, beside tracking.jsonl.

``add_experiment_tracking(recipe, "tensorboard")`` puts one of the components below into the job. They run nowhere:
where a run's results are written, they say what to make of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import structlog

from ..serialization.errors import JobError
from ..serialization.jobspec import Component, JobSpec
from .points import PointReader

if TYPE_CHECKING:
    from .base import Recipe

log = structlog.get_logger(__name__)

#: Which runs of the job's results went to a tracker already: a folder that is written again is not exported again.
EXPORTED_FILE = "tracking_exported.json"


@dataclass(frozen=True, slots=True)
class TensorBoard:
    """Event files below the result folder, a folder a site and ``server`` for the rounds' metrics.

    Attributes:
        tb_folder: its name in the result folder.
    """

    tb_folder: str = "tb_events"

    def __post_init__(self) -> None:
        if not self.tb_folder or PurePath(self.tb_folder).name != self.tb_folder or self.tb_folder.startswith("."):
            raise JobError(f"tb_folder={self.tb_folder!r}; a folder's name, such as 'tb_events', belongs here")


@dataclass(frozen=True, slots=True)
class MLflow:
    """A run a site, and one for the server, in an MLflow experiment.

    Attributes:
        tracking_uri: where to; "" is ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the result folder.
        experiment_name: "" is the job's name.
        run_name: before the site's name; "" is the job's id.
        run_tags, experiment_tags: more tags.
        artifact_location: of a new experiment; "" is MLflow's own choice.
    """

    tracking_uri: str = ""
    experiment_name: str = ""
    run_name: str = ""
    run_tags: dict[str, str] = field(default_factory=dict[str, str])
    experiment_tags: dict[str, str] = field(default_factory=dict[str, str])
    artifact_location: str = ""


@dataclass(frozen=True, slots=True)
class WandB:
    """A run a site, and one for the server, in Weights & Biases.

    Attributes:
        mode: ``offline`` writes to the result folder's ``wandb``, for `wandb sync`; ``online`` to their service.
        project: "" is the job's name.
        wandb_args: more arguments for ``wandb.init``.
    """

    mode: str = "offline"
    project: str = ""
    wandb_args: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise JobError(f"mode={self.mode!r}; 'offline' or 'online' belongs here")


Tracker = TensorBoard | MLflow | WandB
#: By the user's name: the component, the package that it needs where results are written, and the extra that has it.
TRACKERS: dict[str, tuple[type[Tracker], str, str]] = {
    "tensorboard": (TensorBoard, "", ""),
    "mlflow": (MLflow, "mlflow", "mlflow"),
    "wandb": (WandB, "wandb", "wandb"),
}
#: Settings of the documents that ask for nothing here: points are sent on at the end, all at once.
_ACCEPTED = {"mlflow": {"buffer_flush_time"}, "wandb": {"process_timeout"}, "tensorboard": set[str]()}


def add_experiment_tracking(
    recipe: Recipe,
    tracking_type: str,
    tracking_config: Mapping[str, Any] | None = None,
    client_side: bool = False,
    server_side: bool = True,
    clients: Sequence[str] | None = None,
) -> None:
    """Send what scripts log to TensorBoard, MLflow or Weights & Biases as well; several may be added.

    Args:
        tracking_type: ``"tensorboard"``, ``"mlflow"`` or ``"wandb"``.
        tracking_config: the fields of `TensorBoard`, `MLflow` or `WandB`; for MLflow also as ``{"tracking_uri": ...,
            "kw_args": {"experiment_name": ..., "run_name": ...}}``.
        client_side: not built: what sites log goes to the result folder.
        server_side: True.
        clients: None: all sites.

    Raises:
        JobError: no such tracker or setting, its package is not installed here, or it is added twice.
    """
    if tracking_type not in TRACKERS:
        raise JobError(f"tracking_type={tracking_type!r}; one of {', '.join(map(repr, TRACKERS))} belongs here")
    if client_side or not server_side or clients is not None:
        asked = "client_side=True" if client_side else "server_side=False" if not server_side else "clients=..."
        raise JobError(
            f"add_experiment_tracking({asked}): what all sites log goes to the run's result folder, on the server's"
            " side; a script that shall keep files at its site writes them itself, with its tracker's own package"
        )
    cls, package, extra = TRACKERS[tracking_type]
    tracker = settings(tracking_type, tracking_config or {})
    if package and importlib.util.find_spec(package) is None:
        raise JobError(
            f"tracking_type={tracking_type!r} needs the package {package} where the results are written, and it is not"
            f" installed here: pip install 'fedloom[{extra}]'"
        )
    path = path_of(cls)
    if any(component.path == path for component in recipe.job.components):
        raise JobError(f"{tracking_type} tracking was added to {recipe.name!r} before: add it once")
    given = {name: value for name, value in asdict(tracker).items() if value}
    recipe.job.add_component(path, given, id=f"tracking_{tracking_type}")


def path_of(cls: type[Tracker]) -> str:
    """The component path of a tracker."""
    return f"{cls.__module__}.{cls.__name__}"


def settings(tracking_type: str, config: Mapping[str, Any]) -> Tracker:
    """A tracker out of what a user gave.

    Raises:
        JobError: an unknown setting, or a value of the wrong type.
    """
    cls = TRACKERS[tracking_type][0]
    given = {name: value for name, value in config.items() if name not in _ACCEPTED[tracking_type]}
    if cls is MLflow and isinstance(more := given.pop("kw_args", None), Mapping):
        given |= cast("Mapping[str, Any]", more)
    if cls is WandB and isinstance(more := given.get("wandb_args"), Mapping):
        args = dict(cast("Mapping[str, Any]", more))
        given |= {name: args.pop(name) for name in ("mode", "project") if name in args} | {"wandb_args": args}
    return _built(cls, given, f"tracking_config of {tracking_type!r}")


def _built(cls: type[Tracker], given: Mapping[str, Any], where: str) -> Tracker:
    kinds: dict[str, tuple[type, str]] = {item.name: (dict, "a dict") for item in fields(cls)}
    kinds |= {item.name: (str, "a text") for item in fields(cls) if isinstance(item.default, str)}
    for name, value in given.items():
        if name not in kinds:
            raise JobError(f"{where}: unknown {name!r}; allowed are {', '.join(kinds)}")
        if not isinstance(value, kinds[name][0]):
            raise JobError(f"{where}: {name}={value!r}; {kinds[name][1]} belongs here")
    return cls(**given)


# ---------------------------------------------------------------- where results are written


def trackers_of(job_folder: Path) -> list[Tracker]:
    """The trackers of a job folder; none where it is missing or cannot be read."""
    try:
        components = JobSpec.load(job_folder).components
    except JobError:
        return []
    out: list[Tracker] = []
    for component in components:
        if (tracker := _tracker(component)) is not None:
            out.append(tracker)
    return out


def _tracker(component: Component) -> Tracker | None:
    """Compared by its path, never imported by it: a job's results must not run the job's code."""
    for cls, _, _ in TRACKERS.values():
        if component.path == path_of(cls):
            try:
                return _built(cls, component.args, component.path)
            except JobError as error:
                log.warning("tracking_not_written", reason=str(error))
    return None


def write_tracking(
    folder: Path, job_id: str, records: list[dict[str, Any]], reader: PointReader, *, export: bool
) -> None:
    """Make of a result folder's points what its job asks for.

    Args:
        export: hand them to MLflow and Weights & Biases, where the job asks for it: of a run that has ended, where it
            was started, and not of any job that somebody downloads.

    Raises:
        OSError: the disk refused.
    """
    trackers = trackers_of(folder / "job")
    for tracker in trackers:
        if isinstance(tracker, TensorBoard):
            from .tbevents import write_events

            write_events(folder, records, reader.committed_at, tracker.tb_folder)
        elif export and not _was_exported(folder, job_id, tracker):
            _export(folder, job_id, records, reader.committed_at, tracker)


def _export(
    folder: Path, job_id: str, records: list[dict[str, Any]], at: Mapping[int, float], tracker: MLflow | WandB
) -> None:
    from . import trackers

    name = type(tracker).__name__
    try:
        trackers.export(folder, job_id, records, at, tracker)
    except Exception as error:  # noqa: BLE001 - another's package and service: the run is over and its results are good
        log.warning("tracking_not_exported", tracker=name, error=f"{type(error).__name__}: {error}", points=str(folder))
        return
    done = [*_exported(folder), [job_id, name]]
    (folder / EXPORTED_FILE).write_text(json.dumps(done) + "\n", "utf-8")


def _exported(folder: Path) -> list[Any]:
    try:
        found: Any = json.loads((folder / EXPORTED_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return cast("list[Any]", found) if isinstance(found, list) else []


def _was_exported(folder: Path, job_id: str, tracker: Tracker) -> bool:
    return [job_id, type(tracker).__name__] in _exported(folder)
