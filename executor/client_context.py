"""A training script's side of the channel: its tasks, one after another, and what it says beside their results."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..serialization import spans
from ..serialization.errors import CodecError, FedloomError, JobError, LinkError
from ..serialization.jobmessages import POINTS_KIND
from ..serialization.memory import give_back
from ..serialization.model import FLModel
from .channel import Channel, Map
from .gpushare import limit_gpu_memory
from .points import PointSender, make_point
from .seeding import seed_all
from .state import SiteState
from .taskio import TaskSpec, input_model, write_result

#: How much of a traceback travels; the site's log has all of it.
MAX_TRACE_CHARS = 12_000
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
        settings: what the agent said of this host: job, site, once, exchange_format, transfer_type, memory_gc_rounds,
            cuda_empty_cache.
        on_lost: called in the reader's thread when the agent is gone.
    """

    def __init__(self, channel: Channel, settings: Map, on_lost: Callable[[], None]) -> None:
        self.site = str(settings.get("site", ""))
        self.job = str(settings.get("job", ""))
        self._settings = settings
        self._once = bool(settings.get("once", True))
        self._gc_rounds = int(settings.get("memory_gc_rounds", 0))
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
        self._code = "start"  # what the script's own code is about, since then
        self._code_at = spans.start()
        self._points = PointSender(self._send_points)
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
            self._own_code()
            self._model = input_model(self._task)
            self._code_at = spans.start()
        return self._model

    def send(self, model: FLModel, clear_cache: bool = True) -> None:
        """Answer the task. With ``clear_cache`` the sent and the received model let go of their params.

        Raises:
            ClientError: nothing was received. PayloadError, ValuesError: the model cannot be a result, and why.
        """
        spec = self._task
        self._own_code()
        if spec is None or not self._open:
            raise ClientError("flare.send() without a task: call flare.receive() first, and send once for each receive")
        if (spec.task, spec.attempt) in self._cancelled:
            self._cancelled.discard((spec.task, spec.attempt))
            self.fail(f"{spec} was cancelled", "cancelled")  # nobody waits for it: the host is free again
        else:
            result = write_result(model, spec, self._state)
            self._points.flush()  # what was logged for a result is there before it
            self._channel.send(result.to_map(spec, time.monotonic() - self._started_s))
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
        if self._gc_rounds and self._sent % self._gc_rounds == 0:
            give_back(cuda=bool(self._settings.get("cuda_empty_cache")))
        self._code, self._code_at = "after send", spans.start()

    def _next(self, timeout: float | None) -> bool:
        """Take the next task. False when there will be none, or not in time."""
        self._own_code()
        spans.flush()
        if self._stopped.is_set() and self._inbox.empty():
            return False
        sys.stdout.flush()  # what the script printed is in its log before it waits
        sys.stderr.flush()
        try:
            self._points.flush()
            self._channel.send({"op": "waiting"})
        except LinkError:
            return False
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            try:
                message = self._inbox.get(timeout=max(0.0, left))  # with none left, what is there already counts
            except queue.Empty:
                if left <= 0:
                    return False
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
            limit_gpu_memory()
            self._code, self._code_at = "train", spans.start()
            return True

    def _own_code(self) -> None:
        """The script's own code ends here: what comes is fedloom's."""
        task = self._task.task if self._task is not None else ""
        spans.end(self._code, self._code_at, site=self.site, task=task)
        self._code_at = 0.0

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
        config = self._task.full_config if self._task is not None else {}
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

    def log(self, key: str, value: Any, data_type: object, extra: Map) -> None:
        """Keep a value with the job; it leaves with others, within a fifth of a second."""
        try:
            point = make_point(key, value, data_type, self._task.round if self._task is not None else None, extra)
        except CodecError as error:
            raise ClientError(f"flare.log({key!r}): {error}") from None
        self._points.add(point)

    def flush(self) -> None:
        """Send what was logged and waits for company."""
        self._points.flush()

    def _send_points(self, points: list[Map]) -> None:
        self._channel.send({"op": "event", "kind": POINTS_KIND, "data": {"points": points}})

    def clear(self) -> None:
        """Let go of the received model's memory."""
        self._model = None

    def fail(self, text: str, code: str = "exception") -> None:
        """Tell the agent that the task in hand, or the script before its first, failed."""
        spec = self._task if self._open else None
        with contextlib.suppress(LinkError):
            self._points.flush()
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
            self._points.flush()
            self._channel.send({"op": "leaving"})

    def end(self) -> None:
        """The script is over: say what it logged last."""
        with contextlib.suppress(LinkError):
            self._points.close()
