"""Giving memory back: what Python and the C library keep for later use, which with many processes is nobody's use."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any


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
