"""The matrix's short form: a few faults of the kinds that touch the most, over real processes and sockets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from siblings import load

rows = load(__file__, "rows")
matrix = load(__file__, "matrix")
run = load(__file__, "run")

pytestmark = pytest.mark.process


LONG = ("everything at once", "a bit flipped in 1% of the chunks")


@pytest.mark.parametrize("name", ["connections cut", *(pytest.param(name, marks=pytest.mark.proof) for name in LONG)])
def test_faults_that_hit_lose_nothing(children: Any, workspace: Path, name: str) -> None:
    ports = run.two_ports(random.Random(name))
    row = matrix.Run(rows.ROWS[name], children, workspace, ports, seed=5)
    try:
        outcome = row.run(faults=2, rounds=5)
    finally:
        row.close()
    figures = outcome.figures()
    assert not figures["wrong"], figures
    assert figures["hit"] >= 2 and figures["lost"] == figures["twice"] == 0 and figures["equal"]
    assert figures["acknowledged"] == figures["folded"] > 0
    assert len((workspace / "faults.jsonl").read_text().splitlines()) >= 1


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


@pytest.mark.proof
def test_nothing_grows_and_nothing_is_left_over(children: Any, workspace: Path) -> None:
    out = load(__file__, "soak").soak(children, workspace, 60.0, seed=3)
    assert not out.wrong, out
    assert out.jobs >= 4 and sum(out.faults.values()) >= 5
    assert max(out.growth.values()) < 8, out
