from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import JobClient
from fedloom.recipe.client import JobInfo
from fedloom.recipe.results import event_line, read_metrics, write_results
from fedloom.serialization.archive import pack_folder, unpack_archive
from fedloom.serialization.codec import encode_fields, pack
from fedloom.serialization.digest import digest_file
from fedloom.serialization.errors import FaultError, JobError, LinkError, LinkTimeout
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.messages import Answer, Ask, PayloadId, PayloadRef, SubmitJob, Welcome


def job_folder(root: Path) -> Path:
    folder = root / "a job"
    spec = JobSpec(
        "tiny", (Component("a.B"),), (ExecutorSpec(("*",), Component("c.D")),), min_clients=2, num_rounds=3, seed=4
    )
    spec.write(folder)
    return folder


class FakeLink:
    """A broker's answers, without a broker."""

    def __init__(self) -> None:
        self.ref = 0
        self.asked: list[Ask] = []
        self.submitted: list[SubmitJob] = []
        self.payloads: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[Ask], dict[str, Any]]] = {}
        self.big = False
        self.local: Path | None = None
        self.closed = False
        self.welcome: Welcome | None = None

    def start(self, timeout_s: float = 30.0) -> None: ...

    def next_ref(self) -> int:
        self.ref += 1
        return self.ref

    def request(self, message: Any, tail: Any = b"", timeout_s: float = 60.0) -> tuple[Any, bytes]:
        if isinstance(message, SubmitJob):
            self.submitted.append(message)
            return Answer(message.ref, {"job_id": "tiny-1"}), b""
        self.asked.append(message)
        if message.what not in self.answers:
            raise FaultError("unknown_job", f"no job {message.job!r} here")
        data = self.answers[message.what](message)
        return (Answer(message.ref), pack(data)) if self.big else (Answer(message.ref, data), b"")

    def put(self, ref: PayloadRef, source: Path, *, timeout_s: float = 3600.0) -> PayloadRef:
        assert digest_file(source) == ref.digest
        assert source.stat().st_size == ref.size
        self.payloads[ref.id] = source.read_bytes()
        return ref

    def fetch(self, ref: PayloadRef, timeout_s: float = 3600.0, dest: Path | None = None) -> Path | bytes:
        if ref.id not in self.payloads:
            raise FaultError("unknown_payload", ref.id)
        if self.local is not None:
            path = self.local / ref.id
            path.write_bytes(self.payloads[ref.id])
            return path
        if dest is None or ref.size < 10:
            return self.payloads[ref.id]
        dest.write_bytes(self.payloads[ref.id])
        return dest

    def close(self, reason: str = "") -> None:
        self.closed = True

    def keep(self, name: str, data: bytes) -> dict[str, Any]:
        self.payloads[name] = data
        return encode_fields(PayloadRef(PayloadId(name), len(data)))


def test_submit_sends_the_archive_and_what_the_broker_shows(tmp_path: Path) -> None:
    link = FakeLink()
    client = JobClient(link=link)
    folder = job_folder(tmp_path)
    assert client.submit(folder, token="t") == "tiny-1"
    [message] = link.submitted
    assert (message.name, message.token) == ("tiny", "t")
    assert message.meta["rounds"] == 3
    assert message.meta["min_clients"] == 2
    assert message.archive.id == f"b3-{message.archive.digest}"
    unpack_archive(link.payloads[message.archive.id], tmp_path / "out")
    assert JobSpec.load(tmp_path / "out") == JobSpec.load(folder)
    client.close()
    assert not link.closed  # it was lent


def test_an_older_broker_would_begin_anew_and_is_not_asked(tmp_path: Path) -> None:
    link = FakeLink()
    link.welcome = Welcome("s", "e")
    with pytest.raises(FaultError, match="older than this client"):
        JobClient(link=link).submit(job_folder(tmp_path), start="tiny-0")
    assert not link.submitted
    link.welcome = Welcome("s", "e", features=("start",))
    JobClient(link=link).submit(job_folder(tmp_path), start="tiny-0")
    assert [message.start for message in link.submitted] == ["tiny-0"]


