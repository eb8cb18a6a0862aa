"""The Client API behind `import fedloom.client as flare`: a training script's side of the channel.

One `ClientContext` a process. In process, the host makes it before the script starts; an external command makes its own
in `init()` from the environment that the executor gave it. The loop is::

    flare.init()
    while flare.is_running():        # waits for the next task; False once the job is over
        model = flare.receive()      # the same model however often it is called within one task
        ...
        flare.send(flare.FLModel(params=..., meta={"NUM_STEPS_CURRENT_ROUND": steps}))
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..serialization.codec import check_plain
from ..serialization.errors import CodecError, FedloomError, JobError, LinkError
from ..serialization.model import FLModel
from .channel import ENV_CHANNEL, Channel, Map
from .seeding import seed_all
from .state import SiteState
from .taskio import TaskSpec, input_model, write_result

#: How much of a traceback travels; the site's log has all of it.
MAX_TRACE_CHARS = 12_000
_HELLO_S = 60.0
EVALUATE_NAMES = frozenset({"validate", "evaluate"})


class ClientError(JobError, RuntimeError):
    """A call of the Client API where it has no meaning: outside a run, before `init()` or `receive()`."""


def tail_text(text: str, limit: int = MAX_TRACE_CHARS) -> str:
    """The end of a long text, where a traceback says what happened."""
    return text if len(text) <= limit else f"[{len(text) - limit} characters before]\n{text[-limit:]}"


class ClientContext:
    """The script's tasks, one after another.

    Args:
        channel: connected; its hello is sent.
        settings: what the agent said of this host: job, site, once, exchange_format, transfer_type, config.
        on_lost: called in the reader's thread when the agent is gone.
    """

    def __init__(self, channel: Channel, settings: Map, on_lost: Callable[[], None]) -> None:
        self.site = str(settings.get("site", ""))
        self.job = str(settings.get("job", ""))
        self._settings = settings
        self._once = bool(settings.get("once", True))
        self._channel = channel
        self._on_lost = on_lost
        self._inbox: queue.Queue[Map] = queue.Queue()
        self._stopped = threading.Event()
        self._cancelled: set[tuple[str, int]] = set()
        self._task: TaskSpec | None = None  # the last one taken, sent or not
        self._open = False  # taken and not sent
        self._model: FLModel | None = None
        self._state: SiteState | None = None
        self._sent = 0
        self._started_s = 0.0
        self._reader = threading.Thread(target=self._read, name="fedloom-client", daemon=True)
        self._reader.start()

    # ------------------------------------------------------------ tasks

    @property
    def open_task(self) -> TaskSpec | None:
        """The task that was taken and not answered."""
        return self._task if self._open else None

    @property
    def sent(self) -> int:
        """How many results were sent."""
        return self._sent

    def is_running(self) -> bool:
        """Wait for the next task; True at once while one is not answered, False when there will be none."""
        return self._open or self._next(None)

    def receive(self, timeout: float | None = None) -> FLModel | None:
        """The task's model, waiting for a task if there is none. None when stopped, or not within ``timeout`` s."""
        if not self._open and not self._next(timeout):
            return None
        if self._model is None:
            assert self._task is not None
            self._model = input_model(self._task)
        return self._model

    def send(self, model: FLModel, clear_cache: bool = True) -> None:
        """Answer the task. With ``clear_cache`` the sent and the received model let go of their params.

        Raises:
            ClientError: nothing was received. PayloadError, ValuesError: the model cannot be a result, and why.
        """
        spec = self._task
        if spec is None or not self._open:
            raise ClientError("flare.send() without a task: call flare.receive() first, and send once for each receive")
        if (spec.task, spec.attempt) in self._cancelled:
            self._cancelled.discard((spec.task, spec.attempt))
            self.fail(f"{spec} was cancelled", "cancelled")  # nobody waits for it: the host is free again
        else:
            result = write_result(model, spec, self._state)
            self._channel.send(
                {
                    "op": "result",
                    "task": spec.task,
                    "attempt": spec.attempt,
                    "size": result.size,
                    "digest": result.digest,
                    "meta": result.meta,
                    "data": result.data,
                    "path": result.path,
                    "wrote_state": result.wrote_state,
                    "run_s": time.monotonic() - self._started_s,
                }
            )
        self._open = False
        self._state = None
        self._sent += 1
        if clear_cache:
            model.params = model.optimizer_params = None
            if self._model is not None:
                self._model.params = self._model.optimizer_params = None
        self._model = None
        if self._once is False:
            self._stopped.set()

    def _next(self, timeout: float | None) -> bool:
        """Take the next task. False when there will be none, or not in time."""
        if self._stopped.is_set() and self._inbox.empty():
            return False
        sys.stdout.flush()  # what the script printed is in its log before it waits
        sys.stderr.flush()
        try:
            self._channel.send({"op": "waiting"})
        except LinkError:
            return False
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                message = self._inbox.get(timeout=left)
            except queue.Empty:
                continue
            if message["op"] == "stop":
                self._stopped.set()
                return False
            self._task = TaskSpec.from_map(message["task"])
            self._open = True
            self._model = None
            self._state = None
            self._started_s = time.monotonic()
            seed_all(self._task.seed, self._task.threads)
            return True

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                match message["op"]:
                    case "task":
                        self._inbox.put(message)
                    case "cancel":
                        self._cancelled.add((str(message.get("task")), int(message.get("attempt", 0))))
                    case "stop":
                        self._stopped.set()
                        self._inbox.put(message)
                    case _:
                        pass
        except FedloomError:
            self._channel.close()
            self._stopped.set()
            self._inbox.put({"op": "stop"})
            self._on_lost()

    # ------------------------------------------------------------ questions

    def task_name(self) -> str:
        """The name of the task in hand, or of the last one."""
        if self._task is None:
            raise ClientError("no task yet: call flare.is_running() or flare.receive() first")
        return self._task.name

    def state(self) -> SiteState:
        """What this site remembers, as of the task in hand; changes are kept with `send`."""
        if self._task is None or not self._open:
            raise ClientError("flare.state() belongs to a task: call it between flare.receive() and flare.send()")
        if self._state is None:
            self._state = self._task.state()
        return self._state

    def config(self) -> dict[str, Any]:
        """Names of this run and how models are exchanged."""
        config = self._task.config if self._task is not None else {}
        return {
            "site_name": self.site,
            "job_id": self.job,
            "TASK_NAME": self._task.name if self._task is not None else "",
            "TASK_EXCHANGE": {
                "train_with_eval": False,
                "exchange_format": self._settings.get("exchange_format", "numpy"),
                "transfer_type": self._settings.get("transfer_type", "FULL"),
                "train_task_name": "train",
                "eval_task_name": "validate",
                "submit_model_task_name": "submit_model",
            },
            **config,
        }

    def log(self, key: str, value: Any, data_type: str, extra: dict[str, Any]) -> None:
        """Send a metric to whoever watches the job."""
        if hasattr(value, "item") and callable(value.item):
            value = value.item()
        record: Map = {"key": key, "value": value, "type": str(getattr(data_type, "value", data_type)), **extra}
        if self._task is not None:
            record.setdefault("round", self._task.round)
        try:
            check_plain(record)
        except CodecError as error:
            raise ClientError(f"flare.log({key!r}): {error}") from None
        self._channel.send({"op": "event", "kind": "metric", "data": record})

    def clear(self) -> None:
        """Let go of the received model's memory."""
        self._model = None

    def fail(self, text: str, code: str = "exception") -> None:
        """Tell the agent that the task in hand, or the script before its first, failed."""
        spec = self._task if self._open else None
        with contextlib.suppress(LinkError):
            self._channel.send(
                {
                    "op": "failed",
                    "task": spec.task if spec else "",
                    "attempt": spec.attempt if spec else 0,
                    "code": code,
                    "text": tail_text(text),
                }
            )

    def close(self) -> None:
        """Take no more tasks."""
        self._stopped.set()
        with contextlib.suppress(LinkError):
            self._channel.send({"op": "leaving"})


