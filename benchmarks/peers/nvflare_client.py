"""NVFLARE's client of the `np` and `big` rows."""

import numpy as np
import nvflare.client as flare
from workload import note, update, weight


def main():
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1])
    while flare.is_running():
        received = flare.receive()
        if received is None:
            return
        note("task", round=received.current_round, client=client)
        # a list of numbers comes as float64
        params = {name: np.asarray(value, np.float32) for name, value in received.params.items()}
        trained = update(params, client)
        meta = {"NUM_STEPS_CURRENT_ROUND": weight(client)}
        flare.send(flare.FLModel(params=trained, params_type="FULL", meta=meta))


main()