def test_submit_an_archive(tmp_path: Path) -> None:
    link = FakeLink()
    archive = tmp_path / "job.tar"
    archive.write_bytes(pack_folder(job_folder(tmp_path)))
    assert JobClient(link=link).submit(archive) == "tiny-1"
    assert link.payloads[link.submitted[0].archive.id] == archive.read_bytes()
    nested = tmp_path / "nested"
    nested.mkdir()
    job_folder(nested)
    archive.write_bytes(pack_folder(nested))
    with pytest.raises(JobError, match="pack what is in it"):
        JobClient(link=link).submit(archive)


def test_a_folder_that_is_no_job_is_never_sent(tmp_path: Path) -> None:
    link = FakeLink()
    with pytest.raises(JobError, match=r"meta.json is missing"):
        JobClient(link=link).submit(tmp_path)
    assert not link.payloads


def answer(status: str = "RUNNING", round: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "job_id": "tiny-1",
        "name": "tiny",
        "status": status,
        "round": round,
        "rounds": 3,
        "sites": ["a", "b"],
        **more,
    }


@pytest.mark.parametrize("big", [False, True])
def test_info_from_the_body_or_the_tail(big: bool) -> None:
    link = FakeLink()
    link.big = big
    model = link.keep("b3-model", b"m")
    link.answers["job"] = lambda ask: answer(commit={"round": 0, "model": model, "best": None}, reason=None)
    info = JobClient(link=link).info("tiny-1")
    assert info == JobInfo("tiny-1", "tiny", "RUNNING", "", 1, 3, ("a", "b"), model=info.model, raw=info.raw)
    assert info.model == PayloadRef(PayloadId("b3-model"), 1)
    assert {"job_id", "status", "round", "rounds", "sites"} <= info.to_json().keys()


def test_wait_and_its_timeout() -> None:
    link = FakeLink()
    states = iter([answer("SUBMITTED", 0), answer(), answer(), answer("FINISHED:COMPLETED", 3)])
    link.answers["status"] = lambda ask: next(states)
    link.answers["job"] = lambda ask: answer("FINISHED:COMPLETED", 3)  # at the end, with the sites
    seen: list[str] = []
    info = JobClient(link=link).wait("tiny-1", 30, lambda info: seen.append(info.status))
    assert info.ended
    assert seen == ["SUBMITTED", "RUNNING", "FINISHED:COMPLETED"]
    link.answers["status"] = lambda ask: answer()
    with pytest.raises(LinkTimeout, match=r"has not ended within 0 s: RUNNING, round 1 of 3"):
        JobClient(link=link).wait("tiny-1", 0)


def events(count: int, page: int = 2) -> Callable[[Ask], dict[str, Any]]:
    def ask(message: Ask) -> dict[str, Any]:
        numbers = [n for n in range(1, count + 1) if n > message.after][:page]
        return {
            "events": [
                {"seq": n, "at": 0, "kind": "log", "site": "a" if n % 2 else "../b", "text": f"line {n}", "data": {}}
                for n in numbers
            ],
            "next": numbers[-1] if numbers else message.after,
        }

    return ask


def test_events_in_pages_and_followed() -> None:
    link = FakeLink()
    link.answers["events"] = events(5)
    client = JobClient(link=link)
    assert [event["seq"] for event in client.events("j")] == [1, 2, 3, 4, 5]
    assert [event["seq"] for event in client.events("j", 3)] == [4, 5]
    states = iter([answer(), answer("FINISHED:COMPLETED")])
    link.answers["status"] = lambda ask: next(states)
    seen: list[int] = []
    for event in client.follow("j"):
        seen.append(event["seq"])
        if event["seq"] == 5:
            link.answers["events"] = events(7)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def finished(link: FakeLink, tmp_path: Path) -> JobClient:
    model, best = link.keep("b3-model", b"model bytes, many"), link.keep("b3-best", b"best")
    archive = link.keep("b3-job", pack_folder(job_folder(tmp_path)))
    link.answers["job"] = lambda ask: answer(
        "FINISHED:COMPLETED",
        3,
        commit={
            "round": 2,
            "model": model,
            "best": best,
        },
        archive=archive,
        submitted_at=100.0,
        ended_at=160.5,
    )
    records = [
        {
            "best": r == 2,
            "round": r,
            "metrics": {"accuracy": 0.5 + r / 10},
            "results": 2,
            "bytes": 10,
            "sites": [{"name": "a"}],
        }
        for r in range(3)
    ]
    link.answers["rounds"] = lambda ask: {"rounds": records}
    link.answers["events"] = events(5)
    return JobClient(link=link)


