"""Fuzz with coverage: `.venv/bin/python tests/fuzz/run.py --seconds 600 [--jobs 2] [target ...]`, as `make fuzz` does.

Each target runs in a process of its own under a hard limit of memory, from a corpus of real valid inputs, the
regressions and what earlier runs found (`workspace/fuzz/TARGET/corpus`). An input that escapes is kept as
`workspace/fuzz/TARGET/crash-*`, and the exit code is 1. Needs the extra `fedloom[fuzz]` (atheris).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REGRESSIONS = HERE / "regressions"
NAMES = ("envelope", "codec", "header", "payload", "stream", "partial", "job_folder", "archive")

#: Address space of a target's process: Python, numpy, the corpus and libFuzzer's tables take a quarter of it.
MEMORY_BYTES = 3 * 1024**3
RSS_MIB = 1024
#: An input that takes longer is an escape: all targets take microseconds to milliseconds.
INPUT_TIMEOUT_S = 10
#: Counting allocations makes an execution several times slower: one in so many is counted.
WATCH_EVERY = 64
GRACE_S = 60


# ---------------------------------------------------------------- one target, in its own process


def work(name: str, seconds: int, seed: int, folder: Path) -> None:
    """Fuzz one target until the time is over; does not return."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import atheris

    with atheris.instrument_imports(include=["fedloom", "tarfile"]):
        from fuzzing.table import TARGETS
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    known = [path.read_bytes() for path in sorted((REGRESSIONS / name).glob("*"))]
    for data in [*target.seeds(), *known]:
        target.watched(data)
        (corpus / hashlib.sha256(data).hexdigest()[:20]).write_bytes(data)
    words = folder / "words.dict"
    quoted = ("".join(rf"\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        (target if count % WATCH_EVERY else target.watched)(data)

    options = {
        "max_total_time": seconds,
        "max_len": target.max_len,
        "rss_limit_mb": RSS_MIB,
        "timeout": INPUT_TIMEOUT_S,
        "seed": seed,
        "artifact_prefix": f"{folder}/",
        "print_final_stats": 1,
        "use_value_profile": 1,
    }
    arguments = [f"-{key}={value}" for key, value in options.items()]
    if target.words:
        arguments.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


# ---------------------------------------------------------------- all targets


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a target's run came to."""

    name: str
    seconds: float
    executions: int
    corpus: int
    edges: int
    features: int
    peak_mib: int
    escapes: tuple[str, ...]
    code: int

    @property
    def bad(self) -> bool:
        """Something escaped, or nothing was tried."""
        return bool(self.escapes) or self.code != 0 or not self.executions


def run(name: str, seconds: int, seed: int, output: Path) -> Outcome:
    """Run one target in a process of its own and read its report."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "log.txt"
    before = set(escapes_in(folder))
    command = [sys.executable, str(HERE / "run.py"), "--worker", name, "--seconds", str(seconds), "--seed", str(seed)]
    command += ["--output", str(output)]
    started = time.monotonic()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with log_path.open("wb") as log, tempfile.TemporaryDirectory(prefix="fedloom-fuzz-", dir=memory) as scratch:
        environment = {**os.environ, "FEDLOOM_FUZZ_DIR": scratch}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment
        )
        try:
            code = process.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    text = log_path.read_text(errors="replace")
    return Outcome(
        name=name,
        seconds=time.monotonic() - started,
        executions=last(text, r"number_of_executed_units: (\d+)") or last(text, r"^#(\d+)\t"),
        corpus=last(text, r"\bcorp: (\d+)"),
        edges=last(text, r"\bcov: (\d+)"),
        features=last(text, r"\bft: (\d+)"),
        peak_mib=max(last(text, r"peak_rss_mb: *(\d+)"), last(text, r"\brss: (\d+)Mb")),
        escapes=tuple(sorted(set(escapes_in(folder)) - before)),
        code=code,
    )


def escapes_in(folder: Path) -> list[str]:
    """The inputs that libFuzzer has kept because they escaped."""
    return [str(path) for kind in ("crash", "oom", "timeout", "leak") for path in folder.glob(f"{kind}-*")]


def last(text: str, pattern: str) -> int:
    """The last number of this form in a log; 0 if there is none."""
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else 0


HEADINGS = ("target", "seconds", "executions", "per second", "corpus", "edges", "features", "peak MiB", "escapes")


def table(outcomes: list[Outcome]) -> str:
    """The runs as a table."""
    rows = [HEADINGS] + [
        (
            o.name,
            f"{o.seconds:.0f}",
            f"{o.executions:,}",
            f"{o.executions / o.seconds:,.0f}",
            str(o.corpus),
            str(o.edges),
            str(o.features),
            str(o.peak_mib),
            str(len(o.escapes)) if o.code == 0 or o.escapes else f"exit {o.code}",
        )
        for o in outcomes
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz what reads strangers' bytes.")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(NAMES)}; all if none is named")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--seed", type=int, default=0, help="0: another with each run")
    parser.add_argument("--output", type=Path, default=ROOT / "workspace" / "fuzz")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    output = args.output.resolve()
    if args.worker:
        work(args.worker, args.seconds, args.seed, output / args.worker)
        return 0
    names = args.targets or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no target {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    seed = args.seed or int.from_bytes(os.urandom(4), "little") or 1
    print(f"{len(names)} targets, {args.seconds} s each, {args.jobs} at a time, seed {seed}", flush=True)
    with ThreadPoolExecutor(args.jobs, thread_name_prefix="fuzz") as pool:
        outcomes = list(pool.map(lambda name: run(name, args.seconds, seed, output), names))
    print(table(outcomes))
    for outcome in outcomes:
        for path in outcome.escapes:
            print(f"{outcome.name} escaped: {path}")
        if outcome.bad:
            print(f"{outcome.name}: see {output / outcome.name / 'log.txt'}")
    total = sum(outcome.executions for outcome in outcomes)
    print(f"{total:,} executions, {sum(len(o.escapes) for o in outcomes)} escapes")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
