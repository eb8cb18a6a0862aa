"""Which GPUs this machine has, and what their memory holds: asked of the kernel and of nvidia-smi, never of CUDA.

A CUDA call would give this process a context of its own, and break every fork behind it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..serialization.errors import JobError
from .gpus import Groups

__all__ = ["ENV_GPUS", "GpuMemory", "check_present", "gpu_memory"]

#: How many GPUs there are, where that cannot or should not be looked up: a number, or "any" for whatever is asked for.
ENV_GPUS = "FEDLOOM_GPUS"
ANY = "any"

#: nvidia-smi wakes GPUs that sleep, which takes seconds each.
_SMI_S = 30.0
_NUMBERED = re.compile(r"nvidia\d+")
#: Drivers whose GPUs are not listed as NVIDIA's own are: AMD's, WSL's, Jetson's.
_OTHERS = ("/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvmap")


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory in bytes: all of it, and what is taken now, whoever took it."""

    total: int
    used: int


def check_present(groups: Groups) -> None:
    """See whether this machine has these GPUs, as far as that can be told.

    Names (``GPU-...``, ``MIG-...``) need nvidia-smi, and are taken as they are without it.

    Raises:
        JobError: it has none at all, or one that is asked for is not there.
    """
    if not groups:
        return
    wanted = list(dict.fromkeys(gpu for group in groups for gpu in group))
    told = os.environ.get(ENV_GPUS, "").strip()
    if told == ANY:
        return
    if told and not told.isdecimal():
        raise JobError(f"{ENV_GPUS}={told!r}; how many GPUs this machine has belongs there, or {ANY!r}")
    count = int(told) if told else _count()
    if count is None:
        return
    if not count:
        looked = f"{ENV_GPUS}=0 says so" if told else "/dev, /proc/driver/nvidia and nvidia-smi show none"
        raise JobError(
            f"GPU {wanted[0]!r} was asked for, and no GPU was found on this machine: {looked}. Leave the GPUs out to"
            f" run on the CPU; where there are some that are not found so, or to try the placement alone, set"
            f" {ENV_GPUS} to their number, or to {ANY!r}"
        )
    for gpu in wanted:
        if gpu.isdecimal() and int(gpu) >= count:
            there = f"GPU 0 to {count - 1}" if count > 1 else "GPU 0 alone"
            raise JobError(f"there is no GPU {gpu!r} on this machine: it has {there}")
    names = [gpu for gpu in wanted if not gpu.isdecimal()]
    if names and not told and (known := _names()):
        for name in names:  # CUDA takes a name's beginning too, where it is only one GPU's
            if not any(one.startswith(name) for one in known):
                raise JobError(f"there is no GPU {name!r} on this machine: it has {', '.join(known)}")


@functools.cache
def _count() -> int | None:
    """How many GPUs CUDA would number here; None: another driver's, which are not listed alike."""
    try:
        # in a container the devices that it was given
        devices = [name for name in os.listdir("/dev") if _NUMBERED.fullmatch(name)]  # noqa: PTH208
        if devices:
            return len(devices)
        listed = Path("/proc/driver/nvidia/gpus")
        if listed.is_dir() and (found := len(list(listed.iterdir()))):
            return found
    except OSError:
        pass
    if found := sum(name.startswith("GPU-") for name in _names()):
        return found
    return None if any(Path(path).exists() for path in _OTHERS) else 0


@functools.cache
def _names() -> tuple[str, ...]:
    """The names of the GPUs and their MIG parts; () where nvidia-smi is not there, or does not answer."""
    return tuple(re.findall(r"UUID: ((?:GPU|MIG)-[^\s)]+)\)", _smi("-L")))


def gpu_memory() -> dict[str, GpuMemory]:
    """The memory of each GPU, under its number and under its name; {} where nvidia-smi does not say."""
    found: dict[str, GpuMemory] = {}
    for line in _smi("--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[2].isdecimal() and fields[3].isdecimal():
            memory = GpuMemory(int(fields[2]) << 20, int(fields[3]) << 20)
            found[fields[0]] = found[fields[1]] = memory
    return found


def _smi(*args: str) -> str:
    path = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib:/usr/bin:/usr/local/bin")
    if path is None:
        return ""
    command: Sequence[str] = [path, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
