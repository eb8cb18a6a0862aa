"""The child process in which a job's code runs: one script of one site, functions of any site, or a command's keeper.

It is told what to do by the first message on its channel, so that it may as well be forked as started. It dies with its
executor: the kernel signals it, and it watches its channel.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ..serialization.errors import FedloomError, LinkError
from ..serialization.processes import die_with_parent
from .channel import ENV_HOST, Channel, Map
from .client_api import install
from .client_context import ClientContext
from .context import user_traceback
from .functions import run_functions
from .gpushare import limit_gpu_memory
from .hostio import end_group, enter, flush_output
from .lifeline import ENV_LIFELINE, tie_group
from .seeding import seed_all

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


# ---------------------------------------------------------------- a script, in this process


def run_script(channel: Channel, start: Map) -> int:
    """Run a training script as ``__main__`` until it ends."""
    context = ClientContext(channel, start, on_lost=end_group)
    install(context)
    script = str(start["script"])
    enter(start, Path(script).parent)
    sys.argv = [script, *start.get("argv", [])]
    seed_all(int(start.get("seed", 0)), int(start.get("threads", 0)))
    try:
        limit_gpu_memory()
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            context.fail(f"{Path(script).name} called sys.exit({leaving.code!r})", "exit")
            flush_output()
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
    flush_output()
    context.end()
    with contextlib.suppress(LinkError):
        channel.send({"op": "exited", "code": 0})
    return 0


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
