"""The warm process as its launcher holds it, and what it is to load before it forks.

`start_warm` may be called long before it is known what is to run: the imports go on in the background meanwhile.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import structlog

from .forkwire import Preloaded
from .spawner import Asked, ProcessError, WarmClient

__all__ = ["Warm", "modules_for", "start_early", "start_warm", "take_warm", "warmed"]

log = structlog.get_logger(__name__)

#: What every warm process loads, whatever the job needs.
BASE_MODULES = (
    "numpy",
    "zmq",
    "fedloom.broker.service",
    "fedloom.broker.control",
    "fedloom.broker.data",
    "fedloom.controller.service",
    "fedloom.controller.job",
    "fedloom.controller.workflows.fedavg",
    "fedloom.executor.agent",
    "fedloom.executor.host",
    "fedloom.sim.children",
    "fedloom.client",
)
#: With torch, what its first optimizer step would import in every process anew: more than a second each time.
TORCH_MODULES = ("torch", "torch._dynamo")
#: Imports known to start threads, or to break when forked: every process that needs one loads it itself.
NEVER = frozenset({"jax", "jaxlib", "tensorflow", "ray", "grpc", "cupy", "pyspark"})
#: One thread for each library: an OpenMP pool does not survive a fork, and a site's bits must not depend on the cores.
THREAD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
#: Room for the sockets' names below the run folder: a unix socket's path has at most 107 bytes.
MAX_TMP_BYTES = 60
STOP_S = 0.6
#: How many scripts and modules of a job are read for their imports, and how large one may be.
MAX_SCANNED_FILES = 1000
MAX_SCANNED_BYTES = 4 * 1024 * 1024

_BOOT = "from fedloom.sim.warm import main; main()"


class Warm(WarmClient):
    """The warm process itself, as its launcher holds it; closing it ends everything that came out of it.

    Attributes:
        run_dir: a private folder with a short name, for the sockets of one run; it goes with the process.
        path: where other clients connect.
        skip: modules that it must not load.
    """

    def __init__(self, skip: Iterable[str] = ()) -> None:
        if sys.platform != "linux":
            raise ProcessError(f"simulations need Linux (parent-death signals, /proc); this is {sys.platform}")
        base = tempfile.gettempdir()
        short = base if len(os.fsencode(base)) <= MAX_TMP_BYTES else "/tmp"  # noqa: S108 - private by mkdtemp
        self.run_dir = Path(tempfile.mkdtemp(prefix="fl-", dir=short))
        self.path = self.run_dir / "warm"
        self.log_path = self.run_dir / "warm.log"
        self.skip = frozenset(skip)
        self.wanted: dict[str, None] = {}
        self.loading: list[Asked] = []
        ours, theirs = socket.socketpair()
        # the parent-death signal follows the thread, not the process: only the main thread is sure to stay
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        try:
            with theirs, self.log_path.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno()), str(self.run_dir), str(parent)],
                    env={**os.environ, **THREAD_ENV},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a Ctrl-C at the terminal is the launcher's to handle
                )
        except OSError as error:
            ours.close()
            shutil.rmtree(self.run_dir, ignore_errors=True)
            raise ProcessError(f"cannot start {sys.executable!r}: {error}") from None
        super().__init__(ours)

    def load(self, modules: Iterable[str]) -> None:
        """Have modules imported, without waiting. Those of `skip` and `NEVER` are left out.

        Raises:
            ProcessError: the warm process has gone.
        """
        wanted = [name for name in modules if name not in self.skip and name.partition(".")[0] not in NEVER]
        self.wanted.update(dict.fromkeys(wanted))
        self.loading.append(self.begin_preload(wanted))

    def loaded(self) -> list[Preloaded]:
        """Wait for everything that `load` has asked for.

        Raises:
            ProcessError: the warm process has gone; with what it said last.
        """
        try:
            return [self.finish_preload(asked) for asked in self.loading]
        except ProcessError as error:
            words = self.last_words().strip()
            raise ProcessError(f"{error}\n{words}" if words else str(error)) from None
        finally:
            self.loading.clear()

    def last_words(self, limit: int = 2000) -> str:
        """The end of what the warm process and processes without a log of their own have written."""
        try:
            return self.log_path.read_bytes()[-limit:].decode(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        """Kill every process that came out of it, and it; within a second. Harmless a second time."""
        super().close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            # in the middle of an import, or waiting for a process that the kernel does not let go
            self.process.kill()
            self.process.wait()
            self.kill_others()
        shutil.rmtree(self.run_dir, ignore_errors=True)


def start_warm(modules: Iterable[str] = (), *, skip: Iterable[str] = ()) -> Warm:
    """Start a warm process that imports fedloom's own modules and these, without waiting for it.

    Raises:
        ProcessError: no interpreter can be started here.
    """
    warm = Warm(skip)
    try:
        warm.load([*BASE_MODULES, *modules])
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
                warm.load(modules)
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
        log.info("preload_skipped", module=unsafe, reason="its import starts threads or touches a GPU")
        warm = start_warm(warm.wanted, skip=warm.skip | {unsafe})
    warm.close()
    raise ProcessError("every list of modules to preload has one that starts a thread")


_early: list[Warm] = []


def start_early(paths: Iterable[Path]) -> None:
    """Start the next simulation's warm process for the code at ``paths`` now: it loads while the job is read."""
    if not _early:
        with contextlib.suppress(ProcessError):  # the simulation itself will say it
            _early.append(start_warm(modules_for(paths)))


def take_warm(modules: Sequence[str]) -> Warm:
    """A warm process of one's own that has loaded these modules: the one that was started early, or a new one.

    Raises:
        ProcessError: no warm process can be had.
    """
    early = _early.pop() if _early else None
    if early is not None and (early.lost or early.process.poll() is not None):
        early.close()
        early = None
    return warmed(early or start_warm(modules), modules)


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
