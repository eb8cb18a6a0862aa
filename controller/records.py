"""A round's record: what `metrics.jsonl` has a line of, and the broker keeps with the commit."""

from __future__ import annotations

import time
from typing import Any, cast

from ..serialization.codec import pack
from .gather import Gather, Result

#: Sites and failures listed one by one in a record; beyond that the counts alone speak.
MAX_LISTED = 200
#: What a record may weigh, so that it fits in its message.
MAX_RECORD_BYTES = 48 * 1024
_MAX_TEXT = 2000


class RoundRecord:
    """Collects what happened in a round."""

    def __init__(self, round: int) -> None:
        self.round = round
        self.started_at = time.monotonic()
        self.results = 0
        self.in_partials = 0
        self.payload_bytes = 0
        self.fold_s = 0.0
        self.refolds = 0
        self.redone = 0
        self.sites: list[dict[str, Any]] = []
        self.state_lost: list[str] = []

    def add(self, result: Result) -> None:
        """A result was folded."""
        self.results += len(result.items)
        self.payload_bytes += result.size
        if result.partial:
            self.in_partials += len(result.items)
        for item in result.items:
            if item.restarted:
                self.state_lost.append(item.site)
            if len(self.sites) < MAX_LISTED:
                said = item.meta.get("meta")  # of a partial's item nobody has looked at it
                meta = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
                site: dict[str, Any] = {"name": item.site, "run_s": round(item.run_s, 4)}
                if item.meta.get("metrics"):
                    site["metrics"] = item.meta["metrics"]
                if item.attempt > 1:
                    site["attempt"] = item.attempt
                if "NUM_STEPS_CURRENT_ROUND" in meta:
                    site["weight"] = meta["NUM_STEPS_CURRENT_ROUND"]
                self.sites.append(site)

    def build(self, gather: Gather, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
        """The record as plain data; sites in the order of their names, so that two equal runs read alike."""
        record: dict[str, Any] = {
            "round": self.round,
            "metrics": metrics,
            "results": self.results,
            "tasks": gather.seen.tasks,
            "partials": self.in_partials,
            "bytes": self.payload_bytes,
            "seconds": round(time.monotonic() - self.started_at, 6),
            "fold_seconds": round(self.fold_s, 6),
            "refolds": self.refolds,
            "redone": self.redone,
            "claim": gather.opening.claim,
            "cuts": gather.seen.cuts,
            "state_lost": sorted(self.state_lost)[:MAX_LISTED],
            "failures": [
                {"site": f.site, "code": f.code, "text": f.text[-_MAX_TEXT:]} for f in gather.failures[:MAX_LISTED]
            ],
            "sites": sorted(self.sites, key=lambda site: site["name"]),
            **more,
        }
        lists = ("sites", "failures", "state_lost")
        while len(pack(record)) > MAX_RECORD_BYTES and any(record[key] for key in lists):
            for key in lists:
                record[key] = record[key][: len(record[key]) // 2]
        return record
