"""kill -9 at a named point that was reached: the job goes on, and its model has the undisturbed run's bits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import SimEnv

pytestmark = pytest.mark.process

SITES = ("site-1", "site-2", "site-3")
#: Whether the sites keep a momentum of their own: without one a round can say less about what was lost.
STATES = (pytest.param(False, id="stateless", marks=pytest.mark.proof), pytest.param(True, id="momentum"))


@pytest.fixture
def undisturbed(jobs: Any, workspace: Path, sha256: Callable[[Path], str]) -> Callable[..., str]:
    """The digest of the same job's model in a simulation in which nothing dies."""

    def run(**options: Any) -> str:
        env = SimEnv(clients=SITES, num_threads=2, workspace_root=workspace / "calm", show_progress=False)
        digest = sha256(jobs.recipe(**options).execute(env).get_result())
        jobs.runs_path.unlink()
        return digest

    return run


def test_executor_with_half_an_upload_sent(
    cluster: Any, jobs: Any, undisturbed: Callable[..., str], sha256: Callable[[Path], str]
) -> None:
    """The next process goes on at the broker's watermark: the rest, and at most one window again."""
    options = {"rounds": 2, "elements": 8 * 1024 * 1024}  # 32 MiB: 33 chunks with the header's
    calm = undisturbed(**options)
    cluster.broker()
    cluster.controller()
    for site in SITES[1:]:
        cluster.executor(site, streamed=True)
    victim = cluster.executor("site-1", fault="link.before_chunk:20", streamed=True)
    job_id = cluster.submit(jobs.export(**options))
    assert victim.wait(90) == -9
    assert cluster.faults_hit() == ["link.before_chunk"]
    successor = cluster.executor("site-1", streamed=True)
    assert sha256(cluster.result(job_id)) == calm

    chunks = 33
    resumed = [
        (int(sent), int(at))
        for sent, at in re.findall(r"uploaded .*?chunks_sent=(\d+).*?resumed_at=(\d+)", plain(successor.text))
    ]
    sent, at = resumed[0]
    assert at > 0, "the upload began anew"
    assert sent <= chunks - 19 + 8, "more than a window was sent again"
    assert Counter(jobs.runs())["site-1 0"] == 1, "the result was there: nothing had to be trained again"


@pytest.mark.parametrize("momentum", STATES)
def test_controller_after_k_of_n_folds(
    cluster: Any,
    jobs: Any,
    undisturbed: Callable[..., str],
    sha256: Callable[[Path], str],
    until: Callable[..., None],
    momentum: bool,
) -> None:
    """The job's process dies with two of three results folded: the next one folds them again, no site trains twice."""
    calm = undisturbed(momentum=momentum)
    cluster.broker()
    cluster.controller(fault="job.after_fold:2")
    for site in SITES:
        cluster.executor(site)
    job_id = cluster.submit(jobs.export(momentum=momentum))
    # the armed process dies again and again at its second fold: another controller must take over
    cluster.children.all[0].says("broker_ready", 30)
    until(lambda: cluster.faults_hit(), "the fault point was reached")
    cluster.children.all[1].kill()
    cluster.controller()
    assert sha256(cluster.result(job_id)) == calm
    assert set(cluster.faults_hit()) == {"job.after_fold"}
    executions = Counter(jobs.runs())
    assert executions == {f"{site} {round}": 1 for site in SITES for round in range(3)}


def test_controller_behind_a_checkpoint(
    cluster: Any,
    jobs: Any,
    undisturbed: Callable[..., str],
    sha256: Callable[[Path], str],
    until: Callable[..., None],
) -> None:
    """Each result is checkpointed and freed at once; the next process goes on from the checkpoint."""
    options = {"elements": 20_000}
    calm = undisturbed(**options)
    cluster.broker()
    cluster.controller(fault="job.before_checkpoint:3")
    for site in SITES:
        cluster.executor(site)
    folder = jobs.export(**options)
    config = folder / "app/config/config_fed_server.json"
    server = json.loads(config.read_text())
    server["workflows"][0]["args"]["checkpoint_bytes"] = 1
    config.write_text(json.dumps(server))
    job_id = cluster.submit(folder)
    until(lambda: cluster.faults_hit(), "the fault point was reached")
    cluster.children.all[1].kill()
    successor = cluster.controller()
    assert sha256(cluster.result(job_id)) == calm
    assert plain(successor.text).count("checkpoint ") > 3
    assert Counter(jobs.runs()) == {f"{site} {round}": 1 for site in SITES for round in range(3)}


@pytest.mark.parametrize("momentum", STATES)
@pytest.mark.parametrize("at", [6, 14])
def test_broker_between_commit_and_send(
    cluster: Any, jobs: Any, undisturbed: Callable[..., str], sha256: Callable[[Path], str], momentum: bool, at: int
) -> None:
    """What was committed and never said is said again by the next broker; nothing is done twice."""
    calm = undisturbed(momentum=momentum)
    victim = cluster.broker(fault=f"control.after_commit_before_send:{at}")
    cluster.controller()
    for site in SITES:
        cluster.executor(site)
    submitted = cluster.children.python(
        "-m", "fedloom", "job", "submit", jobs.export(momentum=momentum), "--json",
        env={"FEDLOOM_BROKER": cluster.endpoint},
    )  # fmt: skip
    assert victim.wait(60) == -9
    assert cluster.faults_hit() == ["control.after_commit_before_send"]
    cluster.broker()
    assert submitted.wait(60) == 0
    job_id = json.loads(submitted.text.strip().splitlines()[-1])["job_id"]
    assert sha256(cluster.result(job_id)) == calm
    assert Counter(jobs.runs()) == {f"{site} {round}": 1 for site in SITES for round in range(3)}


def test_training_script_killed(
    cluster: Any, jobs: Any, undisturbed: Callable[..., str], sha256: Callable[[Path], str]
) -> None:
    """A script that takes its process down is tried again from the same state."""
    calm = undisturbed(momentum=True)
    cluster.broker()
    cluster.controller()
    for site in SITES:
        cluster.executor(site)
    once = jobs.folder / "died"
    fault = f"import os, signal; p={str(once)!r}; os.path.exists(p) or (open(p, 'w').close(), os.kill(os.getpid(), 9))"
    job_id = cluster.submit(jobs.export(momentum=True, fault=fault))
    assert sha256(cluster.result(job_id)) == calm
    assert once.exists()
    assert Counter(jobs.runs())["site-2 1"] == 2


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
