"""The forked process's side: from the fork to the function or command it is to run, and its end.

Nothing here runs in the warm process itself but `check`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...serialization import faultpoints, spans
from ...serialization.processes import die_with_parent
from .wire import Fork

__all__ = ["become", "check"]


def check(request: Fork) -> None:
    """Refuse before the fork what would fail behind it.

    Raises:
        ValueError: neither a target nor a command, or both.
        NotADirectoryError: the working folder is not there.
    """
    module, _, name = request.target.partition(":")
    if bool(request.argv) == bool(request.target) or (request.target and not (module and name)):
        raise ValueError("a target 'module:function' or a command belongs in the request, one of the two")
    if request.cwd and not Path(request.cwd).is_dir():
        raise NotADirectoryError(f"its working folder {request.cwd!r} does not exist")


def become(request: Fork, log_fd: int, parent: int, close_server: Callable[[], None]) -> NoReturn:
    """Turn the process that has just been forked into the requested one; never returns."""
    status = 1
    try:
        _settle_in(request, log_fd, parent, close_server)
        if request.argv:
            _execute(request.argv)
        status = _call(request.target, request.args)
    except BaseException:  # noqa: BLE001 - the outermost frame of a process: what it ends with is its status
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _settle_in(request: Fork, log_fd: int, parent: int, close_server: Callable[[], None]) -> None:
    os.setpgid(0, 0)
    die_with_parent(parent)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    close_server()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    if log_fd >= 0:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
    os.close(null)
    for name in request.unset:
        os.environ.pop(name, None)
    os.environ.update(request.env)
    faultpoints.arm(os.environ.get("FEDLOOM_FAULT", ""))  # read at import, which was in the warm process
    spans.arm(os.environ.get(spans.ENV_SPANS, ""), request.name)
    tempfile.tempdir = None  # TMPDIR may be another one now
    if request.cwd:
        os.chdir(request.cwd)
    if request.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, commands expect it
        return
    for stream in (sys.stdout, sys.stderr):
        # a log that is read while the process runs, and whose last line is there after a kill
        stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    faulthandler.enable()
    gc.enable()


def _execute(argv: Sequence[str]) -> NoReturn:
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 - the command is the job's own
    except OSError as error:
        print(f"cannot run {argv[0]!r}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(127)


def _call(target: str, args: dict[str, Any]) -> int:
    """Call the function and end as an interpreter would: threads joined, exit handlers run."""
    status = 0
    try:
        module, _, name = target.partition(":")
        result = getattr(importlib.import_module(module), name)(**args)
        status = result if isinstance(result, int) else 0
    except SystemExit as end:
        status = _status_of(end)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:  # noqa: BLE001 - reported as an interpreter would
        traceback.print_exc()
        status = 1
    # what Py_Finalize does, less tearing down the modules, which would unshare every page of them
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    return status & 0xFF


def _status_of(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return 1
