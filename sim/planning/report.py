"""A plan for people."""

from __future__ import annotations

from .estimate import size_text
from .figures import Plan, Row

__all__ = ["advice", "plan_text"]


def plan_text(plan: Plan) -> str:
    """The plan as lines: what was measured, what it comes to, and what there is."""
    measured, fleet, machine = plan.measured, plan.fleet, plan.machine
    some = f" ({fleet.tasks} of them in a round)" if fleet.tasks != fleet.clients else ""
    gpu = "" if measured.gpu is None else f", GPU {size_text(measured.gpu)}"
    lines = [
        f"plan of {plan.job!r}: {fleet.clients} clients{some}, {fleet.workers} at once, {fleet.rounds} rounds",
        f"one client ({measured.site}, {measured.rounds} rounds measured)",
        _line("its task", f"{_seconds(measured.run_s)}, {_seconds(measured.cpu_s)} of CPU", _first(plan)),
        _line("its memory", size_text(measured.worker), f"{size_text(measured.waiting)} between its tasks{gpu}"),
        _line("model, result", size_text(measured.model), size_text(measured.result)),
        "memory",
        *(_line(row.name, size_text(row.bytes), _parts(row)) for row in plan.memory),
        _line("in all", size_text(plan.memory_bytes), f"of {size_text(machine.memory)} available"),
    ]
    for row in plan.gpus:
        need = "not known" if row.bytes is None else size_text(row.bytes)
        each = "" if row.each is None else f" x {size_text(row.each)}"
        share = f", a share of {row.share:.3g} each" if row.share else ""
        free = "" if row.free is None else f", {size_text(row.free)} free"
        lines.append(_line(f"GPU {row.gpu}", need, f"{row.processes} processes{each}{share}{free}"))
    lines += [
        "spool",
        _line("at most", size_text(plan.spool), f"of a quota of {size_text(machine.quota)}"),
        _line("at least", size_text(plan.spool_least), "or it cannot run"),
        "a round",
        _line("to the clients", size_text(plan.down), "and back " + size_text(plan.up)),
        _line("time", _seconds(plan.round_s), f"the first one {_seconds(plan.first_round_s)}"),
        _line("the whole run", _seconds(plan.total_s), f"on {machine.cores} cores"),
        *(f"note: {note}" for note in plan.notes),
        "it fits" if plan.fits else "it does not fit",
    ]
    return "\n".join(lines)


def advice(plan: Plan) -> str:
    """What to do about a plan that does not fit."""
    if plan.most_workers:
        return f"at most {plan.most_workers} at once fit: -t {plan.most_workers}"
    if plan.most_workers == 0:
        return "not even one client at once fits"
    return ""


def _line(name: str, value: str, more: str = "") -> str:
    return f"  {name:<26}{value:>20}  {more}".rstrip()


def _parts(row: Row) -> str:
    return f"{row.count} x {size_text(row.each)}" if row.count > 1 else ""


def _first(plan: Plan) -> str:
    start = plan.measured.start_s
    return f"the first {_seconds(start)} more" if plan.measured.rounds > 1 else ""


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
