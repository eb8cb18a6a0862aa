from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from fedloom.recipe.code import local_code, named_scripts, script_folders, tree
from fedloom.recipe.components import sources
from fedloom.serialization.errors import JobError


def test_follows_imports_recursively(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(
        "import os, model\nfrom fedloom import client\ndef f():\n    import late.deep\n"
    )
    (tmp_path / "model.py").write_text("from layers.conv import Conv\nimport numpy\nimport model\n")
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "__init__.py").write_text("")
    (tmp_path / "layers" / "conv.py").write_text("from . import other\nimport shared\n")
    (tmp_path / "layers" / "other.py").write_text("")
    (tmp_path / "layers" / "table.csv").write_text("1,2\n")
    (tmp_path / "layers" / "__pycache__").mkdir()
    (tmp_path / "layers" / "__pycache__" / "conv.pyc").write_text("")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "deep.py").write_text("")
    (tmp_path / "late" / "unused.py").write_text("")
    (tmp_path / "shared.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "fedloom").mkdir()
    (tmp_path / "fedloom" / "__init__.py").write_text("")
    assert list(local_code([tmp_path / "client.py"], [])) == [
        "client.py",
        "late/deep.py",
        "layers/__init__.py",
        "layers/conv.py",
        "layers/other.py",
        "layers/table.csv",
        "model.py",
        "shared.py",
    ]


def test_looks_beside_the_script_first_and_then_in_the_roots(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "client.py").write_text("import model, near")
    (tmp_path / "src" / "near.py").write_text("")
    (tmp_path / "near.py").write_text("another")
    (tmp_path / "model.py").write_text("")
    found = local_code([tmp_path / "src" / "client.py"], [tmp_path])
    assert found == {
        "client.py": tmp_path / "src" / "client.py",
        "model.py": tmp_path / "model.py",
        "near.py": tmp_path / "src" / "near.py",
    }


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("import broken")
    (tmp_path / "broken.py").write_text("x = (\n")
    with pytest.raises(JobError, match=r"broken.py, line 1 is not valid Python"):
        local_code([tmp_path / "client.py"], [])
    (tmp_path / "broken.py").write_bytes(b"\x00")
    with pytest.raises(JobError, match=r"broken.py.* is not valid Python"):
        local_code([tmp_path / "client.py"], [])


def test_two_files_for_one_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "client.py").write_text(name)
    with pytest.raises(JobError, match=r"would both be 'client.py'"):
        local_code([tmp_path / "a" / "client.py", tmp_path / "b" / "client.py"], [])
    (tmp_path / "b" / "client.py").write_text("a")
    assert list(local_code([tmp_path / "a" / "client.py", tmp_path / "b" / "client.py"], [])) == ["client.py"]


def test_a_debugger_or_a_test_runner_is_not_the_job_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pdb
    import sys

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", pdb.__file__, raising=False)
    assert script_folders() == [tmp_path / "here"]
    (tmp_path / "job.py").write_text("")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "job.py"), raising=False)
    assert script_folders() == [tmp_path, tmp_path / "here"]


def test_tree(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "x.csv").write_text("")
    (tmp_path / "data" / "x.pyc").write_text("")
    assert list(tree(tmp_path / "data")) == ["data/sub/x.csv"]
    assert list(tree(tmp_path / "data" / "sub" / "x.csv")) == ["x.csv"]


def test_scripts_that_a_job_script_names(tmp_path: Path) -> None:
    for name in ("client.py", "other.py"):
        (tmp_path / name).write_text("")
    job = tmp_path / "job.py"
    job.write_text(
        '"""Uses client.py."""\nrun("client.py:train", HERE / "other.py", "gone.py", f"{x}client.py", "a.txt")\n'
    )
    assert named_scripts(job) == [tmp_path / "client.py", tmp_path / "other.py"]
    job.write_text("def (")
    assert named_scripts(job) == []
    assert named_scripts(tmp_path / "gone.py") == []


@pytest.mark.parametrize("packages", ["lib/python3.11/site-packages", "lib/python3/dist-packages"])
def test_packages_of_another_environment_do_not_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: str
) -> None:
    """As a virtual environment with --system-site-packages sees them, or one that PYTHONPATH adds."""
    for folder, name in ((tmp_path / packages, "huge_library"), (tmp_path, "own_model")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("class Net: ...\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)
    assert sources({"huge_library", "own_model.deep"}) == [tmp_path / "own_model"]
