"""Bare transports, in processes of their own: what any system on top of them is bound by.

``python hops.py echo ENDPOINT`` answers what a DEALER receives; ``route FRONT BACK`` forwards between two ROUTERs in a
Python poll loop; ``pull PORT BYTES`` and ``receive PORT BYTES`` swallow a stream of ZeroMQ and of plain TCP.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import zmq

_BATCH = 256
_LIMIT_MS = 60_000


def main() -> None:
    what, *rest = sys.argv[1:]
    {"echo": _echo, "route": _route, "pull": _pull, "receive": _receive}[what](*rest)


def _echo(endpoint: str) -> None:
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(endpoint)
    dealer.send(b"here")
    while True:
        dealer.send_multipart(dealer.recv_multipart())


def _route(front_at: str, back_at: str) -> None:
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    for router, endpoint in ((front, front_at), (back, back_at)):
        router.sndhwm = router.rcvhwm = 100_000
        router.bind(endpoint)
    worker = back.recv_multipart()[0]
    client = b""
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    poller.register(back, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if front in ready:
            for frames in _drain(front):
                client = frames[0]
                back.send_multipart([worker, *frames[1:]])
        if back in ready:
            for frames in _drain(back):
                front.send_multipart([client, *frames[1:]])


def _drain(router: zmq.Socket[bytes]) -> Generator[list[bytes]]:
    with contextlib.suppress(zmq.Again):
        for _ in range(_BATCH):
            yield router.recv_multipart(zmq.DONTWAIT)


def _pull(endpoint: str, size: str) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.rcvhwm = 8
    router.bind(endpoint)
    left = int(size)
    while left > 0:
        frames = router.recv_multipart(copy=False)
        left -= len(frames[-1].buffer)
    router.send_multipart([frames[0].bytes, b"done"])
    time.sleep(1)


def _receive(endpoint: str, size: str) -> None:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.create_server((host, int(port))) as server:
        peer, _ = server.accept()
        buffer, left = memoryview(bytearray(2**20)), int(size)
        while left > 0:
            left -= peer.recv_into(buffer)
        peer.sendall(b"done")


@contextlib.contextmanager
def helper(*argv: str) -> Generator[None]:
    """One of the above as a child."""
    child = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *argv], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def free_endpoint() -> str:
    """A TCP endpoint on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def echo_chain(folder: Path, transport: str) -> Generator[zmq.Socket[bytes]]:
    """A DEALER whose messages come back through a ROUTER from another DEALER: four hops, three processes."""
    ends = [f"ipc://{folder}/{name}" for name in ("front", "back")]
    if transport == "tcp":
        ends = [free_endpoint(), free_endpoint()]
    with helper("route", *ends), helper("echo", ends[1]):
        context: zmq.Context[Any] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.sndhwm = dealer.rcvhwm = 100_000
        dealer.rcvtimeo = dealer.sndtimeo = _LIMIT_MS
        dealer.connect(ends[0])
        dealer.send(b"first")
        dealer.recv()
        try:
            yield dealer
        finally:
            context.destroy(linger=0)


def round_trip_s(dealer: zmq.Socket[bytes], times: int = 500, size: int = 100) -> float:
    """Seconds of a message there and back, the median."""
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        dealer.send(bytes(size))
        dealer.recv()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def echo_rate(dealer: zmq.Socket[bytes], count: int, window: int, size: int = 100) -> float:
    """Messages a second that come back, with so many on their way."""
    message = bytes(size)
    start = time.perf_counter()
    for _ in range(min(window, count)):
        dealer.send(message)
    for number in range(count):
        dealer.recv()
        if number + window < count:
            dealer.send(message)
    return count / (time.perf_counter() - start)


def zmq_rate(total: int, chunk: int) -> float:
    """GB/s of one plain ZeroMQ hop between two processes over TCP, in chunks of this size, zero-copy at both ends."""
    endpoint = free_endpoint()
    data = memoryview(bytearray(total))
    with helper("pull", endpoint, str(total)):
        context: zmq.Context[Any] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.sndhwm = 8
        dealer.rcvtimeo = dealer.sndtimeo = _LIMIT_MS
        dealer.immediate = True
        dealer.connect(endpoint)
        dealer.poll(_LIMIT_MS, zmq.POLLOUT)  # connected
        start = time.perf_counter()
        for at in range(0, total, chunk):
            dealer.send(data[at : at + chunk], copy=False)
        dealer.recv()
        seconds = time.perf_counter() - start
        context.destroy(linger=0)
    return total / seconds / 1e9


def tcp_rate(total: int) -> float:
    """GB/s of a plain TCP connection between two processes."""
    endpoint = free_endpoint()
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    data = memoryview(bytearray(total))
    with helper("receive", endpoint, str(total)):
        deadline = time.monotonic() + 30
        while True:
            try:
                sender = socket.create_connection((host, int(port)))
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        with sender:
            start = time.perf_counter()
            sender.sendall(data)
            sender.recv(4)
            seconds = time.perf_counter() - start
    return total / seconds / 1e9


if __name__ == "__main__":
    main()
