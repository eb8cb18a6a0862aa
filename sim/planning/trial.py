"""One client, measured: the job runs for two rounds through the whole pipeline, in a folder that goes afterwards."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ...executor.config import available_bytes
from ...serialization.archive import SKIPPED_NAMES
from ...serialization.errors import HeaderError, JobError, StorageError, TaskError
from ...serialization.header import header_bytes_needed, read_header
from ...serialization.jobspec import JobSpec
from ..devices import check_present, gpu_memory
from ..gpus import Slot, parse_gpus, slots, worker_count
from ..launcher import WORK_DIR, SimResult, run_simulation
from ..prepare import SimConfig, max_parked, sites_of
from ..progress import Record
from .estimate import estimate
from .figures import Fleet, Machine, Measured, Plan
from .watch import WORKER, Look, Watch, task_cpu_s

__all__ = ["MEASURED_ROUNDS", "plan_simulation"]

#: A first round, with all that only a first one takes, and one like the others.
MEASURED_ROUNDS = 2
_QUOTA_SHARE = 0.8  # of the disk's free space, as the broker takes it where nobody says a quota
_FUNCTIONS = "FunctionExecutor"
_HALVES = frozenset({"F16", "BF16"})
#: With one of these a round may close before every result is there, which are sent one by one then.
_CLOSE_EARLY = frozenset({"deadline_s", "straggler_patience", "after_quorum_s"})


def plan_simulation(config: SimConfig) -> Plan:
    """What `run_simulation` with this config would take, from a run of its first site alone.

    The job's first workflow is measured. ``config.workspace`` is not touched: the run's folder is a temporary one
    beside it, on the same disk.

    Raises:
        TaskError: the site's code failed; its traceback is the message. What else `run_simulation` raises.
    """
    spec = JobSpec.load(config.job_folder)
    sites = sites_of(config, spec)
    groups = parse_gpus(config.gpu)

    def dealt(workers: int) -> tuple[Slot, ...]:
        return slots(groups, workers, config.gpu_memory_share)

    places = dealt(worker_count(len(sites), config.threads, groups))
    check_present(groups)
    machine = _machine(config, groups)

    def fleet(workers: int) -> Fleet:
        mine = dealt(workers)
        waiting = max_parked(config, spec, config.job_folder, mine, len(sites))
        return _fleet(config, spec, len(sites), mine, waiting)

    measured = _measure(config, spec, sites[0], places[0])
    return estimate(spec.name, measured, fleet(len(places)), machine, fleet)


def _machine(config: SimConfig, groups: Sequence[tuple[str, ...]]) -> Machine:
    quota = int(config.broker.get("quota_bytes") or _QUOTA_SHARE * shutil.disk_usage(_nearest(config.workspace)).free)
    return Machine(len(os.sched_getaffinity(0)), available_bytes(), quota, gpu_memory() if groups else {})


def _nearest(folder: Path) -> Path:
    """The folder itself, or the first one above it that exists: on the same disk, where it would be made."""
    folder = folder.expanduser().resolve()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _fleet(config: SimConfig, spec: JobSpec, clients: int, places: tuple[Slot, ...], waiting: int) -> Fleet:
    args = spec.workflows[0].args
    executors = [item.component for item in spec.all_executors]
    collects = args.get("aggregator") is not None
    return Fleet(
        clients=clients,
        tasks=min(clients, _whole(args.get("sample")) or clients),
        rounds=_whole(args.get("num_rounds")) or spec.num_rounds,
        slots=places,
        waiting=waiting,
        functions=all(item.path.endswith(_FUNCTIONS) for item in executors),
        kept=all(item.args.get("launch_once", True) for item in executors),
        # where these are not so, results reach the controller one by one
        prefold=config.prefold and not (collects or spec.server_input or args.keys() & _CLOSE_EARLY),
        collects=collects,
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def one_client(spec: JobSpec, site: str) -> JobSpec:
    """The job for this site alone and `MEASURED_ROUNDS` rounds of its first workflow."""
    first = spec.workflows[0]
    args = dict(first.args)
    for name, most in (("num_rounds", MEASURED_ROUNDS), ("min_clients", 1)):
        if name in args:
            args[name] = min(_whole(args[name]), most)
    for name in ("sample", "participating_clients"):  # of which the site may be none
        args.pop(name, None)
    return replace(
        spec,
        workflows=(replace(first, args=args),),
        sites=(site,),
        min_clients=1,
        mandatory_clients=(),
        num_rounds=min(spec.num_rounds, MEASURED_ROUNDS),
    )


def _measure(config: SimConfig, spec: JobSpec, site: str, place: Slot) -> Measured:
    from ...recipe.workspace import run_folder

    with ExitStack() as stack:
        temporary = stack.enter_context(_temporary(_nearest(config.workspace)))
        workspace = stack.enter_context(run_folder(temporary / "run"))
        job = workspace / "job"
        shutil.copytree(config.job_folder, job, ignore=shutil.ignore_patterns(*SKIPPED_NAMES, "*.pyc"))
        one_client(spec, site).write(job)
        watch = Watch(workspace / WORK_DIR / "logs", place.gpus)
        marks = [watch.look()]

        def mark(record: Record) -> None:
            del record
            marks.append(watch.look())

        trial = replace(
            config,
            job_folder=job,
            workspace=workspace,
            sites=(site,),
            threads=1,
            gpu=f"[{','.join(place.gpus)}]" if place.gpus else None,
            gpu_memory_share=place.share or None,
            max_parked=None,
            profile=False,
            show_progress=False,
            on_round=mark,
        )
        if config.show_progress:
            print(f"{spec.name}: measuring {site} for {MEASURED_ROUNDS} rounds", file=sys.stderr, flush=True)
        with watch:
            result = run_simulation(trial)
        _raise_failures(result, job, config.job_folder)
        return _measured(site, result, watch, marks, job)


@contextmanager
def _temporary(beside: Path) -> Generator[Path]:
    try:
        held = tempfile.TemporaryDirectory(prefix="fedloom-plan-", dir=beside)
    except OSError as error:
        raise StorageError(f"{beside}, where a client would be measured, cannot be written: {error.strerror}") from None
    with held as folder:
        try:
            yield Path(folder)
        except BaseException as error:  # notes that lead to what is gone in a moment
            if kept := getattr(error, "__notes__", None):
                kept[:] = [note for note in kept if folder not in note]
            raise


def _raise_failures(result: SimResult, job: Path, folder: Path) -> None:
    """The run's folder goes, so tracebacks lead to the code in the job's own."""
    from ...recipe.simulate import raise_failure

    failures = tuple(replace(one, text=one.text.replace(str(job), str(folder))) for one in result.failures)
    raise_failure(replace(result, failures=failures, result_dir=job / "gone"))
    for failure in failures:  # one that the rounds did not need
        raise TaskError(failure.site, failure.text or failure.code)
    if not result.rounds:
        raise JobError("the job ended without a round: there is nothing to measure")


def _measured(site: str, result: SimResult, watch: Watch, marks: Sequence[Look], job: Path) -> Measured:
    first, last = result.rounds[0], result.rounds[-1]
    memory = watch.memory()
    worker = memory.pop(WORKER)
    run_s = [_run_s(record) for record in result.rounds]
    cpu_s = task_cpu_s(watch.looks, marks[-2], marks[-1], run_s)
    files = [path for path in job.rglob("*") if path.is_file()]
    model = result.result_dir / "model.safetensors"
    if not model.is_file():  # an evaluation makes none
        model = max((path for path in files if path.suffix == model.suffix), key=_size, default=model)
    numbers = _numbers(model)
    return Measured(
        site=site,
        rounds=len(result.rounds),
        model=_size(model),
        result=int(last["bytes"]) // max(1, int(last["results"])),
        checkpoint=8 * sum(numbers.values()),
        state=4 * sum(count for dtype, count in numbers.items() if dtype in _HALVES),
        archive=sum(map(_size, files)),
        memory=memory,
        worker=worker,
        waiting=min(worker, watch.waiting(marks[1]) or worker),
        startup_s=max(0.0, result.seconds - sum(float(record["seconds"]) for record in result.rounds)),
        first_round_s=float(first["seconds"]),
        round_s=float(last["seconds"]),
        run_s=run_s[-1],
        fold_s=float(last["fold_seconds"]),
        cpu_s=cpu_s,
        start_cpu_s=max(0.0, marks[-1].cpu_s - len(run_s) * cpu_s),
        gpu=watch.gpu(),
    )


def _run_s(record: Record) -> float:
    """The client's own time for its task."""
    return max((float(item["run_s"]) for item in record["sites"]), default=float(record["seconds"]))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _numbers(model: Path) -> dict[str, int]:
    """How many numbers a model's file has of each dtype; {} where there is none."""
    found: dict[str, int] = {}
    if not model.is_file():
        return found
    with model.open("rb") as file:
        head = file.read(8)
        try:
            head += file.read(header_bytes_needed(head) - 8)
            for tensor in read_header(head, _size(model)).tensors:
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.items
        except HeaderError:
            return {}
    return found
