"""The Client API: `import fedloom.client as flare` in a training script.

::

    import fedloom.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        params, steps = train(model.params)
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": steps}))

Importing this imports numpy and no training framework.
"""

from __future__ import annotations

from .executor.client_api import (
    ClientError,
    clear,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    state,
    system_info,
)
from .serialization.model import FLModel, ParamsType

__all__ = [
    "ClientError",
    "FLModel",
    "ParamsType",
    "clear",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "state",
    "system_info",
]
