"""The Client API for those who know it as `fedloom.client.api`, and for the modules beside this one."""

from __future__ import annotations

from fedloom.executor.client_api import (
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
from fedloom.executor.client_context import ClientError
from fedloom.serialization.model import FLModel, ParamsType

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
