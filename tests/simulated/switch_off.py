"""A pytest plugin: the safeguard that ``FEDLOOM_MUTATION`` names is off, so that a stateful machine has to notice."""

from __future__ import annotations

import os

from mutations import MUTATIONS


def pytest_configure() -> None:
    """Before any test is collected."""
    MUTATIONS[os.environ["FEDLOOM_MUTATION"]].switch()
