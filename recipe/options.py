"""Options that several recipes share, each group checked in one place."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from ..serialization.errors import JobError
from ..serialization.jobspec import Component, check_site_name


class TransferType(StrEnum):
    """What a site sends: the whole model, or its difference from the received one."""

    FULL = "FULL"
    DIFF = "DIFF"


class ExchangeFormat(StrEnum):
    """How parameters reach the training script; on the wire they are safetensors with their own dtypes, always."""

    RAW = "raw"
    NUMPY = "numpy"
    PYTORCH = "pytorch"


class FrameworkType(StrEnum):
    """What the training script is written in."""

    RAW = "raw"
    NUMPY = "numpy"
    PYTORCH = "pytorch"


_E = TypeVar("_E", bound=StrEnum)


def one_of(kind: type[_E], value: object, what: str) -> _E:
    """The member of an enum by its value or name, in any case.

    Raises:
        JobError: there is none.
    """
    text = str(value.value if isinstance(value, StrEnum) else value)
    for member in kind:
        if text.lower() in (member.value.lower(), member.name.lower()):
            return member
    raise JobError(f"{what}={value!r}; allowed are {', '.join(repr(member.value) for member in kind)}")


def whole(value: object, what: str, low: int = 0) -> int:
    """A whole number of at least ``low``.

    Raises:
        JobError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise JobError(f"{what}={value!r}; a whole number of at least {low} belongs here")
    return value


def number(value: object, what: str, *, positive: bool = False) -> float:
    """A finite number, not negative.

    Raises:
        JobError: something else.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or (positive and not value)
    ):
        raise JobError(f"{what}={value!r}; a finite number {'above 0' if positive else 'of at least 0'} belongs here")
    return float(value)


@dataclass(frozen=True, slots=True)
class ScriptOptions:
    """What runs on a site for each task.

    Attributes:
        train_script: a script, or ``"client.py:train"`` for a function of it that is called for each task.
        train_args: the script's command line, split as a shell does.
        launch_external_process: run the script with ``command`` in a process tree of its own.
        command: what an external script is started with.
        launch_once: one process over all rounds; False starts the script afresh for each task.
        launch_timeout: seconds within which an external script must call `flare.init()`.
        shutdown_timeout: seconds that a script is given to end by itself once the job is over.
    """

    train_script: str
    train_args: str = ""
    launch_external_process: bool = False
    command: str = "python3 -u"
    launch_once: bool = True
    launch_timeout: float = 300.0
    shutdown_timeout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.train_script, str) or not self.train_script.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(f"train_script={self.train_script!r}; the path of a script such as 'client.py' belongs here")
        for text, what in ((self.train_args, "train_args"), (self.command, "command")):
            try:
                words = shlex.split(text)
            except (ValueError, AttributeError, TypeError):
                raise JobError(f"{what}={text!r}; a command line with closed quotes belongs here") from None
            if what == "command" and not words:
                raise JobError("command is empty; name what starts the script, such as 'python3 -u'")
        number(self.shutdown_timeout, "shutdown_timeout")
        number(self.launch_timeout, "launch_timeout", positive=True)
        if self.function and (self.train_args or self.launch_external_process or not self.launch_once):
            raise JobError(
                f"train_script={self.train_script!r} names a function, which runs in the executor's own process:"
                " train_args, launch_external_process and launch_once=False are for scripts"
            )

    @property
    def script(self) -> str:
        """The script's path, as the user gave it."""
        return self.train_script.rpartition(":")[0] if self.function else self.train_script

    @property
    def function(self) -> str:
        """The function's name, or "" where the whole script runs."""
        path, _, name = self.train_script.rpartition(":")
        return name if path.endswith(".py") and name.isidentifier() else ""

    def component(self, script: str, exchange: ExchangeOptions) -> Component:
        """The executor's configuration; ``script`` is where the script lies in the job's custom folder."""
        args: dict[str, Any] = {"task_script_path": script}
        if self.function:
            path = "fedloom.executor.script.FunctionExecutor"
            args["function"] = self.function
        else:
            path = "fedloom.executor.script.ScriptExecutor"
            args |= {
                "task_script_args": self.train_args,
                "launch_external_process": bool(self.launch_external_process),
                "command": self.command,
                "launch_once": bool(self.launch_once),
                "launch_timeout": float(self.launch_timeout),
                "shutdown_timeout": float(self.shutdown_timeout),
            }
        args["params_exchange_format"] = exchange.framework.value
        args["params_transfer_type"] = exchange.params_transfer_type.value
        return Component(path, args)


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """How models pass between the server and the training script.

    Attributes:
        framework: what `receive()` holds: ``numpy`` arrays or ``pytorch`` tensors.
        server_expected_format: accepted; the server folds every dtype as it is, so nothing is converted.
        params_transfer_type: FULL or DIFF; the difference is taken on the site.
    """

    framework: FrameworkType
    server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY
    params_transfer_type: TransferType = TransferType.FULL

    @staticmethod
    def of(framework: object, server_expected_format: object, params_transfer_type: object) -> ExchangeOptions:
        """Out of what a user gave: members or their names.

        Raises:
            JobError: no such framework, format or type.
        """
        chosen = one_of(FrameworkType, framework, "framework")
        return ExchangeOptions(
            FrameworkType.NUMPY if chosen is FrameworkType.RAW else chosen,
            one_of(ExchangeFormat, server_expected_format, "server_expected_format"),
            one_of(TransferType, params_transfer_type, "params_transfer_type"),
        )


