"""The options of federated averaging, by what they are about; `FedAvgOptions` types them as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from ..controller.workflows.selection import Selection
from ..serialization.errors import JobError
from .naming import result_name
from .notes import note
from .options import (
    AggregationOptions,
    ExchangeFormat,
    ScriptOptions,
    TransferType,
    boolean,
    whole,
)

_KEPT_BY_THE_BROKER = "models are kept by the broker, as safetensors, and start from `model` or `initial_ckpt`"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The job itself.

    Attributes:
        name: the job's name.
        min_clients: results that a round needs.
        num_rounds: rounds.
        seed: what sampling and the generators of each task are drawn from.
        threads_per_task: threads of a task's numeric libraries; they change a result's last bits.
    """

    name: str = "fedavg"
    min_clients: int
    num_rounds: int = 2
    seed: int = 0
    threads_per_task: int = 1

    def __post_init__(self) -> None:
        whole(self.min_clients, "min_clients", 1)
        whole(self.num_rounds, "num_rounds", 1)
        whole(self.seed, "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the first round starts from.

    Attributes:
        model: the initial global model; None without ``initial_ckpt`` either: the first round's results make it.
        initial_model: another name for ``model``, which wins where both are given.
        initial_ckpt: a checkpoint's path; its values go before those of ``model``, whose layout it must have.
    """

    model: Any = None
    initial_model: Any = None
    initial_ckpt: str | Path | None = None

    @property
    def chosen(self) -> Any:
        """The model that was given, or None."""
        return self.initial_model if self.model is None else self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """Which model is the best, under what name it is saved, and when to stop.

    Attributes:
        key_metric: the metric that compares models; where only ``stop_cond`` names one, that.
        key_metric_mode: "max" or "min"; None: as the operator of a ``stop_cond`` on it says, else "max".
        stop_cond: end when the received model scores so, such as "accuracy >= 80".
        patience: end after so many rounds without a better score.
        best_model_filename: another name for the best model in the result folder; the ending becomes .safetensors.
        save_filename: the older name of ``best_model_filename``, which wins where both are given.
    """

    key_metric: str = "accuracy"
    key_metric_mode: str | None = None
    stop_cond: str | None = None
    patience: int | None = None
    best_model_filename: str | None = None
    save_filename: str | None = None

    def __post_init__(self) -> None:
        Selection.of(self.key_metric, self.key_metric_mode, self.stop_cond, self.patience)
        for option in ("best_model_filename", "save_filename"):
            result_name(getattr(self, option), option)

    def args(self) -> dict[str, Any]:
        """The workflow's arguments that differ from its defaults, and the key metric."""
        args: dict[str, Any] = {"key_metric": self.key_metric}
        for name in ("key_metric_mode", "stop_cond", "patience"):
            if getattr(self, name) is not None:
                args[name] = getattr(self, name)
        option = "save_filename" if self.best_model_filename is None else "best_model_filename"
        given = getattr(self, option)
        if (name := result_name(given, option)) is not None:
            args["best_model_filename"] = name
            if name != given:
                note(f"{option}={given!r}: models are safetensors files, so the best model is saved as {name}")
        return args


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the server's side does beside averaging, and options that have nothing to choose here.

    Attributes:
        aggregator: an object with ``accept_model``, ``aggregate_model`` and ``reset_stats``, or one of fedloom's
            aggregators; None: the weighted mean.
        aggregator_data_kind: accepted; each result says itself whether it is FULL or DIFF.
        server_memory_gc_rounds: give the job process's free memory back after every so many rounds; 0: never.
        enable_tensor_disk_offload: accepted; results are always in the broker's spool, on disk.
        model_persistor, model_locator: None; the broker keeps models.
        per_site_config: by site, what differs there from the options of the script and the exchange.
    """

    aggregator: Any = None
    aggregator_data_kind: Any = None
    server_memory_gc_rounds: int = 0
    enable_tensor_disk_offload: bool = False
    model_persistor: Any = None
    model_locator: Any = None
    per_site_config: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        whole(self.server_memory_gc_rounds, "server_memory_gc_rounds")
        if boolean(self.enable_tensor_disk_offload, "enable_tensor_disk_offload"):
            note("enable_tensor_disk_offload has nothing to turn on: results are always on disk, in the broker's spool")
        kind = getattr(self.aggregator_data_kind, "value", self.aggregator_data_kind)
        if kind not in (None, "WEIGHTS", "WEIGHT_DIFF"):
            raise JobError(
                f"aggregator_data_kind={kind!r}; 'WEIGHTS' or 'WEIGHT_DIFF' belongs here, and either is accepted: a"
                " result says itself whether it is FULL or DIFF"
            )
        for name in ("model_persistor", "model_locator"):
            if getattr(self, name) is not None:
                raise JobError(f"{name}={getattr(self, name)!r}: {_KEPT_BY_THE_BROKER}; leave {name} out")


class FedAvgOptions(TypedDict, total=False):
    """The keyword arguments of `FedAvgRecipe` and `NumpyFedAvgRecipe`. The groups have their defaults and checks."""

    # JobOptions
    name: str
    min_clients: Required[int]
    num_rounds: int
    seed: int
    threads_per_task: int
    # ModelOptions
    model: Any
    initial_model: Any
    initial_ckpt: str | Path | None
    # ScriptOptions
    train_script: Required[str]
    train_args: str
    launch_external_process: bool
    command: str
    launch_once: bool
    launch_timeout: float
    shutdown_timeout: float
    client_memory_gc_rounds: int
    cuda_empty_cache: bool
    # ExchangeOptions, without the framework
    server_expected_format: ExchangeFormat | str
    params_transfer_type: TransferType | str
    codec: str | None
    # AggregationOptions
    aggregation_weights: Mapping[str, float] | None
    exclude_vars: str | None
    exact: bool
    sample: int
    deadline_s: float | None
    straggler_patience: float | None
    sites_s: float
    # SelectionOptions
    key_metric: str
    key_metric_mode: str | None
    stop_cond: str | None
    patience: int | None
    best_model_filename: str | None
    save_filename: str | None
    # ServerOptions
    aggregator: Any
    aggregator_data_kind: Any
    server_memory_gc_rounds: int
    enable_tensor_disk_offload: bool
    model_persistor: Any
    model_locator: Any
    per_site_config: Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True)
class ExchangeFormats:
    """`ExchangeOptions` as far as every FedAvg recipe leaves them to the user: the framework is the recipe's own."""

    server_expected_format: ExchangeFormat | str = ExchangeFormat.NUMPY
    params_transfer_type: TransferType | str = TransferType.FULL
    codec: str | None = None


#: In the order in which a recipe's signature shows them.
GROUPS = (
    JobOptions,
    ModelOptions,
    ScriptOptions,
    ExchangeFormats,
    SelectionOptions,
    AggregationOptions,
    ServerOptions,
)
