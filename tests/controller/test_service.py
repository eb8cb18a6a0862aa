"""The controller over the real core: claims, lost processes, lost messages, and a real one that kills its job."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.link import Link
from fedloom.broker.service import start_broker
from fedloom.controller import job as job_process
from fedloom.controller import service
from fedloom.controller.job import JobRequest
from fedloom.controller.service import Controller, ControllerConfig
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError
from fedloom.serialization.messages import Ask, Fault, Hello, PayloadId, PayloadRef, SubmitJob, Welcome


class Process:
    """A job process that ends when it is told to."""

    pid = 4711

    def __init__(self, request: JobRequest) -> None:
        self.request = request
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9 if self.code is None else self.code


class Desk:
    """A controller at a world's core."""

    def __init__(self, world: Any, tools: Any, max_jobs: int = 2) -> None:
        self.world = world
        self.started: list[Process] = []
        self.fails: OSError | None = None
        self.controller = Controller(ControllerConfig("tcp://127.0.0.1:9", max_jobs), self.start)
        self.controller.link.close()
        self.peer = world.peer("controller", "controller/c")
        self.link = tools.CoreLink(self.peer, lambda message, tail: self.controller._inbox.put((message, tail)))
        self.controller.link = self.link

    def start(self, request: JobRequest) -> Process:
        if self.fails:
            raise self.fails
        self.started.append(Process(request))
        return self.started[-1]

    def turn(self, count: int = 4) -> None:
        for _ in range(count):
            self.link.pump()
            self.controller._turn()
            self.world.pass_time(0.2)

    def job(self, job_id: str) -> Any:
        return self.world.core.state.jobs.jobs[job_id]


@pytest.fixture
def desk(tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(service, "_POLL_S", 0.001)
    world = tools.World(tmp_path / "store")
    yield Desk(world, tools)
    world.journal.close()


def test_claims_as_many_as_it_may(desk: Desk) -> None:
    jobs = [desk.world.submit(f"token-{n}") for n in range(3)]
    desk.turn(6)
    assert [p.request.job for p in desk.started] == jobs[:2]
    assert all(p.request.claim == 1 for p in desk.started)
    desk.started[0].code = job_process.ENDED
    desk.turn(6)
    assert [p.request.job for p in desk.started] == jobs
    assert desk.job(jobs[0]).crashes == 0


@pytest.mark.parametrize(("code", "given_back"), [(-9, True), (1, True), (4, True), (0, False), (3, False)])
def test_a_process_that_ends(desk: Desk, code: int, given_back: bool) -> None:
    """Killed, crashed or lost: given back. Ended well, or fenced: the broker knows."""
    job = desk.world.submit()
    desk.turn()
    desk.started[0].code = code
    desk.turn(8)
    assert desk.job(job).crashes == int(given_back)
    assert [p.request.claim for p in desk.started] == ([1, 2] if given_back else [1])
    assert not desk.controller._owed


def test_a_job_that_kills_its_process_each_time_fails(desk: Desk) -> None:
    job = desk.world.submit()
    for _ in range(40):
        desk.turn()
        for process in desk.started:
            process.kill()
        desk.world.pass_time(5)
    assert desk.job(job).status == "FINISHED:FAILED"
    assert "signal 9" in desk.job(job).reason
    assert len(desk.started) == 5


def test_a_process_that_cannot_be_started_is_given_back(desk: Desk) -> None:
    job = desk.world.submit()
    desk.fails = OSError("no memory")
    desk.turn(2)
    assert desk.job(job).crashes == 1
    desk.fails = None
    desk.turn(8)
    assert [p.request.claim for p in desk.started] == [2]


def test_giving_back_is_repeated_until_the_broker_knows(desk: Desk) -> None:
    job = desk.world.submit()
    desk.turn()
    desk.link.state = "down"
    desk.started[0].kill()
    desk.turn()
    assert desk.job(job).crashes == 0
    desk.link.state = "up"
    desk.peer.connect()
    desk.turn(8)
    assert desk.job(job).crashes == 1
    assert [p.request.claim for p in desk.started] == [1, 2]
    assert not desk.controller._owed


def test_a_claim_whose_answer_is_lost_is_answered_again(desk: Desk) -> None:
    desk.controller._turn()
    job = desk.world.submit()
    desk.world.pass_time(0.2)
    assert desk.job(job).claim == 1
    desk.peer.got.clear()  # it was on the connection that breaks
    desk.peer.connect()
    desk.turn()
    assert [(p.request.job, p.request.claim) for p in desk.started] == [(job, 1)]
    desk.controller._inbox.put((Welcome("s", "e"), b""))
    desk.turn()
    assert len(desk.started) == 1


def test_a_refused_question_is_asked_again(desk: Desk) -> None:
    desk.controller._turn()
    desk.controller._inbox.put((Fault("internal", "x", ref=desk.controller._asked), b""))
    desk.turn()
    job = desk.world.submit()
    desk.turn()
    assert [p.request.job for p in desk.started] == [job]


def test_fatal_fault_ends_it(desk: Desk) -> None:
    desk.controller._inbox.put((Fault("name_taken", "x", fatal=True), b""))
    with pytest.raises(FaultError, match="x"):
        desk.turn()


def test_an_old_claims_process_is_ended_by_the_new_claim(desk: Desk) -> None:
    job = desk.world.submit()
    desk.turn()
    process = desk.world.process(next(iter([type("C", (), {"job": job, "claim": 1})()])))
    desk.world.disconnect(process)
    desk.world.core.state.jobs.session_down(job, 1, desk.world.now)
    desk.world.pass_time(1)
    desk.turn(6)
    assert [p.request.claim for p in desk.started] == [1, 2]
    assert desk.started[0].code == -9
    assert desk.job(job).crashes == 0


def test_stop_kills_the_jobs_and_gives_them_back(desk: Desk) -> None:
    job = desk.world.submit()
    desk.turn()
    desk.controller._end()
    assert desk.started[0].code == -9
    assert desk.link.closed
    assert desk.job(job).lapsed


@pytest.mark.process
def test_stop_ends_a_real_job_process(tmp_path: Path) -> None:
    with start_broker(tmp_path / "store", durability="process") as broker:
        pids: list[int] = []

        def spawn(request: JobRequest) -> Any:
            import subprocess

            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pids.append(process.pid)
            return process

        controller = Controller(ControllerConfig(broker.endpoint), spawn)
        thread = threading.Thread(target=controller.run, name="controller")
        thread.start()
        client = Link(broker.endpoint, Hello("client/c", "client", secrets.token_hex(8)))
        client.start()
        data = b"archive"
        ref = PayloadRef(PayloadId("b3-" + digest_buffers([data])), len(data), digest_buffers([data]), "blob")
        client.put(ref, [data])
        job = client.request(SubmitJob(client.next_ref(), "t", "demo", ref))[0].data["job_id"]
        deadline = time.monotonic() + 20
        while not pids:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        controller.stop()
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)
        info = client.request(Ask(client.next_ref(), "job", job))[0].data
        assert info["status"] == "RUNNING"
        kinds = [e["kind"] for e in client.request(Ask(client.next_ref(), "events", job))[0].data["events"]]
        assert "process_lost" in kinds
        client.close()
