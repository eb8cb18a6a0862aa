"""Modules of the tests that hold no tests, loaded by their place.

Pytest imports with ``--import-mode=importlib``, which puts no folder of tests on the path: several have a conftest.py,
or a file of the same name as another's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent


def load(near: str, name: str) -> Any:
    """The module ``name`` (``model``, ``../broker/conftest``) beside the file ``near``: one for all who ask for it.

    It is never the one that pytest makes of a test file or a conftest.py: that has another name, and its own classes.
    """
    path = (Path(near).resolve().parent / f"{name}.py").resolve()
    known_as = "_".join(("fedloom_tests", *path.relative_to(TESTS).with_suffix("").parts))
    if known_as in sys.modules:
        return sys.modules[known_as]
    spec = importlib.util.spec_from_file_location(known_as, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module  # before it runs: dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known_as]  # the next to ask gets the error too, not half a module
        raise
    return module
