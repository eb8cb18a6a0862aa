"""Folders for what only a running process needs: private, short, and gone with it, or with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fedloom.serialization.scratch import Scratch

_HOLD = "from fedloom.serialization.scratch import Scratch; s = Scratch('job'); print(s.path, flush=True); input()"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process that has a folder, with something in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "code").mkdir()
    (folder / "code" / "client.py").write_text("1")
    return process, folder


def test_it_is_private_and_gone_with_its_block(temporary: Path) -> None:
    with Scratch("job") as folder:
        assert folder.name.startswith("job-") and folder.is_relative_to(temporary)
        assert folder.stat().st_mode & 0o077 == folder.parent.stat().st_mode & 0o077 == 0
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("1")
    assert list(folder.parent.iterdir()) == []


def test_closing_twice_is_harmless(temporary: Path) -> None:
    one = Scratch("job")
    one.close()
    one.close()
    assert not one.path.exists()


@pytest.mark.process
def test_the_next_one_removes_what_a_killed_process_left_and_no_other(temporary: Path) -> None:
    dead, left = holder(temporary)
    alive, held = holder(temporary)
    mine = temporary / f"fedloom-{os.getuid()}-notes"
    mine.mkdir()
    try:
        dead.kill()
        dead.wait(10)
        assert left.is_dir()
        with Scratch("executor") as folder:
            assert folder.is_dir() and mine.is_dir()
            assert not left.exists() and (held / "code" / "client.py").is_file()
    finally:
        for process in (dead, alive):
            process.kill()
            process.communicate()


def test_a_short_one_fits_a_socket(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with Scratch("executor", short=True) as folder, Scratch("job") as roomy:
        assert len(os.fsencode(folder)) < 60
        assert roomy.is_relative_to(deep)


@pytest.mark.parametrize("taken", ["a file", "a link", "open to all"])
def test_a_name_that_somebody_has_taken_is_not_used(temporary: Path, taken: str) -> None:
    """Another user of the machine may have made it first, to look into it or to have something removed."""
    base = temporary / f"fedloom-{os.getuid()}"
    elsewhere = temporary / "elsewhere"
    (elsewhere / "job-precious").mkdir(parents=True)
    match taken:
        case "a file":
            base.write_text("")
        case "a link":
            base.symlink_to(elsewhere)
        case _:
            elsewhere.rename(base)
            base.chmod(0o777)
    with Scratch("job") as folder:
        assert folder.is_dir() and not folder.is_relative_to(base)
        assert base.is_file() or (base / "job-precious").is_dir()
