"""The child process in which a job's code runs: one script of one site, functions of any site, or a command's keeper.

It is told what to do by the first message on its channel, so that it may as well be forked as started. It dies with its
executor: the kernel signals it, and it watches its channel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from ..serialization.errors import FedloomError, LinkError, TaskError
from ..serialization.jobmessages import POINTS_KIND
from ..serialization.processes import die_with_parent
from .channel import ENV_HOST, Channel, Map
from .client_api import install
from .client_context import ClientContext, tail_text
from .context import Report, TaskContext, TaskFunction, call_function, user_traceback
from .lifeline import ENV_LIFELINE, tie_group
from .points import PointSender
from .seeding import seed_all
from .taskio import TaskSpec, input_model, write_result

#: The process that must stay alive, where it is this one's parent (a forked host's parent sees to it itself).
ENV_PARENT = "FEDLOOM_PARENT"
_START_S = 60.0


def main() -> int:
    """Run as `fedloom.executor.host:main` with the channel's variables in the environment. Returns the exit code."""
    lifeline = os.environ.pop(ENV_LIFELINE, "")
    if not (lifeline.isdigit() and tie_group(int(lifeline))):
        die_with_parent(_parent())
    try:
        channel = Channel.connect(os.environ, "host")
        start = channel.receive(_START_S)
    except LinkError as error:
        print(f"fedloom host: {error}", file=sys.stderr)
        return 3
    match start.get("kind"):
        case "script":
            return run_script(channel, start)
        case "function":
            return run_functions(channel, start)
        case "command":
            return run_command(channel, start)
        case kind:
            print(f"fedloom host: kind {kind!r} is unknown", file=sys.stderr)
            return 3


def _parent() -> int | None:
    parent = os.environ.get(ENV_PARENT, "")
    return int(parent) if parent.isdigit() else None


