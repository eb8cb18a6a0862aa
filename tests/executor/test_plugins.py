"""Executors that a site has installed, found by entry point."""

from __future__ import annotations

import sys

import pytest
from fedloom.executor.script import FunctionExecutor, settings_of
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import Component

PLUGIN = """
from pathlib import Path
from fedloom.executor.function import FunctionExecutor
from fedloom.client import FLModel

def tabular(rate: float = 1.0):
    return FunctionExecutor(str(Path(__file__)), "train", params_transfer_type="FULL")

def train(model, ctx):
    return FLModel(params={"w": model.params["w"] + 2, "n": model.params["n"]})

def broken():
    raise RuntimeError("no licence")

def strange():
    return 7

constant = 3
"""
ENTRIES = """[fedloom.executors]
acme.tabular = acme_fl:tabular
acme.broken = acme_fl:broken
acme.strange = acme_fl:strange
acme.constant = acme_fl:constant
acme.missing = acme_fl:nothing
acme.twice = acme_fl:tabular
acme.twice = acme_fl:broken
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package as pip leaves it."""
    site = tmp_path / "site-packages"
    info = site / "acme_fl-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    (site / "acme_fl.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("acme_fl", None)


@pytest.mark.parametrize("path", ["acme.tabular", "acme_fl.tabular"])
def test_found_by_its_name_and_by_what_it_stands_for(plugin, path):
    got = settings_of(Component(path, {"rate": 0.5}))
    assert isinstance(got, FunctionExecutor) and got.task_script_path == str(plugin / "acme_fl.py")


@pytest.mark.parametrize(
    ("path", "args", "words"),
    [
        ("acme.tabular", {"rat": 1}, "rat"),
        ("acme.broken", {}, "no licence"),
        ("acme.strange", {}, "int; it is neither"),
        ("acme.constant", {}, "a class or function belongs there"),
        ("acme.missing", {}, "cannot be loaded"),
        ("acme.twice", {}, "acme_fl.broken and acme_fl.tabular"),
        ("acme.other", {}, "known are .*acme.tabular"),
    ],
)
def test_what_is_wrong_is_said(plugin, path, args, words):
    with pytest.raises(JobError, match=words):
        settings_of(Component(path, args))


@pytest.mark.process
@pytest.mark.timeout(60)
def test_its_code_works_on_tasks(plugin, broker, make_agent, make_job, weights):
    archive = make_job({}, path="acme.tabular", task_script_path="unused.py")
    make_agent()
    broker.assign(("a", "site-1"), model=weights(1.0), archive=archive)
    assert "task_script_path" in broker.failed("a").text  # it takes other arguments than a script does
    archive = make_job({"x.py": ""}, path="acme_fl.tabular", task_script_path=None)
    broker.assign(("b", "site-1"), job="job-2", model=weights(1.0), archive=archive)
    assert broker.result(broker.done("b")).params["w"].tolist() == [[3.0] * 3] * 2
