"""GPU lists and slots: what each worker would see."""

from __future__ import annotations

import pytest
from fedloom.serialization.errors import JobError
from fedloom.sim.gpus import parse_gpus, slots, worker_count


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (None, ()),
        ("", ()),
        ("  ", ()),
        ("0", (("0",),)),
        ("0,1", (("0",), ("1",))),
        ("0, 1 ,2", (("0",), ("1",), ("2",))),
        ("0,0", (("0",), ("0",))),
        ("[0,1],[2,3]", (("0", "1"), ("2", "3"))),
        ("[0, 1] , [2,3]", (("0", "1"), ("2", "3"))),
        ("[0,1],2", (("0", "1"), ("2",))),
        ("[3]", (("3",),)),
        ("MIG-8f2a1b-33/1/0,GPU-17", (("MIG-8f2a1b-33/1/0",), ("GPU-17",))),
    ],
)
def test_lists_that_are_read(text: str | None, groups: tuple[tuple[str, ...], ...]) -> None:
    assert parse_gpus(text) == groups


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("0,", "what follows the last comma"),
        (",0", "',0'"),
        ("0,,1", "',1'"),
        ("[0,1][2,3]", "a comma belongs before '[2,3]'"),
        ("[0,1],", "what follows the last comma"),
        ("[0,[1]]", "cannot read '[0,[1]]'"),
        ("[0,1", "cannot read '[0,1'"),
        ("0]", "a comma belongs before ']'"),
        ("[]", "'' is no GPU id"),
        ("[0,0]", "names a GPU twice"),
        ("-1", "'-1' is no GPU id"),
        ("cuda:0", "'cuda:0' is no GPU id"),
        ("all", "'all' is no GPU id"),
        ("0;rm", "'0;rm' is no GPU id"),
    ],
)
def test_lists_that_are_refused_say_what_was_seen_and_what_is_allowed(text: str, seen: str) -> None:
    with pytest.raises(JobError) as error:
        parse_gpus(text)
    assert seen in str(error.value)
    assert repr(text) in str(error.value)
    assert '"[0,1],[2,3]"' in str(error.value)


def test_slots_are_dealt_round_robin() -> None:
    seen = [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots(parse_gpus("0,1"), 5)]
    assert seen == ["0", "1", "0", "1", "0"]
    seen = [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots(parse_gpus("[0,1],[2,3]"), 3)]
    assert seen == ["0,1", "2,3", "0,1"]


def test_without_gpus_a_slot_leaves_the_environment_alone() -> None:
    assert [slot.env for slot in slots((), 3)] == [{}, {}, {}]
    assert [slot.index for slot in slots((), 3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("sites", "threads", "gpus", "workers"),
    [(8, None, None, 8), (8, 3, None, 3), (8, 60, None, 8), (8, None, "0,1", 2), (8, 4, "0,1", 4), (2, None, "0,1", 2)],
)
def test_worker_count(sites: int, threads: int | None, gpus: str | None, workers: int) -> None:
    assert worker_count(sites, threads, parse_gpus(gpus)) == workers


def test_more_groups_than_clients_is_an_error() -> None:
    with pytest.raises(JobError, match=r"2 GPU groups but 1 clients: 1 of the groups could have none; give at most 1"):
        worker_count(1, None, parse_gpus("[0,1],[2,3]"))


def test_no_workers_is_an_error() -> None:
    with pytest.raises(JobError, match="at least 1"):
        worker_count(8, 0, ())
