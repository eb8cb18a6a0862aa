"""`from fedloom.client.tracking import SummaryWriter`."""

from __future__ import annotations

from fedloom.executor.tracking import MLflowWriter, SummaryWriter, WandBWriter

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]
