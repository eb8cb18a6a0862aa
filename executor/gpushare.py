"""A process's share of its GPUs' memory, where several workers use the same GPU.

The slot's environment says it, as a part of 1; torch's allocator then refuses (`torch.cuda.OutOfMemoryError`) what
would go beyond it, so that one worker cannot take what the others need. The context that the driver keeps for each
process, a few hundred MiB, is not counted by torch and comes on top.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..serialization.errors import JobError

#: The part of each visible GPU's memory that this process may take: over 0, up to 1.
ENV_FRACTION = "FEDLOOM_GPU_MEMORY_FRACTION"

_applied_in = 0  # the process in which it was done: a fork has to do it for itself


def fraction() -> float:
    """What the environment says; 0 where it says nothing.

    Raises:
        JobError: it is no number over 0 and up to 1.
    """
    text = os.environ.get(ENV_FRACTION, "")
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise JobError(f"{ENV_FRACTION}={text!r}; a number over 0 and up to 1 belongs there")
    return value


def limit_gpu_memory() -> bool:
    """Bound this process's GPU memory, once, where a share is set and torch with CUDA is here; whether it did now.

    torch is not imported for it: a process whose code imports it later is bound when its next task begins.

    Raises:
        JobError: the environment's share cannot be read.
    """
    global _applied_in
    share = fraction()
    torch: Any = sys.modules.get("torch")
    if not share or _applied_in == os.getpid() or not hasattr(torch, "cuda") or not torch.cuda.is_available():
        return False
    for device in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(share, device)
    _applied_in = os.getpid()
    return True
