"""Modules under another library's name, made of a table: each name is looked up in fedloom when it is first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from ...serialization.errors import JobError
from . import names

GUIDE = "docs/migrating-from-nvflare.md"


def take_over(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """Answer for all modules below ``package`` from now on; returns the package's own ``__getattr__`` and ``__all__``.

    Raises:
        ImportError: (later, of what is returned) a name that has no equivalent, with the nearest one there is.
    """
    if not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package))  # before the path's: the package's folder holds no other module
    return _lookup(package), sorted(names.MODULES.get(package, {}))


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self.package = package
        self._modules = {name for entry in (*names.MODULES, *names.LATER_MODULES) for name in _with_parents(entry)}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if not fullname.startswith(self.package + "."):
            return None
        if fullname not in self._modules:
            raise ImportError(missing(fullname), name=fullname)
        # all of them packages: `from module import name` then asks here for a name that the module does not have
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, f"fedloom under the name {spec.name}; see {GUIDE}.")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _lookup(module.__name__)
        module.__dict__["__all__"] = sorted(names.MODULES.get(module.__name__, {}))


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _lookup(module: str) -> Callable[[str], Any]:
    homes = names.MODULES.get(module, {})

    def load(name: str) -> Any:
        if name in homes:
            value = resolve(homes[name])
        elif (later := names.LATER_MODULES.get(module, {}).get(name)) is not None:
            value = _stand_in(module, name, later)
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        setattr(sys.modules[module], name, value)
        return value

    return load


def resolve(home: str) -> Any:
    """The object at ``"module:name"``."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


def missing(fullname: str) -> str:
    """That there is no equivalent of a module or name, and what comes nearest."""
    near = next((hint for prefix, hint in names.NEAREST if (fullname + ".").startswith(prefix + ".")), names.OTHERWISE)
    return f"fedloom has no equivalent of {fullname} (--compat nvflare); {near}. See {GUIDE}"


class _Refusing(type):
    """The class of stand-ins: to make one, or to inherit from it, is refused in words."""

    _said: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise JobError(cls._said)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        if bases:
            raise JobError(cls._said)


def _stand_in(module: str, name: str, near: str) -> type:
    """For names that scripts import beside those they use: importing one does no harm, using it is refused."""
    said = f"fedloom has no equivalent of {module}.{name} (--compat nvflare); {near}. See {GUIDE}"
    return _Refusing(name, (), {"_said": said, "__module__": module, "__doc__": said})
