"""The benchmarks' training script."""

from __future__ import annotations

import sys
from pathlib import Path

import fedloom.client as flare
from workload import note, update


def main() -> None:
    events = Path(sys.argv[1])
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1])
    while flare.is_running():
        received = flare.receive()
        note(events, "task", round=received.current_round, client=client)
        trained = update(received.params, client)
        flare.send(flare.FLModel(params=trained, meta={"NUM_STEPS_CURRENT_ROUND": 10 * client}))


if __name__ == "__main__":
    main()
