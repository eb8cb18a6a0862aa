"""A worker: the process in which a job's task functions run, for any site, a few tasks at a time.

It takes tasks off its channel one by one. Where the results of a gather may be folded, it folds its own
(`workerfolds`) and answers with what is left of them, their metrics; else each result goes back as it is.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..serialization import spans
from ..serialization.errors import FedloomError, FoldError, LayoutError, LinkError, MixedError, PayloadError, TaskError
from ..serialization.jobmessages import POINTS_KIND
from .channel import Channel, Map
from .client_context import tail_text
from .context import Report, TaskContext, TaskFunction, call_function, user_traceback
from .gpushare import limit_gpu_memory
from .hostio import end_group, enter, flush_output
from .points import PointSender
from .replies import Replies
from .runs import Key, mark_of
from .seeding import seed_all
from .siteoutput import SiteOutput
from .taskio import TaskResult, TaskSpec, encode_result, input_model, plain_result, save_state, write_result
from .workerfolds import WorkerFolds


def run_functions(channel: Channel, start: Map) -> int:
    """Serve a job's task function for any site, until told to stop. Returns the exit code."""
    worker = _Worker(channel, str(start["mark"]))
    began = spans.start()
    enter(start, Path(str(start["script"])).parent)
    seed_all(int(start.get("seed", 0)), int(start.get("threads", 0)))
    try:
        limit_gpu_memory()
        function = load_function(Path(str(start["script"])), str(start["function"]))
    except BaseException as error:  # noqa: BLE001 - importing is user code: whatever it raises, the user must see it
        text = str(error) if isinstance(error, TaskError) else user_traceback(error)
        print(text, file=sys.stderr, flush=True)
        channel.send({"op": "failed", "task": "", "attempt": 0, "code": "import", "text": tail_text(text)})
        return 1
    spans.end("start", began)
    try:
        worker.work(function)
    except LinkError:
        end_group()
    flush_output()
    channel.send({"op": "exited", "code": 0})
    return 0


