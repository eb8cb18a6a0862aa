"""The link against a real broker: payloads in and out, faults, repeats, and what is left of it afterwards."""

from __future__ import annotations

import os
import random
import secrets
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.link import Link
from fedloom.broker.service import Broker, start_broker
from fedloom.serialization.codec import unpack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import (
    FaultError,
    LinkError,
    PayloadError,
)
from fedloom.serialization.messages import (
    Answer,
    Ask,
    ClaimJob,
    Commit,
    Event,
    Fault,
    Hello,
    JobId,
    Message,
    PayloadId,
    PayloadRef,
    SubmitJob,
    Welcome,
)
from structlog.testing import capture_logs

KIB, MIB = 1024, 1024 * 1024
SMALL = random.Random(1).randbytes(20 * KIB)
LARGE = random.Random(2).randbytes(5 * MIB + 321)


def ref_of(data: bytes, **fields: Any) -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob", **fields)


def hello(node: str = "", role: Any = "client", **fields: Any) -> Hello:
    return Hello(node=node or f"client/{secrets.token_hex(4)}", role=role, boot=secrets.token_hex(8), **fields)


def eventually(check: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        pause.wait(0.01)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One that many tests share: none of them stops it."""
    with start_broker(tmp_path_factory.mktemp("broker") / "store", durability="process") as broker:
        yield broker


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """One that a test may stop and kill."""
    broker = start_broker(tmp_path / "store", durability="process", ping_s=0.3, dead_s=3.0)
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Link]]:
    """Links that are closed in the end."""
    links: list[Link] = []

    def make(broker: Broker, words: Hello | None = None, **options: Any) -> Link:
        link = Link(broker.endpoint, words or hello(), **options)
        links.append(link)
        link.start(20)
        return link

    yield make
    for link in links:
        link.close("the test is over")


def cpu_s(link: Link) -> float:
    """Seconds of a processor that the link's thread has used."""
    return int(Path(f"/proc/self/task/{link._thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def streamed(link: Link) -> Link:
    """As a peer of another machine."""
    link._shared.local = None
    return link


@pytest.mark.process
@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["nothing", "small", "large"])
@pytest.mark.parametrize("local", [True, False], ids=["mapped", "streamed"])
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "buffers"])
def test_put_and_fetch(broker: Broker, connect: Any, tmp_path: Path, data: bytes, local: bool, from_file: bool) -> None:
    link = connect(broker) if local else streamed(connect(broker))
    data = data and data + secrets.token_bytes(8)
    ref = ref_of(data)
    source: Any = [data[:10], memoryview(data)[10:]]
    if from_file:
        source = tmp_path / "source"
        source.write_bytes(data)
    assert link.put(ref, source) == ref
    assert link.put(ref, source) == ref, "twice is once"
    if from_file:
        assert source.read_bytes() == data, "a file that is put stays in place"
    got = link.fetch(ref)
    assert isinstance(got, Path) == local
    assert (got.read_bytes() if isinstance(got, Path) else got) == data
    dest = tmp_path / "dest"
    there = link.fetch(ref, dest=dest)
    assert (there.read_bytes() if isinstance(there, Path) else there) == data
    if not local:
        assert there == dest
        pieces: list[bytes] = []
        link.stream(ref, lambda offset, part: pieces.append(bytes(part)))
        assert b"".join(pieces) == data
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "dest"}
    assert not list((broker.config.store / "incoming").iterdir())


@pytest.mark.process
def test_what_is_not_as_its_reference_says(broker: Broker, connect: Any, tmp_path: Path) -> None:
    link = connect(broker)
    for size in (10, 100 * KIB):
        with pytest.raises(PayloadError, match="bytes"):
            link.put(ref_of(b"x" * size), [b"x" * (size - 1)])
    link.put(ref_of(LARGE), [LARGE])
    link.put(ref_of(SMALL), [SMALL])
    streamed(link)
    for data in (SMALL, LARGE):
        for damaged in (PayloadRef(ref_of(data).id, len(data), "0" * 64), PayloadRef(ref_of(data).id, len(data) - 1)):
            with pytest.raises((PayloadError, FaultError)):
                link.fetch(damaged, 10, dest=tmp_path / "dest")
    with pytest.raises(FaultError) as caught:
        link.fetch(ref_of(b"never put"), dest=tmp_path / "dest")
    assert caught.value.code == "unknown_payload"
    assert not list(tmp_path.iterdir()), "nothing half is left"
    for data in (SMALL, LARGE):
        wrong = PayloadRef(PayloadId("b3-" + "0" * 64), len(data), ref_of(data).digest)
        with pytest.raises(FaultError) as caught:
            link.put(wrong, [data])
        assert caught.value.code == "digest"
    assert link.request(Ask(link.next_ref(), "jobs"))[0], "the link works on"


