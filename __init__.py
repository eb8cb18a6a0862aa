"""fedloom: federated learning as a message-queue, event-driven pipeline."""

from __future__ import annotations

__version__ = "0.1.0"
