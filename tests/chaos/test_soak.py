"""The short forms of what takes a while: a fleet at work under faults, and an upgrade of one party at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from siblings import load

pytestmark = pytest.mark.process


@pytest.mark.parametrize("seconds", [30.0, pytest.param(60.0, marks=pytest.mark.proof)])
def test_nothing_grows_and_nothing_is_left_over(children: Any, workspace: Path, seconds: float) -> None:
    out = load(__file__, "soak").soak(children, workspace, seconds, seed=3)
    assert not out.wrong, out
    assert out.jobs >= 3 and sum(out.faults.values()) >= seconds / 12
    assert max(out.growth.values()) < 8, out


def test_each_party_is_upgraded_while_a_job_runs(children: Any, workspace: Path) -> None:
    """Drained and started again as the next minor version; what was stored is not trained again; the same model."""
    upgrade = load(__file__, "upgrade")
    one = upgrade.upgrade(children, workspace, None, upgrade.next_version(workspace))
    assert not one.wrong, one.wrong
    assert sorted(one.stops) == ["broker", "controller", "site-1", "site-2"]
