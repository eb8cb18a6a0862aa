from __future__ import annotations

import threading
import time

import pytest
from fedloom.executor.cache import PayloadCache
from fedloom.serialization.errors import LinkError, PayloadError
from fedloom.serialization.messages import PayloadRef


def ref(name: str, size: int) -> PayloadRef:
    return PayloadRef(f"b3-{name}", size)  # type: ignore[arg-type]


class Source:
    def __init__(self):
        self.asked = []

    def __call__(self, ref, dest):
        self.asked.append(ref.id)
        dest.write_bytes(b"x" * ref.size)
        return dest


def test_each_payload_is_fetched_once_and_found_again_after_a_restart(tmp_path):
    source = Source()
    cache = PayloadCache(tmp_path, 1000)
    for _ in range(3):
        assert cache.fetch(ref("a", 10), source).read_bytes() == b"x" * 10
    assert source.asked == ["b3-a"]
    (tmp_path / "b3-half.part").write_bytes(b"x")
    again = PayloadCache(tmp_path, 1000)
    again.fetch(ref("a", 10), source)
    assert source.asked == ["b3-a"] and [p.name for p in tmp_path.iterdir()] == ["b3-a"]
    again.fetch(ref("a", 11), source)  # what lies there is not what is meant
    assert source.asked == ["b3-a", "b3-a"] and again.bytes == 11


def test_the_bound_evicts_the_least_recently_used_that_nobody_uses(tmp_path):
    source = Source()
    cache = PayloadCache(tmp_path, 100)
    for name in "abc":
        cache.fetch(ref(name, 30), source)
        if name != "b":
            cache.unpin(f"b3-{name}")
    cache.fetch(ref("a", 30), source)
    cache.unpin("b3-a")
    cache.fetch(ref("d", 40), source)  # b is in use, c was used longest ago
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b3-a", "b3-b", "b3-d"] and cache.bytes == 100
    cache.fetch(ref("huge", 5000), source)  # what is needed is had, whatever the bound
    assert "b3-huge" in {p.name for p in tmp_path.iterdir()}


def test_a_payload_of_the_brokers_own_is_not_kept(tmp_path):
    other = tmp_path / "spool-file"
    other.write_bytes(b"m")
    cache = PayloadCache(tmp_path / "cache", 100)
    assert cache.fetch(ref("a", 1), lambda ref, dest: other) == other
    assert cache.fetch(ref("b", 1), lambda ref, dest: b"z") == b"z"
    assert cache.bytes == 0 and not list((tmp_path / "cache").iterdir())


def test_who_asks_meanwhile_waits_and_a_failure_is_not_kept(tmp_path):
    cache = PayloadCache(tmp_path, 1000)
    begun, go = threading.Event(), threading.Event()
    calls = []

    def slow(ref, dest):
        calls.append(ref.id)
        begun.set()
        assert go.wait(10)
        dest.write_bytes(b"x" * ref.size)
        return dest

    got = []
    threads = [threading.Thread(target=lambda: got.append(cache.fetch(ref("a", 5), slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(got) == 4 and calls == ["b3-a"]

    def broken(ref, dest):
        raise LinkError("gone")

    with pytest.raises(LinkError):
        cache.fetch(ref("b", 5), broken)
    assert cache.fetch(ref("b", 5), Source()).exists()
    for bad in ("", "../x", ".x", "a/b"):
        with pytest.raises(PayloadError):
            cache.fetch(PayloadRef(bad, 1), Source())  # type: ignore[arg-type]
