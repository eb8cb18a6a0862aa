"""How a job folder comes in, to be simulated or submitted: as it is, or converted where it was written for NVFLARE."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..serialization.scratch import Scratch


@contextmanager
def job_folder(folder: Path) -> Generator[Path]:
    """The job's folder, as fedloom reads it; a converted one lives as long as the block.

    What was mapped is said in one line on stderr.

    Raises:
        JobError: it was written for NVFLARE, and something in it has no equivalent here.
    """
    from .nvflare.folder import convert_folder, needs_conversion

    folder = folder.expanduser()
    if not folder.is_dir() or not needs_conversion(folder):
        yield folder
        return
    with Scratch("job") as temporary:
        converted = temporary / "job"
        notes = convert_folder(folder, converted)
        if line := notes.line():
            print(f"{folder}: read as NVFLARE's: {line}", file=sys.stderr)
        yield converted
