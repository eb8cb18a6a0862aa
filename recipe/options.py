"""Options that several recipes share, each group checked in one place."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

from ..serialization.errors import JobError
from ..serialization.jobspec import Component, check_site_name
from ..serialization.narrowing import check_codec
from .notes import note


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


def boolean(value: object, what: str) -> bool:
    """True or False.

    Raises:
        JobError: something else.
    """
    if not isinstance(value, bool):
        raise JobError(f"{what}={value!r}; True or False belongs here")
    return value


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
        client_memory_gc_rounds: after every so many rounds the script's process gives memory back; 0: never.
        cuda_empty_cache: empty torch's cache of GPU memory then as well.
    """

    train_script: str
    train_args: str = ""
    launch_external_process: bool = False
    command: str = "python3 -u"
    launch_once: bool = True
    launch_timeout: float = 300.0
    shutdown_timeout: float = 0.0
    client_memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.train_script, str) or not self.train_script.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(f"train_script={self.train_script!r}; the path of a script such as 'client.py' belongs here")
        for text, what in ((self.train_args, "train_args"), (self.command, "command")):
            try:
                words = shlex.split(text)
            except (ValueError, AttributeError, TypeError):
                raise JobError(
                    f"{what}={text!r}; a command line with closed quotes belongs here, as one text such as '--lr 0.1';"
                    " what differs at sites goes into per_site_config"
                ) from None
            if what == "command" and not words:
                raise JobError("command is empty; name what starts the script, such as 'python3 -u'")
        number(self.shutdown_timeout, "shutdown_timeout")
        number(self.launch_timeout, "launch_timeout", positive=True)
        whole(self.client_memory_gc_rounds, "client_memory_gc_rounds")
        for flag in ("launch_external_process", "launch_once", "cuda_empty_cache"):
            boolean(getattr(self, flag), flag)
        if self.cuda_empty_cache and not self.client_memory_gc_rounds:
            note("cuda_empty_cache=True does nothing alone: client_memory_gc_rounds=N says after which rounds")
        if self.function and (
            self.train_args
            or self.launch_external_process
            or not self.launch_once
            or self.client_memory_gc_rounds
            or self.cuda_empty_cache
        ):
            raise JobError(
                f"train_script={self.train_script!r} names a function, which runs in the executor's own process:"
                " train_args, launch_external_process, launch_once=False, client_memory_gc_rounds and cuda_empty_cache"
                " are for scripts"
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
                "launch_external_process": self.launch_external_process,
                "command": self.command,
                "launch_once": self.launch_once,
                "launch_timeout": float(self.launch_timeout),
                "shutdown_timeout": float(self.shutdown_timeout),
            }
            if self.client_memory_gc_rounds:
                args["client_memory_gc_rounds"] = self.client_memory_gc_rounds
            if self.cuda_empty_cache:
                args["cuda_empty_cache"] = True
        args["params_exchange_format"] = exchange.framework.value
        args["params_transfer_type"] = exchange.params_transfer_type.value
        if exchange.codec:
            args["codec"] = exchange.codec
        return Component(path, args)


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """How models pass between the server and the training script; members of the enums, or their names.

    Attributes:
        framework: what `receive()` holds: ``numpy`` arrays or ``pytorch`` tensors.
        server_expected_format: what a custom aggregator gets. Nothing is converted on the way: tensors travel as
            safetensors in their own dtypes, and the weighted mean takes every dtype as it is.
        params_transfer_type: FULL or DIFF; the difference is taken on the site.
        codec: what float tensors of results are narrowed by on their way, undone in the aggregate: ``"fp16"``,
            ``"bf16"`` or ``"int8"`` (groups of 256 with a scale each); None: as they are. Models go out as they are.
    """

    framework: FrameworkType = FrameworkType.PYTORCH
    server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY
    params_transfer_type: TransferType = TransferType.FULL
    codec: str | None = None

    def __post_init__(self) -> None:
        chosen = one_of(FrameworkType, self.framework, "framework")
        values: dict[str, StrEnum] = {
            "framework": FrameworkType.NUMPY if chosen is FrameworkType.RAW else chosen,
            "server_expected_format": one_of(ExchangeFormat, self.server_expected_format, "server_expected_format"),
            "params_transfer_type": one_of(TransferType, self.params_transfer_type, "params_transfer_type"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check_codec(self.codec)

    @staticmethod
    def of(framework: object, server_expected_format: object, params_transfer_type: object) -> ExchangeOptions:
        """Out of what a user gave: members or their names.

        Raises:
            JobError: no such framework, format or type.
        """
        given: tuple[Any, Any, Any] = (framework, server_expected_format, params_transfer_type)
        return ExchangeOptions(*given)


@dataclass(frozen=True, slots=True)
class AggregationOptions:
    """How results become the next model.

    Attributes:
        aggregation_weights: a factor for each site, 1.0 where it is not named; times the steps that the site reports.
        exclude_vars: a regular expression (searched, not matched whole) of tensors that keep their global value.
        exact: add in fixed point, the same bits in any order; False: a float32 running mean, faster and half as large.
        sample: how many of the connected sites work on a round, drawn from the seed; 0: all.
        deadline_s: close a round after so many seconds if ``min_clients`` results are there, else fail it; None: never.
        straggler_patience: once ``min_clients`` results are there, wait for the others so many times as long as those
            took: 0.5 is half as long again, 0 closes the round at once; None: until each has come or failed.
        sites_s: seconds to wait for ``min_clients`` sites to connect, and for a lost one to return.
    """

    aggregation_weights: Mapping[str, float] | None = None
    exclude_vars: str | None = None
    exact: bool = True
    sample: int = 0
    deadline_s: float | None = None
    straggler_patience: float | None = None
    sites_s: float = 60.0

    def __post_init__(self) -> None:
        boolean(self.exact, "exact")
        if not isinstance(cast("object", self.aggregation_weights), Mapping | None):
            raise JobError(f"aggregation_weights={self.aggregation_weights!r}; a map of sites to factors belongs here")
        for site, weight in (self.aggregation_weights or {}).items():
            number(weight, f"aggregation_weights[{check_site_name(site)!r}]", positive=True)
        whole(self.sample, "sample")
        number(self.sites_s, "sites_s")
        if self.deadline_s is not None:
            number(self.deadline_s, "deadline_s", positive=True)
        if self.straggler_patience is not None:
            number(self.straggler_patience, "straggler_patience")
        if self.exclude_vars:
            try:
                re.compile(self.exclude_vars)
            except (re.error, TypeError) as error:
                raise JobError(f"exclude_vars={self.exclude_vars!r} is not a regular expression: {error}") from None

    def args(self) -> dict[str, Any]:
        """The workflow's arguments that differ from its defaults."""
        args: dict[str, Any] = {}
        if self.aggregation_weights:
            args["aggregation_weights"] = {site: float(weight) for site, weight in self.aggregation_weights.items()}
        if self.exclude_vars:
            args["exclude_vars"] = self.exclude_vars
        if not self.exact:
            args["exact"] = False
        if self.sample:
            args["sample"] = self.sample
        if self.deadline_s is not None:
            args["deadline_s"] = float(self.deadline_s)
        if self.straggler_patience is not None:
            args["straggler_patience"] = float(self.straggler_patience)
        if self.sites_s != AggregationOptions.__dataclass_fields__["sites_s"].default:
            args["sites_s"] = float(self.sites_s)
        return args
