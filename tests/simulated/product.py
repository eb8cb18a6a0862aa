"""The product, imported over the pretended system: every module of it gets `time`, `threading`, `zmq`... from here."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import structlog

_PARTS = ("serialization", "broker", "controller", "executor")


def _import_all() -> None:
    for part in _PARTS:
        package = importlib.import_module(f"fedloom.{part}")
        for info in pkgutil.walk_packages(package.__path__, f"fedloom.{part}."):
            importlib.import_module(info.name)


def load() -> None:
    """Import fedloom twice: once to have all that it needs from elsewhere, and once over the pretended modules.

    Afterwards everybody else finds the real modules again; fedloom's own names point into the room for good, so this
    is for a process of its own.
    """
    _import_all()
    for name in [name for name in sys.modules if name == "fedloom" or name.startswith("fedloom.")]:
        del sys.modules[name]
    network = importlib.import_module("network")
    system = importlib.import_module("system")
    importlib.import_module("database")
    pretended: dict[str, ModuleType] = {**system.MODULES, "zmq": network.zmq}
    real: dict[str, Any] = {name: sys.modules[name] for name in pretended}
    sys.modules.update(pretended)
    try:
        _import_all()
    finally:
        sys.modules.update(real)


class Listener:
    """Where the product's log lines go: counted, and shown if somebody wants to see them."""

    def __init__(self) -> None:
        self.tell: Any = None
        self.verbose: Any = None

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        if self.tell is not None:
            self.tell(method, event)
        if self.verbose is not None:
            self.verbose(method, event)
        raise structlog.DropEvent


LISTENER = Listener()


def listen() -> None:
    """All log lines go to `LISTENER`."""
    structlog.configure(processors=[LISTENER], cache_logger_on_first_use=False)
