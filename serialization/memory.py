"""Giving memory back: what Python and the C library keep for later use, which with many processes is nobody's use."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

#: Of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 16 * 1024 * 1024


def keep_freed_memory() -> None:
    """Have malloc keep up to 16 MiB of freed memory in each of its arenas, for a process through which chunks pass.

    By itself it gives freed chunks back to the kernel, and the next ones lie in new pages, which was a fifth of the
    data process's time. It should `give_back` them where it has nothing to do. With glibc; elsewhere nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back(*, cuda: bool = False) -> None:
    """Collect garbage and return free memory to the system; with ``cuda``, torch's free GPU memory as well.

    The C library's part is there with glibc alone. torch is not imported for it.
    """
    gc.collect()
    trim = _trimmer()
    if trim is not None:
        trim()
    torch: Any = sys.modules.get("torch") if cuda else None
    if torch is not None and torch.cuda.is_initialized():  # else there is nothing, and asking would make a context
        torch.cuda.empty_cache()


@functools.cache
def _trimmer() -> Callable[[], bool] | None:
    """glibc's ``malloc_trim(0)``; True where it gave something back."""
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda: bool(function(0))
