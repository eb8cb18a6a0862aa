from __future__ import annotations

import random

import pytest
from fedloom.executor.slots import PATIENCE, Slots


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
            if lanes[key] and rng.random() < 0.3:
                slots.took(lanes[key], rng.choice([0.01, 0.5, 3.0]))
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


def makespan(costs: dict[str, float], capacity: int, known: dict[str, float]) -> float:
    """When the last task of a round ends, of sites whose last tasks took as long as ``known`` says."""
    slots: Slots[str] = Slots(capacity)
    for site, seconds in known.items():
        slots.took(f"job/{site}", seconds)
    for site in costs:
        slots.push(site, f"job/{site}")
    now, ends = 0.0, []
    while slots.waiting or ends:
        ends += [(now + costs[key], key) for key, _ in slots.take()]
        now, key = min(ends)
        ends.remove((now, key))
        slots.release(key)
    return now


def test_what_takes_long_goes_first_and_no_round_ends_much_after_the_shortest_schedule():
    for seed in range(100):
        rng = random.Random(seed)
        capacity = rng.randint(1, 6)
        costs = {f"site-{n}": rng.lognormvariate(0, 1) for n in range(rng.randint(1, 40))}
        least = max(sum(costs.values()) / capacity, max(costs.values()))  # no schedule is shorter
        assert makespan(costs, capacity, costs) <= (4 / 3) * least + max(costs.values()) / 3
    last = {f"site-{n}": 1.0 for n in range(8)} | {"slow": 4.0}
    assert (makespan(last, 2, {}), makespan(last, 2, last)) == (8.0, 6.0)  # four rounds of two, then the slow one


def test_a_site_of_which_nothing_is_known_goes_first_and_quick_ones_are_not_sorted():
    slots: Slots[str] = Slots(1)
    for lane, seconds in (("j/a", 0.01), ("j/b", 0.04)):
        slots.took(lane, seconds)
        slots.push(lane, lane)
    slots.push("j/new", "j/new")
    order = []
    while slots.waiting:
        order += [key for key, _ in slots.take()]
        slots.release(order[-1])
    assert order == ["j/a", "j/b", "j/new"]
    slots.took("j/b", 2.0)
    for lane in ("j/a", "j/b", "j/new"):
        slots.push(lane, lane)
    while slots.waiting:
        order += [key for key, _ in slots.take()]
        slots.release(order[-1])
    assert order[3:] == ["j/new", "j/b", "j/a"]
    slots.forget("j")
    for lane in ("j/a", "j/b"):
        slots.push(lane, lane)
    assert [key for key, _ in slots.take()] == ["j/a"]


def test_the_oldest_task_waits_for_a_bounded_number_of_others():
    slots: Slots[str] = Slots(2)
    slots.took("j/quick", 0.01)
    slots.push("quick", "j/quick")
    started = 0
    for n in range(1000):  # longer ones come all the time
        slots.took(f"j/{n}", 5.0)
        slots.push(f"long-{n}", f"j/{n}")
        for key, _ in slots.take():
            if key == "quick":
                assert started <= PATIENCE * 2 + 2
                return
            started += 1
            slots.release(f"long-{started - 2}")
    raise AssertionError("it never started")
