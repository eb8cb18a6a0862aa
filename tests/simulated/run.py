"""Run schedules: ``run.py --schedules 20000 --jobs 2``; one again: ``run.py --plan "SEED VARIANT FAULTS" -v``.

``--regressions`` runs the lines of ``regressions.txt``, ``--mutations`` switches off one safeguard after the other and
shows which schedule notices. A failing seed is shrunk, printed as such a line, and belongs into that file.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REGRESSIONS = HERE / "regressions.txt"
#: A run whose seed divides this is run twice, to see that it is the same run.
_TWICE = 100
#: Schedules of one process: what a thousand of them leave in memory makes the next ones slower.
_A_WORKER = 500
_STUCK_S = 120.0


def main() -> int:
    """The exit code: 1 when a promise was broken, or a mutation went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--variant", type=int, metavar="N", help="of this job alone, such as one that is not drawn")
    parser.add_argument("--jobs", type=int, default=2, help="processes beside each other")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plan", help="one schedule: its line")
    parser.add_argument("--regressions", action="store_true")
    parser.add_argument("--mutations", nargs="*", metavar="NAME", help="all of them, or these")
    parser.add_argument("--limit", type=int, default=3000, help="schedules a mutation may need")
    parser.add_argument("--calm", action="store_true", help="every job once, undisturbed")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(json.loads(args.worker))
    if args.mutations is not None:
        return _mutations(args)
    if args.plan:
        return _one(args.plan, args.verbose)
    lines = [f"1 {variant} -" for variant in range(17)] if args.calm else None
    if args.regressions:
        lines = [line for line in REGRESSIONS.read_text().splitlines() if line.partition("#")[0].strip()]
    return _many(args, lines)


# ---------------------------------------------------------------- the processes that work


def _product() -> Any:
    """The modules of the room, over which the product is imported, in this process for good."""
    sys.path.insert(0, str(HERE))
    import product

    product.load()
    product.listen()
    import schedule

    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    return schedule


def _work(order: dict[str, Any]) -> int:
    """Schedules one after the other; a line of JSON each."""
    schedule = _product()
    if order.get("mutation"):
        from mutations import MUTATIONS

        mutation = MUTATIONS[order["mutation"]]
        if mutation.machine:
            print(json.dumps({"machine": mutation.machine}), flush=True)
            return 0
        mutation.switch()
    for line in order.get("lines") or range(order["first"], order["stop"], order["stride"]):
        plan = schedule.parse(line) if isinstance(line, str) else schedule.draw(line, order.get("variant"))
        if order.get("mutation"):
            plan = schedule.faults.favour(plan, mutation.variants, mutation.faults)
        faulthandler.dump_traceback_later(
            20.0 if order.get("mutation") else _STUCK_S, exit=True
        )  # a loop that never waits is seen by nobody else
        if order.get("mutation"):
            print(json.dumps({"begins": str(plan)}), flush=True)
        out = schedule.run(plan)
        if not out.broken and plan.seed % _TWICE == 0 and not order.get("mutation"):
            again = schedule.run(plan)
            if again.trace != out.trace:
                out.broken.append(f"two runs differ: {out.trace} and {again.trace}")
        if out.broken and not order.get("mutation"):
            out.plan = schedule.shrink(plan)
        print(json.dumps(out.figures()), flush=True)
        if out.broken and order.get("mutation"):
            break
    return 0


def _start(order: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(order)]
    # sets of texts have their order from the hash seed: a schedule must not
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": "0"})


