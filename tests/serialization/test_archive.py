from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from fedloom.serialization.archive import ArchiveLimits, pack_folder, unpack_archive, write_archive
from fedloom.serialization.errors import JobError


def make_folder(root: Path) -> Path:
    folder = root / "a job"
    (folder / "app" / "custom").mkdir(parents=True)
    (folder / "app" / "empty").mkdir()
    (folder / "meta.json").write_text("{}")
    (folder / "app" / "custom" / "client.py").write_text("print('hé')\n")
    script = folder / "app" / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (folder / "app" / "big.bin").write_bytes(os.urandom(3 * 1024 * 1024 + 17))
    (folder / "app" / ("n" * 180 + "é.txt")).write_text("long")
    (folder / "app" / "none").write_bytes(b"")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_round_trip_keeps_names_bytes_and_the_executable_bit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    out = tmp_path / "out"
    files = unpack_archive(pack_folder(folder), out)
    assert contents(out) == contents(folder)
    assert os.access(out / "app" / "run.sh", os.X_OK)
    assert not os.access(out / "meta.json", os.X_OK)
    assert len(files) == 6


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    first = pack_folder(folder)
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    (folder / "meta.json").chmod(0o600)
    assert pack_folder(folder) == first
    sink = io.BytesIO()
    assert write_archive(folder, sink) == len(first)
    assert sink.getvalue() == first


def test_what_never_belongs_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = pack_folder(folder)
    (folder / "app" / "__pycache__").mkdir()
    (folder / "app" / "__pycache__" / "client.cpython-311.pyc").write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    assert pack_folder(folder) == before


def test_plain_tar_tools_read_it_and_theirs_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(pack_folder(folder))) as tar:
        assert "app/custom/client.py" in tar.getnames()
    theirs = tmp_path / "theirs.tar.gz"
    with tarfile.open(theirs, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    unpack_archive(theirs, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


def test_from_a_file_and_a_memoryview(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    data = pack_folder(folder)
    archive = tmp_path / "job.tar"
    archive.write_bytes(data)
    unpack_archive(archive, tmp_path / "one")
    unpack_archive(memoryview(bytearray(data)), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(folder)


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"x", link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info, data


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/.", "a\\b", "a\nb", "d/" * 40 + "x", "n" * 300]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobError, match="allowed are relative printable names"):
        unpack_archive(tar_of(entry(name)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(JobError, match="link or a device"):
        unpack_archive(tar_of(entry("good"), entry("bad", kind, b"", "/etc/passwd")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_twice_and_a_file_as_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="twice"):
        unpack_archive(tar_of(entry("a"), entry("a")), tmp_path / "out")
    with pytest.raises(JobError, match="both as a file and as a folder"):
        unpack_archive(tar_of(entry("a"), entry("a/b")), tmp_path / "out")


def test_bombs_are_refused_before_they_fill_the_disk(tmp_path: Path) -> None:
    bomb = gzip.compress(tar_of(entry("zeros", data=bytes(64 * 1024 * 1024))))
    assert len(bomb) < 100_000
    with pytest.raises(JobError, match="unpacks to more than"):
        unpack_archive(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(JobError, match="more than 2 files"):
        unpack_archive(tar_of(entry("a"), entry("b"), entry("c")), tmp_path / "out", ArchiveLimits(files=2))
    with pytest.raises(JobError, match="unpacks to more than 1000 bytes"):
        unpack_archive(tar_of(entry("a", data=bytes(5000))), tmp_path / "out", ArchiveLimits(total_bytes=1000))


def test_a_huge_long_name_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 10**9
    with pytest.raises(JobError, match="header of 1000000000 bytes"):
        unpack_archive(info.tobuf(), tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x1f\x8b garbage", bytes(512)[:-1], os.urandom(2048)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(JobError):
        unpack_archive(data, tmp_path / "out")


def test_every_cut_is_noticed_or_whole(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(b"a" * 700)
    (tmp_path / "f" / "b").write_bytes(b"b" * 100)
    data = pack_folder(tmp_path / "f")
    for cut in range(0, len(data) - 1024, 37):
        with pytest.raises(JobError):
            unpack_archive(data[:cut], tmp_path / "out")
    for cut in range(0, len(data), 97):  # the same of a gzip stream, whose own checks come first
        compressed = gzip.compress(data, mtime=0)
        if cut < len(compressed) - 30:
            with pytest.raises(JobError):
                unpack_archive(compressed[:cut], tmp_path / "out")


def test_links_in_the_folder_and_a_full_destination(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "app" / "data").symlink_to("/etc")
    with pytest.raises(JobError, match="link or a special file"):
        pack_folder(folder)
    (folder / "app" / "data").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(JobError, match="not empty"):
        unpack_archive(pack_folder(folder), tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"
    with pytest.raises(JobError, match="not a folder"):
        pack_folder(tmp_path / "nowhere")
