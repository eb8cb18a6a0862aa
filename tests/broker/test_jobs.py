"""The job table: submissions, claims, fencing, commits, crashes."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.broker.jobs import CRASHES_MAX, Job, Jobs
from fedloom.serialization.errors import FaultError, FencedError
from fedloom.serialization.messages import Commit, JobId, PayloadId, PayloadRef, SubmitJob

ARCHIVE = PayloadRef(PayloadId("b3-a"), 10)


def submitted(jobs: Jobs, token: str = "t", name: str = "demo", now: float = 0.0, **fields: Any) -> Job:
    return jobs.submit(SubmitJob(1, token, name, ARCHIVE, **fields), now)[0]


def claimed(jobs: Jobs, now: float = 0.0, ref: int = 1) -> Job:
    job = jobs.claim("controller/a", "boot", ref, now)
    assert job is not None
    return job


def model(n: int) -> PayloadRef:
    return PayloadRef(PayloadId(f"b3-{n}"), n)


def test_a_token_submits_once() -> None:
    jobs = Jobs()
    first, fresh = jobs.submit(SubmitJob(1, "t", "My Job!", ARCHIVE), 0.0)
    again, fresh_again = jobs.submit(SubmitJob(9, "t", "other name", ARCHIVE), 5.0)
    assert first is again and (fresh, fresh_again) == (True, False)
    assert first.id.startswith("my-job-")
    assert submitted(jobs, "other").id != first.id


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"job": JobId("../x")}, "job_id"), ({"job": JobId("taken")}, "job_exists"), ({"token": ""}, "token")],
)
def test_refused_submissions(fields: dict[str, Any], code: str) -> None:
    jobs = Jobs()
    submitted(jobs, "first", job=JobId("taken"))
    with pytest.raises(FaultError) as refused:
        submitted(jobs, **({"token": "second"} | fields))
    assert refused.value.code == code
    assert list(jobs.jobs) == ["taken"]


def test_the_number_of_jobs_is_bounded() -> None:
    jobs = Jobs(max_jobs=2)
    submitted(jobs, "a")
    submitted(jobs, "b")
    with pytest.raises(FaultError, match="max_jobs"):
        submitted(jobs, "c")


def test_the_oldest_job_goes_first_and_claims_go_up() -> None:
    jobs = Jobs(start_s=30.0)
    first, second = submitted(jobs, "a"), submitted(jobs, "b")
    assert claimed(jobs, ref=1) is first
    assert claimed(jobs, ref=2) is second
    assert jobs.claim("controller/a", "boot", 3, 0.0) is None
    assert (first.claim, first.status) == (1, "RUNNING")
    assert jobs.given("controller/a", "boot", 1) is first
    assert jobs.given("controller/a", "another boot", 1) is None
    assert not jobs.tick(29.9)
    assert jobs.tick(30.1), "no process has said Hello in time"
    assert claimed(jobs, 30.1, ref=4).claim == 2


def test_a_claim_lives_with_its_session() -> None:
    jobs = Jobs(start_s=30.0)
    job = submitted(jobs)
    claimed(jobs)
    jobs.session_up(job.id, 1)
    assert not jobs.tick(1e6)
    jobs.session_down(job.id, 1, 1e6)
    assert jobs.tick(1e6 + 1)
    jobs.session_up(job.id, 1)
    assert not jobs.tick(1e6 + 2), "it came back before it was given on"
    jobs.session_down(job.id, 1, 1e6 + 3)
    jobs.tick(1e6 + 3)
    assert claimed(jobs, 1e6 + 3, ref=2).claim == 2
    with pytest.raises(FencedError):
        jobs.session_up(job.id, 1)


def test_fencing() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    claimed(jobs)
    jobs.lost(job.id, 1, "exit code 1", 0.0)
    claimed(jobs, 10.0, ref=2)
    with pytest.raises(FencedError) as fenced:
        jobs.check(job.id, 1)
    assert fenced.value.code == "fenced" and "claim 2" in str(fenced.value)
    assert jobs.check(job.id, 2) is job
    with pytest.raises(FaultError, match="never given"):
        jobs.check(job.id, 3)
    with pytest.raises(FaultError, match="no job"):
        jobs.check("ghost", 1)
    jobs.finish(job, "FINISHED:COMPLETED", "", 11.0)
    with pytest.raises(FencedError):
        jobs.check(job.id, 2)


def test_the_fifth_crash_without_a_commit_fails_the_job() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    now = 0.0
    for n in range(1, CRASHES_MAX + 1):
        claimed(jobs, now, ref=n)
        if n == 2:
            jobs.commit(Commit(1, job.id, n, 7, model=model(1)))
            jobs.lost(job.id, n, "after the commit", now)
            assert job.crashes == 1
        else:
            jobs.lost(job.id, n, f"signal {n}", now)
            jobs.lost(job.id, n, "said twice", now)
        now += 60
    assert job.crashes == 4 and job.status == "RUNNING"
    claimed(jobs, now, ref=9)
    jobs.lost(job.id, job.claim, "signal 9", now)
    assert job.status == "FINISHED:FAILED" and job.ended_at == now
    assert "5 times in the round after 7" in job.reason and job.reason.endswith("signal 9")
    assert jobs.claim("controller/a", "boot", 10, now + 100) is None


def test_a_controller_that_is_told_to_stop_is_no_crash() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    for n in range(1, 2 * CRASHES_MAX):
        claimed(jobs, 10.0 * n, ref=n)
        jobs.lost(job.id, n, "its controller was stopped", 10.0 * n, stopped=True)
        assert job.crashes == 0 and job.available_at == 10.0 * n + 1
    assert job.status == "RUNNING"


def test_a_lost_process_is_restarted_with_a_growing_pause() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    pauses: list[float] = []
    for n in range(1, 5):
        claimed(jobs, n * 100.0, ref=n)
        jobs.lost(job.id, n, "x", n * 100.0)
        pauses.append(job.available_at - n * 100.0)
        assert jobs.claim("controller/a", "boot", 50, n * 100.0) is None
    assert pauses == sorted(pauses) and pauses[0] < 0.5


def test_commits() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    claimed(jobs)
    first = Commit(1, job.id, 1, 0, model=model(1), best=True, record={"a": 1.5})
    assert jobs.commit(first)[2] is True
    assert jobs.commit(first)[2] is False, "a repeat changes nothing"
    assert job.commit is not None and job.commit.best == model(1)
    _, before, fresh = jobs.commit(Commit(2, job.id, 1, 1, model=model(2)))
    assert fresh and before is not None and before.model == model(1)
    assert (job.commit.round, job.commit.model, job.commit.best) == (1, model(2), model(1))
    jobs.commit(Commit(3, job.id, 1, 2, model=model(3), best=True, best_model=model(33)))
    assert job.commit.best == model(33) and job.commits == 3
    for round_, ref in ((2, model(4)), (1, model(2)), (0, model(1))):
        with pytest.raises(FaultError) as refused:
            jobs.commit(Commit(4, job.id, 1, round_, model=ref))
        assert refused.value.code == "committed"
    with pytest.raises(FencedError):
        jobs.commit(Commit(5, job.id, 0, 3))


def test_sites_are_remembered_in_order() -> None:
    jobs = Jobs()
    job = submitted(jobs)
    jobs.add_sites(job, ["b", "a"])
    jobs.dirty.clear()
    jobs.add_sites(job, ["a"])
    assert not jobs.dirty
    jobs.add_sites(job, ["c", "b"])
    assert job.sites == ("b", "a", "c") and jobs.dirty
