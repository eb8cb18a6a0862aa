"""The command's short ways: words read without typer, an end without taking modules apart, logs without asyncio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe.cli.main import app
from fedloom.recipe.cli.quick import read_sim
from typer.main import get_command

READ = (
    "job.py",
    "job.py -w out",
    "-n 8 -t 2 job.py --workspace out -- --rounds 3 -n 4",
    "--json --profile folder --n_clients 3 --threads 12",
    "job.py --",
    "job.py -- -- a",
)
LEFT = (
    "",
    "-w out",
    "job.py one two",
    "job.py -w",
    "job.py -w --json",
    "job.py -n 0",
    "job.py -n x",
    "job.py -n -1",
    "job.py -n 1 -n 2",
    "job.py -n8",
    "job.py --workspace=out",
    "job.py --seed 1",
    "job.py --plan",
    "job.py -h",
    "job.py --no-such",
)


@pytest.mark.parametrize("line", READ)
def test_words_are_read_as_typer_reads_them(line: str) -> None:
    command: Any = get_command(app)
    context = command.commands["sim"].make_context("sim", line.split())
    told = {name: value for name, value in context.params.items() if value not in (None, False, ())}
    read = read_sim(line.split())
    assert read is not None
    assert read | {"script_args": read["script_args"] or []} == {"script_args": [], **told}


@pytest.mark.parametrize("line", LEFT)
def test_all_other_words_are_left_to_typer(line: str) -> None:
    assert read_sim(line.split()) is None


def test_a_command_ends_as_the_interpreter_would(tmp_path: Path) -> None:
    script = (
        "import atexit, sys, threading, time\n"
        "from fedloom.recipe.cli.leave import leave\n"
        "text, data = open(sys.argv[1], 'w'), open(sys.argv[2], 'wb')\n"
        "text.write('kept'); data.write(b'kept')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()\n"
        "atexit.register(print, 'exit handler')\n"
        "leave(7)\n"
    )
    files = [tmp_path / "text", tmp_path / "data"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, files)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "thread\nexit handler\n", "")
    assert [file.read_bytes() for file in files] == [b"kept", b"kept"]
