"""How bounds are set by name, and how the log tells of them."""

from __future__ import annotations

import re

import pytest
import structlog
from fedloom.broker.bounds import REMIND_S, Bounds, figures_of
from fedloom.broker.options import parse
from fedloom.serialization.errors import JobError
from fedloom.serialization.loglimit import LogLimit


def test_an_operator_sets_bounds_by_name() -> None:
    assert parse(["max_jobs=5", "site_bytes=2GiB", "dead_s=1.5"]) == {
        "max_jobs": 5, "site_bytes": 2 * 1024**3, "dead_s": 1.5,
    }  # fmt: skip
    for wrong, says in (
        ("max_job=5", "max_jobs (10000)"),
        ("max_jobs", "NAME=VALUE"),
        ("max_jobs=many", "a whole number over 0, such as 10000"),
        ("max_jobs=0", "over 0"),
        ("max_jobs=1.5", "a whole number"),
    ):
        with pytest.raises(JobError, match=re.escape(says)):
            parse([wrong])


def test_a_bound_is_logged_when_it_is_reached_and_then_once_a_minute() -> None:
    bounds = Bounds()
    assert bounds.tick(0.0) == []
    with structlog.testing.capture_logs() as lines:
        for second in range(125):
            bounds.reached("max_jobs", 10)
            bounds.tick(float(second))
    assert [line["times"] for line in lines] == [10, 10 * REMIND_S, 10 * REMIND_S]
    assert figures_of({"a": {"limit": 1, "used": 2, "reached": 3}, "b": {"limit": "x"}}).keys() == {"a"}


def test_log_lines() -> None:
    now = [0.0]
    limit = LogLimit(3, lambda: now[0])
    for _ in range(3):
        limit(None, "info", {"event": "a"})
    for _ in range(5):
        with pytest.raises(structlog.DropEvent):
            limit(None, "info", {"event": "a"})
    assert limit(None, "info", {"event": "b"}) == {"event": "b"}, "another kind has its own"
    now[0] += 1.0
    assert limit(None, "info", {"event": "a"}) == {"event": "a", "left_out": 5}
    assert (limit.dropped, limit.used) == (5, 1)
