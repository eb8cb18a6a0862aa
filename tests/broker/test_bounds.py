"""Each bound of the control process is reached: it holds, the answer says what is allowed, and work goes on.

`docs/bounds.md` is compared with the code; what the data process bounds is in ``data/test_bounds.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker.bounds import to_plain
from fedloom.broker.control import ControlConfig, ControlLoop
from fedloom.broker.figures import figures
from fedloom.broker.ledger import Limits
from fedloom.broker.options import OPTIONS, parse
from fedloom.broker.sessions import Timing
from fedloom.broker.spool import Spool
from fedloom.broker.transferlimits import Limits as TransferLimits
from fedloom.broker.transfers import Transfers
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Claimed,
    ClaimJob,
    Commit,
    Done,
    EndJob,
    Event,
    Fault,
    Grant,
    Packet,
    PayloadId,
    PayloadRef,
    Ping,
    Pong,
    Put,
    Receipt,
    SubmitJob,
    TaskRef,
    Welcome,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "bounds.md"
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \| `([\w/.]+)::(\w+)` \|$", re.M)

Make = Callable[..., Any]


@pytest.fixture(name="make")
def make_fixture(tools: Any, tmp_path: Path) -> Iterator[Make]:
    made: list[Any] = []

    def make(**settings: Any) -> Any:
        made.append(tools.World(tmp_path / f"store{len(made)}", **settings))
        return made[-1]

    yield make
    for world in made:
        world.journal.close()


def bound(world: Any, name: str) -> dict[str, Any]:
    """What Ask `broker` says of a bound."""
    client = world.client()
    client.send(Ask(1, "broker"))
    message, tail = client.got.pop()
    assert isinstance(message, Answer) and not tail
    found = message.data["bounds"][name]
    world.disconnect(client)
    world.core.end_session(world.core.state.sessions.by_node[client.hello.node], world.now, polite=True)
    world.turn()
    return found


def refused(peer: Any, name: str, *says: object) -> Fault:
    """The one typed answer, which names the bound."""
    fault = peer.one(Fault)
    for word in (name, *says):
        assert str(word) in fault.text, fault.text
    return fault


def works(world: Any, tools: Any, token: str = "after") -> None:
    """A round of a new job comes to its end."""
    executor = world.executor(f"{token}-site")
    job = world.job(token)
    job.send(*tools.opening(job, sites=executor.sites, min_clients=1))
    assert job.one(Receipt).state == "open"
    (task,) = tools.work(executor)
    assert tools.finish(executor, task).tasks
    assert job.take(Receipt)[-1].state == "closed" and tools.indices(job) == [0]


# ---------------------------------------------------------------- the page and the code


def test_the_page_and_the_code_say_the_same(world: Any, tmp_path: Path) -> None:
    rows = {row[0]: row for row in ROW.findall(PAGE.read_text())}
    transfers = Transfers(Spool(tmp_path / "s"), TransferLimits(), boot="ab", next_epoch=lambda: 1)
    world.data(Event("", "bounds", data=to_plain(transfers.figures())))
    shown = figures(world.core.state)
    assert sorted(rows) == sorted(shown), "every bound that is shown has a line, and the other way round"
    for name, default, unit, reached, file, test in rows.values():
        assert name in OPTIONS, f"{name} cannot be set"
        assert parse([f"{name}={default.replace(' ', '')}"])[name] == OPTIONS[name], f"{name}: default {default}"
        assert unit and reached
        functions = [n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)]
        assert test in functions, f"{file} has no {test}"
    named = {name for name in OPTIONS if re.search(r"^max_|_bytes$|_messages$|_per_s$", name)}
    text = PAGE.read_text()
    assert not [name for name in named if f"`{name}`" not in text], "each is on the page"


# ---------------------------------------------------------------- sessions


def test_sessions(make: Make, tools: Any) -> None:
    world = make(timing=Timing(max_sessions=4))
    peers = [world.client() for _ in range(4)]
    late = world.client()
    assert refused(late, "max_sessions", 4).code == "too_many" and not late.take(Welcome)
    world.disconnect(peers[0])
    world.core.end_session(world.core.state.sessions.by_node[peers[0].hello.node], world.now, polite=True)
    assert late.connect().take(Welcome)
    for peer in (*peers[1:], late):
        world.core.end_session(world.core.state.sessions.by_node[peer.hello.node], world.now, polite=True)
    assert bound(world, "max_sessions") == {"limit": 4, "used": 1, "reached": 1}


def test_hellos_that_wait(make: Make, tools: Any) -> None:
    world = make(timing=Timing(max_waiting=2))
    world.executor("a", node="executor/a", boot="b1")
    rivals = [world.executor("a", node="executor/a", boot=f"other{n}") for n in range(2)]
    third = world.executor("a", node="executor/a", boot="third")
    assert refused(third, "max_waiting", 2).code == "too_many"
    assert bound(world, "max_waiting")["used"] == 2
    world.pass_time(3)
    assert all(rival.take(Fault) for rival in rivals), "those that waited are told"
    works(world, tools)


def test_messages_that_cannot_be_read(make: Make, tools: Any) -> None:
    world = make(timing=Timing(max_strikes=3))
    client = world.client()
    for _ in range(3):
        client.send(ClaimJob(1))  # a role's fault is no strike
    assert [f.code for f in client.take(Fault)] == ["forbidden"] * 3
    executor = world.executor("bad")
    for _ in range(3):
        executor.send(Done("j", "g", ()), b"bytes that nobody announced")
    assert executor.take(Fault)[-1].fatal
    assert "executor/bad" not in world.core.state.sessions.by_node
    assert bound(world, "max_strikes")["reached"] == 1
    works(world, tools)


def test_outbox_messages(make: Make, tools: Any) -> None:
    world = make(timing=Timing(outbox_messages=8))
    client = world.client()
    core, packet = world.core, Ask(1, "jobs")
    for _ in range(20):
        core.handle(client.address, Packet(packet), world.now)
    core.commit()
    session = core.state.sessions.by_node[client.hello.node]
    assert len(session.outbox) == 8 and session.overflowed
    world.now += 1.0
    core.tick(world.now)
    assert client.hello.node not in core.state.sessions.by_node, "it comes back and asks again"
    world.turn()
    assert bound(world, "outbox_messages") == {"limit": 8, "used": 0, "reached": 1}
    assert client.connect().take(Welcome)
    works(world, tools)


def test_outbox_bytes(make: Make, tools: Any) -> None:
    world = make(timing=Timing(outbox_bytes=50_000))
    client = world.client()
    session = world.core.state.sessions.by_node[client.hello.node]
    for _ in range(10):
        session.push(Pong(), bytes(20_000))
    assert session.overflowed and session.outbox_bytes < 50_000 + 20_512
    world.now += 1.0
    world.core.tick(world.now)
    assert client.hello.node not in world.core.state.sessions.by_node
    assert bound(world, "outbox_bytes")["reached"] == 1
    works(world, tools)


def test_attempts_that_an_executor_says_it_holds(make: Make, tools: Any) -> None:
    world = make(max_held=3)
    executor = world.executor("a")
    executor.connect(held=tuple(TaskRef(f"t{n}", 1) for n in range(4)))
    assert refused(executor, "max_held", 4, 3).code == "too_many"
    assert bound(world, "max_held")["reached"] == 1
    executor.connect(held=tuple(TaskRef(f"t{n}", 1) for n in range(3)))
    assert executor.take(Welcome)
    works(world, tools)


def test_answers_to_connections_without_a_session(make: Make, tools: Any) -> None:
    world = make(max_loose=5)
    for n in range(20):
        world.core.handle(b"stranger%d" % n, Packet(Ping()), world.now)
    world.core.commit()
    assert len(world.core.loose) == 5
    world.core.loose.clear()
    assert bound(world, "max_loose")["reached"] == 15
    works(world, tools)


# ---------------------------------------------------------------- jobs, gathers, tasks


def test_jobs_and_those_that_ended_first_are_forgotten(make: Make, tools: Any) -> None:
    world = make(max_jobs=2)
    first = world.job("first")
    name = first.hello.job
    model = first.put(b"model", job=name, claim=1)
    first.send(Commit(first.ref(), name, 1, 0, model=model, record={"round": 0}))
    second = world.job("second")
    client = world.client()
    client.send(SubmitJob(1, "third", "x", client.put(b"archive")))
    assert refused(client, "max_jobs", 2).code == "too_many"
    first.send(EndJob(first.ref(), name, 1, "FINISHED:COMPLETED"))
    assert model.id in world.core.state.payloads.rows, "a job that has ended keeps its model"
    client.send(SubmitJob(2, "third", "x", client.put(b"archive")))
    assert client.one(Answer).data["job_id"]
    assert name not in world.core.state.jobs.jobs and model.id not in world.core.state.payloads.rows
    world.restart()
    assert len(world.core.state.jobs.jobs) == 2 and second.hello.job in world.core.state.jobs.jobs
    for table in ("commits", "events"):
        assert not world.journal._db.execute(f"SELECT count(*) FROM {table} WHERE job=?", (name,)).fetchone()[0]
    client = world.client()
    client.send(Ask(1, "job", name))
    assert client.one(Fault).code == "unknown_job"
    assert bound(world, "max_jobs")["used"] == 2


def test_crashes(make: Make, tools: Any) -> None:
    world = make(max_crashes=2)
    job = world.submit()
    controller = world.peer("controller", "controller/c")
    for _ in range(2):
        controller.send(ClaimJob(controller.ref()))
        world.pass_time(12)
        claimed = controller.one(Claimed)
        controller.send(ClaimJob(0, job, claimed.claim, "killed by signal 9"))
    assert world.core.state.jobs.jobs[job].status == "FINISHED:FAILED"
    assert "died 2 times" in world.core.state.jobs.jobs[job].reason
    assert bound(world, "max_crashes")["reached"] == 1


def test_tasks_of_a_gather_and_of_a_job(make: Make, tools: Any) -> None:
    world = make(limits=Limits(max_tasks=3, max_job_tasks=5))
    job = world.job()
    sites = [f"s{n}" for n in range(9)]
    job.send(*tools.opening(job, sites=sites[:4], min_clients=1))
    assert refused(job, "max_tasks", 4, 3).code == "too_many"
    job.send(*tools.opening(job, sites=sites[:3], min_clients=1))
    assert job.one(Receipt).tasks == 3
    job.send(*tools.opening(job, step=1, sites=sites[3:6], min_clients=1))
    assert refused(job, "max_job_tasks", 6, 5, "commit").code == "too_many"
    job.send(*tools.opening(job, step=1, sites=sites[3:5], min_clients=1))
    assert job.one(Receipt).tasks == 2
    assert bound(world, "max_tasks") == {"limit": 3, "used": 3, "reached": 1}
    assert bound(world, "max_job_tasks") == {"limit": 5, "used": 5, "reached": 1}
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    assert bound(world, "max_job_tasks")["used"] == 0
    works(world, tools)


def test_gathers_before_a_commit(make: Make, tools: Any) -> None:
    world = make(limits=Limits(max_gathers=2))
    job = world.job()
    for step in range(3):
        job.send(*tools.opening(job, step=step, sites=["a"], min_clients=1))
    assert len(job.take(Receipt)) == 2 and refused(job, "max_gathers", 2, "commit").code == "too_many"
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    job.send(*tools.opening(job, round=1, sites=["a"], min_clients=1))
    assert job.one(Receipt).state == "open"
    assert bound(world, "max_gathers")["reached"] == 1


def test_rounds_of_committed_gathers(make: Make, tools: Any) -> None:
    world = make(limits=Limits(max_past=2))
    job = world.job()
    for round_ in range(5):
        job.send(*tools.opening(job, round=round_, sites=["a"], min_clients=1))
        job.send(Commit(job.ref(), job.hello.job, 1, round_))
    assert bound(world, "max_past") == {"limit": 2, "used": 2, "reached": 3}
    works(world, tools)


def test_late_results(make: Make, tools: Any) -> None:
    world = make(max_late=2)
    executor, job = world.executor("a"), world.job()
    for round_ in range(4):
        job.send(*tools.opening(job, round=round_, sites=["a"], min_clients=1))
        (task,) = tools.work(executor)
        job.send(Commit(job.ref(), job.hello.job, 1, round_))
        assert tools.finish(executor, task).refused, "its round is over"
    assert len(world.core.state.jobs.jobs[job.hello.job].late) == 2
    assert bound(world, "max_late") == {"limit": 2, "used": 2, "reached": 2}
    works(world, tools)


# ---------------------------------------------------------------- what is told and kept


def test_plain_data_of_users(make: Make, tools: Any) -> None:
    world = make(max_meta_bytes=100, max_config_bytes=100, max_result_meta_bytes=100)
    client = world.client()
    archive = client.put(b"archive")
    client.send(SubmitJob(1, "t", "x", archive, meta={"a": "x" * 200}))
    assert refused(client, "max_meta_bytes", 100).code == "too_large"
    executor, job = world.executor("a"), world.job()
    job.send(*tools.opening(job, sites=["a"], min_clients=1, config={"a": "x" * 200}))
    assert refused(job, "max_config_bytes", 100).code == "too_large"
    job.send(*tools.opening(job, sites=["a"], min_clients=1))
    (task,) = tools.work(executor)
    (refusal,) = tools.finish(executor, task, meta={"a": "x" * 200}).refused
    assert refusal.code == "too_large" and "max_result_meta_bytes" in refusal.reason
    for name in ("max_meta_bytes", "max_config_bytes", "max_result_meta_bytes"):
        assert bound(world, name)["reached"] == 1
    works(world, tools)


def test_events_and_their_bytes(make: Make, tools: Any) -> None:
    world = make(max_events=50, max_event_bytes=1000)
    job = world.job()
    name = job.hello.job
    for n in range(200):
        job.send(Event(name, "metric", data={"n": n}))
    count = world.journal._db.execute("SELECT count(*) FROM events").fetchone()[0]
    assert 50 <= count <= 51
    job.send(Event(name, "log", text="x" * 5000 + "end"))
    job.send(Event(name, "metric", data={"large": "x" * 2000}))
    *_, text, data = world.journal.events(name, 0, 1000)
    assert len(text.text) == 1000 and text.text.endswith("end")
    assert "max_event_bytes" in data.data["left_out"]
    assert bound(world, "max_events")["reached"] > 100 and bound(world, "max_event_bytes")["reached"] == 2
    works(world, tools)


def test_journal_bytes(make: Make, tools: Any) -> None:
    world = make(journal_bytes=300_000)
    job = world.job()
    for _ in range(20):
        job.send(Event(job.hello.job, "log", text="x" * 16_000))
    world.now += 61.0
    job.send(Ping())
    world.turn()
    before = world.journal.size()
    job.send(Event(job.hello.job, "log", text="x" * 16_000))
    assert world.journal.size() == before > 300_000, "events are left out"
    client = world.client()
    client.send(SubmitJob(1, "t", "x", client.put(b"archive")))
    assert refused(client, "journal_bytes", 300_000).code == "journal_full"
    executor = world.executor("a")
    job.send(*tools.opening(job, sites=["a"], min_clients=1))
    (task,) = tools.work(executor)
    assert tools.finish(executor, task).tasks, "what runs goes on"
    assert bound(world, "journal_bytes")["reached"] == 2


def test_small_payloads_in_memory(make: Make, tools: Any) -> None:
    world = make(small_cache_bytes=50_000)
    client = world.client()
    refs = [client.put(bytes([n]) * 20_000) for n in range(6)]
    for n, ref in enumerate(refs):
        assert world.core.state.small(ref) == bytes([n]) * 20_000
    found = bound(world, "small_cache_bytes")
    assert found["used"] <= 50_000 and found["reached"] == 4
    assert world.core.state.small(refs[0]) == bytes(20_000), "what went is read again"


# ---------------------------------------------------------------- the spool


def ask(world: Any, size: int, name: str, **owner: Any) -> Any:
    """What the data process is answered when it asks for an upload."""
    (answer,) = world.data(Put(PayloadRef(PayloadId(name), size), f"{abs(hash(name)):032x}"[-32:], **owner))
    return answer


def round_of(world: Any, tools: Any, sites: int) -> tuple[Any, list[Any]]:
    """A job's open gather, and its tasks."""
    job = world.job()
    pool = world.executor(*(f"s{n}" for n in range(sites)), node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=sites))
    return job, tools.work(pool)


