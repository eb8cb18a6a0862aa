"""What a worker's tasks print is in their sites' logs, whoever wrote it and however the worker ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fedloom.executor.siteoutput import salvage

pytestmark = pytest.mark.timeout(60)

WORKER = """
import os, subprocess, sys, time
from pathlib import Path
from fedloom.executor.siteoutput import SiteOutput

def reads(log, text):
    return log.is_file() and log.read_text() == text

folder = Path(sys.argv[1])
a, b, c, d = (folder / f"{name}.log" for name in "abcd")
output = SiteOutput(str(folder / "worker"))
output.begin(str(a))
print("one", end="", flush=True)
os.write(2, b" two\\n")
output.end()
output.begin(str(b))
output.end()
output.begin(str(c))
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # it has what standard output is now
print("early", flush=True)
deadline = time.monotonic() + 30
while not reads(c, "early\\n"):  # of a task that takes its time: while it works
    assert time.monotonic() < deadline
print("late", flush=True)
assert reads(c, "early\\nlate\\n")
child.communicate(b"child\\n")
output.end()
output.close()
print("back", flush=True)
output = SiteOutput(str(folder / "worker"))
output.begin(str(d))
print("last words", flush=True)
os._exit(3)
"""


@pytest.mark.process
def test_what_is_printed_is_in_the_logs_and_nothing_makes_none(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path)], capture_output=True, text=True, check=False, timeout=50
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "back\n", "")
    salvage(str(tmp_path / "worker"), str(tmp_path / "d.log"))
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs == {"a.log": "one two\n", "c.log": "early\nlate\nchild\n", "d.log": "last words\n"}
    salvage(str(tmp_path / "worker"), str(tmp_path / "b.log"))  # nothing is left
    assert not (tmp_path / "b.log").exists()
