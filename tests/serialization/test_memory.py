from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
from fedloom.serialization import memory


class Node:
    """Holds itself, so that only the collector can end it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_goes() -> None:
    gc.disable()
    try:
        seen = weakref.ref(Node())
        assert seen() is not None
        memory.give_back()
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of others has no malloc_trim")
def test_free_pages_go_back_to_the_system() -> None:
    trim = memory._trimmer()
    if trim is None:
        pytest.skip("a C library without malloc_trim")
    blocks = [bytes(32 * 1024) for _ in range(512)]  # under glibc's threshold for mappings of their own
    keep = blocks[-1]
    del blocks
    assert trim() in (True, False)
    assert len(keep) == 32 * 1024


def test_gpu_memory_only_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for initialized in (False, True):
        cuda = SimpleNamespace(
            is_initialized=lambda initialized=initialized: initialized, empty_cache=lambda: calls.append("emptied")
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        memory.give_back()
        assert calls == []
        memory.give_back(cuda=True)
    assert calls == ["emptied"]
