"""The spool's quota: uploads wait, a round's own payloads have their reserve, a job that cannot fit is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fedloom.serialization.messages import (
    Abort,
    Answer,
    Ask,
    Checkpoint,
    Claimed,
    ClaimJob,
    Commit,
    Done,
    DoneItem,
    EndJob,
    Fault,
    Grant,
    PayloadId,
    PayloadRef,
    Put,
    Receipt,
    Stored,
    SubmitJob,
)

MODEL = 1_000_000


class Spooled:
    """A world with a quota, whose data process is played: payloads are files of the right length."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.streams = 0

    def ask(self, size: int, name: str, **owner: Any) -> Any:
        """What control answers to the data process's question."""
        self.streams += 1
        stream = f"{self.streams:032x}"
        (answer,) = self.world.data(Put(PayloadRef(PayloadId(name), size), stream, **owner))
        return answer

    def land(self, size: int, name: str, **owner: Any) -> PayloadRef:
        """Admitted, and then whole."""
        answer = self.ask(size, name, **owner)
        assert isinstance(answer, Grant), answer
        path = self.world.core.state.spool.path(name)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        ref = PayloadRef(PayloadId(name), size)
        assert self.world.data(Put(ref, answer.stream, local="landed", **owner)) == [Stored(answer.stream, payload=ref)]
        return ref

    def spool(self) -> dict[str, int]:
        client = self.world.client()
        client.send(Ask(1, "broker"))
        return client.one(Answer).data["spool"]


@pytest.fixture(name="make")
def make_fixture(tools: Any, tmp_path: Path) -> Iterator[Callable[[int], Spooled]]:
    made: list[Any] = []

    def make(quota_bytes: int) -> Spooled:
        world = tools.World(tmp_path / f"store{len(made)}", quota_bytes=quota_bytes)
        made.append(world)
        return Spooled(world)

    yield make
    for world in made:
        world.journal.close()


def opened(one: Spooled, tools: Any, sites: int) -> tuple[Any, Any, list[Any], str]:
    """A job with a model and an open gather: the job, its pool, the tasks, the gather."""
    job = one.world.job()
    owner = {"job": job.hello.job, "claim": 1}
    model = one.land(MODEL, "b3-model", **owner)
    pool = one.world.executor(*(f"site-{i}" for i in range(sites)), node="pool/p")
    job.send(*tools.opening(job, sites=pool.sites, min_clients=sites, payload=model))
    return job, pool, tools.work(pool), job.one(Receipt).gather


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_file_whose_uploader_died_before_its_row_goes_with_what_it_was_for(
    make: Callable[[int], Spooled], tools: Any, asked_again: bool
) -> None:
    one = make(20 * MODEL)
    spool = one.world.core.state.spool
    job, _, tasks, _ = opened(one, tools, 2)
    assign, ref, _ = tasks[0]
    name = f"r-{ref.task}.1"
    owner = {"job": assign.job, "task": ref.task, "attempt": 1}
    assert isinstance(one.ask(6, name, **owner), Grant)
    spool.store(name, [b"result"])  # and the data process dies
    job.send(EndJob(3, assign.job, 1, "FINISHED:COMPLETED"))
    if asked_again:
        assert one.ask(6, name, **owner).code == "closed"
    one.world.turn()
    assert not spool.exists(name)
    assert one.spool()["coming_bytes"] == 0


def test_uploads_wait_for_a_checkpoint_and_nothing_is_lost(make: Callable[[int], Spooled], tools: Any) -> None:
    one = make(14 * MODEL)
    world = one.world
    job, pool, tasks, gather = opened(one, tools, 20)
    jid = job.hello.job
    todo = list(tasks)
    covered = waited = checkpoints = 0
    while todo:
        assign, ref, site = todo[0]
        name = f"r-{ref.task}.{ref.attempt}"
        answer = one.ask(MODEL, name, job=jid, task=ref.task, attempt=1)
        if isinstance(answer, Abort):
            assert answer.code == "quota" and answer.retry_after_s > 0
            waited += 1
            spool = one.spool()
            assert spool["used_bytes"] + spool["coming_bytes"] <= spool["quota_bytes"]
            # uploads have all they may have: the job's reserve is still there, for an int64 checkpoint twice the model
            checkpoints += 1
            name = f"p-{checkpoints}"
            checkpoint = one.land(2 * MODEL, name, job=jid, claim=1)
            covered = 20 - len(todo)
            job.send(Checkpoint(job.ref(), jid, 1, gather, checkpoint, covered))
            assert job.one(Answer).data == {"covered": covered}
            assert checkpoints < 20
            continue
        todo.pop(0)
        payload = one.land(MODEL, name, job=jid, task=ref.task, attempt=1)
        pool.send(Done(assign.job, gather, (DoneItem(ref.task, 1, site, payload),)))
        assert pool.one(Stored).tasks == (ref,)
    assert waited >= 2 and job.take(Receipt)[-1].results == 20
    new = one.land(MODEL, "b3-next", job=jid, claim=1)
    job.send(Commit(job.ref(), jid, 1, 0, model=new))
    job.one(Answer)
    spool = one.spool()
    assert spool["used_bytes"] - MODEL < 100 and not spool["coming_bytes"] and spool["waits"] == waited
    assert spool["reserved_bytes"] == 5 * MODEL  # two checkpoints, and the best model once it is another
    world.restart()
    assert one.spool()["used_bytes"] == spool["used_bytes"]