@pytest.mark.process
def test_faults_of_requests(broker: Broker, connect: Any) -> None:
    link = connect(broker)
    with pytest.raises(FaultError) as caught:
        link.request(Ask(link.next_ref(), "job", JobId("nobody's")))
    assert caught.value.code == "unknown_job"
    with pytest.raises(FaultError) as caught:
        link.request(Commit(link.next_ref(), JobId("nobody's"), 1, 0))
    assert caught.value.code == "forbidden"
    with pytest.raises(FaultError) as caught:
        link.put(ref_of(b"result"), [b"result"], job="nobody's", claim=1)
    assert caught.value.code == "unknown_job"


@pytest.mark.process
def test_sink_that_raises(broker: Broker, connect: Any) -> None:
    link = streamed(connect(broker))
    link.put(ref_of(LARGE), [LARGE])

    def sink(offset: int, data: memoryview) -> None:
        raise ZeroDivisionError("in the sink")

    with pytest.raises(ZeroDivisionError):
        link.stream(ref_of(LARGE), sink)
    assert link.fetch(ref_of(LARGE)) == LARGE


@pytest.mark.process
def test_many_puts_at_once(broker: Broker, connect: Any) -> None:
    link = connect(broker)
    for local in (True, False):
        if not local:
            streamed(link)
        blobs = [secrets.token_bytes(size) for size in (1, 1000, 40_000, MIB, 2 * MIB + 5) * 4]
        with ThreadPoolExecutor(16) as pool:
            refs = list(pool.map(lambda data: link.put(ref_of(data), [data]), blobs))
            again = list(pool.map(link.fetch, refs))
        assert [got.read_bytes() if isinstance(got, Path) else got for got in again] == blobs
    assert not link._shared.requests
    assert not link._shared.streams


@pytest.mark.process
def test_latency_and_rest(broker: Broker, connect: Any) -> None:
    """A request wakes the link and the broker at once; an idle link costs nothing, also after it has moved payloads."""
    link = streamed(connect(broker))
    link.put(ref_of(LARGE), [LARGE])
    times: list[float] = []
    for _ in range(200):
        started = time.perf_counter()
        link.request(Ask(link.next_ref(), "jobs"))
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.005
    before = cpu_s(link)
    threading.Event().wait(2.0)
    assert cpu_s(link) - before < 0.02


@pytest.mark.process
def test_close_while_others_wait(broker: Broker) -> None:
    before = len(os.listdir("/proc/self/fd"))
    threads = {thread.name for thread in threading.enumerate()}
    link = Link(broker.endpoint, hello(role="controller", capacity=1))
    link.start()
    streamed(link)
    errors: list[Exception] = []

    def wait(work: Callable[[], object]) -> None:
        try:
            work()
        except LinkError as error:
            errors.append(error)

    works = [
        lambda: link.request(ClaimJob(link.next_ref())),  # no job: it waits
        lambda: link.stream(PayloadRef(PayloadId("b3-" + "1" * 64), 100 * KIB), lambda offset, data: None),
    ]
    os.kill(broker.data_pid, signal.SIGSTOP)
    try:
        waiting = [threading.Thread(target=wait, args=(work,)) for work in works]
        for thread in waiting:
            thread.start()
        eventually(lambda: link._shared.requests and link._shared.streams)
        link.close("enough")
        for thread in waiting:
            thread.join(5)
    finally:
        os.kill(broker.data_pid, signal.SIGCONT)
    assert len(errors) == 2
    assert link.state == "closed"
    eventually(lambda: {thread.name for thread in threading.enumerate()} <= threads)
    assert len(os.listdir("/proc/self/fd")) <= before
    link.close()


@pytest.mark.process
def test_name_taken(broker: Broker, connect: Any) -> None:
    first = connect(broker, hello("controller/same", "controller"))
    got: list[Message] = []
    second = Link(broker.endpoint, hello("controller/same", "controller"), on_message=lambda m, t: got.append(m))
    with pytest.raises(FaultError) as caught:
        second.start(20)
    assert caught.value.code == "name_taken"
    assert second.state == "closed"
    assert [m.code for m in got if isinstance(m, Fault)] == ["name_taken"]
    assert first.state == "up"


