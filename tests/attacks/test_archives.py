"""Job archives that lie: the client's command refuses to make them; the job's own process refuses to unpack them.

The broker does not look into payloads: what a stranger submits is stored and claimed, and ends as a failed job whose
reason says what was found, before a byte of it lies outside of its folder.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.serialization.archive import ArchiveLimits, pack_folder, unpack_archive
from fedloom.serialization.errors import JobError
from fedloom.serialization.jobspec import JobSpec
from fedloom.serialization.messages import Answer, Ask, JobId

pytestmark = pytest.mark.process

MIB = 1024 * 1024
#: Where an archive wants to write to, seen from the folder that it is unpacked into.
OUTSIDE = "fedloom-escaped"


def tar(*entries: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], fmt: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as archive:
        for entry in entries:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data) if data else None)
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return entry(name), data


def claims(size: int) -> bytes:
    """A header that promises more than there is."""
    info = entry("big")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: tar(file(f"/tmp/{OUTSIDE}")), "file name '/tmp/.*; allowed are relative printable names"),
    "parent": (lambda: tar(file(f"../{OUTSIDE}")), "without '..'"),
    "parent inside": (lambda: tar(file(f"app/../../{OUTSIDE}")), "without '..'"),
    "dot": (lambda: tar(file("./meta.json")), "allowed are relative printable names"),
    "backslash": (lambda: tar(file(f"..\\{OUTSIDE}")), "allowed are relative printable names"),
    "control character": (lambda: tar(file("a\x1b[2J")), "allowed are relative printable names"),
    "symlink": (lambda: tar(entry("app", tarfile.SYMTYPE, "/etc")), "'app' is a link or a device; only files"),
    "through a symlink": (
        lambda: tar(entry("app", tarfile.SYMTYPE, "/tmp"), file(f"app/{OUTSIDE}")),
        "'app' is a link or a device",
    ),
    "hardlink": (lambda: tar(entry("meta.json", tarfile.LNKTYPE, "/etc/passwd")), "is a link or a device"),
    "device": (lambda: tar(entry("null", tarfile.CHRTYPE)), "'null' is a link or a device"),
    "block device": (lambda: tar(entry("sda", tarfile.BLKTYPE)), "is a link or a device"),
    "fifo": (lambda: tar(entry("pipe", tarfile.FIFOTYPE)), "'pipe' is a link or a device"),
    "twice": (lambda: tar(file("meta.json", b"{}"), file("meta.json", b"{ }")), "holds 'meta.json' twice"),
    "file and folder": (lambda: tar(file("app"), file("app/x")), "both as a file and as a folder"),
    "long name": (lambda: tar(file("n" * 2000)), "file name 'nnn.*1024 bytes"),
    "long part": (lambda: tar(file("n" * 256)), "allowed are relative printable names"),
    "deep": (lambda: tar(file("a/" * 40 + "x")), "up to 32 deep"),
    "pax size": (lambda: _pax({"size": "99999999999"}), "pax size or sparse record"),
    "long header": (lambda: _pax({"comment": "x" * 20_000}), "a header of .* bytes in the job archive; at most 16384"),
    "cut short": (lambda: tar(file("meta.json", b"x" * 2000))[:1024], "ends within 'meta.json'"),
    "promises a terabyte": (lambda: claims(2**40 - 1), "ends within 'big'"),
    "no archive": (lambda: os.urandom(5000), "not a job archive|damaged"),
    "nothing": (lambda: b"", "cut short|empty"),
    "text": (lambda: b"#!/bin/sh\nrm -rf /\n" * 100, "not a job archive"),
    "gzip cut short": (lambda: gzip.compress(os.urandom(5000))[:-9], "damaged|not a job archive|cut short"),
    "gzip bomb": (lambda: gzip.compress(tar(file("zeros", bytes(24 * MIB)))), r"unpacks to more than \d+ bytes"),
}
#: Those that go through a real broker, controller and job process; one of each family.
SUBMITTED = ("parent inside", "through a symlink", "text", "gzip bomb")


def _pax(headers: dict[str, str]) -> bytes:
    info = entry("x")
    info.pax_headers = headers
    return tar(info, fmt=tarfile.PAX_FORMAT)


@pytest.mark.parametrize("name", ARCHIVES)
def test_unpacking(name: str, tmp_path: Path) -> None:
    """What an executor and a job process do with what they are given: all or nothing, and nothing outside."""
    data, words = ARCHIVES[name][0](), ARCHIVES[name][1]
    dest = tmp_path / "deep" / "er" / "job"
    with pytest.raises(JobError, match=words):
        unpack_archive(data, dest)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert not Path(f"/tmp/{OUTSIDE}").exists()


def test_a_bomb_costs_no_more_than_its_size_allows(tmp_path: Path) -> None:
    """The ratio, not the figure in a header: what is written is counted."""
    bomb = gzip.compress(tar(file("zeros", bytes(8 * MIB))))
    with pytest.raises(JobError, match="unpacks to more than 4194304 bytes"):
        unpack_archive(bomb, tmp_path / "job", ArchiveLimits(total_bytes=4 * MIB))
    assert not list(tmp_path.rglob("zeros"))


def test_very_many_files(tmp_path: Path) -> None:
    """Each costs an inode: counted beside the bytes."""
    many = tar(*(entry(f"f{n}") for n in range(101)))
    with pytest.raises(JobError, match="the job archive holds more than 100 files"):
        unpack_archive(many, tmp_path / "job", ArchiveLimits(files=100))
    assert not list(tmp_path.rglob("f*"))


@pytest.fixture(scope="module")
def reasons(_ground: Any, run_controller: Any) -> dict[str, dict[str, Any]]:
    """Each archive submitted by a stranger; what its job came to."""
    run_controller()
    jobs = {name: _ground.submit(ARCHIVES[name][0](), "evil") for name in SUBMITTED}
    out: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        _ground.until(lambda job=job: _ground.ask("job", job)["status"].startswith("FINISHED"), f"{name} ended")
        out[name] = _ground.ask("job", job)
    return out


@pytest.mark.parametrize("name", SUBMITTED)
def test_a_submitted_one(ground: Any, reasons: dict[str, dict[str, Any]], name: str) -> None:
    assert reasons[name]["status"] == "FINISHED:FAILED"
    assert re.search(ARCHIVES[name][1], reasons[name]["reason"]), reasons[name]["reason"]
    assert reasons[name]["claim"] == 1, "it is not tried again and again"
    assert not Path(f"/tmp/{OUTSIDE}").exists()


# ---------------------------------------------------------------- job folders


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_a_folder_that_holds_more_than_files(tmp_path: Path, kind: str) -> None:
    """The client's own command: a link in a job folder might carry away what nobody meant to send."""
    (tmp_path / "meta.json").write_text("{}")
    if kind == "symlink":
        (tmp_path / "data").symlink_to("/etc")
    else:
        os.mkfifo(tmp_path / "data")
    with pytest.raises(JobError, match="is a link or a special file; a job holds regular files only"):
        pack_folder(tmp_path)


