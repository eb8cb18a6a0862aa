"""``--compat nvflare``: scripts that import NVFLARE's names get fedloom's, without a change to the scripts.

A folder with nothing but a package of that name goes first on the path: of this process, and by ``PYTHONPATH`` of every
process that it starts, hosts and external commands alike. An installed package of the name is hidden while it lasts.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from ...serialization.errors import JobError

#: The names that ``--compat`` takes; each is a package in `SHIMS`.
KNOWN = ("nvflare",)
SHIMS = Path(__file__).resolve().parent / "shims"


def enable(name: str) -> str:
    """Let this process, and those that it starts from now on, import fedloom by another library's names.

    Returns:
        What to tell the user: an installed library of that name is hidden; "" where there is none.

    Raises:
        JobError: no such library is known, or its own modules are loaded already.
    """
    if name not in KNOWN:
        raise JobError(f"--compat {name!r}; allowed is {', '.join(KNOWN)}")
    loaded = sys.modules.get(name)
    if loaded is not None and not str(getattr(loaded, "__file__", "")).startswith(str(SHIMS)):
        raise JobError(f"--compat {name}: {name} itself is loaded in this process already, from {loaded.__file__}")
    folder = str(SHIMS)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != folder]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *before])
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    return f"{name} {version} is installed here and is hidden in this run: `import {name}` gives fedloom"
