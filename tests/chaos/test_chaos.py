"""The matrix's short form: one fault of each kind, over real processes and sockets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from siblings import load

run = load(__file__, "run")

pytestmark = pytest.mark.process


LONG = ("everything at once", "a bit flipped in 1% of the chunks")


def _nothing_is_lost(figures: dict[str, Any], least: int) -> None:
    assert not figures["wrong"], figures
    assert figures["hit"] >= least and figures["lost"] == figures["twice"] == 0 and figures["equal"], figures
    assert figures["folded"] == figures["tasks"] > 0


def test_one_fault_of_each_kind(children: Any, workspace: Path) -> None:
    """One fleet, a fault after the other; each is seen in a log, in the counts and in the rounds' records."""
    figures = run.run_short(children, 5, workspace).figures()
    _nothing_is_lost(figures, 13)
    assert 0 < figures["acknowledged"] <= figures["folded"]
    assert len((workspace / "faults.jsonl").read_text().splitlines()) >= 13


@pytest.mark.parametrize("name", ["worker", "warm process", *(pytest.param(n, marks=pytest.mark.proof) for n in LONG)])
def test_faults_that_hit_lose_nothing(children: Any, workspace: Path, name: str) -> None:
    _nothing_is_lost(run.run_with(children, name, 1, 5, workspace, rounds=4).figures(), 1)


def test_the_proxy_flips_what_it_counts() -> None:
    """Frames are found in whatever pieces they come: greeting, short, long and command frames."""
    proxy = load(__file__, "proxy")
    long = b"\x02" + (300).to_bytes(8, "big") + bytes(300)
    stream = bytes(64) + b"\x04\x05READY" + b"\x01\x03abc" + long + b"\x00\x00" + long
    for piece in (1, 7, len(stream)):
        weather, counts = proxy.Weather(flip=1.0, least=100), proxy.Counts()
        frames, out = proxy._Frames(), b""
        for at in range(0, len(stream), piece):
            data = bytearray(stream[at : at + piece])
            frames.flip(data, weather, random.Random(at), counts)
            out += data
        changed = [i for i, (a, b) in enumerate(zip(stream, out, strict=True)) if a != b]
        begins = len(stream) - 2 * len(long) - 2
        assert counts.frames == counts.flipped == len(changed) == 2
        assert begins + 9 <= changed[0] < begins + len(long) and len(stream) - 300 <= changed[1]
