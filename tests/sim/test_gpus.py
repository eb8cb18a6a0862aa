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


def shares(text: str, workers: int, share: float | str) -> list[tuple[str, str]]:
    """What each worker gets: its GPUs, and its part of their memory."""
    envs = [slot.env for slot in slots(parse_gpus(text), workers, share)]
    return [(env["CUDA_VISIBLE_DEVICES"], env["FEDLOOM_GPU_MEMORY_FRACTION"]) for env in envs]


def test_an_equal_share_is_of_those_on_the_same_gpu() -> None:
    assert shares("0,1", 4, "equal") == [("0", "0.5"), ("1", "0.5"), ("0", "0.5"), ("1", "0.5")]
    assert shares("0,1", 3, "equal") == [("0", "0.5"), ("1", "1"), ("0", "0.5")]
    assert shares("0,0,0", 3, "equal") == [("0", "0.333333")] * 3
    # a GPU in two groups has the workers of both, and a group's fullest GPU says what its workers may take
    assert shares("[0,1],[1,2]", 2, "equal") == [("0,1", "0.5"), ("1,2", "0.5")]
    assert shares("[0,1],[2,3]", 4, 0.4) == [("0,1", "0.4"), ("2,3", "0.4"), ("0,1", "0.4"), ("2,3", "0.4")]


@pytest.mark.parametrize(
    ("share", "seen"),
    [
        (0.5, "3 workers share GPU 0 with 0.5 of its memory each, 1.5 times what there is: give at most 0.333 each"),
        (0, "allowed are a number over 0 and up to 1"),
        (1.5, "allowed are a number over 0 and up to 1"),
        (float("nan"), "allowed are a number over 0 and up to 1"),
        (True, "GPU memory share True"),
        ("half", "GPU memory share 'half'"),
    ],
)
def test_shares_that_are_refused(share: float | str, seen: str) -> None:
    with pytest.raises(JobError, match=seen):
        slots(parse_gpus("0"), 3, share)


def test_a_third_may_be_written_short() -> None:
    assert len(slots(parse_gpus("0"), 3, "0.3333")) == len(slots(parse_gpus("0"), 3, "0.3333333")) == 3