def test_what_is_coming_counts_until_it_lands_or_is_not_wanted(make: Callable[[int], Spooled], tools: Any) -> None:
    one = make(13 * MODEL)
    job, pool, tasks, _ = opened(one, tools, 2)
    (_, first, _), (_, second, _) = tasks
    room = 13 - 1 - 5  # less the model and the reserve
    answer = one.ask(room * MODEL - 100_000, f"r-{first.task}.1", job=job.hello.job, task=first.task, attempt=1)
    assert isinstance(answer, Grant)
    again = one.ask(room * MODEL - 100_000, f"r-{first.task}.1", job=job.hello.job, task=first.task, attempt=1)
    assert isinstance(again, Grant), "a repeated question takes nothing more"
    wanted = {"job": job.hello.job, "task": second.task, "attempt": 1}
    assert one.ask(MODEL, f"r-{second.task}.1", **wanted).code == "quota"
    pool.connect(held=(second,))  # the first is given out again: what came of it is not wanted
    assert isinstance(one.ask(MODEL, f"r-{second.task}.1", **wanted), Grant)


def test_an_upload_that_nobody_goes_on_with_gives_its_room_back(make: Callable[[int], Spooled]) -> None:
    one = make(10 * MODEL)
    assert isinstance(one.ask(9 * MODEL, "b3-a"), Grant)
    assert one.ask(9 * MODEL, "b3-b").code == "quota"
    one.world.pass_time(700, step=20)
    assert isinstance(one.ask(9 * MODEL, "b3-b"), Grant)


