from __future__ import annotations

import random

import pytest
from fedloom.executor.slots import Slots


def test_capacity_bounds_what_runs_and_the_queue_is_first_come():
    slots: Slots[str] = Slots(2)
    for key in "abcd":
        slots.push(key)
    assert [key for key, _ in slots.take()] == ["a", "b"]
    assert (slots.running, slots.waiting, slots.free) == (2, 2, 0)
    assert list(slots.take()) == []
    slots.release("b")
    assert [key for key, _ in slots.take()] == ["c"]
    slots.release("d")  # wanted no more
    slots.release("a")
    slots.release("c")
    slots.release("nobody")
    assert (slots.running, slots.waiting, slots.free) == (0, 0, 2)


def test_a_lane_runs_one_at_a_time_and_holds_nobody_up():
    slots: Slots[str] = Slots(3)
    slots.push("a1", "a")
    slots.push("a2", "a")
    slots.push("b1", "b")
    assert [key for key, _ in slots.take()] == ["a1", "b1"]
    slots.release("a1")
    assert [key for key, _ in slots.take()] == ["a2"]


def test_devices_go_round_and_a_bound_lane_returns_to_its_own():
    envs = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    slots: Slots[str] = Slots(4, envs)
    for i in range(4):
        slots.push(f"t{i}", f"lane{i}")
    given = {key: dict(slot.env)["CUDA_VISIBLE_DEVICES"] for key, slot in slots.take()}
    assert list(given.values()) == ["0", "1", "0", "1"]
    for i in range(4):
        slots.release(f"t{i}")
    one: Slots[str] = Slots(2, envs)
    one.push("x", "lane")
    ((_, slot),) = one.take()
    one.bind("lane", slot)
    one.push("y", "other")
    list(one.take())
    one.release("x")
    one.push("z", "filler")
    list(one.take())  # takes GPU 0
    one.release("y")  # GPU 1 is free
    one.push("x2", "lane")
    assert list(one.take()) == []  # its script sees GPU 0 only
    one.release("z")
    ((key, again),) = one.take()
    assert key == "x2" and again.env == slot.env
    one.release("x2")
    one.unbind("lane")
    one.push("x3", "lane")
    assert [key for key, _ in one.take()] == ["x3"]


def test_a_capacity_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        Slots(0)


def test_any_schedule_keeps_the_rules():
    for seed in range(200):
        rng = random.Random(seed)
        capacity = rng.randint(1, 4)
        slots: Slots[int] = Slots(capacity, [{"G": str(i)} for i in range(rng.randint(1, 3))])
        lanes: dict[int, str] = {}
        running: dict[int, int] = {}
        started: set[int] = set()
        for key in range(60):
            lanes[key] = rng.choice(["", "a", "b", "c"])
            slots.push(key, lanes[key])
            for got, slot in slots.take():
                assert slot.index not in running.values() and got not in started
                started.add(got)
                running[got] = slot.index
            assert len(running) <= capacity
            busy = [lanes[k] for k in running if lanes[k]]
            assert len(busy) == len(set(busy))
            if running and rng.random() < 0.6:
                done = rng.choice(list(running))
                del running[done]
                slots.release(done)
        while running or slots.waiting:
            for done in list(running):
                del running[done]
                slots.release(done)
            for got, slot in slots.take():
                started.add(got)
                running[got] = slot.index
        assert started == set(range(60))
