"""Jobs that go on behind another's rounds, and jobs that run once more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import SimEnv

pytestmark = pytest.mark.process

SITES = ("site-1", "site-2", "site-3")


def test_a_failed_job_goes_on_with_its_fault_mended_and_a_clone_begins_anew(
    cluster: Any, jobs: Any, sha256: Callable[[Path], str], workspace: Path
) -> None:
    env = SimEnv(clients=SITES, num_threads=2, workspace_root=workspace / "calm", show_progress=False)
    calm = sha256(jobs.recipe().execute(env).get_result())
    jobs.runs_path.unlink()
    cluster.broker()
    cluster.controller()
    for site in SITES:
        cluster.executor(site)

    def job(*words: str | Path, code: int = 0) -> Any:
        argv = ("job", *words, "--broker", cluster.endpoint, "--json")
        ended, out, err = cluster.children.fedloom_output(*argv, timeout_s=90)
        assert ended == code, err
        return json.loads(out) if code in (0, 1) else err

    failed = job("submit", jobs.export("broken", fault="raise ValueError('no disk')"), "--wait", code=1)
    assert (failed["status"], failed["round"]) == ("FINISHED:FAILED", 1)
    same = job("resume", failed["job_id"], "--wait", code=1)
    assert (same["status"], same["round"]) == ("FINISHED:FAILED", 1), "the fault is still there"
    before = Counter(jobs.runs())
    assert before["site-1 0"] == 1, "the committed round was trained again"

    resumed = job("resume", same["job_id"], jobs.export("mended"), "--wait")
    assert (resumed["status"], resumed["round"]) == ("FINISHED:COMPLETED", 3)
    assert Counter(jobs.runs()) - before == {f"{site} {round_}": 1 for site in SITES for round_ in (1, 2)}
    result = workspace / "resumed"
    job("download", resumed["job_id"], "-o", result)
    assert sha256(result) == calm
    assert [json.loads(line)["round"] for line in (result / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    refused = job("resume", resumed["job_id"], code=3)
    assert "has done all of its 3 rounds" in refused

    jobs.runs_path.unlink()
    clone = job("clone", resumed["job_id"], "--wait")
    assert (clone["status"], clone["round"]) == ("FINISHED:COMPLETED", 3)
    assert set(Counter(jobs.runs()).values()) == {1}
    job("download", clone["job_id"], "-o", workspace / "clone")
    assert sha256(workspace / "clone") == calm


@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_a_simulation_that_was_ended_goes_on(
    children: Any, jobs: Any, sha256: Callable[[Path], str], workspace: Path, until: Callable[..., None], end: str
) -> None:
    """The model has the bits of a run that nobody ended, with what the sites keep to themselves; no result is lost."""
    waits = workspace / "waits"
    pause = f"os.path.exists({str(waits)!r}) or (open({str(waits)!r}, 'w').close(), __import__('time').sleep(60))"
    env = SimEnv(clients=SITES, num_threads=2, workspace_root=workspace / "calm", show_progress=False)
    calm = sha256(jobs.recipe(momentum=True).execute(env).get_result())
    jobs.runs_path.unlink()

    argv = ("-c", ",".join(SITES), "-t", "2", "-w", workspace / "my runs")
    first = children.fedloom("sim", jobs.export(momentum=True, fault=pause), *argv)
    until(waits.exists, "site-2 waits in its second round")
    (first.kill if end == "kill" else first.interrupt)()
    assert first.wait(20) == (-9 if end == "kill" else 130)
    children.gone()
    assert (end == "kill") or "--resume" in first.text

    code, _, err = children.fedloom_output("sim", workspace / "job", *argv, "--resume", timeout_s=90)
    assert code == 0, err
    result = workspace / "my runs" / "bits"
    assert sha256(result) == calm
    assert "goes on behind 1 committed rounds" in err
    assert [json.loads(line)["round"] for line in (result / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    runs = Counter(jobs.runs())
    assert runs.pop("site-2 1") == 2, "it was at work when the run was ended"
    assert max(runs.values()) <= 2 and all(runs[f"{site} 0"] == 1 for site in SITES)
    assert not (result / ".sim").exists() and not (result / "logs").is_symlink()
    assert "nothing to resume" in children.fedloom_output("sim", workspace / "job", *argv, "--resume", timeout_s=90)[2]


def test_a_simulation_whose_script_failed_goes_on_with_it_mended(
    children: Any, jobs: Any, sha256: Callable[[Path], str], workspace: Path
) -> None:
    env = SimEnv(clients=SITES, num_threads=2, workspace_root=workspace / "calm", show_progress=False)
    calm = sha256(jobs.recipe().execute(env).get_result())
    jobs.runs_path.unlink()
    argv = ("-c", ",".join(SITES), "-t", "2", "-w", workspace)
    broken, mended = jobs.export("broken", fault="raise ValueError('my mistake')"), jobs.export("mended")
    code, _, err = children.fedloom_output("sim", broken, *argv, timeout_s=90)
    assert code == 1 and "--resume" in err, err
    code, _, err = children.fedloom_output("sim", mended, *argv, "--resume", timeout_s=90)
    assert code == 0, err
    assert sha256(workspace / "bits") == calm
    assert Counter(jobs.runs())["site-1 0"] == 1
    assert (workspace / "bits" / "logs.before" / "site-2.log").exists()
