"""From one client's figures to a fleet's. Pure: measurements and numbers in, a plan out.

The formulas stand in docs/guides/simulation.md as well: whoever changes one changes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ...broker.quota import Needs
from ...executor.prepare import MEMORY_SHARE, PAYS_A_WORKER, PAYS_HERE
from ...serialization.messages import INLINE_BYTES
from ..gpus import users
from .figures import Fleet, GpuRow, Machine, Measured, Plan, Row

__all__ = ["TASK_BYTES", "TASK_S", "estimate", "size_text"]

#: What broker, controller and agent each keep at most of one task of an open round (measured with 1,000 and 5,000: 2.3,
#: 1.0 and 2.1 KiB), and what its messages take.
TASK_BYTES = 3072
TASK_S = 0.0005
#: How many results one partial stands for (`AgentConfig.partial_max_tasks`).
_PARTIAL_TASKS = 256
#: After how many models, or which part of the quota, a checkpoint frees the results of a round.
_CHECKPOINT_MODELS = 4
_CHECKPOINT_QUOTA = 8


def estimate(
    job: str, measured: Measured, fleet: Fleet, machine: Machine, narrower: Callable[[int], Fleet] | None = None
) -> Plan:
    """The plan of a fleet, and why it cannot run if it cannot.

    Args:
        narrower: the same fleet with another T, for finding the largest one that fits.
    """
    plan = _plan(job, measured, fleet, machine)
    if plan.fits or narrower is None:
        return plan
    return replace(plan, most_workers=_most_workers(job, measured, fleet.workers, machine, narrower))


def _most_workers(job: str, measured: Measured, wanted: int, machine: Machine, narrower: Callable[[int], Fleet]) -> int:
    """The largest T that fits, found by halving, since fewer workers take less; 0: not even one fits."""
    low, high = 0, wanted - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _plan(job, measured, narrower(middle), machine).fits:
            low = middle
        else:
            high = middle - 1
    return low


def _plan(job: str, measured: Measured, fleet: Fleet, machine: Machine) -> Plan:
    memory = _memory(measured, fleet, machine)
    gpus = _gpus(measured, fleet, machine)
    sizes: dict[str, object] = {"checkpoint_bytes": measured.checkpoint, "state_bytes": measured.state}
    needs = Needs.of(sizes | {"rounds": fleet.rounds}, measured.model)
    least = measured.archive + needs.round + (fleet.tasks * measured.result if fleet.collects else 0)
    first, later = _round_s(measured, fleet, machine, first=True), _round_s(measured, fleet, machine, first=False)
    plan = Plan(
        job,
        measured,
        fleet,
        machine,
        memory,
        gpus,
        spool=max(least, measured.archive + needs.round + _in_flight(measured, fleet, machine)),
        spool_least=least,
        down=fleet.tasks * measured.model,
        up=fleet.tasks * measured.result,
        first_round_s=first,
        round_s=later,
        total_s=measured.startup_s + first + (fleet.rounds - 1) * later,
        notes=_notes(measured, fleet, machine),
    )
    return replace(plan, reasons=(*_memory_reasons(plan), *_gpu_reasons(plan), *_spool_reasons(plan)))


# ---------------------------------------------------------------- memory


def _worker_folds(measured: Measured, fleet: Fleet, machine: Machine) -> bool:
    """Whether a worker of functions adds up its own results: it has several, and memory holds a sum for each worker."""
    sums = measured.checkpoint * fleet.workers
    several = fleet.tasks >= PAYS_A_WORKER * fleet.workers
    return fleet.functions and fleet.prefold and several and sums <= machine.memory // MEMORY_SHARE


def _agent_folds(measured: Measured, fleet: Fleet) -> bool:
    return fleet.prefold and fleet.tasks > 1 and (measured.model <= INLINE_BYTES or fleet.tasks >= PAYS_HERE)


def _memory(measured: Measured, fleet: Fleet, machine: Machine) -> tuple[Row, ...]:
    own = measured.memory
    # nothing is folded of the one client that was measured
    in_workers = _worker_folds(measured, fleet, machine)
    folds = measured.checkpoint if _agent_folds(measured, fleet) and not in_workers else 0
    each = measured.worker + (measured.checkpoint if in_workers else 0)
    rows = [
        Row("launcher and warm process", own.get("launcher", 0) + own.get("warm", 0)),
        Row("broker", own.get("broker", 0) + own.get("data", 0), more=fleet.tasks * TASK_BYTES),
        Row("controller", own.get("controller", 0) + own.get("job", 0), more=fleet.tasks * TASK_BYTES),
        Row("agent", own.get("agent", 0), more=folds + fleet.tasks * TASK_BYTES),
        Row("workers", each, fleet.workers),
    ]
    if fleet.parked:
        rows.append(Row("waiting scripts", measured.waiting, fleet.parked))
    return tuple(rows)


def _memory_reasons(plan: Plan) -> list[str]:
    if plan.memory_bytes <= plan.machine.memory:
        return []
    parts = sorted(plan.memory, key=lambda row: row.bytes, reverse=True)[:2]
    shown = ", ".join(_row_text(row) for row in parts)
    needed, available = size_text(plan.memory_bytes), size_text(plan.machine.memory)
    return [f"memory: {needed} are needed and {available} are available ({shown})"]


def _row_text(row: Row) -> str:
    return f"{row.name} {size_text(row.bytes)}" + (f" = {row.count} x {size_text(row.each)}" if row.count > 1 else "")


# ---------------------------------------------------------------- GPUs


def _gpus(measured: Measured, fleet: Fleet, machine: Machine) -> tuple[GpuRow, ...]:
    rows: list[GpuRow] = []
    for gpu, workers in users(fleet.slots).items():
        share = max(slot.share for slot in fleet.slots if gpu in slot.gpus)
        there = machine.gpus.get(gpu)
        rows.append(
            GpuRow(
                gpu,
                workers,
                # those that wait are spread as the slots are
                workers + math.ceil(fleet.parked * workers / fleet.workers),
                share,
                measured.gpu,
                None if there is None else max(0, there.total - there.used),
                None if there is None or not share else int(there.total * share),
            )
        )
    return tuple(rows)


def _gpu_reasons(plan: Plan) -> list[str]:
    found: list[str] = []
    for row in plan.gpus:
        if row.each is None:
            continue
        if row.allowed is not None and row.each > row.allowed:
            found.append(
                f"GPU {row.gpu}: a client took {size_text(row.each)}, and its share is {size_text(row.allowed)}"
                f" ({row.share:.3g} of the GPU)"
            )
        elif row.free is not None and (row.bytes or 0) > row.free:
            waiting = f", {row.processes - row.workers} of them waiting" if row.processes > row.workers else ""
            found.append(
                f"GPU {row.gpu}: {size_text(row.bytes or 0)} are needed and {size_text(row.free)} are free"
                f" ({row.processes} processes{waiting}, {size_text(row.each)} each)"
            )
    return found


# ---------------------------------------------------------------- the spool


def _in_flight(measured: Measured, fleet: Fleet, machine: Machine) -> int:
    """Results of a round that lie in the spool until they are folded and covered."""
    if fleet.collects:
        return fleet.tasks * measured.result
    count, each = fleet.tasks, measured.result
    if _worker_folds(measured, fleet, machine):
        count, each = max(math.ceil(fleet.tasks / _PARTIAL_TASKS), fleet.workers), measured.checkpoint
    elif _agent_folds(measured, fleet):
        count, each = math.ceil(fleet.tasks / _PARTIAL_TASKS), measured.checkpoint
    covered = max(_CHECKPOINT_MODELS * measured.model, machine.quota // _CHECKPOINT_QUOTA)
    return min(count * each, covered + each)


def _spool_reasons(plan: Plan) -> list[str]:
    if plan.spool_least <= plan.machine.quota:
        return []
    measured = plan.measured
    model, result, checkpoint = (size_text(size) for size in (measured.model, measured.result, measured.checkpoint))
    held = "a result"
    if plan.fleet.collects:
        held = f"all {plan.fleet.tasks} results of a round at once, {result} each, which its aggregator needs"
    text = (
        f"disk: {size_text(plan.spool_least)} are needed in the spool and its quota is {size_text(plan.machine.quota)}:"
        f" the job's files {size_text(measured.archive)}, the model {model} before and after a round, two checkpoints"
        f" of {checkpoint}, and {held}"
    )
    return [text]


# ---------------------------------------------------------------- time


def _round_s(measured: Measured, fleet: Fleet, machine: Machine, *, first: bool) -> float:
    """Whichever takes longest: the slots one task after another, the cores, or the thread that folds."""
    tasks, workers = fleet.tasks, fleet.workers
    starts = 0
    if first or fleet.restarts:
        starts = min(tasks, workers) if fleet.functions else tasks
    waves = math.ceil(tasks / workers)
    slots_s = waves * measured.run_s + math.ceil(starts / workers) * measured.start_s
    cores_s = (tasks * (measured.cpu_s + measured.fold_s) + starts * measured.start_cpu_s) / machine.cores
    thread_s = 0.0 if _worker_folds(measured, fleet, machine) else tasks * measured.fold_s
    return measured.turn_s + max(slots_s, cores_s, thread_s) + (tasks - 1) * TASK_S


# ---------------------------------------------------------------- what else there is to know


def _notes(measured: Measured, fleet: Fleet, machine: Machine) -> tuple[str, ...]:
    notes: list[str] = []
    if measured.rounds < 2:
        notes.append("one round was measured, so what only a first round takes is in all of them")
    if fleet.restarts and fleet.kept:
        notes.append(
            f"{fleet.clients - fleet.workers - fleet.parked} of the scripts cannot wait between their tasks and start"
            " again for each: what they keep in memory is lost"
        )
    if fleet.collects:
        notes.append(
            "the job's own aggregator was measured with one result: what it keeps of more is not in the figures"
        )
    if fleet.slots[0].gpus and measured.gpu is None:
        notes.append("what the client took of its GPU is not known: nvidia-smi did not say")
    elif fleet.slots[0].gpus and fleet.workers > len({slot.gpus for slot in fleet.slots}):
        notes.append("workers on one GPU also share its speed: the times are those of a client that has it for itself")
    if measured.cpu_s * fleet.workers > 1.5 * measured.run_s * machine.cores:
        notes.append(
            f"{fleet.workers} at once keep the {machine.cores} cores more than busy: fewer take less memory and as long"
        )
    return tuple(notes)


def size_text(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
