"""What models are called in a result folder: the standard names, and one that the user gave."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from ..serialization.errors import JobError
from ..serialization.jobspec import check_site_name

MODEL_FILE = "model.safetensors"
BEST_MODEL_FILE = "best_model.safetensors"

#: The key of a round's record that holds the user's name for the best model.
RECORD_KEY = "best_model_filename"
_SUFFIX = ".safetensors"
#: Endings that stand for a model's format; here it is always safetensors.
_FORMATS = frozenset({".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".h5", _SUFFIX})
_MAX_NAME = 200


def result_name(given: object, what: str) -> str | None:
    """The file in the result folder for a name that a user gave: the same stem, as safetensors.

    Raises:
        JobError: no plain file name, or the name of the global model's file.
    """
    if given is None:
        return None
    if not isinstance(given, str) or not _is_plain(given):
        raise JobError(f"{what}={given!r}; a file name without a folder, such as 'FL_global_model.pt', belongs here")
    path = PurePath(given)
    name = (path.stem if path.suffix.lower() in _FORMATS else path.name) + _SUFFIX
    if name == MODEL_FILE:
        raise JobError(
            f"{what}={given!r}: {MODEL_FILE} is the global model after the last round, and this is another name for"
            f" the best one, {BEST_MODEL_FILE}: give a name of its own"
        )
    return name


def save_under_name(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Give the best model in a result folder the user's name as well; where no model was scored, the global model.

    Raises:
        OSError: the disk refused.
    """
    name = name_in(records)
    source = next((folder / one for one in (BEST_MODEL_FILE, MODEL_FILE) if (folder / one).is_file()), None)
    if source is None or name is None:
        return
    place = folder / name
    place.unlink(missing_ok=True)
    try:
        os.link(source, place)
    except OSError:  # a file system without links
        shutil.copyfile(source, place)


def name_in(records: Iterable[Mapping[str, Any]]) -> str | None:
    """The user's own name for the best model, as a job's records have it; None where there is none."""
    name = next((record[RECORD_KEY] for record in records if record.get(RECORD_KEY)), None)
    # a record comes off the wire: its text must not lead out of the folder, or over another of its files
    if not isinstance(name, str) or not _is_plain(name) or not name.endswith(_SUFFIX):
        return None
    return None if name in (MODEL_FILE, BEST_MODEL_FILE) else name


def _is_plain(name: str) -> bool:
    return bool(name) and PurePath(name).name == name and name.isprintable() and len(name) <= _MAX_NAME


def folder_name(site: str) -> str:
    """The site's name where it may be a file's name; a name off the wire must not lead out of the folder."""
    if not site:
        return ""
    try:
        return check_site_name(site)
    except JobError:
        return site.encode().hex()[:200]