def test_spool_bytes_and_whose_turn_it_is(make: Make, tools: Any) -> None:
    """Uploads wait in the order in which they asked first; the nearer the turn, the sooner they ask again."""
    world = make(quota_bytes=10_000)
    job, tasks = round_of(world, tools, 30)

    def upload(n: int, size: int = 4_000) -> Any:
        task = tasks[n][1].task
        return ask(world, size, f"r-{task}.1", job=job.hello.job, task=task, attempt=1)

    assert [type(upload(n)) for n in range(2)] == [Grant, Grant]
    waits = [upload(n) for n in range(2, 30)]
    assert {w.code for w in waits} == {"quota"} and str(10_000) in waits[0].reason
    times = [w.retry_after_s for w in waits]
    assert times == sorted(times) and times[0] < 0.2 and sum(1 / t for t in times) < 150, "no storm of questions"
    assert bound(world, "quota_bytes")["reached"] == 28 and bound(world, "max_turns")["used"] == 28
    world.core.state.quota.landed(f"r-{tasks[0][1].task}.1")
    assert upload(20, 1_000).code == "quota", "a smaller one does not overtake those before it"
    assert upload(3).code == "quota" and type(upload(2)) is Grant, "the first of them is next"
    world.pass_time(60, step=5)
    world.core.state.quota.landed(f"r-{tasks[1][1].task}.1")
    assert type(upload(25)) is Grant, "who does not ask any more loses its turn"


