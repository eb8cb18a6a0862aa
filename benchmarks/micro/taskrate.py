"""Small tasks a second through a broker's process and two links, over tcp and ipc; beside a bare ZeroMQ echo.

The executor's process answers each Assign at once, with 100 bytes a task; the job's process takes the results. Each
task crosses four hops (out and back), as each message of the echo does.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fedloom.broker.link import Link
from fedloom.serialization.codec import pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Assign,
    Claimed,
    ClaimJob,
    CloseRule,
    Done,
    DoneItem,
    Hello,
    OpenGather,
    PayloadId,
    PayloadRef,
    SubmitJob,
    TaskRef,
)

_CAPACITY = 200
_RESULT = bytes(100)
_LIMIT_S = 120.0


def measure(*, quick: bool = False) -> list[Any]:
    """Both transports; a window of 200 tasks, or messages, on their way."""
    from figures import Figure
    from micro.cluster import cluster
    from micro.hops import echo_chain, echo_rate

    tasks = 2000 if quick else 20_000
    out: list[Any] = []
    for transport in ("tcp", "ipc"):
        with tempfile.TemporaryDirectory(prefix="fb-") as name:
            folder = Path(name)
            with echo_chain(folder, transport) as dealer:
                echo = echo_rate(dealer, tasks, _CAPACITY)
            bind = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{folder}/broker"
            with cluster(controller=False, bind=bind, durability="process") as running:
                running.python(str(Path(__file__).resolve()), running.broker.endpoint, str(tasks))
                running.sites = tasks
                running.wait()
                rate = _gather(running.broker.endpoint, tasks)
        out.append(Figure(f"small tasks through broker and links, {transport}", rate, "tasks/s", "bare echo", echo))
    return out


def _hello(role: Any, node: str, **fields: Any) -> Hello:
    return Hello(node=node, role=role, boot=secrets.token_hex(8), **fields)


def _gather(endpoint: str, tasks: int) -> float:
    """Tasks a second from the gather's opening to its last result, as the job's process sees it."""
    client, controller = (Link(endpoint, _hello(role, f"{role}/bench")) for role in ("client", "controller"))
    client.start()
    controller.start()
    digest = digest_buffers([b"archive"])
    archive = PayloadRef(PayloadId(f"b3-{digest}"), 7, digest, "blob")
    client.put(archive, [b"archive"])
    answer, _ = client.request(SubmitJob(client.next_ref(), secrets.token_hex(8), "bench", archive))
    assert isinstance(answer, Answer)
    claimed, _ = controller.request(ClaimJob(controller.next_ref()))
    assert isinstance(claimed, Claimed)
    got, all_here = [0], threading.Event()

    def on_message(message: Any, tail: Any) -> None:
        if isinstance(message, Done):
            got[0] += len(message.items)
            if got[0] >= tasks:
                all_here.set()

    node = f"job/{claimed.job}/{claimed.claim}"
    job = Link(endpoint, _hello("job", node, job=claimed.job, claim=claimed.claim), on_message=on_message)
    job.start()
    try:
        rule = CloseRule(min_clients=tasks)
        opening = OpenGather(job.next_ref(), claimed.job, claimed.claim, 0, 0, "train", rule)
        sites = pack({"sites": [f"site-{number}" for number in range(tasks)]})
        start = time.perf_counter()
        job.request(opening, sites)
        if not all_here.wait(_LIMIT_S):
            raise RuntimeError(f"{got[0]} of {tasks} results within {_LIMIT_S:g} s")
        return tasks / (time.perf_counter() - start)
    finally:
        for link in (job, controller, client):
            link.close()


def _executor() -> None:
    """The process that answers: ``taskrate.py ENDPOINT TASKS``."""
    endpoint, tasks = sys.argv[1], int(sys.argv[2])

    def on_message(message: Any, tail: Any) -> None:
        if isinstance(message, Assign):
            link.send(Accept(tuple(TaskRef(item.task, item.attempt) for item in message.items)))
            items = tuple(DoneItem(i.task, i.attempt, i.site, inline_bytes=len(_RESULT)) for i in message.items)
            link.send(Done(message.job, message.gather, items), _RESULT * len(items))

    sites = [f"site-{number}" for number in range(tasks)]
    link = Link(endpoint, _hello("executor", "pool/bench", capacity=_CAPACITY), sites=sites, on_message=on_message)
    link.start()
    threading.Event().wait()


if __name__ == "__main__":
    _executor()
