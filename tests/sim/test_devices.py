"""Which GPUs a machine has: what is refused, and what is taken as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedloom.serialization.errors import JobError
from fedloom.sim import devices
from fedloom.sim.devices import GpuMemory, check_present, gpu_memory
from fedloom.sim.gpus import parse_gpus

SMI = """#!/bin/sh
if [ "$1" = -L ]; then
  echo "GPU 0: NVIDIA H100 (UUID: GPU-aaaa-1111)"
  echo "  MIG 1g.10gb     Device  0: (UUID: MIG-bbbb-2222)"
  echo "GPU 1: NVIDIA H100 (UUID: GPU-cccc-3333)"
else
  echo "0, GPU-aaaa-1111, 81559, 1024"
  echo "1, GPU-cccc-3333, 81559, [N/A]"
fi
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FEDLOOM_GPUS", raising=False)
    for looked_up in (devices._count, devices._names):
        looked_up.cache_clear()
    yield
    for looked_up in (devices._count, devices._names):
        looked_up.cache_clear()


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nvidia-smi, and nothing else, tells of two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tool


@pytest.mark.parametrize(("count", "asked"), [("2", "0,1"), ("4", "[0,1],[2,3]"), ("any", "7"), ("1", "GPU-17")])
def test_what_is_there_or_said_to_be(monkeypatch: pytest.MonkeyPatch, count: str, asked: str) -> None:
    monkeypatch.setenv("FEDLOOM_GPUS", count)
    check_present(parse_gpus(asked))


@pytest.mark.parametrize(
    ("count", "asked", "seen"),
    [
        ("2", "0,2", "there is no GPU '2' on this machine: it has GPU 0 to 1"),
        ("1", "[0,1]", "there is no GPU '1' on this machine: it has GPU 0 alone"),
        ("0", "0", "no GPU was found on this machine: FEDLOOM_GPUS=0 says so"),
        ("two", "0", "FEDLOOM_GPUS='two'; how many GPUs"),
    ],
)
def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch, count: str, asked: str, seen: str) -> None:
    monkeypatch.setenv("FEDLOOM_GPUS", count)
    with pytest.raises(JobError, match=seen):
        check_present(parse_gpus(asked))
    check_present(())


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has GPUs of its own")
def test_gpus_are_looked_up_by_number_and_by_name(smi: Path) -> None:
    check_present(parse_gpus("0,1,GPU-aaaa,MIG-bbbb-2222"))
    with pytest.raises(JobError, match="no GPU '2' on this machine: it has GPU 0 to 1"):
        check_present(parse_gpus("2"))
    with pytest.raises(JobError, match=r"no GPU 'GPU-dddd' .* it has GPU-aaaa-1111, MIG-bbbb-2222, GPU-cccc-3333"):
        check_present(parse_gpus("GPU-dddd"))


def test_a_gpus_memory_under_its_number_and_its_name(smi: Path) -> None:
    memory = GpuMemory(81559 << 20, 1024 << 20)
    assert gpu_memory() == {"0": memory, "GPU-aaaa-1111": memory}  # what is not known of the other is left out
    smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert gpu_memory() == {}
