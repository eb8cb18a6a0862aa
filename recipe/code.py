"""The code that travels with a job: a script, and the modules beside it that it imports.

Found by reading the source, never by running it: what `import x` names is taken along when ``x.py`` or a folder ``x``
lies beside the script (or beside the job script), and is read for imports in turn. What is imported by a computed name
must be added by hand.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from ..serialization.archive import SKIPPED_NAMES, SKIPPED_SUFFIXES
from ..serialization.errors import JobError

#: Installed at every site: never taken along, even where a checkout of it lies beside the script.
_NEVER = frozenset({"fedloom", "__main__", "__future__"})
#: What installers call the folders of packages (the second is Debian's), whichever environment they belong to.
_PACKAGES = frozenset({"site-packages", "dist-packages"})


def script_folders() -> list[Path]:
    """Where a script that a job names by a relative path is looked for: beside the running script, then here."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    here = Path.cwd()
    beside = Path(main).resolve().parent if isinstance(main, str) and Path(main).is_file() else here
    if beside == here or is_installed(beside):  # a debugger, a test runner or a server is what runs
        return [here]
    return [beside, here]


def is_installed(folder: Path) -> bool:
    """Whether a folder is Python's own or that of installed packages or commands, here or in an environment below."""
    if not _PACKAGES.isdisjoint(folder.parts):  # such as the system's, which a virtual environment may see
        return True
    return any(folder.is_relative_to(Path(path).resolve()) for path in set(sysconfig.get_paths().values()))


def local_code(scripts: Iterable[Path], roots: Iterable[Path]) -> dict[str, Path]:
    """The files that these scripts need, by their place in the job's custom folder.

    Args:
        scripts: absolute paths; each lands at the top of the custom folder, or at its place below a root.
        roots: folders to look for imported modules in, besides each script's own.

    Raises:
        JobError: a script that is missing or not Python, or two different files for one place.
    """
    found: dict[str, Path] = {}
    extra = [root.resolve() for root in roots]
    waiting: list[tuple[Path, Path]] = []
    for script in scripts:
        folder = script.resolve().parent
        waiting.append((script.resolve(), folder))
    seen: set[Path] = set()
    while waiting:
        path, root = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        add_file(found, path.relative_to(root).as_posix(), path)
        for module in _imports(path):
            for base in dict.fromkeys([root, *extra]):
                files = _module_files(base, module)
                if not files:
                    continue
                for file in files:
                    if file.suffix == ".py":
                        waiting.append((file, base))
                    else:
                        add_file(found, file.relative_to(base).as_posix(), file)
                break
    return dict(sorted(found.items()))


def named_scripts(script: Path) -> list[Path]:
    """The Python files beside a job script that it names by a text, such as ``train_script="client.py:train"``."""
    try:
        parsed = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    texts = [n.value for n in ast.walk(parsed) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    places = dict.fromkeys(script.parent / text.partition(":")[0] for text in texts if _is_script_name(text))
    return [place for place in places if place.is_file()]


def _is_script_name(text: str) -> bool:
    return text.partition(":")[0].endswith(".py") and "\n" not in text and len(text) < 256


def add_file(found: dict[str, Path], name: str, path: Path) -> None:
    """Note a file's place.

    Raises:
        JobError: another file has that place.
    """
    other = found.setdefault(name, path)
    if other != path and other.read_bytes() != path.read_bytes():
        raise JobError(f"{other} and {path} would both be {name!r} in the job: rename one of them")


def tree(path: Path) -> dict[str, Path]:
    """A file, or all files in a folder, by their place beside that folder."""
    path = path.resolve()
    if path.is_file():
        return {path.name: path}
    return {file.relative_to(path.parent).as_posix(): file for file in _files(path)}


def _files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not file.name.endswith(SKIPPED_SUFFIXES)
        and not SKIPPED_NAMES.intersection(file.relative_to(folder).parts)
    )


def _module_files(base: Path, module: str) -> list[Path]:
    """The files of a module beside a script: a package whole, a plain folder's Python files, or one file."""
    top = module.split(".", 1)[0]
    if top in _NEVER:
        return []
    package = base / top
    if (package / "__init__.py").is_file():
        return _files(package)
    if (file := base / f"{top}.py").is_file():
        return [file]
    if package.is_dir() and "." in module:  # a folder without __init__.py: only the file that is named
        parts = module.split(".")
        for stop in range(len(parts), 1, -1):
            inner = base.joinpath(*parts[:stop])
            if inner.with_suffix(".py").is_file():
                return [inner.with_suffix(".py")]
            if (inner / "__init__.py").is_file():
                return _files(inner)
    return []


def _imports(path: Path) -> list[str]:
    """The dotted names that a file imports absolutely, anywhere in it."""
    if path.suffix != ".py":
        return []
    try:
        parsed = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise JobError(f"{path}{line} is not valid Python: {error}") from None
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error}") from None
    names: list[str] = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names
