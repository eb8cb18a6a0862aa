from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fedloom.broker.incoming import IncomingFile
from fedloom.broker.spool import Landing, Spool
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.errors import PayloadError, StorageError
from fedloom.serialization.messages import PayloadId, PayloadRef


@pytest.fixture(params=["power", "process"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Spool:
    return Spool(tmp_path / "store", request.param)


def write(spool: Spool, name: str, data: bytes) -> None:
    spool.incoming_path(name).write_bytes(data)


class TestSpool:
    def test_is_its_users_alone_and_has_one_token(self, tmp_path: Path) -> None:
        spool = Spool(tmp_path / "a" / "b")
        assert stat.S_IMODE(spool.root.stat().st_mode) == 0o700
        assert len(spool.token) == 32
        assert Spool(spool.root).token == spool.token == (spool.root / ".token").read_text()
        assert stat.S_IMODE((spool.root / ".token").stat().st_mode) == 0o600
        (spool.root / ".token").write_text("")  # as a power cut may leave it
        assert len(Spool(spool.root).token) == 32
        assert sorted(p.name for p in spool.root.iterdir()) == [".token", "incoming", "payloads", "run"]

    def test_a_root_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="--store"):
            Spool(tmp_path / "file")

    def test_finish_moves_a_file_to_its_payload(self, spool: Spool) -> None:
        write(spool, "x", b"data")
        assert not spool.exists("b3-1")
        path = spool.finish("x", "b3-1")
        assert path == spool.root / "payloads" / "b3" / "b3-1" == spool.path("b3-1")
        assert path.read_bytes() == b"data"
        assert spool.exists("b3-1") and spool.exists("b3-1", 4) and not spool.exists("b3-1", 5)
        assert list(spool.incoming.iterdir()) == []
        with pytest.raises(PayloadError, match="gone"):
            spool.finish("x", "b3-1")

    def test_finish_all_closes_descriptors_and_names_what_was_taken_away_or_exchanged(self, spool: Spool) -> None:
        landings = []
        for name in ("a", "b", "c"):
            write(spool, name, name.encode())
            landings.append(Landing(name, f"r-{name}.1", spool.open_incoming(name, create=False)))
        spool.incoming_path("b").unlink()
        write(spool, "other", b"evil")
        spool.incoming_path("other").replace(spool.incoming_path("c"))
        assert spool.finish_all(landings) == landings[1:]
        assert [spool.exists(f"r-{n}.1") for n in "abc"] == [True, False, False]
        for landing in landings:
            assert landing.fd is not None
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(landing.fd)

    def test_power_syncs_the_file_before_its_name_and_the_folder_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spool = Spool(tmp_path, "power")
        write(spool, "x", b"data")
        synced: list[str] = []
        fsync = os.fsync

        def spy(fd: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
            fsync(fd)

        monkeypatch.setattr(os, "fsync", spy)
        spool.finish("x", "b3-1")
        assert synced == ["x", "payloads", "b3"]
        synced.clear()
        write(spool, "x", b"data")
        Spool(tmp_path, "process").finish("x", "b3-1")
        assert synced == []

    def test_a_failed_sync_is_loud(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spool = Spool(tmp_path, "power")
        write(spool, "x", b"data")

        def fail(fd: int) -> None:
            raise OSError(5, "I/O error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="durable"):
            spool.finish("x", "b3-1")
        assert not spool.exists("b3-1")

    def test_store_and_read_small_payloads(self, spool: Spool) -> None:
        assert spool.store("p-1", [b"ab", memoryview(b"cde"), b""]) == 5
        assert spool.read("p-1", 5) == b"abcde"
        assert spool.read("p-1", 4) is None
        assert spool.read("p-2", 4) is None
        assert spool.store("p-2", []) == 0
        assert spool.read("p-2", 4) == b""

    @pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "-x", "é", "x" * 129])
    def test_ids_cannot_leave_the_spool(self, spool: Spool, bad: str) -> None:
        with pytest.raises(PayloadError):
            spool.path(bad)
        if len(bad) < 129:
            with pytest.raises(PayloadError):
                spool.local_path(bad)

    def test_local_names_are_not_those_of_uploads(self, spool: Spool) -> None:
        assert spool.local_path("x.up").parent == spool.incoming
        for name in ("b3-1.part", "b3-1.blocks"):
            with pytest.raises(PayloadError, match="own"):
                spool.local_path(name)

    def test_links_are_not_followed(self, spool: Spool, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("s")
        spool.incoming_path("x").symlink_to(tmp_path / "secret")
        with pytest.raises(OSError, match="symbolic"):
            spool.open_incoming("x", create=False)
        spool.path("b3-1").parent.mkdir()
        spool.path("b3-1").symlink_to(tmp_path / "secret")
        assert not spool.exists("b3-1")

    def test_delete_sweep_and_usage(self, spool: Spool) -> None:
        for name in ("b3-1", "b3-2", "r-1.1"):
            spool.store(name, [b"12345"])
        write(spool, "half", b"123")
        assert spool.usage() == 18
        assert spool.delete("b3-1") == 5
        assert spool.delete("b3-1") == 0
        assert spool.sweep({"b3-2"}) == ["r-1.1"]
        assert spool.usage() == 8
        old = spool.incoming_path("half").stat().st_mtime
        assert spool.sweep_incoming(old - 1) == 0
        assert spool.sweep_incoming(old + 1, keep={"half"}) == 0
        assert spool.sweep_incoming(old + 1) == 1
        assert list(spool.incoming.iterdir()) == []


BODY = bytes(range(256)) * (9 * BLOCK_BYTES // 2 // 256)  # four blocks and a half


def ref(data: bytes, id: str = "r-1.1") -> PayloadRef:
    return PayloadRef(PayloadId(id), len(data), digest_buffers([data]))


def reopen(spool: Spool, payload: PayloadRef) -> IncomingFile:
    file = IncomingFile(spool, payload, digested=True)
    while file.verifying:
        assert file.verify(2 * BLOCK_BYTES) > 0
    return file


class TestIncomingFile:
    @pytest.fixture
    def spool(self, tmp_path: Path) -> Spool:
        return Spool(tmp_path, "process")

    def half(self, spool: Spool, size: int) -> None:
        file = IncomingFile(spool, ref(BODY), digested=True)
        assert not file.verifying and file.size == 0
        for start in range(0, size, 1 << 20):
            file.append(BODY[start : min(size, start + (1 << 20))])
        file.close()

    def test_whole_blocks_survive_and_the_digest_goes_on(self, spool: Spool) -> None:
        self.half(spool, 2 * BLOCK_BYTES + 12345)
        file = reopen(spool, ref(BODY))
        assert file.size == 2 * BLOCK_BYTES
        file.append(BODY[file.size :])
        assert file.hexdigest() == ref(BODY).digest
        os.close(file.release())
        assert spool.incoming_path(file.name).read_bytes() == BODY
        assert [p.name for p in spool.incoming.iterdir()] == [file.name]

    def test_a_damaged_block_ends_the_watermark(self, spool: Spool) -> None:
        self.half(spool, 4 * BLOCK_BYTES)
        with spool.incoming_path("r-1.1.part").open("r+b") as part:
            part.seek(2 * BLOCK_BYTES + 77)
            part.write(b"damage")
        file = reopen(spool, ref(BODY))
        assert file.size == 2 * BLOCK_BYTES
        assert spool.incoming_path("r-1.1.part").stat().st_size == file.size
        file.append(BODY[file.size :])
        assert file.hexdigest() == ref(BODY).digest
        file.close()

    def test_a_part_that_lost_its_end_is_trusted_as_far_as_it_goes(self, spool: Spool) -> None:
        self.half(spool, 4 * BLOCK_BYTES)
        os.truncate(spool.incoming_path("r-1.1.part"), BLOCK_BYTES + 5)
        file = reopen(spool, ref(BODY))
        assert file.size == BLOCK_BYTES
        file.close()

    @pytest.mark.parametrize("what", ["other digest", "other size", "no blocks"])
    def test_what_is_not_the_same_starts_anew(self, spool: Spool, what: str) -> None:
        self.half(spool, 4 * BLOCK_BYTES)
        payload = ref(BODY)
        if what == "other digest":
            payload = ref(BODY[:-1] + b"x")
        elif what == "other size":
            payload = ref(BODY[:-1])
        else:
            spool.incoming_path("r-1.1.blocks").unlink()
        file = IncomingFile(spool, payload, digested=True)
        assert (file.size, file.verifying) == (0, False)
        assert spool.incoming_path("r-1.1.part").stat().st_size == 0
        file.drop()
        assert list(spool.incoming.iterdir()) == []

    def test_cut_goes_back_to_where_a_chunk_begins(self, spool: Spool) -> None:
        self.half(spool, 4 * BLOCK_BYTES)
        file = reopen(spool, ref(BODY))
        file.cut(BLOCK_BYTES + 1000)
        assert file.size == BLOCK_BYTES + 1000
        file.append(BODY[file.size :])
        assert file.hexdigest() == ref(BODY).digest
        file.close()
        assert reopen(spool, ref(BODY)).size == 4 * BLOCK_BYTES

    def test_within_one_user_the_length_is_the_watermark(self, spool: Spool) -> None:
        payload = PayloadRef(PayloadId("r-1.1"), 100, "")
        file = IncomingFile(spool, payload, digested=False)
        file.append(b"x" * 60)
        file.close()
        file = IncomingFile(spool, payload, digested=False)
        assert (file.size, file.verifying, file.hexdigest()) == (60, False, "")
        file.close()
        shorter = IncomingFile(spool, PayloadRef(PayloadId("r-1.1"), 50, ""), digested=False)
        assert shorter.size == 0
        shorter.drop()