def _figures(orders: list[dict[str, Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """What the workers for these orders say, so many of them at a time."""
    return _told([_start(order) for order in orders[:jobs]], orders[jobs:])


def _told(workers: list[subprocess.Popen[str]], orders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the workers say, as they say it; one that is done makes room for the next order's.

    Raises:
        RuntimeError: one of them died.
    """
    import selectors

    selector = selectors.DefaultSelector()
    for worker in workers:
        selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
    try:
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    yield json.loads(line)
                    continue
                selector.unregister(key.fileobj)
                if key.data.wait() != 0:
                    raise RuntimeError(f"a worker ended with {key.data.returncode}")
                if orders:
                    workers.append(worker := _start(orders.pop(0)))
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


# ---------------------------------------------------------------- what is run


def _one(line: str, verbose: bool) -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    schedule = _product()
    plan = schedule.parse(line)
    for fault in plan.faults:
        print(fault)
    out = schedule.run(plan, verbose=verbose)
    print(json.dumps({k: v for k, v in out.figures().items() if k != "broken"}))
    print("\n".join(out.broken) or "no promise was broken")
    return bool(out.broken)


def _many(args: argparse.Namespace, lines: list[str] | None) -> int:
    started = time.monotonic()
    jobs = max(1, min(args.jobs, len(lines) if lines is not None else args.schedules))
    stop = args.first + args.schedules
    orders: list[dict[str, Any]] = (
        [{"lines": lines[n::jobs]} for n in range(jobs)]
        if lines is not None
        else [
            {"first": first, "stop": min(stop, first + _A_WORKER), "stride": 1, "variant": args.variant}
            for first in range(args.first, stop, _A_WORKER)
        ]
    )
    total: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    most: dict[str, int] = {}
    broken: list[str] = []
    try:
        for figures in _figures(orders, jobs):
            total["schedules"] += 1
            for name in ("steps", "executions", "refusals", "virtual_ms"):
                total[name] += figures[name]
            faults.update(figures["faults"])
            hits.update(figures["hits"])
            for name, seen in figures["most"].items():
                most[name] = max(most.get(name, 0), seen)
            if figures["broken"]:
                broken.append(figures["plan"])
                print(f"\nBROKEN {figures['plan']}\n{figures['broken'][0]}\n", flush=True)
            if sys.stdout.isatty() or total["schedules"] % 2000 == 0:
                print(f"\r{total['schedules']} schedules, {len(broken)} broken", end="", flush=True)
    except KeyboardInterrupt:  # what was seen is shown all the same
        broken.append(f"interrupted after {total['schedules']} schedules")
    wall = time.monotonic() - started
    _report(total, faults, hits, most, wall)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        values = {"total": total, "faults": faults, "hits": hits, "most": most, "broken": broken, "seconds": wall}
        args.json.write_text(json.dumps(values, indent=1))
    for line in (line for line in broken if not line.startswith("interrupted")):
        print(f"add to {REGRESSIONS.name}: {line}")
    return bool(broken)


def _report(total: Counter[str], faults: Counter[str], hits: Counter[str], most: dict[str, int], wall: float) -> None:
    print(
        f"\n{total['schedules']} schedules in {wall:.0f} s, {total['virtual_ms'] / 3.6e6:.1f} h of virtual time,"
        f" {total['steps']:,} steps, {total['executions']:,} task executions, {total['refusals']:,} results refused"
    )
    print(f"\n{'fault':24} {'planned':>9} {'hit somebody at work':>22}")
    for kind in sorted({*faults, *hits}, key=lambda k: (k not in faults, k)):
        print(f"{kind:24} {faults[kind] or '':>9} {hits[kind]:>22}")
    print(f"\n{'bound':24} {'most seen':>9}")
    for name, seen in sorted(most.items()):
        print(f"{name:24} {seen:>9}")


def _mutations(args: argparse.Namespace) -> int:
    """Every safeguard off in turn, until a schedule notices."""
    sys.path.insert(0, str(HERE))
    names = args.mutations or _mutation_names()
    waiting = list(names)
    unnoticed = 0
    print(f"{'safeguard switched off':34} {'schedules':>9}  noticed by")
    while waiting:
        some, waiting = waiting[: args.jobs], waiting[args.jobs :]
        started = [(n, _start({"mutation": n, "first": 1, "stop": 1 + args.limit, "stride": 1})) for n in some]
        for name, worker in started:
            count, found, plan = 0, "", ""
            try:
                for figures in _told([worker], []):
                    if "machine" in figures:
                        count, found = _machine(name, figures["machine"])
                    elif "begins" in figures:
                        plan, count = figures["begins"], count + 1
                    elif figures["broken"]:
                        found = f"[{plan}] {figures['broken'][0].splitlines()[0][:110]}"
            except RuntimeError:
                if not plan:
                    raise  # it never came to run one
                found = f"[{plan}] a loop that never ends, or an error of the room's"
            unnoticed += not found
            print(f"{name:34} {count:>9}  {found or 'NOBODY'}", flush=True)
    return bool(unnoticed)


def _machine(name: str, path: str) -> tuple[int, str]:
    """Whether a stateful machine notices, and by which of its words."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "switch_off", "-p", "no:cacheprovider", path]
    env = os.environ | {"PYTHONPATH": str(HERE), "FEDLOOM_MUTATION": name}
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 1:  # 1: tests ran, and some failed
        return 1, "" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"
    wrong = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    return 1, f"{Path(path).name}: {(wrong or ['a test failed'])[0][1:].strip()[:100]}"


def _mutation_names() -> list[str]:
    import re

    return re.findall(r"^(?:\)|@mutation\(.*\))\ndef (\w+)\(\) -> None", (HERE / "mutations.py").read_text(), re.M)


if __name__ == "__main__":
    sys.exit(main())
