"""The rows' models as torch modules, which some systems insist on."""

from __future__ import annotations

from typing import Any

import torch
from digitsnet import network
from torch import nn
from workload import shapes


class Large(nn.Module):
    """Zeros: ``mib`` MiB of float32 in so many tensors, named as `workload.shapes` does."""

    def __init__(self, mib: int = 100, tensors: int = 50) -> None:
        super().__init__()
        self.mib, self.tensors = mib, tensors  # kept, since some systems read a module's arguments off it
        for name, shape in shapes(mib, tensors).items():
            layer, _, kind = name.partition(".")
            if layer not in self._modules:
                self.add_module(layer, nn.Module())
            self.get_submodule(layer).register_parameter(kind, nn.Parameter(torch.zeros(shape)))


class Digits(nn.Module):
    """The digits row's network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: Any) -> Any:
        return self.net(images)
