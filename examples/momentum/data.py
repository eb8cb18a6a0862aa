"""Points on one plane, a little noisy; each site sees another corner of it."""

from __future__ import annotations

import torch

FEATURES = 8


def site_data(site: str, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (rows, 8) and targets (rows, 1) of `site-N`, always the same ones."""
    number = int(site.rsplit("-", 1)[1])
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(rows, FEATURES, generator=generator) + 0.3 * number
    truth = torch.linspace(-1, 1, FEATURES).reshape(-1, 1)
    return x, x @ truth + 0.01 * torch.randn(rows, 1, generator=generator)
