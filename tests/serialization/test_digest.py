from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from fedloom.serialization import digest
from fedloom.serialization.digest import BLOCK_BYTES, Digester, digest_buffers, digest_file
from fedloom.serialization.errors import PayloadError
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = bytes(range(251)) * (2 * BLOCK_BYTES // 251 + 12345)


def by_hand(data: bytes) -> str:
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
    return blake3(b"".join(blake3(block).digest() for block in blocks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_is_the_digest_of_the_block_digests(size: int, tmp_path: Path) -> None:
    data = DATA[:size]
    root = digest_buffers([data])
    assert root == by_hand(data)
    assert len(root) == 64
    path = tmp_path / "payload"
    path.write_bytes(data)
    assert digest_file(path) == root


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, len(DATA)), max_size=6))
def test_does_not_depend_on_the_pieces(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(DATA)]
    assert digest_buffers(DATA[a:b] for a, b in pairwise(edges)) == by_hand(DATA)


def test_takes_any_contiguous_buffer() -> None:
    data = bytearray(b"abcdefgh" * 8)
    assert digest_buffers([memoryview(data).cast("d", (2, 4))]) == by_hand(bytes(data))


def test_can_be_asked_on_the_way() -> None:
    digester = Digester()
    digester.update(DATA[:100])
    assert digester.hexdigest() == by_hand(DATA[:100])
    digester.update(DATA[100 : BLOCK_BYTES + 5])
    assert digester.hexdigest() == by_hand(DATA[: BLOCK_BYTES + 5])
    assert digester.size == BLOCK_BYTES + 5


def test_goes_on_behind_known_blocks() -> None:
    first = Digester()
    first.update(DATA[: 2 * BLOCK_BYTES])
    assert [len(block) for block in first.blocks] == [32, 32]
    second = Digester(first.blocks)
    assert second.size == 2 * BLOCK_BYTES
    second.update(DATA[2 * BLOCK_BYTES :])
    assert second.hexdigest() == by_hand(DATA)


def test_refuses_a_half_block_digest() -> None:
    with pytest.raises(PayloadError, match="31 bytes"):
        Digester([b"x" * 31])


def test_one_changed_bit_changes_it() -> None:
    changed = bytearray(DATA)
    changed[BLOCK_BYTES + 17] ^= 1
    assert digest_buffers([changed]) != digest_buffers([DATA])


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_still_hashes_after_the_parent_used_all_cores() -> None:
    assert digest_buffers([DATA]) == by_hand(DATA)
    assert digest._Pool.started  # pyright: ignore[reportPrivateUsage]
    child = os.fork()
    if child == 0:
        os._exit(0 if digest_buffers([DATA]) == by_hand(DATA) and not digest._Pool.usable else 1)  # pyright: ignore
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
