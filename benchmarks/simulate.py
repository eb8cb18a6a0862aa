"""One simulated run of a benchmark's workload; `measure.py` starts this in a process of its own and watches it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv
from safetensors.numpy import load_file
from workload import expected, model, note

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["tiny", "big"])
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=50)
    parser.add_argument("--workspace", type=Path, required=True)
    args = parser.parse_args()

    events = args.workspace / "events.jsonl"
    note(events, "start")
    started = time.perf_counter()
    recipe = NumpyFedAvgRecipe(
        name=f"bench-{args.kind}",
        model=model(args.kind, args.mib, args.tensors),
        min_clients=args.clients,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=f"'{events}'",
    )
    env = SimEnv(num_clients=args.clients, num_threads=args.threads, workspace_root=args.workspace, show_progress=False)
    run = recipe.execute(env)
    note(events, "end")
    wall_s = time.perf_counter() - started

    result = Path(run.get_result())
    wanted = expected(args.clients, args.rounds)
    worst = max(float(np.abs(a - wanted).max()) for a in load_file(result / "model.safetensors").values())
    if worst > 1e-5:
        raise SystemExit(f"wrong result: off by {worst:g} from {wanted:g}; no figure counts")
    print(json.dumps({"status": run.get_status(), "wall_s": wall_s, "error": worst}))


if __name__ == "__main__":
    main()
