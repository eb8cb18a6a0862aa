"""The broker as processes with real sockets: readiness, crashes at named points, locks, garbage, a clean stop."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.broker.link import Link
from fedloom.broker.lock import StoreLock
from fedloom.broker.service import Broker, start_broker
from fedloom.broker.sockets import bind, free_endpoint, make_context, make_socket
from fedloom.serialization.codec import pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError, LinkError, StorageError
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Ask,
    Assign,
    Claimed,
    ClaimJob,
    CloseRule,
    Commit,
    Done,
    DoneItem,
    Fault,
    Hello,
    Message,
    OpenGather,
    PayloadId,
    PayloadRef,
    Receipt,
    Stored,
    SubmitJob,
    TaskRef,
    Welcome,
    decode,
    encode,
)

pytestmark = pytest.mark.process

M = TypeVar("M")
QUICK: dict[str, Any] = {"durability": "process", "ping_s": 0.5, "dead_s": 5.0, "lost_s": 2.0, "retry_s": 0.05}


class Peer:
    """A link and what came over it."""

    def __init__(self, broker: Broker, role: Any, node: str, sites: tuple[str, ...] = (), **hello: Any) -> None:
        self.got: queue.SimpleQueue[tuple[Message, bytes]] = queue.SimpleQueue()
        self.held: list[TaskRef] = []
        self.hello = Hello(node=node, role=role, boot=os.urandom(8).hex(), capacity=len(sites), **hello)
        self.link = Link(
            broker.endpoint,
            self.hello,
            sites=sites,
            held=lambda: self.held,
            on_message=lambda message, tail: self.got.put((message, bytes(tail))),
        )
        self.welcome = self.link.start(20)

    def wait(
        self, kind: type[M], timeout_s: float = 20.0, when: Callable[[M], bool] = lambda m: True
    ) -> tuple[M, bytes]:
        """The next message of a kind; others before it are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            message, tail = self.got.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(message, kind) and when(message):
                return message, tail

    def put(self, data: bytes, **owner: Any) -> PayloadRef:
        """Store bytes by their content."""
        digest = digest_buffers([data])
        return self.link.put(PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob"), [data], **owner)


@pytest.fixture(name="peers")
def peers_fixture() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(*args: Any, **fields: Any) -> Peer:
        made.append(Peer(*args, **fields))
        return made[-1]

    yield make
    for peer in made:
        peer.link.close()


@pytest.fixture(name="broker")
def broker_fixture(tmp_path: Path) -> Iterator[Broker]:
    broker = start_broker(tmp_path / "store", **QUICK)
    yield broker
    if broker.alive:
        broker.stop()


def running_job(broker: Broker, peers: Callable[..., Peer]) -> Peer:
    client = peers(broker, "client", "client/x")
    archive = client.put(b"archive")
    answer, _ = client.link.request(SubmitJob(client.link.next_ref(), "token", "demo", archive))
    assert isinstance(answer, Answer)
    controller = peers(broker, "controller", "controller/x")
    controller.link.send(ClaimJob(controller.link.next_ref()))
    claimed, _ = controller.wait(Claimed)
    job = peers(broker, "job", f"job/{claimed.job}/{claimed.claim}", job=claimed.job, claim=claimed.claim)
    answer, _ = job.link.request(ClaimJob(job.link.next_ref(), claimed.job, claimed.claim))
    assert isinstance(answer, Claimed) and answer.archive == archive
    return job


def open_gather(job: Peer, sites: tuple[str, ...], **fields: Any) -> None:
    hello = job.hello
    rule = CloseRule(min_clients=len(sites))
    values: dict[str, Any] = {"round": 0, "step": 0, "name": "train", "lease_s": 5.0} | fields
    message = OpenGather(job.link.next_ref(), hello.job, hello.claim, rule=rule, **values)
    job.link.send(message, pack({"sites": list(sites)}))


def send_done(executor: Peer, assign: Assign, data: bytes) -> TaskRef:
    item = assign.items[0]
    ref = TaskRef(item.task, item.attempt)
    executor.held = [ref]
    executor.link.send(Accept((ref,)))
    done = Done(assign.job, assign.gather, (DoneItem(item.task, item.attempt, item.site, inline_bytes=len(data)),))
    executor.link.send(done, data)
    return ref


def test_a_round_over_sockets_and_over_a_crash_of_the_broker(broker: Broker, peers: Callable[..., Peer]) -> None:
    job = running_job(broker, peers)
    one, two = (peers(broker, "executor", f"executor/{s}", (s,)) for s in ("site-1", "site-2"))
    model = job.put(os.urandom(3_000_000), job=job.hello.job, claim=1)
    open_gather(job, ("site-1", "site-2"), payload=model)
    receipt, _ = job.wait(Receipt)
    assert (receipt.state, receipt.tasks) == ("open", 2)
    assign, _ = one.wait(Assign)
    assert assign.payload == model
    ref = send_done(one, assign, b"from one")
    stored, _ = one.wait(Stored)
    assert stored.tasks == (ref,)
    done, tail = job.wait(Done)
    assert (done.items[0].index, tail) == (0, b"from one")
    assign, _ = two.wait(Assign)

    broker.kill()
    two.held = [TaskRef(assign.items[0].task, assign.items[0].attempt)]
    broker.start()
    job.wait(Welcome)
    open_gather(job, ("site-1", "site-2"), payload=model, have=1)
    receipt, _ = job.wait(Receipt)
    assert (receipt.state, receipt.results) == ("open", 1)
    two.wait(Welcome)
    ref = send_done(two, assign, b"from two")
    stored, _ = two.wait(Stored)
    assert stored.tasks == (ref,), "the lease was taken up again: the attempt is still the current one"
    done, tail = job.wait(Done)
    assert (done.items[0].index, done.items[0].attempt, tail) == (1, 1, b"from two")
    receipt, _ = job.wait(Receipt, when=lambda r: r.state == "closed")
    assert receipt.results == 2
    job.link.request(Commit(job.link.next_ref(), job.hello.job, 1, 0, model=model, record={"round": 0}))
    answer, _ = job.link.request(Ask(job.link.next_ref(), "job", job.hello.job))
    assert isinstance(answer, Answer) and answer.data["round"] == 1


@pytest.mark.parametrize(
    "point",
    ["journal.before_commit", "journal.after_commit", "control.after_commit_before_send", "control.before_commit"],
)
def test_a_submission_survives_a_kill_at_each_point_and_is_made_once(
    tmp_path: Path, peers: Callable[..., Peer], point: str
) -> None:
    store, hits = tmp_path / "store", tmp_path / "hits"
    broker = start_broker(store, **QUICK)
    client = peers(broker, "client", "client/x")
    archive = client.put(b"archive")
    broker.kill()
    # turns without changes pass the control points too: only those of the journal are passed by the submission alone
    count = 1 if point.startswith("journal") else 3
    broker.env = {"FEDLOOM_FAULT": f"{point}:{count}", "FEDLOOM_FAULT_LOG": str(hits)}

    def revive() -> None:
        broker.wait(20)
        broker.env = {}
        broker._end(signal.SIGKILL, 5)  # pyright: ignore[reportPrivateUsage]
        broker.start()

    broker.start() if point.startswith("journal") else start_until_ready(broker)
    reviver = threading.Thread(target=revive, name="revive")
    reviver.start()
    answer, _ = client.link.request(SubmitJob(client.link.next_ref(), "token", "demo", archive), timeout_s=40)
    reviver.join(30)
    assert isinstance(answer, Answer)
    assert hits.read_text().split() == [point]
    again, _ = client.link.request(SubmitJob(client.link.next_ref(), "token", "demo", archive))
    assert isinstance(again, Answer) and again.data == answer.data
    jobs, _ = client.link.request(Ask(client.link.next_ref(), "jobs"))
    assert isinstance(jobs, Answer) and len(jobs.data["jobs"]) == 1
    broker.stop()


def start_until_ready(broker: Broker) -> None:
    """A broker that may be killed before its ready line is started all the same: its kill is what the test wants."""
    try:
        broker.start()
    except LinkError:
        broker.env = {}
        broker.start()
        os.kill(broker.pid, signal.SIGKILL)


def test_stops_within_a_second(broker: Broker, peers: Callable[..., Peer]) -> None:
    peers(broker, "executor", "executor/site-1", ("site-1",))
    data_pid = broker.data_pid
    begun = time.monotonic()
    assert broker.stop() == 0
    assert time.monotonic() - begun < 1.0
    assert not alive(data_pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    ticker = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        ticker.wait(0.02)


def test_the_data_process_goes_with_the_broker_and_comes_back_alone(broker: Broker, peers: Callable[..., Peer]) -> None:
    client = peers(broker, "client", "client/x")
    first = broker.data_pid
    os.kill(first, signal.SIGKILL)
    data = os.urandom(200_000)
    ref = client.put(data)
    assert client.link.fetch(ref) is not None
    assert broker.data_pid != first
    second = broker.data_pid
    broker.kill()
    until(lambda: not alive(second))


def test_one_broker_a_store(broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="used by another broker"):
        start_broker(tmp_path / "store", **QUICK)
    with pytest.raises(StorageError, match=str(broker.pid)):
        StoreLock(tmp_path / "store")
    broker.kill()
    lock = StoreLock(tmp_path / "store")
    lock.close()


def test_an_endpoint_in_use_names_it(broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"in use.*another port"):
        start_broker(tmp_path / "other", broker.endpoint, **QUICK)


def test_a_data_endpoint_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match="data-bind"):
            start_broker(tmp_path / "store", data_bind=f"tcp://127.0.0.1:{port}", **QUICK)


def test_only_loopback_without_insecure(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="--insecure"):
        start_broker(tmp_path / "store", free_endpoint("tcp://0.0.0.0:*"), **QUICK)


def test_ipc_with_a_store_whose_path_is_too_long_for_sockets(tmp_path: Path, peers: Callable[..., Peer]) -> None:
    store = tmp_path / ("long" * 30)
    path = Path("/tmp") / f"fl-{os.getpid()}-{os.urandom(3).hex()}"
    broker = start_broker(store, f"ipc://{path}", **QUICK)
    try:
        client = peers(broker, "client", "client/x")
        assert client.welcome.spool_dir == str(store)
        ref = client.put(b"z" * 100_000)
        found = client.link.fetch(ref)
        assert isinstance(found, Path) and found.is_relative_to(store), "a co-located peer maps the file"
    finally:
        broker.stop()
        for left in (path, Path(f"{path}.data")):
            left.unlink(missing_ok=True)


def test_garbage_does_not_stop_the_loop(broker: Broker, peers: Callable[..., Peer]) -> None:
    context = make_context()
    try:
        raw = make_socket(context, "control-dealer")
        raw.connect(broker.endpoint)
        raw.set(zmq.SNDTIMEO, 5000)
        raw.set(zmq.RCVTIMEO, 5000)
        raw.send_multipart([b"garbage"])
        fault = decode(raw.recv_multipart()).message
        assert isinstance(fault, Fault) and fault.code == "malformed"
        frames = encode(Hello("client/raw", "client", "b"))
        raw.send_multipart([frames[0], bytes(frames[1])[:-1]])
        fault = decode(raw.recv_multipart()).message
        assert isinstance(fault, Fault) and "checksum" in fault.text
        raw.send_multipart([b"a"] * 50)
        raw.send_multipart([*frames, b"x" * 10])  # a tail that is no msgpack
        raw.send_multipart(frames)
        kinds = [type(decode(raw.recv_multipart()).message).__name__ for _ in range(3)]
        assert kinds == ["Fault", "Fault", "Welcome"]
    finally:
        context.destroy(linger=0)
    client = peers(broker, "client", "client/x")
    answer, _ = client.link.request(Ask(client.link.next_ref(), "jobs"))
    assert isinstance(answer, Answer) and answer.data == {"jobs": [], "next": 0}


def test_a_killed_executors_successor_gets_the_name_soon(broker: Broker, peers: Callable[..., Peer]) -> None:
    first = peers(broker, "executor", "executor/site-1", ("site-1",))
    with pytest.raises(FaultError) as refused:
        Peer(broker, "executor", "executor/site-1", ("site-1",))
    assert refused.value.code == "name_taken"
    first.link.close()  # without a Bye, as a kill does
    begun = time.monotonic()
    peers(broker, "executor", "executor/site-1", ("site-1",))
    assert time.monotonic() - begun < 4.0, "well before dead_s"


def test_sockets_refuse_what_libzmq_lets_pass(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with make_context() as context, make_socket(context, "control-router") as first:
        assert bind(first, f"ipc://{path}") == f"ipc://{path}"
        assert oct(path.stat().st_mode)[-3:] == "600"
        with make_socket(context, "control-router") as second:
            with pytest.raises(LinkError, match="in use"):
                bind(second, f"ipc://{path}")
            with pytest.raises(LinkError, match="bytes long"):
                bind(second, "ipc:///" + "x" * 120)
            for endpoint in ("tcp://", "http://x:1", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "nonsense"):
                with pytest.raises(LinkError, match="endpoint"):
                    bind(second, endpoint)
            with pytest.raises(FaultError) as insecure:
                bind(second, "tcp://*:7600")
            assert insecure.value.code == "insecure_bind"
