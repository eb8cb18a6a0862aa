from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fedloom.recipe import NumpyFedAvgRecipe, ProdEnv, SimEnv, SiteFailure
from fedloom.recipe.client import JobInfo
from fedloom.recipe.failures import describe, failures_of
from fedloom.recipe.overrides import Outcome, Overrides, applied
from fedloom.recipe.workspace import run_folder
from fedloom.serialization.errors import FedloomError, GatherError, JobError, TaskError
from fedloom.serialization.jobspec import JobSpec

if TYPE_CHECKING:
    from conftest import FakeLauncher


def recipe(**changes: Any) -> NumpyFedAvgRecipe:
    values: dict[str, Any] = {
        "name": "my job",
        "model": [1.0],
        "min_clients": 2,
        "train_script": "client.py",
        "seed": 5,
    }
    return NumpyFedAvgRecipe(**(values | changes))


def test_execute_runs_in_a_folder_of_its_own(here: Path, launcher: FakeLauncher) -> None:
    run = recipe().execute(SimEnv(num_clients=3, num_threads=2, gpu_config="0,1", gpu_memory_share="equal"))
    [config] = launcher.configs
    assert config.sites == ["site-1", "site-2", "site-3"]
    assert (config.threads, config.gpu, config.gpu_memory_share, config.seed) == (2, "0,1", "equal", 5)
    assert config.workspace == here / "fedloom-workspace" / "my job"
    assert (config.workspace / ".fedloom").is_file()
    assert launcher.jobs[0].name == "my job"
    assert (run.get_job_id(), run.get_status(), run.get_reason()) == ("job-1", "FINISHED:COMPLETED", "")
    assert run.get_result() == config.workspace
    assert run.wait(1) == "FINISHED:COMPLETED"
    (config.workspace / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    assert run.metrics() == [{"round": 0}, {"round": 1}]
    run.abort()


def test_threads_are_left_to_the_launcher_and_are_never_more(here: Path, launcher: FakeLauncher) -> None:
    recipe().execute(SimEnv(num_clients=3))
    recipe().execute(SimEnv(num_clients=3, num_threads=60))
    assert [config.threads for config in launcher.configs] == [None, 3]


def test_named_clients_and_defaults(here: Path, launcher: FakeLauncher) -> None:
    recipe().execute(SimEnv(clients=["a", "b"]))
    recipe(min_clients=3).execute(SimEnv())
    recipe(min_clients=1).execute(SimEnv())
    assert [config.sites for config in launcher.configs] == [
        ["a", "b"],
        ["site-1", "site-2", "site-3"],
        ["site-1", "site-2"],
    ]


def test_too_few_clients_is_said_at_once(here: Path, launcher: FakeLauncher) -> None:
    with pytest.raises(JobError, match="min_clients=5 but the simulation has 3 clients"):
        recipe(min_clients=5).execute(SimEnv(num_clients=3))
    assert not launcher.configs
    assert not (here / "fedloom-workspace").exists()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_clients": -1}, "num_clients=-1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"clients": ["a", "a"]}, "names a client twice"),
        ({"clients": ["a/b"]}, "site name"),
        ({"clients": ["a"], "num_clients": 2}, "give one of the two"),
    ],
)
def test_values_that_are_not_allowed(values: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        SimEnv(**values)


class TestWorkspace:
    def test_a_folder_of_the_users_is_left_alone(self, here: Path, launcher: FakeLauncher) -> None:
        mine = here / "ws" / "my job"
        mine.mkdir(parents=True)
        (mine / "thesis.txt").write_text("keep")
        with pytest.raises(JobError, match="files that fedloom did not make"):
            recipe().execute(SimEnv(2, workspace_root="ws"))
        assert (mine / "thesis.txt").read_text() == "keep"
        assert not launcher.configs

    def test_the_last_run_is_moved_away(self, here: Path, launcher: FakeLauncher) -> None:
        for text in ("one", "two", "three"):
            folder = recipe().execute(SimEnv(2, workspace_root="ws")).get_result()
            assert not (folder / "model").exists()
            (folder / "model").write_text(text)
        assert (here / "ws" / "my job.previous" / "model").read_text() == "two"

    def test_an_empty_folder_may_be_used(self, here: Path, launcher: FakeLauncher) -> None:
        (here / "ws" / "my job").mkdir(parents=True)
        recipe().execute(SimEnv(2, workspace_root=here / "ws"))
        assert len(launcher.configs) == 1

    def test_a_folder_in_use_is_refused(self, here: Path, launcher: FakeLauncher) -> None:
        folder = recipe().execute(SimEnv(2, workspace_root="ws")).get_result()
        code = """if True:
            import sys
            from pathlib import Path
            from fedloom.recipe.workspace import mark, run_folder
            with run_folder(Path(sys.argv[1])) as folder:
                mark(folder, "results")  # as the end of a run does: the folder stays held
                (folder / ".fedloom").read_text()
                print("held", flush=True)
                sys.stdin.read()
        """
        holder = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(JobError, match="another simulation is running"):
                recipe().execute(SimEnv(2, workspace_root="ws"))
            holder.stdin.close()
        recipe().execute(SimEnv(2, workspace_root="ws"))

    def test_a_folder_in_use_is_refused_to_another_thread(self, tmp_path: Path) -> None:
        with run_folder(tmp_path / "ws") as folder:
            for _ in range(2):  # the first refusal has not let go of it
                with pytest.raises(JobError, match="another simulation is running"), run_folder(folder):
                    pass
        with run_folder(folder):
            pass

    def test_a_child_that_lives_on_does_not_keep_the_folder(self, tmp_path: Path) -> None:
        with run_folder(tmp_path / "ws") as folder:
            child = os.fork()
            if not child:
                signal.pause()
        try:
            with run_folder(folder):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_job_folder_and_the_last_runs_own(here: Path, launcher: FakeLauncher) -> None:
    from fedloom.recipe.simulate import SimOptions, simulate

    folder = recipe().export(here / "exported")
    result = simulate(SimOptions(num_clients=2, seed=8), folder=folder)
    assert launcher.configs[0].seed == 8
    assert result.result_dir == here / "fedloom-workspace" / "my job"
    assert (result.result_dir / "job" / "app" / "custom" / "client.py").is_file()
    simulate(SimOptions(num_clients=2), folder=result.result_dir / "job")
    assert launcher.jobs[1] == launcher.jobs[0]
    with pytest.raises(JobError, match="3 clients; at most 2"):
        simulate(SimOptions(num_clients=3, max_clients=2), folder=folder)


def test_prod_env(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Client:
        def __init__(self, endpoint: str, connect_s: float) -> None:
            asked.append((endpoint, connect_s))

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *args: object) -> None:
            asked.append("closed")

        def submit(self, folder: Path) -> str:
            asked.append(JobSpec.load(folder).name)
            return "j-1"

        def info(self, job_id: str) -> JobInfo:
            return JobInfo(job_id, status="RUNNING", reason="why")

        def wait(self, job_id: str, timeout_s: float | None) -> JobInfo:
            asked.append(("wait", timeout_s))
            return JobInfo(job_id, status="FINISHED:COMPLETED")

        def download(self, job_id: str, dest: Path, *, export: bool) -> Path:
            return dest

        def rounds(self, job_id: str) -> list[dict[str, Any]]:
            return [{"round": 0, "failures": [{"site": "site-2", "code": "timeout", "text": "late"}]}]

        def events(self, job_id: str) -> list[dict[str, Any]]:
            late = {"text": "Traceback: ValueError: too late", "round": 1}
            return [{"kind": "log", "text": "x"}, {"kind": "script_error", "site": "site-1", "data": late}]

        def abort(self, job_id: str) -> None:
            asked.append(("abort", job_id))

    monkeypatch.setattr("fedloom.recipe.client.JobClient", Client)
    run = recipe().execute(ProdEnv("tcp://host:7600", connect_s=3, workspace_root="res"))
    assert asked == [("tcp://host:7600", 3), "my job", "closed"]
    assert (run.get_job_id(), run.get_status(), run.get_reason()) == ("j-1", "RUNNING", "why")
    assert run.wait(5) == "FINISHED:COMPLETED"
    assert run.get_result(timeout=0) == here / "res" / "j-1"
    assert [record["round"] for record in run.metrics()] == [0]
    assert run.failures() == [
        SiteFailure("site-2", "timeout", "late", 0),
        SiteFailure("site-1", "script_error", "Traceback: ValueError: too late", 1),
    ]
    run.abort()
    assert [item for item in asked if item[0] in ("wait", "abort")] == [("wait", 5), ("wait", None), ("abort", "j-1")]
    with pytest.raises(JobError, match="timeout=-1"):
        run.wait(-1)
    monkeypatch.setenv("FEDLOOM_BROKER", "tcp://other:1")
    assert ProdEnv().endpoint == "tcp://other:1"


class TestFailures:
    def test_a_sites_traceback_is_raised(self, here: Path, launcher: FakeLauncher) -> None:
        launcher.status, launcher.reason = "FINISHED:FAILED", "round 0 has 1 of 2 results"
        launcher.failures = (launcher.failure("site-2", "Traceback: ValueError: mine"),)
        with pytest.raises(TaskError, match="site-2: Traceback: ValueError: mine") as caught:
            recipe().execute(SimEnv(2))
        notes = " ".join(caught.value.__notes__)
        assert "round 0 has 1 of 2 results" in notes
        assert str(here / "fedloom-workspace" / "my job") in notes
        run = recipe().execute(SimEnv(2, check=False))
        assert (run.get_status(), run.get_reason()) == ("FINISHED:FAILED", "round 0 has 1 of 2 results")

    def test_a_failure_that_the_quorum_spared(
        self, here: Path, launcher: FakeLauncher, capsys: pytest.CaptureFixture[str]
    ) -> None:
        launcher.failures = (
            launcher.failure("site-2", "Traceback: ValueError: mine", 1),
            launcher.failure("site-2", "Traceback: ValueError: mine", 3),
            launcher.failure("site-1", "", 2),
        )
        overrides = Overrides()
        with applied(overrides):
            run = recipe().execute(SimEnv(2))
        assert run.get_status() == "FINISHED:COMPLETED"
        assert run.failures() == list(launcher.failures)
        assert capsys.readouterr().err == (
            "warning: site-1 failed in round 3; the job went on without it:\nexception\n"
            "site-2 failed in 2 rounds, first in round 2; the job went on without it:\nTraceback: ValueError: mine\n"
        )
        assert overrides.runs[0].failures, "what the command's exit code goes by"

    def test_many_failures_are_a_page_at_most(self, launcher: FakeLauncher) -> None:
        text = describe([launcher.failure(f"site-{n:04}", "Traceback\nValueError: x") for n in range(1000)])
        assert text.count("ValueError") == 5
        assert text.endswith("site-0024 and 975 more")

    def test_failures_out_of_records_and_reason(self) -> None:
        records = [
            {"round": 0, "failures": []},
            {"round": 1, "failures": [{"site": "site-3", "code": "killed", "text": "by SIGKILL"}]},
        ]
        assert failures_of(records) == [SiteFailure("site-3", "killed", "by SIGKILL", 1)]
        reason = "round 2, train: 3 results cannot be reached\nsite-1: exception\nTraceback (most\nValueError: x"
        first = SiteFailure("site-1", "exception", "Traceback (most\nValueError: x", 2)
        assert failures_of(records, reason)[0] == first
        assert failures_of(records, "aborted by alice")[0].site == "site-3"

    def test_other_ends(self, here: Path, launcher: FakeLauncher) -> None:
        launcher.status, launcher.reason = "FINISHED:FAILED", "no site"
        with pytest.raises(GatherError, match="no site"):
            recipe().execute(SimEnv(2))
        launcher.status, launcher.reason = "FINISHED:ABORTED", ""
        with pytest.raises(FedloomError, match="was aborted"):
            recipe().execute(SimEnv(2))


def test_a_plan_is_of_simulations() -> None:
    with applied(Overrides(plan=True)), pytest.raises(JobError, match="--plan is for simulations"):
        NumpyFedAvgRecipe(model=[1.0], min_clients=1, train_script=__file__).execute(ProdEnv("tcp://127.0.0.1:1"))


def test_overrides_win(here: Path, launcher: FakeLauncher) -> None:
    env = SimEnv(num_clients=2, num_threads=1, gpu_config="0", workspace_root="theirs")
    overrides = Overrides(num_clients=4, num_threads=3, gpu_config="1", workspace_root=Path("mine"), seed=9)
    with applied(overrides):
        recipe().execute(env)
    recipe().execute(env)
    first, second = launcher.configs
    assert (len(first.sites), first.threads, first.gpu, first.seed) == (4, 3, "1", 9)
    assert first.workspace == here / "mine" / "my job"
    assert (len(second.sites), second.threads, second.gpu, second.seed) == (2, 1, "0", 5)
    assert second.workspace == here / "theirs" / "my job"
    assert overrides.runs == [Outcome("job-1", "FINISHED:COMPLETED", str(first.workspace))]
    with applied(Overrides(clients=("a", "b", "c"))):
        recipe().execute(SimEnv(num_clients=2))
    assert launcher.configs[-1].sites == ["a", "b", "c"]
