"""The Client API: `import fedloom.client as flare` in a training script.

::

    import fedloom.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        params, steps = train(model.params)
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": steps}))

Importing this imports numpy and no training framework. Below it are ``fedloom.client.tracking`` (the writers, which are
here as well), and patches for trainers: ``fedloom.client.lightning`` and ``fedloom.client.hf``.
"""

from __future__ import annotations

from pathlib import Path

from .executor.client_api import (
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
from .executor.client_context import ClientError
from .executor.decorators import evaluate, train
from .executor.tracking import MLflowWriter, SummaryWriter, WandBWriter
from .serialization.model import FLModel, ParamsType

#: Where modules below this one are found: it is a single file, as the other two at the root are.
__path__ = [str(Path(__file__).resolve().parent / "executor" / "flare")]

__all__ = [
    "ClientError",
    "FLModel",
    "MLflowWriter",
    "ParamsType",
    "SummaryWriter",
    "WandBWriter",
    "clear",
    "evaluate",
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
    "train",
]
