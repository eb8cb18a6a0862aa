"""What each bound allows and what is there now, for Ask ``broker``: control's own, and what the data process told."""

from __future__ import annotations

from collections import Counter

from ..serialization.loglimit import LINES
from .bounds import Figure
from .state import BrokerState

__all__ = ["figures"]

#: Bounds on a single thing that comes in: nothing is there to be measured between two of them.
_SINGLE = ("max_meta_bytes", "max_config_bytes", "max_result_meta_bytes", "max_event_bytes", "max_held", "max_loose")


def figures(state: BrokerState) -> dict[str, Figure]:
    """All bounds of the broker by name. Of what every session, job or gather has, the fullest is shown."""
    settings, timing, limits = state.settings, state.settings.timing, state.ledger.limits
    sessions = state.sessions.by_id.values()
    gathers = state.ledger.gathers.values()
    by_job: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    for gather in gathers:
        by_job[gather.job] += 1
        tasks[gather.job] += len(gather.tasks)
    jobs = state.jobs
    sites = {r.site for gather in gathers for r in gather.results if settings.site_bytes}
    found: dict[str, tuple[int | float, int | float]] = {
        "max_sessions": (timing.max_sessions, len(state.sessions.by_id)),
        "max_waiting": (timing.max_waiting, state.sessions.waiting),
        "max_strikes": (timing.max_strikes, 0),
        "outbox_messages": (timing.outbox_messages, max((len(s.outbox) for s in sessions), default=0)),
        "outbox_bytes": (timing.outbox_bytes, max((s.outbox_bytes for s in sessions), default=0)),
        "quota_bytes": (settings.quota_bytes, state.quota.used),
        "site_bytes": (settings.site_bytes, max((state.quota.site_used(site) for site in sites), default=0)),
        "max_turns": (settings.max_turns, len(state.quota.turns)),
        "journal_bytes": (settings.journal_bytes, state.journal.size()),
        "max_jobs": (settings.max_jobs, len(jobs.jobs)),
        "max_crashes": (settings.max_crashes, max((job.crashes for job in jobs.active()), default=0)),
        "max_events": (settings.max_events, max((state.events_kept(job) for job in jobs.jobs), default=0)),
        "max_late": (settings.max_late, max((len(job.late) for job in jobs.jobs.values()), default=0)),
        "max_gathers": (limits.max_gathers, max(by_job.values(), default=0)),
        "max_tasks": (limits.max_tasks, max((len(gather.tasks) for gather in gathers), default=0)),
        "max_job_tasks": (limits.max_job_tasks, max(tasks.values(), default=0)),
        "max_past": (limits.max_past, len(state.ledger.past)),
        "small_cache_bytes": (settings.small_cache_bytes, state.small_bytes),
        "data_outbox_messages": (settings.data_outbox_messages, state.data_outbox),
        "log_lines_per_s": (LINES.per_s, LINES.used),
    }
    found |= {name: (getattr(settings, name), 0) for name in _SINGLE}
    counts = state.bounds.counts
    own = {name: Figure(limit, used, counts[name]) for name, (limit, used) in found.items()}
    own["log_lines_per_s"] = own["log_lines_per_s"].with_count(LINES.dropped)
    own["max_past"] = own["max_past"].with_count(state.ledger.past_dropped)
    return own | state.data_figures
