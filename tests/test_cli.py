from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "zmq", "msgpack", "structlog", "rich", "safetensors", "blake3")


def run(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedloom", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **(env or {})},
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['fedloom', '--help']\n"
        "try:\n    runpy.run_module('fedloom', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")
    for command in ("broker", "controller", "executor", "sim", "job", "status"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    "command", ["broker", "controller", "executor", "sim", "job", "job submit", "job download", "status"]
)
def test_each_command_has_help(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "Usage: fedloom" in done.stdout
    assert done.stderr == ""


def test_documented_options_are_there() -> None:
    sim = run("sim", "--help").stdout
    options = "-w, -n, -c, -t, -gpu, --gpu-memory-share --plan -m, -l, --seed --json --log-format --compat"
    for option in options.split():
        assert option in sim
    assert "--bind" in run("broker", "--help").stdout
    assert "--insecure" in run("broker", "--help").stdout
    executor = run("executor", "--help").stdout
    for option in ("--broker", "--site", "--workspace", "--pool", "--compat"):
        assert option in executor


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["job", "frobnicate"], "No such command 'frobnicate'"),
        (["sim"], "Missing argument"),
        (["sim", "nowhere.py"], "nowhere.py does not exist"),
        (["sim", "nowhere.py", "-n", "0"], "greater than or equal to 1"),
        (["sim", "nowhere.py", "-n", "2", "-c", "a,b"], "give one of them"),
        (["sim", "nowhere.py", "-c", ","], "names no client; write -c site-1,site-2"),
        (["sim", "nowhere.py", "--compat", "flower"], "--compat 'flower'; allowed is nvflare"),
        (["sim", ".", "-l", "loud"], "log level 'loud'"),
        (["sim", ".", "--plan", "--profile"], "give --plan or --profile"),
        (["sim", "."], "meta.json is missing"),
        (["job", "submit", "nowhere"], "job folder nowhere does not exist"),
        (["job", "status", "x", "--broker", "localhost"], "an endpoint such as"),
        (["job", "wait", "x", "--timeout", "-1"], "greater than or equal to 0"),
        (["executor"], "an executor works for a site"),
        (["executor", "--site", "a/b"], "site name 'a/b'"),
        (["broker", "--bind", "7600"], "endpoint '7600'"),
        (["broker", "--durability", "none"], "--durability 'none'"),
        (["broker", "--set", "max_job=1"], "max_jobs (10000)"),
        (["broker", "--set", "max_jobs=none"], "max_jobs is a whole number over 0, such as 10000"),
    ],
)
def test_wrong_use_is_2_and_one_clear_line(tmp_path: Path, args: list[str], text: str) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.process
def test_a_broker_that_is_not_there_is_3(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/none"
    for args in (["status", "x"], ["list", "--json"], ["abort", "x"], ["logs", "x"], ["download", "x"], ["wait", "x"]):
        done = run("job", *args, "--connect-timeout", "0.3", env={"FEDLOOM_BROKER": endpoint})
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith(f"error: no broker answered at {endpoint}")
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my job.py"
    path.write_text(text)
    return str(path)


class TestScripts:
    def test_a_script_that_runs_no_job(self, tmp_path: Path) -> None:
        done = run("sim", script(tmp_path, "print(__name__)"))
        assert done.returncode == 2
        assert done.stdout == "__main__\n"
        assert "ran no job" in done.stderr

    def test_its_arguments_and_its_exit_code(self, tmp_path: Path) -> None:
        path = script(tmp_path, "import sys, beside\nprint(sys.argv[1:], beside.X)\nsys.exit(7)\n")
        (tmp_path / "beside.py").write_text("X = 1\n")
        done = run("sim", path, "-n", "2", "--", "--lr", "1")
        assert done.returncode == 7
        assert done.stdout == "['--lr', '1'] 1\n"

    def test_its_traceback_without_ours(self, tmp_path: Path) -> None:
        done = run("sim", script(tmp_path, "def f():\n    raise ValueError('mine')\nf()\n"))
        assert done.returncode == 1
        assert "ValueError: mine" in done.stderr
        assert "runpy" not in done.stderr
        assert "recipe/cli" not in done.stderr

    def test_json_is_all_there_is_on_standard_output(self, tmp_path: Path) -> None:
        done = run("sim", script(tmp_path, "print('mine')\nraise KeyboardInterrupt"), "--json")
        assert done.returncode == 130
        assert json.loads(done.stdout) == {"job_id": None, "status": None, "path": None, "runs": []}
        assert done.stderr.startswith("mine\n")

    def test_a_mistake_in_the_recipe_is_wrong_use(self, tmp_path: Path) -> None:
        text = (
            "from fedloom.recipe import NumpyFedAvgRecipe\n"
            "NumpyFedAvgRecipe(model=[1], min_clients=1, train_script='gone.py')\n"
        )
        done = run("sim", script(tmp_path, text))
        assert done.returncode == 2
        assert "script 'gone.py' not found" in done.stderr
        assert "Traceback" not in done.stderr


def test_exit_codes_of_errors() -> None:
    from fedloom.recipe.cli.common import exit_code
    from fedloom.serialization import errors

    assert exit_code(errors.TaskError("site-1", "boom")) == 1
    assert exit_code(errors.GatherError("few")) == 1
    assert exit_code(errors.StorageError("full")) == 1
    assert exit_code(errors.JobError("wrong")) == 2
    assert exit_code(errors.FaultError("unknown_job", "no")) == 2
    assert exit_code(errors.FaultError("not_allowed", "no")) == 3
    assert exit_code(errors.LinkError("gone")) == 3
    assert exit_code(errors.LinkTimeout("late")) == 4
    assert exit_code(KeyboardInterrupt()) == 130


def test_version() -> None:
    import fedloom

    assert run("--version").stdout == f"fedloom {fedloom.__version__}\n"
