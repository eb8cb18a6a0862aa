"""What is attacked, and who attacks: one broker for the whole folder, honest peers, and peers on bare sockets.

The broker (its two processes) runs once a session. Honest peers are the real ones: an embedded `Executor`, a job
process's `Link`. Strangers are in strangers.py.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq
from fedloom.broker.link import Link
from fedloom.broker.service import Broker, start_broker
from fedloom.executor import Executor
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.codec import pack, unpack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Claimed,
    ClaimJob,
    CloseRule,
    Commit,
    Done,
    Hello,
    JobId,
    Message,
    OpenGather,
    PayloadId,
    PayloadRef,
    Receipt,
    SubmitJob,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model
from siblings import load

M = TypeVar("M")

strangers_module = load(__file__, "strangers")

WAIT_S: float = strangers_module.WAIT_S
#: How much more memory than at the start the broker's processes may have, whatever was done to them.
GROWTH_BYTES = 96 * 1024 * 1024
ELEMENTS = 20_000


def rss(pid: int) -> int:
    """The bytes of memory a process has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Job:
    """An honest job process: gathers, results, commits."""

    def __init__(self, ground: Ground, claimed: Claimed) -> None:
        self.claimed = claimed
        self.round = 0
        self._steps = itertools.count()
        self._inbox: queue.SimpleQueue[tuple[Message, bytes]] = queue.SimpleQueue()
        hello = Hello(
            f"job/{claimed.job}/{claimed.claim}", "job", secrets.token_hex(8), job=claimed.job, claim=claimed.claim
        )
        self.link = Link(ground.endpoint, hello, on_message=lambda m, tail: self._inbox.put((m, bytes(tail))))
        self.link.start()

    def put(self, model: FLModel) -> PayloadRef:
        """A model, by its content."""
        encoded = encode_model(model)
        digest = encoded.digest()
        ref = PayloadRef(PayloadId(f"b3-{digest}"), encoded.size, digest)
        return self.link.put(ref, encoded.buffers, job=self.claimed.job, claim=self.claimed.claim)

    def opening(self, *sites: str, **fields: Any) -> tuple[OpenGather, bytes]:
        """An OpenGather for these sites and its tail."""
        values: dict[str, Any] = {"round": self.round, "step": next(self._steps), "name": "train", "rule": CloseRule()}
        message = OpenGather(
            ref=self.link.next_ref(), job=self.claimed.job, claim=self.claimed.claim, **values | fields
        )
        return message, pack({"sites": list(sites)})

    def gather(self, *sites: str, **fields: Any) -> Receipt:
        """Open a gather; its first Receipt."""
        message, tail = self.opening(*sites, **fields)
        self.link.send(message, tail)
        return self.take(Receipt, where=lambda m: m.ref == message.ref)

    def take(self, kind: type[M], where: Callable[[M], bool] = lambda m: True) -> M:
        """The next message of this kind; others are dropped."""
        deadline = time.monotonic() + WAIT_S
        passed: list[Message] = []
        while True:
            try:
                message, _ = self._inbox.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the honest job got no {kind.__name__}; it got {passed}") from None
            if isinstance(message, kind) and where(message):
                return message
            passed.append(message)

    def commit(self) -> None:
        """Make the round durable: all gathers of it go."""
        ref = self.link.next_ref()
        self.link.request(Commit(ref, self.claimed.job, self.claimed.claim, self.round))
        self.round += 1


