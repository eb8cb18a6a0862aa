"""A 100 MiB model with 4 clients: seconds a round, and the peak memory of each process.

50 float32 tensors, every client a script in a process of its own, against a bare numpy loop in one process that does
the same additions. A round's time is from its first task's begin to the next round's, so that three rounds give two
times a run; what the last round and the end take together is kept in the JSON.
"""

from __future__ import annotations

import statistics
from typing import Any

from measure import machine
from runs import arguments, bare, median_of, save, simulated


def main() -> None:
    parser = arguments(__doc__ or "", clients=4, rounds=3, repeat=3)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=50)
    args = parser.parse_args()
    size = ["--mib", str(args.mib), "--tensors", str(args.tensors)]
    where = machine()
    ours = [simulated("big", args.clients, args.rounds, args.threads, *size) for _ in range(args.repeat)]
    plain = [bare("big", args.clients, args.rounds, *size) for _ in range(args.repeat)]
    for entry in (*ours, *plain):
        entry["round_s"] = statistics.median(entry["seconds"])
    figures: dict[str, Any] = {
        "benchmark": "bigmodel",
        "machine": where,
        "mib": args.mib,
        "tensors": args.tensors,
        "clients": args.clients,
        "rounds": args.rounds,
        "repeat": args.repeat,
        "round_s": median_of(ours, "round_s"),
        "bare_round_s": median_of(plain, "round_s"),
        "bare_peak_mib": median_of(plain, "peak_mib"),
        "startup_s": median_of(ours, "startup_s"),
        "wall_s": median_of(ours, "wall_s"),
        "processes": ours[-1]["processes"],
        "largest_mib": median_of(ours, "peak_mib"),
    }
    figures["ratio"] = figures["round_s"] / figures["bare_round_s"]
    figures["memory_ratio"] = figures["largest_mib"] / figures["bare_peak_mib"]
    save(args.json, figures | {"runs": ours})
    print(f"{args.mib} MiB, {args.clients} clients, {args.rounds} rounds, median of {args.repeat} runs:")
    print(f"  fedloom    {figures['round_s']:8.3f} s a round  ({figures['ratio']:.2f} x the bare loop)")
    print(f"  bare loop  {figures['bare_round_s']:8.3f} s a round, peak {figures['bare_peak_mib']:.0f} MiB")
    print("  peak memory of each process, MiB: VmHWM (mapped files included), and of its own")
    for entry in figures["processes"]:
        print(f"    {entry['role']:30} x{entry['count']:<3} {entry['hwm_mib']:8.1f} {entry['anon_mib']:8.1f}")


if __name__ == "__main__":
    main()