# ---------------------------------------------------------------- the module's functions

_context: ClientContext | None = None
_passive_rank = ""


def install(context: ClientContext | None) -> None:
    """Make this the process's context (the host does, before it starts a script)."""
    global _context
    _context = context


def _current() -> ClientContext:
    if _passive_rank:
        raise ClientError(
            f"this is rank {_passive_rank}: only rank 0 talks to fedloom. Receive and send there, and broadcast the"
            " model to the other ranks with your framework"
        )
    if _context is None:
        raise ClientError("call flare.init() first")
    return _context


def init(rank: str | int | None = None, config_file: str | None = None) -> None:
    """Connect the script to its executor. Further calls do nothing.

    Args:
        rank: this process's rank in a multi-process training; by default from ``RANK``, else 0. Only rank 0 takes part.
        config_file: accepted for compatibility; fedloom passes its settings through the environment.

    Raises:
        ClientError: this process was not started by fedloom.
    """
    global _passive_rank
    del config_file
    if _context is not None:
        return
    name = str(os.environ.get("RANK", "0") if rank is None else rank)
    if name != "0":
        _passive_rank = name
        return
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
    context = ClientContext(channel, settings, on_lost=_die)
    install(context)
    _report_exceptions(context)
    atexit.register(context.close)  # an end that Python went through, unlike os._exit or a signal
    seed_all(int(settings.get("seed", 0)), int(settings.get("threads", 0)))


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
    return _current().receive(timeout)