@pytest.mark.process
def test_a_large_answer_that_no_link_takes_is_a_fault(broker: Broker, connect: Any) -> None:
    """Events of up to 30 KiB a piece: each page fits, and none is lost."""
    link = connect(broker)
    archive = ref_of(b"archive")
    link.put(archive, [b"archive"])
    job = link.request(SubmitJob(link.next_ref(), secrets.token_hex(8), "big", archive))[0].data["job_id"]
    for number in range(60):
        link.send(Event(JobId(job), "metric", data={"number": number, "text": "x" * 30_000}))
    seen: list[int] = []
    after = 0
    while True:
        answer, tail = link.request(Ask(link.next_ref(), "events", JobId(job), after))
        data = unpack(tail, max_bytes=2 * MIB) if len(tail) else answer.data
        seen += [event["data"]["number"] for event in data["events"] if event["kind"] == "metric"]
        if data["next"] <= after:
            break
        after = data["next"]
    assert seen == list(range(60))


# ---------------------------------------------------------------- lost and found


@pytest.mark.process
def test_requests_are_repeated_over_a_restart(own_broker: Broker, connect: Any) -> None:
    got: list[Message] = []
    with capture_logs() as logs:
        link = connect(own_broker, on_message=lambda message, tail: got.append(message))
        link.put(ref_of(SMALL), [SMALL])
        own_broker.kill()
        eventually(lambda: link.state == "down")
        answers: list[Message] = []
        token = secrets.token_hex(8)

        def submit() -> None:
            message = SubmitJob(link.next_ref(), token, "demo", ref_of(SMALL))
            answers.append(link.request(message, timeout_s=30)[0])

        asking = [threading.Thread(target=submit) for _ in range(2)]
        for thread in asking:
            thread.start()
        used_s = cpu_s(link)
        threading.Event().wait(1.0)
        assert cpu_s(link) - used_s < 0.02, "it does not spin while the broker is gone"
        own_broker.start()
        for thread in asking:
            thread.join(30)
    assert len({message.data["job_id"] for message in answers if isinstance(message, Answer)}) == 1
    assert len(answers) == 2
    assert link.state == "up"
    assert sum(isinstance(message, Welcome) for message in got) >= 2
    down = [entry for entry in logs if entry["event"] == "link_down"]
    assert [entry["log_level"] for entry in down].count("warning") == 1, down


@pytest.mark.process
@pytest.mark.parametrize("way", ["up", "down"])
def test_streams_go_on_when_the_data_process_is_killed(own_broker: Broker, connect: Any, way: str) -> None:
    data = random.Random(7).randbytes(24 * MIB)
    link = streamed(connect(own_broker))
    ref = ref_of(data)
    hit = threading.Event()

    def kill_once(at: int) -> None:
        if at >= 12 * MIB and not hit.is_set():
            hit.set()
            os.kill(own_broker.data_pid, signal.SIGKILL)

    if way == "down":
        link.put(ref, [data])
        got = bytearray()

        def sink(offset: int, part: memoryview) -> None:
            assert offset == len(got)
            got.extend(part)
            kill_once(offset)

        link.stream(ref, sink, 60)
        assert got == data
    else:
        with capture_logs() as logs:
            watch = threading.Thread(
                target=lambda: eventually(lambda: link.bytes_sent > 12 * MIB) or kill_once(1 << 60)
            )
            watch.start()
            link.put(ref, [data], timeout_s=60)
            watch.join()
        (line,) = [entry for entry in logs if entry["event"] == "uploaded"]
        assert line["chunks_sent"] < 24 + 12 + 4, (
            "it goes on where it was: a block and two windows are sent again at most"
        )
        path = own_broker.config.store / "payloads" / ref.id[:2] / ref.id
        assert path.read_bytes() == data
    assert hit.is_set()


@pytest.mark.process
def test_broker_that_stays_away(own_broker: Broker, connect: Any) -> None:
    """The link gives up, and whoever waits is told."""
    got: list[Message] = []
    link = connect(own_broker, on_message=lambda message, tail: got.append(message), give_up_s=1.0)
    own_broker.kill()
    eventually(lambda: link.state == "down")
    started = time.monotonic()
    with pytest.raises(FaultError, match="no broker") as caught:
        link.request(Ask(link.next_ref(), "jobs"), timeout_s=60)
    assert caught.value.code == "gone"
    assert time.monotonic() - started < 10
    assert got
    assert isinstance(got[-1], Fault)
    eventually(lambda: link.state == "closed")
    own_broker.start()