def load_function(script: Path, name: str) -> TaskFunction:
    """A function out of a file, imported once as the module that its name says.

    Raises:
        TaskError: the file has no such function.
    """
    module = sys.modules.get(script.stem)
    if module is None or getattr(module, "__file__", None) != str(script):
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[script.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(script.stem, None)
            raise
    function = getattr(module, name, None)
    if not callable(function):
        raise TaskError("any site", f"{script.name} has no function {name!r}: the job's executor names it")
    return function


class _Worker:
    """Takes tasks off the channel; a thread of its own reads, so that a cancel reaches a running task, and a partial
    leaves while one runs.
    """

    def __init__(self, channel: Channel, mark: str) -> None:
        self._place = mark
        self._mark = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._channel = channel
        self._inbox: queue.SimpleQueue[Map] = queue.SimpleQueue()
        self._replies = Replies(channel)
        self._folds = WorkerFolds()
        self._lock = threading.Lock()  # of the two below
        self._running: TaskContext | None = None
        self._unwanted: set[Key] = set()
        self._key: Key = ("", 0)
        self._points = PointSender(
            lambda points: self._report("event", {"kind": POINTS_KIND, "data": {"points": points}})
        )
        threading.Thread(target=self._read, name="fedloom-host", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                match message["op"]:
                    case "cancel":
                        self._cancel((message["task"], message["attempt"]))
                    case "plan":
                        self._folds.plan(message["gather"], message["plan"])
                    case "flush":
                        self._flush(message)
                    case _:
                        self._inbox.put(message)
        except FedloomError:
            end_group()

    def _cancel(self, key: Key) -> None:
        with self._lock:
            if key == self._key and self._running is not None:
                self._running.cancel()
            else:
                self._unwanted.add(key)

    def _flush(self, message: Map) -> None:
        """Hand over what was folded of a gather."""
        gather = str(message["gather"])
        answer: Map = {"op": "partial", "gather": gather}
        keys = self._folds.keys(gather)
        try:
            made = self._folds.take(gather, str(message["path"]), digest=bool(message["digest"]))
        except OSError as error:
            self._replies.add(answer | {"keys": keys, "error": str(error)}, urgent=True)
            return
        if made is None:
            self._replies.add(answer | {"keys": []}, urgent=True)
            return
        told = {"keys": made.keys, "id": made.id, "size": made.size, "digest": made.digest, "data": made.data}
        self._replies.add(answer | told, urgent=True)  # behind the answers of the tasks that it holds

    def work(self, function: TaskFunction) -> None:
        """Work until told to stop."""
        output = SiteOutput(self._place)
        try:
            while True:
                output.rest()
                self._replies.add({"op": "waiting"}, urgent=True)
                message = self._inbox.get()
                match message["op"]:
                    case "stop":
                        return
                    case "tasks":
                        first = TaskSpec.from_map(message["first"])
                        shared = {field.name: getattr(first, field.name) for field in fields(first)}
                        for own in message["own"]:
                            self._one(function, TaskSpec(**(shared | own)), output)
                        self._unwanted.clear()
                    case _:
                        pass
        finally:
            output.close()

    def _one(self, function: TaskFunction, spec: TaskSpec, output: SiteOutput) -> None:
        key = (spec.task, spec.attempt)
        os.pwrite(self._mark, mark_of(key), 0)
        if key in self._unwanted:
            self._replies.add({"op": "failed", "task": key[0], "attempt": key[1], "code": "cancelled", "text": ""})
            return
        began = spans.start()
        if spec.cwd:
            _go_to(spec.cwd)
        output.begin(spec.log_path)
        with self._lock:
            self._key = key
        seed_all(spec.seed, spec.threads)
        if "torch" in sys.modules:
            limit_gpu_memory()
        spans.end("enter", began, site=spec.site, task=spec.task)
        answer = run_task(function, spec, self._say, self._begun, self._folds if spec.fold else None)
        output.end()
        self._points.flush()  # what was logged for a result is there before it
        with self._lock:
            self._running = None
        self._replies.add(answer, urgent=answer["op"] == "failed")
        if answer.get("folded"):
            self._folds.told(spec.fold)

    def _begun(self, context: TaskContext) -> None:
        with self._lock:
            self._running = context
            if self._key in self._unwanted:  # said between the look at it and now
                context.cancel()

    def _say(self, op: str, data: dict[str, Any]) -> None:
        points = data.get("data", {}).get("points") if data.get("kind") == POINTS_KIND else None
        if points is None:
            self._report(op, data)
        for point in points or ():
            self._points.add(point)

    def _report(self, op: str, data: dict[str, Any]) -> None:
        self._replies.add({"op": op, "task": self._key[0], "attempt": self._key[1], **data}, urgent=True)


def _go_to(folder: str) -> None:
    """Work in the site's folder, which is made where it is not there."""
    try:
        os.chdir(folder)
    except FileNotFoundError:
        try:
            os.mkdir(folder)  # noqa: PTH102 - a Path for each of thousands costs as much as the call
        except (FileNotFoundError, FileExistsError):  # what is above it is not there; another was first
            Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)


def _nobody(context: TaskContext) -> None:
    del context


def run_task(
    function: TaskFunction,
    spec: TaskSpec,
    report: Report,
    running: Callable[[TaskContext], None] = _nobody,
    folds: WorkerFolds | None = None,
) -> Map:
    """Call a function for a task; the channel message that tells how it went.

    Args:
        folds: where its result is to be added; None: it goes back by itself.
    """
    started = time.monotonic()
    context = TaskContext(
        spec.site, spec.job, spec.name, spec.round, spec.total_rounds, spec.seed, spec.full_config, spec.state(), report
    )
    running(context)
    failed: Map = {"op": "failed", "task": spec.task, "attempt": spec.attempt}
    try:
        returned = _called(function, spec, context)
        result = folded(returned, spec, context, folds) if folds is not None and not context.cancelled else None
        result = result or write_result(returned, spec, context.state)
    except FedloomError as error:
        trace = error.__traceback__
        deeper = trace is not None and not str(error).count(str(spec))
        text = user_traceback(error) if deeper else str(error)
        print(text, file=sys.stderr, flush=True)
        return failed | {"code": "bad_result", "text": tail_text(text)}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # the process is to end; in a thread it was the function itself that raised it
        text = user_traceback(error)
        print(text, file=sys.stderr, flush=True)
        return failed | {"code": "exception", "text": tail_text(text)}
    return result.to_map(spec, time.monotonic() - started)


def folded(returned: object, spec: TaskSpec, context: TaskContext, folds: WorkerFolds) -> TaskResult | None:
    """Add what a function returned to the worker's partial; None where it has to go by itself.

    Raises:
        FedloomError: it is no result, or does not fit the model.
    """
    key = (spec.task, spec.attempt)
    plainly = plain_result(returned, spec)
    encoded = encode_result(returned, spec) if plainly is None else None
    wrote_state = save_state(context.state, spec)  # first: what is in a partial does not come out of it again
    try:
        if plainly is not None and folds.add_tensors(spec.fold, key, plainly[0], spec.site, plainly[1]):
            return TaskResult(0, "", plainly[1], None, "", wrote_state, folded=True)
        encoded = encoded or encode_result(returned, spec)
    except MixedError:
        return None  # the plan is not here
    try:
        folds.add(spec.fold, key, encoded, spec.site, encoded.meta)
    except MixedError:
        return None  # good by itself: which of a round's results does not go with the others depends on who came first
    except (FoldError, LayoutError, PayloadError) as error:
        raise FoldError(f"the result of {spec} cannot be folded: {error}") from None
    return TaskResult(0, "", encoded.meta, None, "", wrote_state, folded=True)


def _called(function: TaskFunction, spec: TaskSpec, context: TaskContext) -> Any:
    """What the function returns; the model that it got is nobody's any more then."""
    model = input_model(spec)
    began = spans.start()
    try:
        return call_function(function, model, context)
    finally:
        spans.end("train", began, site=spec.site, task=spec.task)