@dataclass(frozen=True, slots=True)
class AggregationOptions:
    """How results become the next model.

    Attributes:
        aggregation_weights: a factor for each site, 1.0 where it is not named; times the steps that the site reports.
        exclude_vars: a regular expression (searched, not matched whole) of tensors that keep their global value.
        key_metric: the metric by which the best model is chosen.
        sample: how many of the connected sites work on a round, drawn from the seed; 0: all.
        deadline_s: close a round after so many seconds if ``min_clients`` results are there, else fail it; None: never.
        sites_s: seconds to wait for ``min_clients`` sites to connect, and for a lost one to return.
    """

    aggregation_weights: Mapping[str, float] | None = None
    exclude_vars: str | None = None
    key_metric: str = "accuracy"
    sample: int = 0
    deadline_s: float | None = None
    sites_s: float = 60.0
    weights: dict[str, float] = field(init=False, default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for site, weight in (self.aggregation_weights or {}).items():
            self.weights[check_site_name(site)] = number(weight, f"aggregation_weights[{site!r}]", positive=True)
        whole(self.sample, "sample")
        number(self.sites_s, "sites_s")
        if self.deadline_s is not None:
            number(self.deadline_s, "deadline_s", positive=True)
        if self.exclude_vars:
            try:
                re.compile(self.exclude_vars)
            except re.error as error:
                raise JobError(f"exclude_vars={self.exclude_vars!r} is not a regular expression: {error}") from None

    def args(self) -> dict[str, Any]:
        """The workflow's arguments that differ from its defaults, and the key metric."""
        args: dict[str, Any] = {"key_metric": self.key_metric}
        if self.weights:
            args["aggregation_weights"] = self.weights
        if self.exclude_vars:
            args["exclude_vars"] = self.exclude_vars
        if self.sample:
            args["sample"] = self.sample
        if self.deadline_s is not None:
            args["deadline_s"] = float(self.deadline_s)
        if self.sites_s != AggregationOptions.__dataclass_fields__["sites_s"].default:
            args["sites_s"] = float(self.sites_s)
        return args


#: Options of the documents that a later version builds: the values that ask for nothing, and what to do until then.
LATER: dict[str, tuple[tuple[object, ...], str]] = {
    "initial_ckpt": ((None,), "load the checkpoint in job.py and give it as `model`"),
    "aggregator": ((None,), "the built-in weighted mean is used"),
    "aggregator_data_kind": ((None, "WEIGHTS"), "the kind is read from each result"),
    "model_persistor": ((None,), "models are kept by the broker, as safetensors"),
    "model_locator": ((None,), "models are kept by the broker, as safetensors"),
    "per_site_config": ((None,), "read `flare.system_info()['site_name']` in the script"),
    "stop_cond": ((None,), "stop with `run.abort()`, or set num_rounds"),
    "patience": ((None,), "set num_rounds"),
    "key_metric_mode": ((None, "max"), "report a metric whose largest value is best, such as -loss"),
    "save_filename": ((None, "FL_global_model.pt"), "results are model.safetensors and best_model.safetensors"),
    "best_model_filename": ((None,), "results are model.safetensors and best_model.safetensors"),
    "server_memory_gc_rounds": ((0, None), "the server holds one aggregate, whatever the number of sites"),
    "client_memory_gc_rounds": ((0, None), "call gc.collect() in the script"),
    "cuda_empty_cache": ((False, None), "call torch.cuda.empty_cache() in the script"),
    "enable_tensor_disk_offload": ((False, None), "results are always on the broker's disk, not in memory"),
}


def refuse_later(recipe: str, options: Mapping[str, object]) -> None:
    """Refuse options that this version would have to ignore.

    Raises:
        JobError: one of `LATER` with a value that asks for something.
        TypeError: an option that no version knows, as Python says it of any call.
    """
    for name, value in options.items():
        if name not in LATER:
            raise TypeError(f"{recipe}() got an unexpected keyword argument {name!r}")
        harmless, instead = LATER[name]
        plain = getattr(value, "value", value)
        if not any(type(plain) is type(item) and plain == item for item in harmless):
            raise JobError(
                f"{recipe}: {name}={value!r} is not built yet in this version of fedloom; until then {instead}"
            )
