from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import SiteFailure


@dataclass
class FakeSimResult:
    job_id: str
    status: str
    result_dir: Path
    reason: str = ""
    failures: tuple[SiteFailure, ...] = ()
    unfinished: bool = False


@dataclass
class FakeLauncher:
    """Stands for `fedloom.sim.launcher`: notes what it was asked, and answers as told."""

    status: str = "FINISHED:COMPLETED"
    reason: str = ""
    failures: tuple[SiteFailure, ...] = ()
    configs: list[Any] = field(default_factory=list[Any])
    jobs: list[Any] = field(default_factory=list[Any])

    def failure(self, site: str, text: str, round: int = 0) -> SiteFailure:
        return SiteFailure(site, "exception", text, round)

    def run(self, config: Any) -> FakeSimResult:
        from fedloom.serialization.jobspec import JobSpec

        self.configs.append(config)
        self.jobs.append(JobSpec.load(config.job_folder))
        return FakeSimResult(f"job-{len(self.configs)}", self.status, config.workspace, self.reason, self.failures)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    fake = FakeLauncher()
    module = types.ModuleType("fedloom.sim.launcher")
    module.SimConfig = lambda **values: types.SimpleNamespace(**values)  # type: ignore[attr-defined]
    module.SimResult = FakeSimResult  # type: ignore[attr-defined]
    module.run_simulation = fake.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedloom.sim.launcher", module)
    monkeypatch.setattr("fedloom.sim.preload.start_early", lambda: None)
    monkeypatch.setenv("FEDLOOM_GPUS", "2")  # whatever this machine has
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with a space in its name and a small client script in it."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "client.py").write_text("import helper\n\ndef train(model, ctx):\n    return model\n")
    (folder / "helper.py").write_text("VALUE = 1\n")
    (folder / "job.py").write_text("")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(folder / "job.py"), raising=False)
    monkeypatch.delenv("FEDLOOM_WORKSPACE", raising=False)
    monkeypatch.delenv("FEDLOOM_BROKER", raising=False)
    return folder
