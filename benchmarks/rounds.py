"""Rounds per second with tiny clients: what a round costs when the work in it costs nothing.

1,000 float32 values, eight clients, every one of them a script in a process of its own, against a bare Python loop that
does the same additions. A round's time is from its first task's begin to the next round's.
"""

from __future__ import annotations

import statistics

from measure import machine
from runs import arguments, bare, median_of, save, simulated


def main() -> None:
    args = arguments(__doc__ or "", clients=8, rounds=40, repeat=3).parse_args()
    where = machine()
    ours = [simulated("tiny", args.clients, args.rounds, args.threads) for _ in range(args.repeat)]
    plain = [bare("tiny", args.clients, 2000) for _ in range(args.repeat)]
    for entry in (*ours, *plain):
        entry["round_s"] = statistics.median(entry["seconds"])
        entry["rounds_per_s"] = len(entry["seconds"]) / sum(entry["seconds"])
    figures = {
        "benchmark": "rounds",
        "machine": where,
        "clients": args.clients,
        "rounds": args.rounds,
        "threads": args.threads or args.clients,
        "repeat": args.repeat,
        "rounds_per_s": median_of(ours, "rounds_per_s"),
        "round_s": median_of(ours, "round_s"),
        "bare_rounds_per_s": median_of(plain, "rounds_per_s"),
        "bare_round_s": median_of(plain, "round_s"),
        "startup_s": median_of(ours, "startup_s"),
        "wall_s": median_of(ours, "wall_s"),
    }
    figures["ratio"] = figures["rounds_per_s"] / figures["bare_rounds_per_s"]
    save(args.json, figures | {"runs": ours})
    print(f"{args.clients} tiny clients, {args.rounds} rounds, median of {args.repeat} runs:")
    print(f"  fedloom    {figures['rounds_per_s']:10.1f} rounds/s  ({figures['round_s'] * 1000:.2f} ms a round)")
    print(f"  bare loop  {figures['bare_rounds_per_s']:10.1f} rounds/s  (fedloom / bare = {figures['ratio']:.5f})")
    print(f"  start to first task {figures['startup_s']:.2f} s, whole run {figures['wall_s']:.2f} s")


if __name__ == "__main__":
    main()
