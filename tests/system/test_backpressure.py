"""Many uploaders and little room: all results arrive, nobody is disconnected, memory and disk stay under their bounds.

The uploaders are executors as the broker sees them, hundreds in one thread: two sockets each, the real codec and the
real streams. Broker and controller are processes, the job is folded and checkpointed as any other.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from fedloom.broker.linksource import Source
from fedloom.broker.linkstreams import Streams, Upload
from fedloom.broker.sockets import connect, make_context, make_socket, resolve_data_endpoint
from fedloom.recipe.client import JobClient
from fedloom.serialization.codec import pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Accept,
    Assign,
    Bye,
    Cancel,
    Done,
    DoneItem,
    Fault,
    Hello,
    Message,
    PayloadId,
    PayloadRef,
    Ping,
    Put,
    Stored,
    TaskRef,
    Welcome,
    decode,
    encode,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

pytestmark = pytest.mark.process

KIB, MIB, GIB = 1024, 1024**2, 1024**3
PING_S = 5.0
BLOCK = 64 * KIB


class Results:
    """Models of one tensor, full of the site's number: a header, and one block as often as it fits."""

    def __init__(self, elements: int) -> None:
        values = np.zeros(elements, np.float32)
        encoded = encode_model(FLModel(params={"numpy_key": values}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
        self.meta = encoded.meta
        self.header = encoded.header_bytes
        self.elements = elements
        assert encoded.size == len(self.header) + values.nbytes

    def of(self, number: int) -> list[bytes | memoryview]:
        whole, rest = divmod(self.elements, BLOCK)
        block = np.full(BLOCK, number, np.float32).tobytes()
        return [self.header, *[block] * whole, *([memoryview(block)[: 4 * rest]] if rest else [])]


class Uploader:
    """An executor of one site, without threads: `on_control`, `on_data` and `drive` are called by its swarm."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        self.swarm = swarm
        self.number = number
        self.site = f"site-{number}"
        self.control = make_socket(swarm.context, "control-dealer")
        self.data = make_socket(swarm.context, "data-dealer")
        self.streams = Streams()
        self.welcome: Welcome | None = None
        self.stored: Stored | None = None
        self.said_hello = self.data_up = self.asked_data = False
        self._sequence = 0
        self._pinged_at = 0.0
        self._upload: tuple[Upload, Assign, DoneItem] | None = None
        self._done_sent = False
        connect(self.control, swarm.endpoint)

    def say(self, message: Message, tail: bytes = b"") -> None:
        self._sequence += 1
        self.control.send_multipart(encode(message, tail, self._sequence), zmq.DONTWAIT)

    def hello(self) -> None:
        self.said_hello = True
        name = f"executor/{self.site}"
        self._hello = Hello(name, "executor", f"boot{self.number}", capacity=1)
        self.say(self._hello, pack({"sites": [self.site], "held": []}))

    def on_control(self, message: Message) -> None:
        match message:
            case Welcome():
                assert self.welcome is None, f"{self.site} was disconnected"
                self.welcome = message
                connect(self.data, resolve_data_endpoint(self.swarm.endpoint, message.data_endpoint))
            case Assign():
                (item,) = message.items
                assert item.attempt == 1, f"{self.site} works again: attempt {item.attempt}"
                self.say(Accept((TaskRef(item.task, item.attempt),)))
                buffers = self.swarm.results.of(self.number)
                size = sum(len(buffer) for buffer in buffers)
                ref = PayloadRef(PayloadId(f"r-{item.task}.1"), size, digest_buffers(buffers))
                put = Put(ref, f"{self.number:032x}", message.job, task=item.task, attempt=1)
                done = DoneItem(item.task, 1, item.site, payload=ref, meta=self.swarm.results.meta)
                upload = Upload(put, Source(buffers, ref.size))
                self._upload = upload, message, done
                self.streams.add(upload)
            case Stored():
                assert not message.refused, message
                self.stored = message
            case Cancel() if self.stored is None:
                self.swarm.trouble.append(f"{self.site}: {message}")
            case Fault() | Bye():
                self.swarm.trouble.append(f"{self.site}: {message}")
            case _:
                pass

    def on_data(self, message: Message, tail: Any, now: float) -> None:
        match message:
            case Welcome():
                self.data_up = True
                self.streams.connected()
            case Fault():
                self.swarm.trouble.append(f"{self.site}, data link: {message}")
            case _:
                self.swarm.aborts += type(message).__name__ == "Abort"
                self.streams.on_message(message, tail, now)

    def drive(self, now: float) -> None:
        """Send what is due."""
        if self.welcome is None:
            return
        if now - self._pinged_at >= PING_S:
            self._pinged_at = now
            self.say(Ping())
        if self._upload is None:
            return
        if not self.asked_data:
            try:
                hello = Hello(self._hello.node, "executor", self._hello.boot, session=self.welcome.session)
                self.data.send_multipart(encode(hello), zmq.DONTWAIT)
                self.asked_data = True
            except zmq.Again:
                return
        upload, assign, item = self._upload
        if self.data_up and not upload.done.is_set() and self.streams.wait_s(now) <= 0:
            for frames in self.streams.outgoing(now, self.welcome):
                try:
                    self.data.send_multipart(frames, zmq.DONTWAIT)
                except zmq.Again:
                    self.streams.unsend(frames)
                    break
        if upload.done.is_set() and not self._done_sent:
            assert upload.error is None, f"{self.site}: {upload.error}"
            self._done_sent = True
            assert upload.source is not None
            upload.source.close()
            self.say(Done(assign.job, assign.gather, (item,)))


class Swarm:
    """So many uploaders in one thread."""

    def __init__(self, endpoint: str, count: int, elements: int) -> None:
        self.endpoint = endpoint
        self.results = Results(elements)
        self.context = make_context(2)
        self.trouble: list[str] = []
        self.aborts = 0
        self.uploaders = [Uploader(self, number) for number in range(count)]

    def connect(self, timeout_s: float = 60.0) -> None:
        """All of them, until the broker has welcomed each."""
        self.run(lambda: all(one.welcome for one in self.uploaders), timeout_s)

    def work(self, timeout_s: float) -> None:
        """Until all results are stored."""
        self.run(lambda: all(one.stored for one in self.uploaders), timeout_s)

    def run(self, done: Callable[[], bool], timeout_s: float) -> None:
        poller = zmq.Poller()
        by_socket: dict[Any, Uploader] = {}
        for one in self.uploaders:
            for socket in (one.control, one.data):
                by_socket[socket] = one
                poller.register(socket, zmq.POLLIN)
            if not one.said_hello:
                poller.modify(one.control, zmq.POLLIN | zmq.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while not done():
            left = sum(one.stored is None for one in self.uploaders)
            assert time.monotonic() < deadline, f"{left} of {len(self.uploaders)} have no answer; {self.trouble[:5]}"
            assert not self.trouble, self.trouble[:5]
            for socket, event in poller.poll(20):
                one = by_socket[socket]
                if event & zmq.POLLOUT and not one.said_hello:
                    one.hello()
                    poller.modify(socket, zmq.POLLIN)
                if event & zmq.POLLIN:
                    self._receive(one, socket)
            now = time.monotonic()
            for one in self.uploaders:
                one.drive(now)

    def _receive(self, one: Uploader, socket: Any) -> None:
        for _ in range(64):
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            packet = decode(frames)
            if socket is one.control:
                one.on_control(packet.message)
            else:
                one.on_data(packet.message, packet.tail, time.monotonic())

    def close(self) -> None:
        self.context.destroy(linger=0)


class Watch:
    """Samples the bytes of the payloads on disk, and the broker's two processes' memory, while it is entered."""

    def __init__(self, store: Path, control_pid: int) -> None:
        self.store = store
        self.pids = {"control": control_pid, "data": int((store / "run" / "data.pid").read_text())}
        self.before = {name: rss(pid, "VmRSS") for name, pid in self.pids.items()}
        self.disk_bytes = 0
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="watch", daemon=True)

    def _main(self) -> None:
        while not self._stop.wait(0.02):
            self.disk_bytes = max(self.disk_bytes, on_disk(self.store))
            self.samples += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def grown(self) -> dict[str, int]:
        """By how much each process was larger at its peak."""
        return {name: rss(pid, "VmHWM") - self.before[name] for name, pid in self.pids.items()}


def rss(pid: int, what: str) -> int:
    """The memory of a process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * KIB


def on_disk(store: Path) -> int:
    """The bytes of all payloads, and of those that come in."""
    total = 0
    for folder in (store / "payloads", store / "incoming"):
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total


@pytest.fixture
def swarm(endpoint: str) -> Iterator[Callable[..., Swarm]]:
    made: list[Swarm] = []

    def make(count: int, elements: int) -> Swarm:
        made.append(Swarm(endpoint, count, elements))
        return made[-1]

    yield make
    for each in made:
        each.close()


def upload_all(cluster: Any, jobs: Any, swarm: Callable[..., Swarm], *, count: int, elements: int, quota: int,
               memory: dict[str, int], timeout_s: float, bounds: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    """A round of a real job whose results all come at once under this quota; what the broker says in the end."""
    broker = cluster.children.fedloom(
        "broker", "--bind", cluster.endpoint, "--store", cluster.folder / "store", "--durability", "process",
        *(word for bound in (f"quota_bytes={quota}", *bounds) for word in ("--set", bound)),
    )  # fmt: skip
    broker.says("broker_ready")
    cluster.controller()
    many = swarm(count, elements)
    many.connect()
    with JobClient(cluster.endpoint) as client:
        with Watch(cluster.folder / "store", broker.pid) as watch:
            job_id = client.submit(jobs.export(clients=count, rounds=1, elements=elements))
            many.work(timeout_s)
            info = client.wait(job_id, 60)
        told = client.broker()
        assert info.status == "FINISHED:COMPLETED", info.reason
        (record,) = client.rounds(job_id)
        model = decode_model(client.fetch(info.model, cluster.folder / "model"), framework="numpy")
    assert record["results"] == count and not record["failures"] and not record.get("late")
    assert bool((np.asarray(model.params["numpy_key"]) == np.float32((count - 1) / 2)).all())
    assert told["sessions"] == count + 2, "uploaders, controller and client: nobody was disconnected"
    assert not many.trouble
    spool = told["bounds"]["quota_bytes"]
    assert watch.samples > 10 and watch.disk_bytes <= quota, f"{watch.disk_bytes} bytes on disk"
    assert spool["limit"] == quota and spool["used"] <= quota
    grown = watch.grown()
    assert all(grown[name] < most for name, most in memory.items()), f"grown by {grown}; allowed {memory}"
    return told | {"disk": watch.disk_bytes, "grown": grown, "aborts": many.aborts}


def test_a_hundred_uploaders_at_once_under_a_small_quota(cluster: Any, jobs: Any, swarm: Any) -> None:
    told = upload_all(
        cluster, jobs, swarm, count=100, elements=64 * KIB, quota=5 * MIB, timeout_s=60,
        memory={"control": 48 * MIB, "data": 64 * MIB}, bounds=("max_streams=32",),
    )  # fmt: skip
    assert told["bounds"]["quota_bytes"]["reached"] > 0, "the quota was never reached: the test shows nothing"
    assert told["bounds"]["max_streams"]["reached"] > 0
    assert told["aborts"] < 20 * 100, "who has to wait asks again and again"


@pytest.mark.proof
def test_five_hundred_uploaders_at_once_under_a_small_quota(cluster: Any, jobs: Any, swarm: Any) -> None:
    told = upload_all(
        cluster, jobs, swarm, count=500, elements=256 * KIB, quota=24 * MIB, timeout_s=240,
        memory={"control": 96 * MIB, "data": 160 * MIB},
    )  # fmt: skip
    assert told["bounds"]["quota_bytes"]["reached"] > 0
    assert told["aborts"] < 100 * 500


def test_results_of_eight_times_the_room(cluster: Any, jobs: Any, swarm: Any) -> None:
    """The same shape as below: 64 results under a spool of eight, with checkpoints all the time."""
    told = upload_all(
        cluster, jobs, swarm, count=64, elements=64 * KIB, quota=2 * MIB, timeout_s=100,
        memory={"control": 48 * MIB, "data": 64 * MIB},
    )  # fmt: skip
    assert told["bounds"]["quota_bytes"]["reached"] > 0


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_64_uploads_of_256_mib_under_a_spool_of_2_gib(cluster: Any, jobs: Any, swarm: Any) -> None:
    free = shutil.disk_usage(cluster.folder).free
    if free < 6 * GIB:
        pytest.skip(f"{free / GIB:.1f} GiB of free disk; 6 are needed")
    header = 128  # a payload of 256 MiB with its header
    upload_all(
        cluster, jobs, swarm, count=64, elements=64 * MIB - header // 4, quota=2 * GIB, timeout_s=1500,
        memory={"control": 64 * MIB, "data": 768 * MIB}, bounds=("window_bytes=64MiB",),
    )  # fmt: skip


def test_a_job_that_cannot_fit_is_refused_at_submission_with_the_figures(cluster: Any, jobs: Any) -> None:
    quota = 1_000_000
    cluster.children.fedloom(
        "broker", "--bind", cluster.endpoint, "--store", cluster.folder / "store", "--quota-bytes", str(quota)
    ).says("broker_ready")
    folder = jobs.export("large", rounds=2, elements=50_000)
    code, out, err = cluster.job("submit", folder, ok=False)
    size = (folder / "app" / "initial_model.safetensors").stat().st_size
    assert code == 3 and out == "" and len(err.strip().splitlines()) == 1, err
    for figure in (f"a model of {size} bytes", f"checkpoints of {2 * size}", f"the quota is {quota}", "quota_bytes"):
        assert figure in err
    code, out, _ = cluster.job("submit", jobs.export("small", rounds=2, elements=20_000), "--json")
    assert code == 0 and json.loads(out)["job_id"]
