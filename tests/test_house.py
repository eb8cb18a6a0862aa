"""The rules of the house that no linter knows: packaging, forbidden calls, file sizes, imports, the protocol page."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from fedloom.serialization import messages

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_DIRS = ("broker", "controller", "executor", "recipe", "serialization", "sim")
ROOT_MODULES = {"__init__.py", "__main__.py", "client.py"}
MAX_LINES = 500
#: The one module that may call torch.load, with weights_only=True, for checkpoints that a user names on this machine.
TORCH_LOAD_MODULE = "controller/checkpoints.py"


def tracked(*suffixes: str) -> list[Path]:
    """The files of the checkout that git knows or would add; in an unpacked archive all but what tools make."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0")]
    else:
        made = {".venv", ".typing", "build", "dist", "workspace", "fedloom-workspace"}
        paths = [path for path in ROOT.rglob("*") if not made.intersection(path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.name.endswith(suffixes) and path.is_file())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_packages_are_the_folders() -> None:
    """pyproject's list is written by hand: a forgotten subpackage would be missing from wheels only."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = config["tool"]["setuptools"]["packages"]
    found = ["fedloom"]
    for top in PACKAGE_DIRS:
        for init in (ROOT / top).rglob("__init__.py"):
            found.append("fedloom." + ".".join(init.parent.relative_to(ROOT).parts))
    assert sorted(listed) == sorted(found)
    assert len(set(listed)) == len(listed)


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without __init__.py would be importable from a checkout and missing from a wheel."""
    for top in PACKAGE_DIRS:
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{relative(file.parent)} has no __init__.py"


def test_every_import_is_a_declared_dependency() -> None:
    """What another dependency happens to bring along may be gone with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["torch"]]
    names = {re.split(r"[<>=\[; ]", line)[0] for line in declared}
    known = {"pyzmq": "zmq"}
    allowed = {known.get(name, name) for name in names} | {"fedloom"} | set(sys.stdlib_module_names)
    files = [path for top in PACKAGE_DIRS for path in (ROOT / top).rglob("*.py")] + list(ROOT.glob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=aliases):
                    found = {alias.name.split(".")[0] for alias in aliases}
                case ast.ImportFrom(module=str(module), level=0):
                    found = {module.split(".")[0]}
                case _:
                    continue
            assert found <= allowed, f"{relative(path)} imports {found - allowed}: declare it in pyproject.toml"


def test_only_three_modules_at_the_root() -> None:
    """The repository root is the package: any other module here would be published as fedloom.<name>."""
    assert {path.name for path in ROOT.glob("*.py")} <= ROOT_MODULES


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def forbidden_calls(source: str) -> list[str]:
    """Imports and calls that would run what a peer sends."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [f"import {a.name}" for a in names if a.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"from {module}")
            case ast.Attribute(attr="recv_pyobj" | "send_pyobj" as name):
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.Call(keywords=keywords):
                found += ["allow_pickle" for k in keywords if k.arg == "allow_pickle" and not _is_false(k.value)]
            case _:
                pass
    return found


FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"})


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_search_for_pickle_finds_it() -> None:
    assert forbidden_calls("import pickle") == ["import pickle"]
    assert forbidden_calls("from pickle import loads") == ["from pickle"]
    assert forbidden_calls("import torch\ntorch.load('x')") == ["torch.load"]
    assert forbidden_calls("sock.recv_pyobj()") == ["recv_pyobj"]
    assert forbidden_calls("np.load(p, allow_pickle=True)") == ["allow_pickle"]
    assert forbidden_calls("np.load(p, allow_pickle=False)\nimport json") == []


def test_no_pickle_anywhere() -> None:
    for path in tracked(".py"):
        if relative(path).startswith("tests/"):
            continue  # tests may show that pickles are refused
        found = forbidden_calls(path.read_text())
        if relative(path) == TORCH_LOAD_MODULE:
            assert set(found) <= {"torch.load"}
            assert "weights_only=True" in path.read_text()
            continue
        assert not found, f"{relative(path)}: {', '.join(found)}"


def test_files_stay_readable() -> None:
    """A file past 500 lines is two files."""
    long = {relative(p): n for p in tracked(".py", ".md") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_no_licence_headers_and_no_stray_prints() -> None:
    for top in PACKAGE_DIRS:
        for path in (ROOT / top).rglob("*.py"):
            head = path.read_text()[:400]
            assert "Licensed under" not in head and "Copyright" not in head, relative(path)


def test_broker_and_serialization_never_import_torch() -> None:
    """Broker hosts do without torch: importing every module of the two must not bring it in."""
    modules = [
        "fedloom." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for top in ("broker", "serialization")
        for path in sorted((ROOT / top).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "sys.exit(next((name for name in ('torch', 'sklearn', 'starlette') if name in sys.modules), None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for top in ("broker",):
        for path in (ROOT / top).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE), relative(path)


# ---------------------------------------------------------------- the protocol page


def sections() -> dict[str, str]:
    """The page's paragraphs about one message each, by heading such as ``Hello (1)``."""
    parts = re.split(r"^### (.+)$", (ROOT / "docs" / "protocol.md").read_text(), flags=re.MULTILINE)
    return {
        heading.strip(): re.split(r"^## ", text, flags=re.MULTILINE)[0]
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("kind", sorted(messages.KINDS))
def test_protocol_page_describes_every_kind(kind: int) -> None:
    """Every kind has a section with its number, and the section names every one of its fields."""
    cls = messages.KINDS[kind]
    text = sections().get(f"{cls.__name__} ({kind})")
    assert text is not None, f"docs/protocol.md has no section '### {cls.__name__} ({kind})'"
    missing = [f.name for f in fields(cls) if not re.search(rf"`{f.name}`", text)]
    assert not missing, f"docs/protocol.md, {cls.__name__}: says nothing of {missing}"


def test_protocol_page_has_no_kind_too_many() -> None:
    known = {f"{cls.__name__} ({kind})" for kind, cls in messages.KINDS.items()}
    assert set(sections()) == known


@pytest.mark.parametrize(
    "record",
    [messages.TaskRef, messages.PayloadRef, messages.CloseRule, messages.Failure, messages.Refusal, messages.CommitRef],
)
def test_protocol_page_describes_the_shared_records(record: type) -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{record.__name__}` |"))
    assert [f.name for f in fields(record) if f"`{f.name}`" not in row] == []


def test_protocol_page_describes_items() -> None:
    found = sections()
    for record, heading in ((messages.AssignItem, "Assign (13)"), (messages.DoneItem, "Done (17)")):
        assert [f.name for f in fields(record) if f"`{f.name}`" not in found[heading]] == []


def test_docs_links_lead_somewhere() -> None:
    for path in tracked(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{relative(path)} links to {target}"
