"""An executor inside a program, as `cluster.Cluster.executor` starts it: its function does nothing, or sends a lot."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from fedloom.executor import Executor, FLModel, TaskContext
from workload import note, numpy_model

_TOGETHER_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--broker", required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--mib", type=int, default=0)
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    sites = [f"site-{number}" for number in range(args.first, args.first + args.sites)]
    pool: dict[str, Any] = {"pool": f"pool-{args.first}", "queue_ahead": args.sites} if args.sites > 1 else {}
    executor = Executor(args.broker, sites=sites, workspace=args.folder, capacity=args.capacity, **pool)
    large = _values(args.mib) if args.mib else None
    noted: set[int] = set()

    @executor.task("train")
    def train(model: FLModel, ctx: TaskContext) -> FLModel:
        if ctx.round not in noted:
            noted.add(ctx.round)
            note("task", round=ctx.round, client=ctx.site)
        if large is None:
            return FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1})
        _wait_for_others(args, ctx.round)
        note("ready", round=ctx.round, client=ctx.site)
        return FLModel(params=large, meta={"NUM_STEPS_CURRENT_ROUND": 1})

    executor.start()
    threading.Event().wait()


def _values(mib: int) -> dict[str, Any]:
    """A result that is ready before it is asked for."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(value.shape, np.float32) * np.float32(0.01)
        for name, value in numpy_model("big", mib, 4).items()
    }


def _wait_for_others(args: argparse.Namespace, number: int) -> None:
    """Until so many executors have said that they are here; a file each, beside the executors' folders."""
    place = args.folder.parent
    (place / f"here-{number}-{args.first}").touch()
    deadline = time.monotonic() + _TOGETHER_S
    while sum(1 for _ in place.glob(f"here-{number}-*")) < args.together and time.monotonic() < deadline:
        time.sleep(0.001)


if __name__ == "__main__":
    main()
