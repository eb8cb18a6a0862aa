"""Generators set before each task, so that a task's draws depend on nothing but which task it is."""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np


def task_seed(seed: int, round: int, step: int, site: str) -> int:
    """A 63-bit seed of (job seed, round, step, site): stable over processes, machines and Python versions."""
    text = f"{seed}|{round}|{step}|{site}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"fedloom-seed").digest(), "big") >> 1


def start_seed(seed: int, site: str) -> int:
    """The seed under which a site's script starts, before its first task: the same at whichever round it starts."""
    return task_seed(seed, -1, 0, site)


def seed_all(value: int, threads: int = 0) -> None:
    """Set `random`, numpy and, where it is imported, torch (CUDA with it); with ``threads``, torch's intra-op threads.

    The number of threads is set here because it changes the bits of a sum as a seed does.
    """
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(value)
        if threads > 0 and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
