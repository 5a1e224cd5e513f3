"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


class EMA(Generic[N]):
    """Keeps an averaged copy of a network in step with training.

    Args:
        network: the network being trained; the average starts as a copy of it.
        decay: weight of the past at each update.
        ramp: start at a low decay, min(decay, (1 + n) / (10 + n)) at update n, so that short runs forget their start.

    Attributes:
        network: the average, in eval mode, without gradients. Frozen parameters are copied once and left alone.
    """

    def __init__(self, network: N, decay: float, *, ramp: bool = False) -> None:
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        averaged = dict(self.network.named_parameters())
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._source: list[Tensor] = list(trained.values())
        self._average: list[Tensor] = [averaged[name] for name in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the network: one fused operation over all weights."""
        ramped = (1 + self.updates) / (10 + self.updates)
        decay = min(self.decay, ramped) if self.ramp else self.decay
        torch._foreach_lerp_(self._average, self._source, 1 - decay)
        self.updates += 1
