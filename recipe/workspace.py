"""Folders that fedloom may write into and replace: only those that it made itself, marked by a file ``.fedloom``."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..serialization.errors import JobError, StorageError

MARKER = ".fedloom"
#: In a simulation's folder while its job is not done: which job the store beside this file holds.
UNFINISHED = Path(".sim", "job.json")


def is_ours(folder: Path) -> bool:
    """Whether fedloom made this folder."""
    return (folder / MARKER).is_file()


def mark(folder: Path, what: str) -> None:
    """Make a folder and mark it; one that is marked already stays as it is.

    Raises:
        StorageError: the disk refused.
    """
    from .. import __version__

    if is_ours(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(json.dumps({"made_by": f"fedloom {__version__}", "what": what}) + "\n")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from None


def claim_folder(folder: Path, what: str) -> Path:
    """An empty, marked folder at this place. One that fedloom made is moved to ``<name>.previous`` first.

    Raises:
        JobError: something that fedloom did not make is there.
        StorageError: the disk refused.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise JobError(f"{folder} is not a folder; name another place for the {what}")
    if folder.is_dir() and any(folder.iterdir()):
        if not is_ours(folder):
            raise JobError(
                f"{folder} holds files that fedloom did not make (it has no {MARKER}), and is left alone:"
                f" name another place for the {what}, or an empty folder"
            )
        _move_away(folder, what)
    mark(folder, what)
    return folder


def previous(folder: Path) -> Path:
    """Where what was in a folder before lies now."""
    return folder.with_name(folder.name + ".previous")


def _move_away(folder: Path, what: str) -> None:
    old = previous(folder)
    if old.exists():
        if not is_ours(old):
            raise JobError(f"{old} is in the way of the last {what} and was not made by fedloom: move it")
        shutil.rmtree(old, ignore_errors=True)
    try:
        folder.rename(old)
    except OSError as error:
        raise StorageError(f"{folder} cannot be moved to {old.name}: {error.strerror or error}") from None


@contextmanager
def run_folder(folder: Path, *, resume: bool = False) -> Generator[Path]:
    """The folder of one simulation, held for as long as it runs; with ``resume`` an unfinished one's as it was left.

    Raises:
        JobError: another simulation runs there, or fedloom did not make the folder.
        StorageError: the disk refused.
    """
    if resume and is_ours(folder) and (folder / UNFINISHED).is_file():
        with _held(folder):
            yield folder
        return
    if is_ours(folder):
        with _held(folder):
            pass  # nobody else runs there: it may be moved away
    claim_folder(folder, "simulation")
    with _held(folder):
        yield folder


@contextmanager
def _held(folder: Path) -> Generator[None]:
    # flock, not a POSIX record lock: that would end as soon as anything in this process opens and closes the file, and
    # would not keep another thread's simulation out. A forked child shares flock's, so it is ended in words.
    handle = os.open(folder / MARKER, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(f"another simulation is running in {folder}: name another workspace") from None
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