@pytest.mark.parametrize("local", [False, True])
def test_the_result_folder(tmp_path: Path, local: bool) -> None:
    link = FakeLink()
    if local:
        link.local = tmp_path / "spool"
        link.local.mkdir()
    client = finished(link, tmp_path)
    out = client.download("tiny-1", tmp_path / "out put")
    assert (out / "model.safetensors").read_bytes() == b"model bytes, many"
    assert (out / "best_model.safetensors").read_bytes() == b"best"
    if link.local:
        assert (link.local / "b3-model").read_bytes() == b"model bytes, many"  # copied, never moved
    assert [record["round"] for record in read_metrics(out)] == [0, 1, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "FINISHED:COMPLETED"
    assert summary["seconds"] == 60.5
    assert summary["metrics"] == {"accuracy": 0.7}
    assert summary["best_round"] == 1
    assert (summary["results"], summary["bytes"]) == (6, 30)
    assert summary["files"]["model.safetensors"] == 17
    assert JobSpec.load(out / "job").name == "tiny"
    assert (out / "logs" / "a.log").read_text() == "line 1\nline 3\nline 5\n"  # as it was printed
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["2e2e2f62.log", "a.log"]
    assert sorted(path.name for path in (out / "sites").iterdir()) == ["a", "b"]
    assert not list(out.rglob("*.part")) + list(out.rglob("*.copy")) + list(out.rglob("*.tar"))
    (out / "mine.txt").write_text("kept")
    client.download("tiny-1", out)  # again, into what fedloom made
    assert (out / "mine.txt").exists()
    (out / "summary.json").write_text('{"job_id": "another"}')
    client.download("tiny-1", out)
    assert not (out / "mine.txt").exists()
    assert (tmp_path / "out put.previous" / "mine.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(JobError, match="did not make"):
        client.download("tiny-1", tmp_path / "mine")


def test_results_of_a_job_that_has_not_committed(tmp_path: Path) -> None:
    link = FakeLink()
    link.answers["job"] = lambda ask: answer("FINISHED:FAILED", 0, commit=None, reason="no site")
    link.answers["rounds"] = lambda ask: {"rounds": []}
    link.answers["events"] = lambda ask: {"events": [], "next": 0}
    out = write_results(JobClient(link=link), "tiny-1", tmp_path / "out")
    assert not (out / "model.safetensors").exists()
    assert (out / "metrics.jsonl").read_text() == ""
    assert json.loads((out / "summary.json").read_text())["reason"] == "no site"


def test_event_line() -> None:
    line = event_line({"at": 0, "kind": "state_lost", "text": "gone\n", "data": {"round": 1}})
    assert line.endswith('state_lost gone {"round": 1}')


def test_no_broker_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="no broker answered") as caught:
        JobClient(f"ipc://{tmp_path}/none", connect_s=0.3)
    assert not isinstance(caught.value, LinkTimeout)
    with pytest.raises(JobError, match="an endpoint such as"):
        JobClient("localhost:7600")


def test_rounds_behind_those_that_are_known(tmp_path: Path) -> None:
    link = FakeLink()
    records = [{"round": number} for number in range(7)]

    def two_at_a_time(ask: Ask) -> dict[str, Any]:
        page = records[ask.after : ask.after + 2]
        return {"rounds": page, "next": ask.after + len(page)}

    link.answers["rounds"] = two_at_a_time
    client = JobClient(link=link)
    assert client.rounds("tiny-1") == records
    link.asked.clear()
    assert client.rounds("tiny-1", after=6) == [{"round": 6}]
    assert [ask.after for ask in link.asked] == [6, 7]
