"""What a simulation's warm process loads before it forks, and the one that is started before it is known what runs.

Importing this takes a few milliseconds: `start_early` comes before all else.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..serialization.errors import ProcessError
from .forkserver.warm import Warm

__all__ = ["end_early", "load_early", "modules_for", "start_early", "start_warm", "take_warm", "warmed"]

#: What every warm process loads, whatever the job needs.
BASE_MODULES = (
    "numpy",
    "numpy.random",  # numpy itself waits for its first use, which is in every site
    "zmq",
    "fedloom.broker.service",
    "fedloom.broker.control",
    "fedloom.broker.data",
    "fedloom.controller.service",
    "fedloom.controller.job",
    "fedloom.serialization.jobfolder",
    "fedloom.controller.workflows.fedavg",
    "fedloom.executor.agent",
    "fedloom.executor.host",
    "fedloom.sim.children",
    "fedloom.client",
    "pkgutil",  # of runpy, which starts scripts
)
#: With torch, what its first optimizer step would import in every process anew: more than a second each time.
TORCH_MODULES = ("torch", "torch._dynamo")
#: Imports known to start threads, or to break when forked: every process that needs one loads it itself.
NEVER = frozenset({"jax", "jaxlib", "tensorflow", "ray", "grpc", "cupy", "pyspark"})
#: How many scripts and modules of a job are read for their imports, and how large one may be.
MAX_SCANNED_FILES = 1000
MAX_SCANNED_BYTES = 4 * 1024 * 1024

_early: list[Warm] = []


def start_warm(modules: Iterable[str] = (), *, skip: Iterable[str] = ()) -> Warm:
    """Start a warm process that imports fedloom's own modules and these, without waiting for it.

    Raises:
        ProcessError: no interpreter can be started here.
    """
    warm = Warm(skip)
    try:
        warm.load([*BASE_MODULES, *_loadable(modules)])
    except ProcessError:
        warm.close()
        raise
    return warm


def warmed(warm: Warm, modules: Sequence[str]) -> Warm:
    """A warm process that has loaded these modules and can be forked.

    It is this one, or, where a module's import has started a thread or touched a GPU, another one without that module.

    Raises:
        ProcessError: no warm process can be had.
    """
    for number in range(len(warm.wanted) + len(modules)):
        try:
            if number == 0:
                warm.load(_loadable(modules))
            answers = warm.loaded()
        except BaseException:
            warm.close()
            raise
        unsafe = next((answer.unsafe for answer in answers if answer.unsafe), "")
        if not unsafe:
            return warm
        warm.close()
        if unsafe in BASE_MODULES:
            raise ProcessError(f"importing {unsafe} started a thread: the warm process cannot fork")
        _log_skipped(unsafe)
        warm = start_warm(warm.wanted, skip=warm.skip | {unsafe})
    warm.close()
    raise ProcessError("every list of modules to preload has one that starts a thread")


def _loadable(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if name.partition(".")[0] not in NEVER]


def _log_skipped(module: str) -> None:
    import structlog  # not before the warm process is started

    log = structlog.get_logger(__name__)
    log.info("preload_skipped", module=module, reason="its import starts threads or touches a GPU")


def start_early() -> None:
    """Start the next simulation's warm process now: it loads fedloom's modules while the job is read."""
    if not _early:
        with contextlib.suppress(ProcessError):  # the simulation itself will say it
            _early.append(start_warm())


def load_early(paths: Iterable[Path]) -> None:
    """Have the warm process that was started early, if one was, load what the code at ``paths`` imports."""
    for warm in _early:
        with contextlib.suppress(ProcessError):
            warm.load(modules_for(paths))


def end_early() -> None:
    """End the warm process that was started early and not taken."""
    while _early:
        warm = _early.pop()
        warm.process.terminate()  # it may be in the middle of an import
        warm.close()


def take_warm(modules: Sequence[str]) -> Warm:
    """A warm process of one's own that has loaded these modules: the one that was started early, or a new one.

    Raises:
        ProcessError: no warm process can be had.
    """
    early = _early.pop() if _early else None
    if early is not None and not _fits(early):
        early.close()
        early = None
    return warmed(early or start_warm(modules), modules)


def _fits(warm: Warm) -> bool:
    try:
        return warm.process.poll() is None and warm.follow_env(os.environ)
    except ProcessError:
        return False


def modules_for(paths: Iterable[Path], *, torch: bool = False) -> tuple[str, ...]:
    """The installed third-party modules that the Python files (and those in the folders) at ``paths`` import at once.

    Files beside them shadow installed modules of the same name, so those are left to the job; so are imports within
    functions, which may never happen. With any of torch comes what makes its first step fast.
    """
    files = list(_python_files(paths))
    local = {file.stem for file in files} | {file.parent.name for file in files if file.name == "__init__.py"}
    names: dict[str, None] = dict.fromkeys(TORCH_MODULES) if torch else {}
    known: dict[str, bool] = {}
    for file in files:
        for name in _imports(file):
            top = name.partition(".")[0]
            if top in local or top in NEVER or top == "fedloom":
                continue
            if top not in known:
                known[top] = _third_party(top)
            if known[top]:
                names.setdefault(name)
    if any(name.partition(".")[0] in ("torch", "torchvision", "lightning", "transformers") for name in names):
        names = {**dict.fromkeys(TORCH_MODULES), **names}
    return tuple(names)


def _python_files(paths: Iterable[Path]) -> Iterator[Path]:
    count = 0
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.suffix == ".py" and count < MAX_SCANNED_FILES:
                count += 1
                yield file


def _imports(file: Path) -> Iterator[str]:
    """Absolute imports that running the file would do at once."""
    try:
        if file.stat().st_size > MAX_SCANNED_BYTES:
            return
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the job itself will say it, with its own traceback
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop(0)
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                pass
            case _:
                pending += ast.iter_child_nodes(node)


def _third_party(top: str) -> bool:
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    return any(Path(place).is_relative_to(folder) for place in places for folder in _site_folders())


def _site_folders() -> list[str]:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    with contextlib.suppress(AttributeError, TypeError):
        folders.add(site.getusersitepackages())
    return [folder for folder in folders if folder]
