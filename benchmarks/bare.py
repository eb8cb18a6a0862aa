"""The bare loop of a workload in a process of its own, so that its memory can be compared."""

from __future__ import annotations

import argparse
import json

import numpy as np
from workload import bare_loop, expected


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["tiny", "big"])
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=50)
    args = parser.parse_args()
    seconds, model = bare_loop(args.kind, args.mib, args.tensors, args.clients, args.rounds)
    wanted = expected(args.clients, args.rounds)
    worst = max(float(np.abs(value - wanted).max()) for value in model.values())
    if worst > 1e-4 * wanted:
        raise SystemExit(f"wrong result: off by {worst:g} from {wanted:g}")
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
