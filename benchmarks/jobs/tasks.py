"""The same work as a function: what a fleet uses, where sites are many and workers few."""

from __future__ import annotations

from typing import Any

from workload import note, update, weight

#: The rounds that this worker has noted: in a large fleet only the first task of each counts.
_noted: set[int] = set()


def train(model: Any, ctx: Any) -> Any:
    """One task of one site."""
    from fedloom.client import FLModel

    if ctx.round not in _noted:
        _noted.add(ctx.round)
        note("task", round=ctx.round, client=ctx.site)
    client = int(ctx.site.rsplit("-", 1)[1])
    return FLModel(params=update(model.params, client), meta={"NUM_STEPS_CURRENT_ROUND": weight(client)})
