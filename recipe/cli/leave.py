"""The end of a command that has run a user's script, without what only takes time."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys
import threading
from typing import NoReturn

__all__ = ["leave"]

_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def leave(code: int) -> NoReturn:
    """End this process as the interpreter would, less taking the modules apart, which is most of a second with torch.

    Threads are joined, exit handlers run, and files that the script has left open are written out.
    """
    # the interpreter's own first two steps, for which there are no public names
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    # by its type, not by isinstance: that asks objects for their class, and some load something to answer
    files = [item for item in gc.get_objects() if issubclass(type(item), _FILES)]
    files.sort(key=lambda item: isinstance(item, io.BufferedIOBase))  # text first: it goes through a buffer
    for stream in (*files, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)