META: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "meta.json"),
    "a list": ([], "meta.json"),
    "no name": ({"name": None}, "name"),
    "a path for a name": ({"name": "../../etc"}, "job name '../../etc'"),
    "another format": ({"format": "pickle/9"}, "format"),
    "half a client": ({"min_clients": 0.5}, "min_clients"),
    "no clients": ({"min_clients": 0}, "min_clients"),
    "a bool of clients": ({"min_clients": True}, "min_clients"),
    "a billion clients": ({"min_clients": 10**12}, "min_clients"),
    "minus one rounds": ({"num_rounds": -1}, "num_rounds"),
    "a path for a site": ({"sites": ["../x"]}, "site name '../x'"),
    "a site twice": ({"sites": ["a", "a"]}, "twice|'a'"),
    "sites that are text": ({"sites": "site-1"}, "sites"),
    "a path for an app": ({"deploy_map": {"../../app": ["@ALL"]}}, "app"),
    "no threads": ({"threads_per_task": 0}, "threads_per_task"),
    "a seed of text": ({"seed": "now"}, "seed"),
}


@pytest.fixture(scope="module")
def honest_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedloom.recipe import NumpyFedAvgRecipe

    folder = tmp_path_factory.mktemp("honest")
    (folder / "client.py").write_text("")
    recipe = NumpyFedAvgRecipe(
        name="honest", model=[1.0], min_clients=1, num_rounds=1, train_script=str(folder / "client.py")
    )
    return recipe.export(folder / "job")


@pytest.mark.parametrize("name", META)
def test_meta_json(honest_job: Path, tmp_path: Path, name: str) -> None:
    """Absurd values in a job's meta.json: told before anything runs, with the file's key."""
    change, words = META[name]
    folder = tmp_path / "job"
    unpack_archive(pack_folder(honest_job), folder)
    meta = json.loads((folder / "meta.json").read_text())
    text = change if isinstance(change, str) else json.dumps(meta | change if isinstance(change, dict) else change)
    (folder / "meta.json").write_text(text)
    with pytest.raises(JobError, match=words):
        JobSpec.load(folder)


def test_components_that_are_no_workflow(ground: Any, honest_job: Path, tmp_path: Path, run_controller: Any) -> None:
    """A config names any class it likes; what is no workflow is not run as one, and its job says so."""
    folder = tmp_path / "job"
    unpack_archive(pack_folder(honest_job), folder)
    config = folder / "app" / "config" / "config_fed_server.json"
    server = json.loads(config.read_text())
    server["workflows"] = [{"id": "w", "path": "subprocess.CompletedProcess", "args": {"args": [], "returncode": 0}}]
    config.write_text(json.dumps(server))
    run_controller()
    job = ground.submit(pack_folder(folder), "evil")
    started = time.monotonic()
    ground.until(lambda: ground.ask("job", job)["status"].startswith("FINISHED"), "the job ended")
    status = ground.ask("job", job)
    assert status["status"] == "FINISHED:FAILED" and "is a CompletedProcess, not a fedloom Workflow" in status["reason"]
    assert time.monotonic() - started < 20
    answer, _ = ground.client.request(Ask(ground.client.next_ref(), "job", JobId(job)))
    assert isinstance(answer, Answer)
