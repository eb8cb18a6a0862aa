"""How a job says that a script, or a function in one, works on its tasks: the settings in config_fed_client.json."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from typing import Any

from ..serialization.errors import JobError
from ..serialization.jobspec import Component
from ..serialization.narrowing import check_codec
from .plugins import call_plugin, find_plugin, plugin_names

EXCHANGE_FORMATS = ("numpy", "pytorch")
TRANSFER_TYPES = ("FULL", "DIFF")


@dataclass(frozen=True, slots=True)
class ScriptExecutor:
    """A training script that talks through the Client API.

    Attributes:
        task_script_path: the script, relative to the job's custom folder, or an absolute path that the site has.
        task_script_args: its command line, split as a shell does.
        launch_external_process: False runs it within a child process of the executor; True as a command of its own.
        command: what an external script is started with.
        launch_once: one process over all rounds, waiting in `is_running()`; False starts the script for each task.
        shutdown_timeout: seconds that a script is given to end by itself once the job is over.
        params_exchange_format: ``"numpy"`` or ``"pytorch"``: what `receive()` holds.
        params_transfer_type: ``"FULL"``, or ``"DIFF"``: what reaches the aggregator; the site takes the difference.
        codec: ``"fp16"``, ``"bf16"`` or ``"int8"``: what float tensors of results are narrowed by on their way; "": as
            they are.
        launch_timeout: seconds within which an external script must call `flare.init()`.
        client_memory_gc_rounds: after every so many rounds the script's process gives memory back; 0: never.
        cuda_empty_cache: empty torch's cache of GPU memory then as well.
    """

    task_script_path: str
    task_script_args: str = ""
    launch_external_process: bool = False
    command: str = "python3 -u"
    launch_once: bool = True
    shutdown_timeout: float = 0.0
    params_exchange_format: str = "numpy"
    params_transfer_type: str = "FULL"
    launch_timeout: float = 300.0
    client_memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False
    codec: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def argv(self) -> list[str]:
        """The script's arguments.

        Raises:
            JobError: a quote that does not end.
        """
        return _split(self.task_script_args, "task_script_args")

    @property
    def command_argv(self) -> list[str]:
        """The external command, without the script."""
        return _split(self.command, "command")


@dataclass(frozen=True, slots=True)
class FunctionExecutor:
    """A function of a module in the job's custom folder, called as ``function(model, ctx)`` for each task.

    It runs in worker processes that serve any site: what it must remember goes through ``ctx.state``.
    """

    task_script_path: str
    function: str
    params_exchange_format: str = "numpy"
    params_transfer_type: str = "FULL"
    codec: str = ""

    def __post_init__(self) -> None:
        _check(self)
        if not self.function.isidentifier():
            raise JobError(f"function {self.function!r}; a function's name in {self.task_script_path} belongs here")


Settings = ScriptExecutor | FunctionExecutor

_BY_PATH: dict[str, type[ScriptExecutor] | type[FunctionExecutor]] = {
    "fedloom.executor.script.ScriptExecutor": ScriptExecutor,
    "fedloom.executor.script.FunctionExecutor": FunctionExecutor,
    "fedloom.executor.function.FunctionExecutor": FunctionExecutor,
}


def settings_of(component: Component) -> Settings:
    """The settings that a job's executor component holds.

    Raises:
        JobError: neither one of fedloom's executors nor one that is installed here, or arguments that it does not take.
    """
    cls = _BY_PATH.get(component.path)
    if cls is None:
        plugin = find_plugin(component.path)
        if plugin is None:
            known = ", ".join(["ScriptExecutor", "FunctionExecutor", *plugin_names()])
            raise JobError(
                f"executor {component.path!r} is not here; known are {known}. Others are installed at the site, as"
                " entry points of the group fedloom.executors"
            )
        built = call_plugin(plugin, component.path, component.args)
        if isinstance(built, ScriptExecutor | FunctionExecutor):
            return built
        raise JobError(
            f"executor {component.path!r} gave a {type(built).__name__}; it is neither a ScriptExecutor nor a"
            " FunctionExecutor"
        )
    allowed = {item.name for item in fields(cls)}
    args: dict[str, Any] = component.args
    if unknown := sorted(set(args) - allowed):
        raise JobError(
            f"executor {cls.__name__}: unknown {unknown[0]!r}; its arguments are {', '.join(sorted(allowed))}"
        )
    try:
        return cls(**args)
    except TypeError as error:
        raise JobError(f"executor {cls.__name__}: {error}") from None


def _check(settings: Settings) -> None:
    hints: dict[str, type] = {"bool": bool, "str": str}
    for item in fields(settings):
        wanted = hints.get(str(item.type))
        value = getattr(settings, item.name)
        if wanted is not None and type(value) is not wanted:
            raise JobError(f"{item.name}={value!r}; {item.type} belongs here")
        if item.type == "int" and (type(value) is not int or value < 0):
            raise JobError(f"{item.name}={value!r}; a whole number, 0 or more, belongs here")
        if item.type == "float" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise JobError(f"{item.name}={value!r}; seconds, 0 or more, belong here")
    if not settings.task_script_path:
        raise JobError("task_script_path is empty; the training script's name belongs here")
    if settings.params_exchange_format not in EXCHANGE_FORMATS:
        raise JobError(f"params_exchange_format={settings.params_exchange_format!r}; one of {EXCHANGE_FORMATS}")
    if settings.params_transfer_type not in TRANSFER_TYPES:
        raise JobError(f"params_transfer_type={settings.params_transfer_type!r}; one of {TRANSFER_TYPES}")
    check_codec(settings.codec)


def _split(text: str, what: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise JobError(f"{what}={text!r}: {error}") from None
