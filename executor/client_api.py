"""The Client API's functions, as `import fedloom.client as flare` has them: this process's `ClientContext`, called.

One a process. In process, the host makes it before the script starts; an external command makes its own in `init()`
from the environment that the executor gave it. The loop is::

    flare.init()
    while flare.is_running():        # waits for the next task; False once the job is over
        model = flare.receive()      # the same model however often it is called within one task
        ...
        flare.send(flare.FLModel(params=..., meta={"NUM_STEPS_CURRENT_ROUND": steps}))
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from types import TracebackType
from typing import Any

from ..serialization import spans
from ..serialization.errors import LinkError
from ..serialization.model import FLModel
from .channel import ENV_CHANNEL, ENV_JOB, ENV_SITE, Channel
from .client_context import EVALUATE_NAMES, ClientContext, ClientError
from .gpushare import limit_gpu_memory
from .seeding import seed_all
from .state import SiteState

_HELLO_S = 60.0

_context: ClientContext | None = None
_passive_rank = ""


def install(context: ClientContext | None) -> None:
    """Make this the process's context (the host does, before it starts a script)."""
    global _context
    _context = context


def current() -> ClientContext:
    """This process's context.

    Raises:
        ClientError: before `init()`, or on a rank that does not talk.
    """
    if _passive_rank:
        raise ClientError(
            f"this is rank {_passive_rank}: only rank 0 talks to fedloom. Call is_running, receive, send and log there,"
            " and broadcast what the other ranks need with your framework (docs/guides/client-api.md shows how)"
        )
    if _context is None:
        raise ClientError("call flare.init() first")
    return _context


def init(rank: str | int | None = None, config_file: str | None = None) -> ClientContext | None:
    """Connect the script to its executor. Further calls change nothing.

    Args:
        rank: this process's rank in a multi-process training; by default from ``RANK``, else 0. Only rank 0 takes part.
        config_file: accepted for compatibility; fedloom passes its settings through the environment.

    Returns:
        The context behind these functions; None on other ranks than 0, which know their site and job and nothing more.

    Raises:
        ClientError: this process was not started by fedloom.
    """
    global _passive_rank
    del config_file
    if _context is not None:
        return _context
    limit_gpu_memory()  # every rank its own process
    name = str(os.environ.get("RANK", "0") if rank is None else rank)
    if name != "0":
        _passive_rank = name
        return None
    if not os.environ.get(ENV_CHANNEL):
        raise ClientError(
            "this script is not part of a fedloom run. It is started by an executor: run its job with"
            " `fedloom sim job.py`, or `recipe.execute(SimEnv(...))`, or submit it with `fedloom job submit`"
        )
    channel: Channel | None = None
    try:
        channel = Channel.connect(os.environ, "client")
        settings = channel.receive(_HELLO_S)
    except LinkError as error:
        if channel is not None:
            channel.close()
        raise ClientError(f"flare.init(): {error}") from None
    spans.arm(os.environ.get(spans.ENV_SPANS, ""), f"{settings.get('site', '')} (command)")
    context = ClientContext(channel, settings, on_lost=_die)
    install(context)
    _report_exceptions(context)
    atexit.register(_end, context)  # an end that Python went through, unlike os._exit or a signal
    seed_all(int(settings.get("seed", 0)), int(settings.get("threads", 0)))
    return context


def _end(context: ClientContext) -> None:
    context.end()
    context.close()


def _die() -> None:
    """The executor is gone: an external script must not train on for nobody."""
    os.kill(os.getpid(), signal.SIGTERM)


def _report_exceptions(context: ClientContext) -> None:
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            context.fail("".join(traceback.format_exception(kind, error, trace)))
        previous(kind, error, trace)

    sys.excepthook = hook


def receive(timeout: float | None = None) -> FLModel | None:
    """The task's model; waits for a task if there is none.

    A second call within a task returns the same model. None when the job is over, or no task came within ``timeout``
    seconds. For ``submit_model`` its ``params`` are None.
    """
    return current().receive(timeout)


def send(model: FLModel, clear_cache: bool = True) -> None:
    """Send the task's result. It needs params or metrics; with ``clear_cache`` both models' params are None afterwards.

    Metrics sent with params describe the model that was *received*. With transfer type DIFF a FULL model becomes the
    difference to the received one here.

    Raises:
        ClientError: there is no received task. PayloadError, ValuesError, LayoutError: what is wrong with the model.
    """
    current().send(model, clear_cache)


def is_running() -> bool:
    """Wait for the next task; False when the job is over (with ``launch_once=False``: after the first result)."""
    return current().is_running()


def is_train() -> bool:
    """Whether the task in hand is ``train``."""
    return current().task_name() == "train"


def is_evaluate() -> bool:
    """Whether the task in hand is ``validate`` (or ``evaluate``)."""
    return current().task_name() in EVALUATE_NAMES


def is_submit_model() -> bool:
    """Whether the task in hand is ``submit_model``: its model has no params; send the site's own."""
    return current().task_name() == "submit_model"


def get_task_name() -> str:
    """The name of the task in hand."""
    return current().task_name()


def get_job_id() -> str:
    """The job's id; known right after `init`, on every rank."""
    return system_info()["job_id"]


def get_site_name() -> str:
    """This site's name; known right after `init`, on every rank."""
    return system_info()["site_name"]


def system_info() -> dict[str, str]:
    """``{"site_name", "job_id"}``; known right after `init`, on every rank."""
    if _passive_rank:  # which data to load is every rank's business
        return {"site_name": os.environ.get(ENV_SITE, ""), "job_id": os.environ.get(ENV_JOB, "")}
    context = current()
    return {"site_name": context.site, "job_id": context.job}


def get_config() -> dict[str, Any]:
    """``site_name``, ``job_id``, ``TASK_NAME``, ``TASK_EXCHANGE``, and what the workflow gave the task along."""
    return current().config()


def log(key: str, value: Any, data_type: str = "SCALAR", **kwargs: Any) -> None:
    """Keep a value of this site with the job: a number, a text, or a map of them.

    Args:
        data_type: what it is: SCALAR, SCALARS, METRIC, METRICS, PARAMETER, PARAMETERS, TEXT, TAG, TAGS.
        kwargs: ``global_step``: the point's place on its curve, counted for each key where it is left out;
            ``walltime``: seconds since 1970, now if left out; more is kept with the point.

    Raises:
        ClientError: not plain data, or over 16 KiB. NaN and Inf are kept, as texts.
    """
    current().log(key, value, data_type, kwargs)


def state() -> SiteState:
    """What this site remembers between tasks: a dict of tensors and values, kept with the result that `send` sends.

    It survives the process: a task that is tried again starts from what its first try started from.
    """
    return current().state()


def clear() -> None:
    """Let go of the received model's memory; `receive` reads it again."""
    current().clear()


def shutdown() -> None:
    """Take no more tasks: `is_running()` is False from now on."""
    current().close()
