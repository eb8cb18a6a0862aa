"""`import fedloom.client.lightning as flare`: the Client API, and `patch` for a Lightning trainer."""

from __future__ import annotations

from fedloom.executor.flare import api
from fedloom.executor.flare.api import *  # noqa: F403 - the whole API, under this name too
from fedloom.executor.lightning import patch

__all__ = ["patch"]
__all__ += api.__all__