def test_a_job_that_cannot_fit_is_refused_with_the_figures(make: Callable[[int], Spooled]) -> None:
    one = make(6 * MODEL)
    client = one.world.client()
    archive = client.put(b"archive")
    client.send(SubmitJob(client.ref(), "t", "x", archive, meta={"model_bytes": MODEL}))
    fault = client.one(Fault)
    assert fault.code == "quota"
    assert all(str(n) in fault.text for n in (MODEL, 7 * MODEL + archive.size, 6 * MODEL))
    client.send(SubmitJob(client.ref(), "t", "x", archive, meta={"model_bytes": MODEL // 2}))
    client.one(Answer)
    # a job that did not say how large its model is learns it when it puts it
    job = one.world.job("other")
    answer = one.ask(MODEL, "b3-model", job=job.hello.job, claim=1)
    assert (answer.code, answer.retry_after_s) == ("quota", 0.0) and str(6 * MODEL) in answer.reason


def test_a_second_job_starts_when_the_first_has_left_room(make: Callable[[int], Spooled], tools: Any) -> None:
    one = make(11 * MODEL)
    first, *_ = opened(one, tools, 1)
    second = one.world.job("second")
    owner = {"job": second.hello.job, "claim": 1}
    answer = one.ask(MODEL, "b3-other", **owner)
    assert answer.code == "quota" and answer.retry_after_s > 0
    first.send(EndJob(first.ref(), first.hello.job, 1, "FINISHED:COMPLETED"))
    first.one(Answer)
    assert isinstance(one.ask(MODEL, "b3-other", **owner), Grant)


def test_a_running_job_keeps_room_for_a_result(make: Callable[[int], Spooled], tools: Any) -> None:
    """A smaller job, or a client, would take the last of it, and what they commit or submit would stay there."""
    one = make(8 * MODEL)
    first, _, ((_, ref, _),), _ = opened(one, tools, 1)  # 2 models are free
    second = one.world.job("second")
    answer = one.ask(MODEL // 4, "b3-other", job=second.hello.job, claim=1)  # it needs 7/4
    assert answer.code == "quota" and answer.retry_after_s > 0
    assert one.ask(MODEL * 3 // 2, "b3-clients").code == "quota"
    one.land(MODEL, f"r-{ref.task}.1", job=first.hello.job, task=ref.task, attempt=1)


def test_the_model_of_a_round_that_is_not_open_yet_is_no_part_of_the_reserve(
    make: Callable[[int], Spooled], tools: Any
) -> None:
    """Others would take that much of it before the round opens."""
    one = make(14 * MODEL)
    job = one.world.job()
    model = one.land(MODEL, "b3-model", job=job.hello.job, claim=1)
    assert one.spool()["reserved_bytes"] == 5 * MODEL
    job.send(*tools.opening(job, sites=("site-0",), payload=model))
    assert one.spool()["reserved_bytes"] == 5 * MODEL


def test_room_is_kept_for_a_model_that_the_disk_has_lost(make: Callable[[int], Spooled], tools: Any) -> None:
    one = make(14 * MODEL)
    opened(one, tools, 1)
    before = one.spool()
    one.world.core.state.spool.path("b3-model").unlink()
    one.world.restart()
    spool = one.spool()
    assert spool["used_bytes"] == before["used_bytes"] - MODEL
    assert spool["reserved_bytes"] == before["reserved_bytes"] + MODEL, "the job puts it again"


def test_a_partial_whose_executor_died_before_its_done_goes_in_an_hour(
    make: Callable[[int], Spooled], tools: Any
) -> None:
    """The round may not come to its end for want of that room."""
    one = make(14 * MODEL)
    job, *_ = opened(one, tools, 1)
    one.land(2 * MODEL, "p-1", job=job.hello.job)
    one.world.pass_time(3900, step=195)
    assert one.spool()["used_bytes"] - MODEL < 100


def test_small_payloads_of_clients_are_bounded_too(make: Callable[[int], Spooled]) -> None:
    one = make(100_000)
    client = one.world.client()
    for n in range(3):
        client.put(bytes([n]) * 32_000)
    with pytest.raises(AssertionError):
        client.put(b"x" * 32_000)
    assert client.one(Fault).code == "quota"


def test_without_a_quota_all_may_come(make: Callable[[int], Spooled]) -> None:
    one = make(0)
    assert isinstance(one.ask(1 << 50, "b3-a"), Grant)
    assert one.spool()["quota_bytes"] == 0


def test_the_question_of_a_controller_is_answered_while_the_spool_is_full(make: Callable[[int], Spooled]) -> None:
    one = make(1000)
    one.ask(1000, "b3-a")
    controller = one.world.peer("controller", "controller/a")
    controller.send(ClaimJob(1))
    assert not controller.take(Claimed) and not controller.take(Fault)


def test_what_a_commit_keeps_beside_its_model_is_reserved(make: Callable[[int], Spooled], tools: Any) -> None:
    """Else a best model that is not the last takes the room of the results: of two jobs neither got one any more."""
    one = make(30 * MODEL + 1000)
    first, second = one.world.job("first"), one.world.job("second")
    owner = {"job": first.hello.job, "claim": 1}
    model = one.land(3 * MODEL, "b3-first", **owner)
    first.send(*tools.opening(first, sites=("site-1",), payload=model))
    answer = one.ask(2 * MODEL, "b3-second", job=second.hello.job, claim=1)
    assert isinstance(answer, Abort) and answer.retry_after_s > 0, "it starts when the first has ended"
    for round_, best in ((0, True), (1, False)):
        model = one.land(3 * MODEL, f"b3-first.{round_}", **owner)
        before = one.spool()
        first.send(Commit(first.ref(), first.hello.job, 1, round_, model=model, best=best))
        first.one(Answer)
        spool = one.spool()
        taken, was = (s["used_bytes"] + s["reserved_bytes"] for s in (spool, before))
        assert taken <= was, "a commit takes nothing that was not kept for it"


def test_a_gather_takes_partials_only_where_one_has_room(make: Callable[[int], Spooled], tools: Any) -> None:
    """A partial is as large as a checkpoint, twice the model: where only one model is kept free it waited for ever."""
    for free, taken in ((1, False), (3, True)):
        one = make((1 + 5 + free) * MODEL + 1000)
        job = one.world.job()
        owner = {"job": job.hello.job, "claim": 1}
        model = one.land(MODEL, "b3-model", **owner)
        pool = one.world.executor("site-0", "site-1", node="pool/p")
        asked = {"sites": pool.sites, "min_clients": 2, "payload": model, "partials": True}
        job.send(*tools.opening(job, **asked))
        tasks = tools.work(pool)
        assert [assign.partials for assign, *_ in tasks[:1]] == [taken]
        job.send(*tools.opening(job, **asked))
        assert {r.gather for r in job.take(Receipt)} == {tasks[0][0].gather}, "asked for again, it is the same gather"
        if not taken:
            continue
        # room for one is kept while the gather is open: neither a client nor a smaller job gets it
        assert one.ask(MODEL * 3 // 2, "b3-clients").code == "quota"
        second = one.world.job("second")
        assert one.ask(MODEL // 4, "b3-other", job=second.hello.job, claim=1).code == "quota"
        partial = one.land(2 * MODEL, "p-1", job=job.hello.job)
        items = tuple(DoneItem(ref.task, ref.attempt, site) for _, ref, site in tasks)
        pool.send(Done(tasks[0][0].job, tasks[0][0].gather, items, partial))
        assert len(pool.one(Stored).tasks) == 2


def test_the_archive_of_a_client_leaves_the_reserves_alone(make: Callable[[int], Spooled], tools: Any) -> None:
    one = make(7 * MODEL + 1000)
    job, *_ = opened(one, tools, 1)
    client = one.world.client()
    with pytest.raises(AssertionError):
        client.put(b"x" * 32_000)
    assert client.one(Fault).code == "quota"
    one.land(2 * MODEL, "p-1", job=job.hello.job, claim=1)
