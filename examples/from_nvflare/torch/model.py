"""A small network, and data that each site makes up for itself."""

from __future__ import annotations

import torch
from torch import nn


class SimpleNetwork(nn.Module):
    """Two numbers in, two classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def ring(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in a square, and whether each lies in the circle of radius 0.8."""
    points = torch.rand(size, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return points, (points.norm(dim=1) < 0.8).long()
