"""One training step, and what it took since this process was born: a script of its own, and part of `client_step`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from digitsnet import network
from workload import note


def step() -> None:
    """Forward, backward, optimizer: then note the age of the process and its private bytes."""
    torch.set_num_threads(1)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(32, 64)).square().mean().backward()
    optimizer.step()
    note("step", ready_s=age_s(), private=private())


def age_s() -> float:
    """Seconds since this process was forked; the kernel's clock ticks are 10 ms."""
    born = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / 100
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born


def private() -> int:
    """Bytes that are there for this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    step()