def test_turns(make: Make, tools: Any) -> None:
    world = make(quota_bytes=1_000, max_turns=3)
    job, tasks = round_of(world, tools, 8)
    for _, ref, _ in tasks:
        ask(world, 900, f"r-{ref.task}.1", job=job.hello.job, task=ref.task, attempt=1)
    assert bound(world, "max_turns") == {"limit": 3, "used": 3, "reached": 4}
    job.send(Commit(job.ref(), job.hello.job, 1, 0))
    assert bound(world, "max_turns")["used"] == 0, "nobody waits for a round that is over"
    works(world, tools)


def test_bytes_of_one_site(make: Make, tools: Any) -> None:
    world = make(site_bytes=1_000)
    job = world.job()
    executor = world.executor("a", capacity=3)
    for step in range(2):
        job.send(*tools.opening(job, step=step, sites=["a"], min_clients=1))
    (_, one, _), (_, two, _) = tools.work(executor)
    owner = {"job": job.hello.job, "attempt": 1}
    large = ask(world, 1_001, f"r-{one.task}.1", task=one.task, **owner)
    assert (large.code, large.retry_after_s) == ("quota", 0.0) and "site_bytes" in large.reason
    assert type(ask(world, 800, f"r-{one.task}.1", task=one.task, **owner)) is Grant
    waits = ask(world, 800, f"r-{two.task}.1", task=two.task, **owner)
    assert waits.code == "quota" and waits.retry_after_s > 0
    assert bound(world, "site_bytes")["reached"] == 2
    world.core.state.quota.landed(f"r-{one.task}.1")
    assert type(ask(world, 800, f"r-{two.task}.1", task=two.task, **owner)) is Grant


def test_messages_for_the_data_process(tmp_path: Path) -> None:
    config = ControlConfig(
        tmp_path / "store", f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/i", bounds={"data_outbox_messages": 3}
    )
    loop = ControlLoop(config)
    try:
        loop.core.data_out += [Pong()] * 10
        loop._send_all()
        assert len(loop._data_outbox) == 3
        shown = figures(loop.core.state)["data_outbox_messages"]
        assert (shown.limit, shown.used, shown.reached) == (3, 3, 7)
    finally:
        loop.close()
