"""Folders of strangers: a job archive that is unpacked, and a job folder that is read."""

from __future__ import annotations

import atexit
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fedloom.serialization.archive import ArchiveLimits, folder_entries, pack_folder, unpack_archive
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import (
    CLIENT_CONFIG,
    META_FILE,
    SERVER_CONFIG,
    Component,
    ExecutorSpec,
    FilterSpec,
    JobSpec,
)

from .target import MIB, Target

LIMITS = ArchiveLimits(total_bytes=256 * 1024, files=24, depth=6, name_bytes=120, ratio=4)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    {"os.mkdir", "os.rename", "os.symlink", "os.link", "os.chmod", "os.chown", "os.utime", "os.truncate"}
)


def memory_dir() -> str | None:
    """A folder in memory, where the system has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@cache
def sandbox() -> Path:
    """This process's folder for what is unpacked."""
    if given := os.environ.get("FEDLOOM_FUZZ_DIR"):  # the runner's: libFuzzer ends a process without its exit handlers
        return Path(given)
    folder = Path(tempfile.mkdtemp(prefix="fedloom-fuzz-", dir=memory_dir()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _Guard:
    """Sees everything that this process opens for writing or makes, while a folder is named."""

    inside: str = ""
    hooked = False

    @classmethod
    def hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if not cls.inside:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & _WRITES or isinstance(path, int):
                return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        real = os.path.realpath(os.fsdecode(path))
        if not (real + "/").startswith(cls.inside):
            raise AssertionError(f"{event} of {real}, outside {cls.inside}")
        assert event not in ("os.symlink", "os.link"), f"{event} at {real}"

    @classmethod
    @contextmanager
    def only(cls, folder: Path) -> Iterator[None]:
        if not cls.hooked:
            sys.addaudithook(cls.hook)
            cls.hooked = True
        cls.inside = os.path.realpath(folder) + "/"
        try:
            yield
        finally:
            cls.inside = ""


# ---------------------------------------------------------------- archive


def archive(data: bytes) -> None:
    """Unpack: nothing outside the folder, no links, every bound held, and nothing left of what is refused."""
    box = sandbox() / "box"
    dest = box / "out"
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir()
    try:
        with _Guard.only(dest):
            files = unpack_archive(data, dest, LIMITS)
    except JobError:
        assert not list(box.iterdir()), "a refused archive left files"
        raise
    assert [entry.name for entry in box.iterdir()] == ["out"]
    found = sorted(dest.rglob("*"))
    assert not any(path.is_symlink() for path in found)
    assert all(path.is_dir() or path.is_file() for path in found)
    assert sorted(files) == [path for path in found if path.is_file()]
    assert len(found) <= LIMITS.files, f"{len(found)} files and folders; at most {LIMITS.files}"
    total = sum(path.stat().st_size for path in found if path.is_file())
    assert total <= LIMITS.total_bytes
    assert all(len(path.relative_to(dest).parts) <= LIMITS.depth for path in found)
    packed = pack_folder(dest)
    again = box / "again"
    unpack_archive(packed, again)
    assert pack_folder(again) == packed
    for name, path in folder_entries(dest):
        assert path.is_dir() or (again / name).read_bytes() == path.read_bytes()


def a_tar(*entries: tuple[str, bytes, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, type, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, kind, body in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(body), "x" if kind in (b"1", b"2") else ""
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()[:4096]


def archive_seeds() -> Iterable[bytes]:
    """Job archives, plain and gzip, with long names in both notations, and each forbidden kind of entry."""
    folder = sandbox() / "seed"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "app" / "custom").mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "app" / "custom" / "client.py").write_text("print('hé')\n")
    plain = pack_folder(folder)
    long = "n" * 105
    return [
        plain,
        gzip.compress(plain, mtime=0),
        a_tar(("a", b"0", b"x" * 600), ("d", b"5", b""), ("d/b", b"0", b"")),
        a_tar((long, b"0", b"x")),
        a_tar((long, b"0", b"x"), format=tarfile.PAX_FORMAT),
        a_tar(("é" * 20, b"0", b"x"), format=tarfile.PAX_FORMAT),
        gzip.compress(a_tar(("zeros", b"0", bytes(3000))), mtime=0),
        *(a_tar(("a", kind, b"")) for kind in (b"1", b"2", b"3", b"6", b"S", b"g")),
        a_tar(("../up", b"0", b"x")),
        a_tar(("/etc/x", b"0", b"x")),
        a_tar(("a/b/c/d/e", b"0", b"x"), ("a/b", b"5", b"")),
    ]


# ---------------------------------------------------------------- job folder

SEPARATOR = b"\n---\n"


def job_folder(data: bytes) -> None:
    """meta.json and the two config files out of the bytes, read as a job; what is read is written and read again."""
    meta, server, client, *_ = [*data.split(SEPARATOR, 2), b"", b""]
    folder = _job_dir(sandbox() / "job")
    for name, text in ((META_FILE, meta), (f"app/{SERVER_CONFIG}", server), (f"app/{CLIENT_CONFIG}", client)):
        (folder / name).write_bytes(text)
    spec = JobSpec.load(folder, {})
    for executor in spec.executors:
        for task in executor.tasks:
            for site in ("", *executor.sites):
                spec.executor_for(task, site)
    for app in spec.apps:
        for site in ("site-1", *app.sites):
            app.config_of(site)
            spec.filters_for("client_output", "train", site)
    spec.filters_for("server_input", "train")
    again = sandbox() / "again"
    shutil.rmtree(again, ignore_errors=True)
    spec.write(again)
    if all(custom == again / "app" / "custom" for custom in spec.custom_dirs(again)):
        _job_dir(again, fresh=False)
        assert JobSpec.load(again, {}) == spec


def _job_dir(folder: Path, *, fresh: bool = True) -> Path:
    if not folder.exists() or not fresh:
        (folder / "app" / "config").mkdir(parents=True, exist_ok=True)
        (folder / "app" / "custom").mkdir(exist_ok=True)
        (folder / "app" / "custom" / "client.py").write_text("")
        (folder / "app" / "model.safetensors").write_text("")
    return folder


def job_seeds() -> Iterable[bytes]:
    """Jobs as recipes write them."""
    fedavg = Component(
        "fedloom.controller.workflows.fedavg.FedAvg", {"num_rounds": 2, "initial_model": "model.safetensors"}
    )
    script = Component("fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py"}, "x")
    specs = [
        JobSpec("digits", (fedavg,), (ExecutorSpec(("*",), script),), min_clients=2, num_rounds=3, seed=7),
        JobSpec(
            "é",
            (fedavg,),
            (ExecutorSpec(("train", "eval*"), script), ExecutorSpec(("*",), script, ("site-1",))),
            sites=("site-1", "site-2"),
            components=(Component("a.B", {"x": [1.5, {"path": "c.D", "args": {}}]}, "selector"),),
            client_components=(Component("c.D"),),
            extra={"study": None},
            server_output=(FilterSpec((Component("a.F", {"x": 1}),), ("train",)),),
            client_output=(FilterSpec((Component("a.F"),), ("*",), ("site-2",)),),
            mandatory_clients=("site-1",),
            resource_spec={"site-1": {"num_of_gpus": 1}},
            client_extra={"mine": 1, "path": "{mine}/x", "site_config": {"site-1": {"mine": 2}}},
        ),
    ]
    seeds: list[bytes] = []
    for spec in specs:
        folder = sandbox() / "jobseed"
        shutil.rmtree(folder, ignore_errors=True)
        spec.write(folder)
        texts = [folder / META_FILE, folder / "app" / SERVER_CONFIG, folder / "app" / CLIENT_CONFIG]
        seeds.append(
            SEPARATOR.join(json.dumps(json.loads(p.read_text()), separators=(",", ":")).encode() for p in texts)
        )
    return seeds


ARCHIVE_WORDS = (
    b"ustar\x0000",
    b"ustar  \0",
    b"././@LongLink",
    b"../",
    b"/",
    b"20 path=../../x\n",
    b"0000644\0",
    b"\x80\0\0\0\0\0\0\0\0\0\0\1",
    b"9 size=1\n",
    b"GNU.sparse.name=",
    b"\x1f\x8b\x08\0\0\0\0\0\0\xff",
)
JOB_WORDS = (
    SEPARATOR,
    b'"format":"fedloom/1"',
    b'"name":',
    b'"min_clients":',
    b'"deploy_map":{"',
    b'"sites":[',
    b'"workflows":[',
    b'"executors":[',
    b'"components":[',
    b'"path":"a.B"',
    b'"args":{',
    b'"tasks":["',
    b'"executor":{',
    b'"task_result_filters":[{"filters":[{"name":"ExcludeVars"}]}]',
    b'"site_config":{"',
    b'"mandatory_clients":["',
    b'"resource_spec":{"',
    b'"name":"FedAvg"',
    b'["server","site-1"]',
    b"{mine}",
    b"{SITE_NAME}",
    b'"task_script_path":"',
    b'"initial_model":"',
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"@ALL",
    b"../",
    b"[[[[[[[[",
    b"NaN",
)

ARCHIVE = Target("archive", archive, (JobError,), archive_seeds, ARCHIVE_WORDS, max_len=8192, constant_bytes=3 * MIB)
JOB_FOLDER = Target("job_folder", job_folder, (JobError,), job_seeds, JOB_WORDS)