class Ground:
    """The broker under attack, and the honest peers that go on working."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.broker: Broker = start_broker(folder / "store", durability="process", retry_s=0.05)
        self.endpoint = self.broker.endpoint
        self.store = folder / "store"
        host, _, port = self.endpoint.rpartition(":")
        self.data_endpoint = f"{host}:{int(port) + 1}"
        self.client = Link(self.endpoint, Hello(f"client/{secrets.token_hex(4)}", "client", secrets.token_hex(8)))
        self.client.start()
        self.archive = self._archive(folder / "job")
        self._claimers: list[Link] = []
        self._second: Claimed | None = None
        self.job = Job(self, self._claim(self.submit(self.archive)))
        self.executor = Executor(self.endpoint, site="honest", workspace=folder / "honest")
        self.executor.task("train")(
            lambda model: FLModel(params={"w": model.params["w"] + 1}, meta={"NUM_STEPS_CURRENT_ROUND": 1})
        )
        self.executor.start()
        self.pids = (self.broker.pid, self.broker.data_pid)
        self.honest_round()
        self.memory = [rss(pid) for pid in self.pids]

    def _archive(self, folder: Path) -> bytes:
        script = Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"})
        flow = Component("fedloom.controller.workflows.fedavg.FedAvg")
        spec = JobSpec("honest", (flow,), (ExecutorSpec(("*",), script),), num_rounds=3)
        spec.write(folder)
        (spec.custom_dir(folder) / "client.py").write_text("")
        return pack_folder(folder)

    def submit(self, archive: bytes, name: str = "honest", **meta: Any) -> str:
        """A job's archive becomes a job; its id."""
        ref = self.blob(archive)
        submit = SubmitJob(self.client.next_ref(), secrets.token_hex(8), name, ref, meta=meta)
        answer, _ = self.client.request(submit)
        assert isinstance(answer, Answer)
        return answer.data["job_id"]

    def blob(self, data: bytes) -> PayloadRef:
        """Bytes put by the client."""
        digest = digest_buffers([data])
        return self.client.put(PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob"), [data])

    def _claim(self, job: str) -> Claimed:
        claimer = Link(self.endpoint, Hello(f"controller/{secrets.token_hex(4)}", "controller", secrets.token_hex(8)))
        claimer.start()
        claimed, _ = claimer.request(ClaimJob(claimer.next_ref()))
        assert isinstance(claimed, Claimed) and claimed.job == job
        self._claimers.append(claimer)
        return claimed

    def second_job(self) -> Claimed:
        """Another job, whose process is whoever says that it is."""
        self._second = self._second or self._claim(self.submit(self.archive))
        return self._second

    # ------------------------------------------------------------ proofs

    def honest_round(self) -> None:
        """A whole round: model up and down in chunks, result up and down in chunks, all of it the right bytes."""
        model = FLModel(params={"w": np.full(ELEMENTS, self.job.round, np.float32)})
        gather = self.job.gather("honest", payload=self.job.put(model))
        done = self.job.take(Done, where=lambda m: m.gather == gather.gather)
        result = done.items[0].payload
        assert result is not None
        got = self.job.link.fetch(result)
        assert isinstance(got, bytes)
        params = decode_model(got).params
        assert params is not None and np.all(params["w"] == self.job.round + 1)
        closed = self.job.take(Receipt, where=lambda m: m.gather == gather.gather and m.state != "open")
        assert (closed.state, closed.results) == ("closed", 1)
        self.job.commit()

    def works(self) -> None:
        """Normal work goes on, in the same two processes, which have not grown."""
        self.honest_round()
        assert self.broker.alive and (self.broker.pid, self.broker.data_pid) == self.pids
        grown = [rss(pid) - before for pid, before in zip(self.pids, self.memory, strict=True)]
        assert max(grown) < GROWTH_BYTES, f"control and data process have grown by {grown} bytes"
        assert self.ask("broker")["counters"].get("fault.internal", 0) == 0

    def until(self, check: Callable[[], bool], what: str) -> None:
        """Wait for what the broker does in its own time."""
        deadline = time.monotonic() + WAIT_S
        while not check():
            assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
            threading.Event().wait(0.02)

    def ask(self, what: str, job: str = "") -> dict[str, Any]:
        """A question to the broker."""
        answer, _ = self.client.request(Ask(self.client.next_ref(), what, JobId(job)))
        assert isinstance(answer, Answer)
        return answer.data

    def events(self, job: str = "") -> list[dict[str, Any]]:
        """All events of a job, the honest one's where none is named."""
        out: list[dict[str, Any]] = []
        after = 0
        while True:
            ask = Ask(self.client.next_ref(), "events", JobId(job or self.job.claimed.job), after)
            answer, tail = self.client.request(ask)
            assert isinstance(answer, Answer)
            page = unpack(bytes(tail), max_bytes=1 << 20) if len(tail) else answer.data
            if not page["events"]:
                return out
            out += page["events"]
            after = page["next"]

    def count(self, name: str) -> int:
        """One of the broker's counters."""
        return int(self.ask("broker")["counters"].get(name, 0))

    def close(self) -> None:
        self.executor.stop()
        for link in (self.job.link, *self._claimers, self.client):
            link.close()
        self.broker.stop()
        self.context.destroy(linger=0)


@pytest.fixture(scope="module")
def _ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    before = os.environ.get("FEDLOOM_NO_LOCAL")
    os.environ["FEDLOOM_NO_LOCAL"] = "1"  # honest peers stream: the data link is under attack too
    ground = Ground(tmp_path_factory.mktemp("attacks"))
    try:
        yield ground
    finally:
        ground.close()
        if before is None:
            del os.environ["FEDLOOM_NO_LOCAL"]
        else:
            os.environ["FEDLOOM_NO_LOCAL"] = before


@pytest.fixture
def ground(_ground: Ground) -> Iterator[Ground]:
    """The broker under attack; after each attack its normal work must go on."""
    yield _ground
    _ground.works()


def _strangers(ground: Ground) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(role: str = "client", *sites: str, join: bool = True, **fields: Any) -> Any:
        node = fields.pop("node", f"{role}/{secrets.token_hex(4)}")
        fields.setdefault("capacity", len(sites))
        hello = Hello(node, role, fields.pop("boot", secrets.token_hex(8)), **fields)  # type: ignore[arg-type]
        made.append(strangers_module.Wire(ground, hello, sites))
        return made[-1].join() if join else made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def wire(ground: Ground) -> Iterator[Callable[..., Any]]:
    """Make strangers: of a role, serving sites, welcome already (or not, with ``join=False``)."""
    yield from _strangers(ground)


@pytest.fixture(scope="module")
def strangers(_ground: Ground) -> Iterator[Callable[..., Any]]:
    """As `wire`, for as long as a module's tests."""
    yield from _strangers(_ground)


@pytest.fixture(scope="module")
def run_controller(_ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], None]]:
    """Start a real controller, which starts a real process for each job; once a module."""
    processes: list[subprocess.Popen[bytes]] = []
    log = (tmp_path_factory.mktemp("controller") / "log").open("wb")

    def run() -> None:
        if not processes:
            command = [sys.executable, "-m", "fedloom", "controller", "--broker", _ground.endpoint]
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    yield run
    for process in processes:
        process.terminate()
        process.wait(10)
    log.close()


@pytest.fixture
def memory(ground: Ground) -> Callable[[], int]:
    """The memory of the broker's two processes now, in bytes."""
    return lambda: sum(rss(pid) for pid in ground.pids)


@pytest.fixture
def tcp(ground: Ground) -> Iterator[Callable[..., Any]]:
    """Connections by hand, to the control link or the data link."""
    made: list[Any] = []

    def make(*, data: bool = False) -> Any:
        made.append(strangers_module.Tcp(ground.data_endpoint if data else ground.endpoint))
        return made[-1]

    yield make
    for one in made:
        one.sock.close()
