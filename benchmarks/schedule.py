"""What it is worth to start first what takes longest: a skewed fleet's rounds against first come, first served.

    python benchmarks/schedule.py

Twice: on a virtual clock, with the queue that the agent uses; and in a simulation whose sites sleep, where the first
round is first-come because nothing is known of any site yet. The bound is what no schedule can go below: the sum of all
tasks over the slots, or the longest task.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path

import numpy as np
from fedloom.executor.slots import Slots
from fedloom.recipe import NumpyFedAvgRecipe
from fedloom.sim.launcher import SimConfig, run_simulation

FLEETS = ((2, 16), (4, 40), (8, 100), (16, 60))  # slots, sites
SLOTS, SHORT, LONG = 4, 14, 2
SHORT_S, LONG_S = 0.1, 1.0
ROUNDS = 6
CLIENT = f"""
import time

def train(model, ctx):
    time.sleep({LONG_S} if int(ctx.site.rpartition("-")[2]) >= {SHORT} else {SHORT_S})
    return model
"""


def makespan(costs: dict[str, float], slots: int, *, known: bool) -> float:
    """Virtual seconds until the last task ends."""
    queue: Slots[str] = Slots(slots)
    for site, seconds in costs.items():
        if known:
            queue.took(f"job/{site}", seconds)
        queue.push(site, f"job/{site}")
    now, ends = 0.0, list[tuple[float, str]]()
    while queue.waiting or ends:
        ends += [(now + costs[key], key) for key, _ in queue.take()]
        ends.sort()
        now, key = ends.pop(0)
        queue.release(key)
    return now


def virtual() -> None:
    """Sites whose times are log-normal (sigma 1: one in twenty takes five times the median)."""
    print("slots  sites  first come / bound  longest first / bound  longest first / first come")
    for slots, sites in FLEETS:
        ratios: list[tuple[float, float, float]] = []
        for seed in range(200):
            rng = random.Random(seed)
            costs = {f"site-{number}": rng.lognormvariate(0, 1) for number in range(sites)}
            bound = max(sum(costs.values()) / slots, max(costs.values()))
            first, longest = (makespan(costs, slots, known=known) for known in (False, True))
            ratios.append((first / bound, longest / bound, longest / first))
        shown = [f"{statistics.median(column):.3f}" for column in zip(*ratios, strict=True)]
        print(f"{slots:5}  {sites:5}  {shown[0]:>18}  {shown[1]:>21}  {shown[2]:>26}")


def real() -> None:
    """A simulation of sites that sleep: two long ones come last."""
    names = [f"site-{number}" for number in range(SHORT + LONG)]
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
        place = Path(folder)
        (place / "client.py").write_text(CLIENT)
        recipe = NumpyFedAvgRecipe(
            name="schedule",
            model=np.zeros(8, np.float32),
            min_clients=len(names),
            num_rounds=ROUNDS,
            train_script=f"{place / 'client.py'}:train",
        )
        job = recipe.export(place / "job")
        result = run_simulation(SimConfig(job, place / "run", names, threads=SLOTS, show_progress=False))
    seconds = [float(record["seconds"]) for record in result.rounds]
    first, later = seconds[0], statistics.median(seconds[1:])
    bound = max((SHORT * SHORT_S + LONG * LONG_S) / SLOTS, LONG_S)
    print(f"\n{SLOTS} slots, {SHORT} sites of {SHORT_S} s and then {LONG} of {LONG_S} s; bound {bound:.2f} s")
    print(
        f"first come (round 1): {first:.2f} s; longest first (median of the others): {later:.2f} s; {later / first:.2f}"
    )


if __name__ == "__main__":
    virtual()
    real()