def end_group() -> NoReturn:
    """Kill this process and whatever it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(3)


# ---------------------------------------------------------------- a script, in this process


def run_script(channel: Channel, start: Map) -> int:
    """Run a training script as ``__main__`` until it ends."""
    context = ClientContext(channel, start, on_lost=end_group)
    install(context)
    script = str(start["script"])
    _enter(start, Path(script).parent)
    sys.argv = [script, *start.get("argv", [])]
    seed_all(int(start.get("seed", 0)), int(start.get("threads", 0)))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            context.fail(f"{Path(script).name} called sys.exit({leaving.code!r})", "exit")
            _flush()
            return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - user code's outermost guard: whatever it was, the user must see it
        text = user_traceback(error)
        print(text, file=sys.stderr, flush=True)
        context.fail(text)
        return 1
    if (task := context.open_task) is not None:
        context.fail(
            f"{Path(script).name} ended without sending a result for {task}: call flare.send() once for each receive()",
            "no_result",
        )
    _flush()
    context.end()
    with contextlib.suppress(LinkError):
        channel.send({"op": "exited", "code": 0})
    return 0


def _enter(start: Map, script_folder: Path | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what was printed is in the log, however the process ends
    cwd, custom = start.get("cwd"), start.get("custom")
    if cwd:
        os.chdir(cwd)
    wanted = [str(path) for path in (custom, script_folder) if path]
    sys.path[:0] = [path for path in dict.fromkeys(wanted) if path not in sys.path]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# ---------------------------------------------------------------- functions


class _Functions:
    """Takes tasks off the channel one by one; a thread of its own reads, so that a cancel reaches a running task."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.inbox: queue.Queue[Map] = queue.Queue()
        self.running: TaskContext | None = None
        self.key = ("", 0)
        self.points = PointSender(
            lambda points: self._report("event", {"kind": POINTS_KIND, "data": {"points": points}})
        )
        threading.Thread(target=self._read, name="fedloom-host", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message = self.channel.receive()
                if message["op"] == "cancel":
                    running = self.running
                    if running is not None and self.key == (message.get("task"), message.get("attempt")):
                        running.cancel()
                else:
                    self.inbox.put(message)
        except FedloomError:
            end_group()

    def work(self, function: TaskFunction) -> None:
        """Work until told to stop."""
        while True:
            self.channel.send({"op": "waiting"})
            message = self.inbox.get()
            if message["op"] == "stop":
                return
            if message["op"] == "task":
                self._one(function, TaskSpec.from_map(message["task"]))

    def _one(self, function: TaskFunction, spec: TaskSpec) -> None:
        if spec.cwd:
            os.chdir(spec.cwd)
        if spec.log_path:
            write_to(spec.log_path)
        self.key = (spec.task, spec.attempt)
        seed_all(spec.seed, spec.threads)
        answer = run_task(function, spec, self._say, self._running)
        self.points.flush()  # what was logged for a result is there before it
        self.channel.send(answer)
        self.running = None

    def _running(self, context: TaskContext) -> None:
        self.running = context

    def _say(self, op: str, data: dict[str, Any]) -> None:
        points = data.get("data", {}).get("points") if data.get("kind") == POINTS_KIND else None
        if points is None:
            self._report(op, data)
        for point in points or ():
            self.points.add(point)

    def _send_points(self, points: list[Map]) -> None:
        self._report("event", {"kind": POINTS_KIND, "data": {"points": points}})

    def _report(self, op: str, data: dict[str, Any]) -> None:
        self.channel.send({"op": op, "task": self.key[0], "attempt": self.key[1], **data})


def _nobody(context: TaskContext) -> None:
    del context


def run_task(
    function: TaskFunction, spec: TaskSpec, report: Report, running: Callable[[TaskContext], None] = _nobody
) -> Map:
    """Call a function for a task; the channel message that tells how it went."""
    started = time.monotonic()
    context = TaskContext(
        spec.site, spec.job, spec.name, spec.round, spec.total_rounds, spec.seed, spec.full_config, spec.state(), report
    )
    running(context)
    failed: Map = {"op": "failed", "task": spec.task, "attempt": spec.attempt}
    try:
        result = write_result(call_function(function, input_model(spec), context), spec, context.state)
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


def run_functions(channel: Channel, start: Map) -> int:
    """Serve a job's task function for any site, until told to stop."""
    functions = _Functions(channel)
    _enter(start, Path(str(start["script"])).parent)
    seed_all(int(start.get("seed", 0)), int(start.get("threads", 0)))
    try:
        function = load_function(Path(str(start["script"])), str(start["function"]))
    except BaseException as error:  # noqa: BLE001 - importing is user code: whatever it raises, the user must see it
        text = str(error) if isinstance(error, TaskError) else user_traceback(error)
        print(text, file=sys.stderr, flush=True)
        channel.send({"op": "failed", "task": "", "attempt": 0, "code": "import", "text": tail_text(text)})
        return 1
    try:
        functions.work(function)
    except LinkError:
        end_group()
    _flush()
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


def write_to(log_path: str) -> None:
    """Let this process's output go to that file."""
    _flush()
    handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- a command of its own


def run_command(channel: Channel, start: Map) -> int:
    """Start an external command, and see to it that all of its processes end with the executor."""

    def terminate(signum: int, frame: object) -> None:
        del signum, frame
        end_group()

    signal.signal(signal.SIGTERM, terminate)
    # not SIGKILL: this process has a group to take along, and only ever waits, so its handler runs at once
    die_with_parent(_parent(), signal.SIGTERM)
    environ = {**os.environ, **{str(k): str(v) for k, v in start.get("environ", {}).items()}}
    environ.pop(ENV_PARENT, None)
    environ[ENV_HOST] = os.environ.get(ENV_HOST, "")
    try:
        process = subprocess.Popen(
            list(start["argv"]),
            cwd=start.get("cwd") or None,
            env=environ,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        text = f"the command {' '.join(start['argv'])!r} cannot be started: {error}"
        print(text, file=sys.stderr, flush=True)
        channel.send({"op": "failed", "task": "", "attempt": 0, "code": "command", "text": text})
        return 1
    threading.Thread(target=_watch, args=(channel,), name="fedloom-host", daemon=True).start()
    code = process.wait()
    with contextlib.suppress(LinkError):
        channel.send({"op": "exited", "code": code})
    return 0


def _watch(channel: Channel) -> None:
    with contextlib.suppress(FedloomError):
        while True:
            channel.receive()
    end_group()


if __name__ == "__main__":
    sys.exit(main())