def send(model: FLModel, clear_cache: bool = True) -> None:
    """Send the task's result. It needs params or metrics; with ``clear_cache`` both models' params are None afterwards.

    Metrics sent with params describe the model that was *received*. With transfer type DIFF a FULL model becomes the
    difference to the received one here.

    Raises:
        ClientError: there is no received task. PayloadError, ValuesError, LayoutError: what is wrong with the model.
    """
    _current().send(model, clear_cache)


def is_running() -> bool:
    """Wait for the next task; False when the job is over (with ``launch_once=False``: after the first result)."""
    return _current().is_running()


def is_train() -> bool:
    """Whether the task in hand is ``train``."""
    return _current().task_name() == "train"


def is_evaluate() -> bool:
    """Whether the task in hand is ``validate`` (or ``evaluate``)."""
    return _current().task_name() in EVALUATE_NAMES


def is_submit_model() -> bool:
    """Whether the task in hand is ``submit_model``: its model has no params; send the site's own."""
    return _current().task_name() == "submit_model"


def get_task_name() -> str:
    """The name of the task in hand."""
    return _current().task_name()


def get_job_id() -> str:
    """The job's id; known right after `init`."""
    return _current().job


def get_site_name() -> str:
    """This site's name; known right after `init`."""
    return _current().site


def system_info() -> dict[str, str]:
    """``{"site_name", "job_id"}``; known right after `init`."""
    context = _current()
    return {"site_name": context.site, "job_id": context.job}


def get_config() -> dict[str, Any]:
    """``site_name``, ``job_id``, ``TASK_NAME``, ``TASK_EXCHANGE``, and what the workflow gave the task along."""
    return _current().config()


def log(key: str, value: Any, data_type: str = "SCALAR", **kwargs: Any) -> None:
    """Record a metric of this site; ``global_step=`` and the like are kept with it."""
    _current().log(key, value, data_type, kwargs)


def state() -> SiteState:
    """What this site remembers between tasks: a dict of tensors and values, kept with the result that `send` sends.

    It survives the process: a task that is tried again starts from what its first try started from.
    """
    return _current().state()


def clear() -> None:
    """Let go of the received model's memory; `receive` reads it again."""
    _current().clear()


def shutdown() -> None:
    """Take no more tasks: `is_running()` is False from now on."""
    _current().close()
