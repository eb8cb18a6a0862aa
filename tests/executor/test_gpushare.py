"""A worker's share of its GPUs' memory: only where one is set, and torch sees GPUs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from fedloom.executor import gpushare
from fedloom.executor.gpushare import ENV_FRACTION, limit_gpu_memory
from fedloom.serialization.errors import JobError


class Cuda:
    """torch.cuda as far as it is asked: two GPUs, or none."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.set: list[tuple[float, int]] = []

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        self.set.append((fraction, device))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpushare, "_applied_in", 0)
    monkeypatch.delenv(ENV_FRACTION, raising=False)


def test_every_visible_gpu_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(2)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert not limit_gpu_memory()  # nobody asked for it: no call that could make a context
    monkeypatch.setenv(ENV_FRACTION, "0.25")
    assert limit_gpu_memory()
    assert not limit_gpu_memory()
    assert cuda.set == [(0.25, 0), (0.25, 1)]


def test_without_torch_or_without_gpus_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FRACTION, "0.5")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert not limit_gpu_memory()
    assert "torch" not in sys.modules
    cpu = Cuda(0)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cpu))
    assert not limit_gpu_memory() and not cpu.set
    late = Cuda(1)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=late))
    assert limit_gpu_memory() and late.set == [(0.5, 0)]


@pytest.mark.parametrize("text", ["half", "0", "1.5", "nan", "-1"])
def test_a_share_that_cannot_be(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(ENV_FRACTION, text)
    with pytest.raises(JobError, match=f"{ENV_FRACTION}='{text}'; a number over 0 and up to 1"):
        limit_gpu_memory()
