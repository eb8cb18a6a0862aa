"""A client of the `np` and `big` rows: a script, unchanged, as any training loop would be."""

from __future__ import annotations

import fedloom.client as flare
from workload import note, update, weight


def main() -> None:
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1])
    while flare.is_running():
        received = flare.receive()
        note("task", round=received.current_round, client=client)
        trained = update(received.params, client)
        flare.send(flare.FLModel(params=trained, meta={"NUM_STEPS_CURRENT_ROUND": weight(client)}))


if __name__ == "__main__":
    main()
