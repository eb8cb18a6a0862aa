"""Run schedules: ``run.py --schedules N``, or one again: ``run.py --plan "SEED VARIANT FAULTS" -v``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # sets of texts have their order from it
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])

sys.path.insert(0, str(Path(__file__).parent))

import product

product.load()
product.listen()

import faults
import schedule
from scenario import VARIANTS

BUSY_S = [scenario.busy_s for scenario in VARIANTS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--plan", default="")
    parser.add_argument("--calm", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    if args.calm:
        for variant in range(len(VARIANTS)):
            out = schedule.run(faults.Plan(1, variant), verbose=args.verbose)
            print(variant, out.broken[:1], out.steps, f"{out.virtual_s:.2f}", f"{out.busy_s:.2f}", out.executions)
        return 0
    if args.plan:
        out = schedule.run(faults.parse(args.plan, BUSY_S), verbose=args.verbose)
        print(out)
        return bool(out.broken)
    import time
    bad = 0
    for seed in range(args.first, args.first + args.schedules):
        t = time.process_time()
        out = schedule.run(faults.draw(seed, BUSY_S), verbose=args.verbose)
        if args.verbose or out.broken: print(seed, out.plan.variant, out.steps, f"{out.virtual_s:.1f} {time.process_time() - t:.2f}", dict(out.hits), flush=True)
        if out.broken:
            bad += 1
            print("BROKEN", out.plan, [f.kind + "/" + f.whom for f in out.plan.faults], "\n   ", out.broken[0][:3000])
    print(args.schedules, "schedules,", bad, "broken")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
