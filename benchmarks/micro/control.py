"""How long the broker takes to answer on the control link, while the data link idles and while it is full."""

from __future__ import annotations

import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedloom.broker.link import Link
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import Ask, Hello, PayloadId, PayloadRef

_CHUNK = 2**20
_UPLOAD_MIB = 128


def measure(*, quick: bool = False) -> list[Any]:
    """Milliseconds of a small question, at the median and the 99th percentile."""
    from figures import Figure, Target
    from micro.cluster import cluster
    from micro.hops import echo_chain, round_trip_s

    with tempfile.TemporaryDirectory(prefix="fb-") as folder, echo_chain(Path(folder), "tcp") as dealer:
        trip = round_trip_s(dealer) * 1000
    asks = 300 if quick else 3000
    with cluster(controller=False, durability="process", trust_local=False, chunk_bytes=_CHUNK) as running:
        link = Link(running.broker.endpoint, _hello())
        link.start()
        try:
            _ask(link, 50)
            idle = _ask(link, asks)
            uploader = running.python(str(Path(__file__).resolve()), running.broker.endpoint, str(4 if quick else 16))
            _wait_for(running.folder / "00.log", "uploading")
            full = _ask(link, asks, while_=lambda: uploader.poll() is None)
        finally:
            link.close()
    against = "four ZeroMQ hops, tcp"
    idle_p50, idle_p99 = _percentiles(idle)
    full_p50, full_p99 = _percentiles(full)
    return [
        Figure("a question, idle data link, median", idle_p50, "ms", against, trip),
        Figure("a question, idle data link, 99th percentile", idle_p99, "ms", against, trip),
        Figure("a question, full data link, median", full_p50, "ms", "idle", idle_p50),
        Figure("a question, full data link, 99th percentile", full_p99, "ms", "idle", idle_p99, Target(5, of="extra")),
        Figure("questions asked while it was full", len(full), ""),
    ]


def _hello() -> Hello:
    return Hello(node=f"client/{secrets.token_hex(4)}", role="client", boot=secrets.token_hex(8))


def _ask(link: Link, times: int, while_: Any = lambda: True) -> list[float]:
    out: list[float] = []
    for _ in range(times):
        if not while_():
            break
        start = time.perf_counter()
        link.request(Ask(ref=link.next_ref(), what="jobs"))
        out.append(time.perf_counter() - start)
        time.sleep(0.0005)
    return out


def _percentiles(taken: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(taken, n=100)
    return cuts[49] * 1000, cuts[98] * 1000


def _wait_for(path: Path, words: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.is_file() and words in path.read_text(errors="replace")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} does not say {words!r}")
        time.sleep(0.005)


def _upload() -> None:
    """The process that fills the data link: ``control.py ENDPOINT UPLOADS``."""
    endpoint, uploads = sys.argv[1], int(sys.argv[2])
    link = Link(endpoint, _hello())
    link.start()
    data = bytearray(_UPLOAD_MIB * 2**20)
    for number in range(uploads):
        data[:8] = number.to_bytes(8, "little")
        digest = digest_buffers([data])
        print("uploading", flush=True)
        link.put(PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob"), [data])
    link.close()


if __name__ == "__main__":
    _upload()
