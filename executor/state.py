"""What a site remembers between tasks: a map of tensors and values, versioned with the tasks that wrote it.

An attempt starts from the version that its Assign names and writes a new one, named ``<task>.<attempt>``. The new one
counts once the broker has stored the attempt's result, so an attempt that is lost or refused leaves no trace: the next
one starts from where the first had started.

Which version counts only the broker knows: its answers are lost, repeated and late. So a version goes only where the
broker itself says that it is over with: an Assign names the site's current version, and every other one that no attempt
here starts from or writes has been replaced for good.

A version is a payload file: the tensors as they are, and ``tree``, the JSON of everything else with their places. Keys
may be texts or whole numbers (an optimizer's ``state_dict()`` has both).
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..serialization.errors import PayloadError
from ..serialization.model import FLModel
from ..serialization.payload import decode_model, encode_model

_TREE = "tree"
_MAX_DEPTH = 64


def version_name(task: str, attempt: int) -> str:
    """The version that this attempt writes."""
    return f"{task}.{attempt}"


class SiteState(MutableMapping[str, Any]):
    """A site's memory within one attempt. Use it as a dict; values are tensors (numpy or torch), numbers, texts, bytes,
    None, and lists, tuples and dicts of these.

    It is read from disk when first looked at, and written with the result if it was looked at. Arrays may be changed in
    place: the version they came from stays as it is.
    """

    def __init__(self, source: Path | None) -> None:
        self._source = source
        self._values: dict[str, Any] | None = None

    @property
    def used(self) -> bool:
        """Whether anyone has looked at it in this attempt."""
        return self._values is not None

    def _loaded(self) -> dict[str, Any]:
        if self._values is None:
            self._values = {} if self._source is None else load_state(self._source)
        return self._values

    def __getitem__(self, key: str) -> Any:
        return self._loaded()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"site state key {key!r}; keys are texts")
        self._loaded()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._loaded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def __repr__(self) -> str:
        return f"SiteState({', '.join(self._loaded())})"

    def save(self, path: Path) -> bool:
        """Write the new version; False where there is nothing to remember.

        Raises:
            PayloadError: a value of a type that cannot be stored; names its key.
        """
        if self._values is None or (not self._values and self._source is None):
            return False
        save_state(self._values, path)
        return True


def save_state(values: dict[str, Any], path: Path) -> None:
    """Write a map of tensors and values as one payload file, whole or not at all."""
    tensors: dict[str, Any] = {}
    tree = _to_tree(values, tensors, "state", 0)
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    tensors[_TREE] = np.frombuffer(text, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for buffer in encode_model(FLModel(params=tensors)).buffers:
            file.write(buffer)
    part.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """A map out of its file; tensors are private views of it and may be changed.

    Raises:
        PayloadError: not a site state, or damaged.
    """
    arrays: dict[str, Any] = decode_model(path, framework="numpy").params or {}
    try:
        tree = json.loads(arrays.pop(_TREE).tobytes())
        torch: dict[str, Any] = decode_model(path, framework="pytorch").params if _has_torch(tree) else {}
        values = _from_tree(tree, arrays, torch)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise PayloadError(f"{path} is not a site state: {error!r}") from None
    if not isinstance(values, dict):
        raise PayloadError(f"{path} is not a site state: {type(values).__name__} where a map belongs")
    return cast("dict[str, Any]", values)


def _to_tree(value: Any, tensors: dict[str, Any], where: str, depth: int) -> Any:
    """A JSON value: numbers, texts and null stand for themselves, everything else is [kind, ...]."""
    if depth > _MAX_DEPTH:
        raise PayloadError(f"{where} is nested more than {_MAX_DEPTH} deep (or holds itself)")
    torch = sys.modules.get("torch")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.ndarray | np.generic) or (torch is not None and isinstance(value, torch.Tensor)):
        name = f"t{len(tensors)}"
        is_numpy = isinstance(value, np.ndarray | np.generic)
        tensors[name] = np.asarray(cast("Any", value)) if is_numpy else value.detach().cpu()
        return ["n" if is_numpy else "p", name]
    if isinstance(value, float):
        return value if math.isfinite(value) else ["f", repr(value)]
    if isinstance(value, bytes):
        return ["b", base64.b64encode(value).decode()]
    if isinstance(value, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", value)
        kind = "l" if isinstance(value, list) else "t"
        return [kind, [_to_tree(item, tensors, f"{where}[{i}]", depth + 1) for i, item in enumerate(items)]]
    if isinstance(value, MutableMapping | dict):
        pairs: list[Any] = []
        for key, item in cast("dict[Any, Any]", value).items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise PayloadError(f"{where}: key {key!r}; keys are texts or whole numbers")
            pairs.append([key, _to_tree(item, tensors, f"{where}[{key!r}]", depth + 1)])
        return ["d", pairs]
    raise PayloadError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}; the site state holds tensors, numbers,"
        " texts, bytes, None, and lists, tuples and dicts of these (of an optimizer keep its state_dict())"
    )


def _from_tree(node: Any, arrays: dict[str, Any], torch: dict[str, Any]) -> Any:
    if not isinstance(node, list):
        return node
    kind, content = cast("list[Any]", node)
    match kind:
        case "n":
            return arrays[content]
        case "p":
            return torch[content]
        case "f":
            return float(content)
        case "b":
            return base64.b64decode(content)
        case "l":
            return [_from_tree(item, arrays, torch) for item in content]
        case "t":
            return tuple(_from_tree(item, arrays, torch) for item in content)
        case "d":
            return {key: _from_tree(item, arrays, torch) for key, item in content}
        case _:
            raise ValueError(f"kind {kind!r}")


def _has_torch(node: Any) -> bool:
    if not isinstance(node, list):
        return False
    kind, content = cast("list[Any]", node)
    if kind in ("l", "t"):
        return any(_has_torch(item) for item in content)
    return any(_has_torch(item) for _, item in content) if kind == "d" else kind == "p"


class StateStore:
    """The agent's side: which version files a site has for a job, and which may go."""

    def __init__(self, workspace: Path) -> None:
        self._root = workspace / "sites"

    def folder(self, site: str, job: str) -> Path:
        """Where this site's versions for this job lie."""
        return self._root / site / "state" / job

    def path(self, site: str, job: str, version: str) -> Path:
        """The file of a version, whether it exists or not.

        Raises:
            PayloadError: a version that is not a file name.
        """
        return Path(self.place(site, job, version))

    def place(self, site: str, job: str, version: str) -> str:
        """`path` as text: of thousands hardly one is written. Raises as `path`."""
        if not version or "/" in version or version.startswith("."):
            raise PayloadError(f"site-state version {version!r}; '<task>.<attempt>' belongs here")
        return f"{self._root}/{site}/state/{job}/{version}"

    def has_any(self, site: str, job: str) -> bool:
        """Whether this site has a folder of versions for this job."""
        return self.folder(site, job).is_dir()

    def with_any(self, sites: Iterable[str], job: str) -> list[str]:
        """Those of these sites that have one."""
        return [site for site in sites if self.has_any(site, job)] if self._root.is_dir() else []

    def keep_only(self, site: str, job: str, versions: AbstractSet[str]) -> None:
        """Remove all others, and what is left of writes that were cut short."""
        for item in self.folder(site, job).iterdir():
            if item.name.removeprefix(".").removesuffix(".part") not in versions:
                item.unlink(missing_ok=True)

    def discard(self, site: str, job: str, version: str) -> None:
        """The attempt that wrote this version has ended, and its result was never offered to the broker."""
        if version:
            self.path(site, job, version).unlink(missing_ok=True)

    def forget(self, job: str, sites: tuple[str, ...]) -> None:
        """The job is over."""
        for site in sites:
            folder = self.folder(site, job)
            if folder.is_dir():
                for item in folder.iterdir():
                    item.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
