"""Optimizers, the average of the weights (EMA), and a guard against non-finite steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from runtime import distributed
from runtime.averages import first_share
from runtime.settings import setting
from runtime.sharding import local

N = TypeVar("N", bound=nn.Module)


class OptimizerSettings(Protocol):
    """Settings of an optimizer, which make it."""

    def make(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """Build the optimizer; a fused one, so that `FiniteGuard` can skip its steps on the device."""
        ...


OPTIMIZERS: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Enter a dataclass of settings, with a `make` like `OptimizerSettings`, as the optimizer of this name."""

    def enter(cls: type) -> type:
        OPTIMIZERS[name] = cls
        return cls

    return enter


@register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101).

    Raises:
        ValueError: Naming the flag and its value.
    """

    adam_betas: tuple[float, float] = setting((0.9, 0.999), "betas of AdamW")
    weight_decay: float = setting(0.0, "weight decay of AdamW")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam-betas {' '.join(map(str, self.adam_betas))}: both must lie in [0, 1)")
        if not 0 <= self.weight_decay <= torch.finfo(torch.float32).max:
            raise ValueError(f"--weight-decay {self.weight_decay}: must not be negative, and finite in float32")

    def make(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return torch.optim.AdamW(
            list(parameters), lr=lr, betas=self.adam_betas, weight_decay=self.weight_decay, fused=True
        )


class EMA(Generic[N]):
    """An exponential moving average of a network's weights.

    Args:
        network: The network being trained; the average starts as a copy of it.
        decay: Weight of the past at each update.
        ramp: Start at a low decay, min(decay, (1 + n) / (10 + n)) at update n, so that short runs forget their start.
        every: Updates that are made as one, with the product of their decays and the weights after the last.
        average: A copy of the network, divided over processes alike; None makes one.

    Attributes:
        network: The average, in eval mode, without gradients. Frozen parameters are copied once and left alone.
        name: Name of its group in checkpoints, by its decay.
        updates: Number of updates asked for.
        averaged: Number of those that the average holds.
    """

    def __init__(
        self, network: N, decay: float, *, ramp: bool = False, every: int = 1, average: N | None = None
    ) -> None:
        self.decay, self.ramp, self.every, self.name = decay, ramp, every, f"ema-{decay:g}"
        self.updates = self.averaged = 0
        self.network = (copy.deepcopy(network) if average is None else average).eval().requires_grad_(False)
        averaged = dict(self.network.named_parameters())
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._source: list[Tensor] = [local(parameter) for parameter in trained.values()]
        self._average: list[Tensor] = [local(averaged[name]) for name in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network if it is due: one fused operation over all weights."""
        self.updates += 1
        pending = self.updates - self.averaged
        if pending < self.every:
            return
        decay = first_share(self.decay, pending, ramp=self.ramp, start=self.averaged)
        torch._foreach_lerp_(self._average, self._source, 1 - decay)
        self.averaged = self.updates


class FiniteGuard:
    """Skips optimizer steps with a non-finite gradient, and records the step and rank of a non-finite loss.

    The decision stays on the device: fused optimizers skip an update where their `found_inf` is 1, except on MPS, where
    `step` reads it. Gradients are already averaged over ranks, so all ranks skip together.

    Args:
        optimizer: A fused optimizer.
        device: Device of the losses.
        drop_above: Norm of the gradient above which `drops` is true; None drops none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, drop_above: float | None = None) -> None:
        self._optimizer, self._reads_decision = optimizer, device.type == "mps"
        self._drop_above, self._dropped = drop_above, 0
        self._skipped = torch.zeros((), device=device)
        self._too_large = torch.zeros((), device=device)
        self._last_bad_loss = torch.full((), -1.0, device=device)

    def drops(self, grad_norm: Tensor) -> bool:
        """True for a step that is to leave everything as it is; waits for the device where there is a limit."""
        if self._drop_above is None:
            return False
        dropped = not float(grad_norm) <= self._drop_above  # as of NaN
        self._dropped += dropped
        return dropped

    def count_dropped(self) -> int:
        """Steps that were dropped since the last call."""
        count, self._dropped = self._dropped, 0
        return count

    def watch(self, step: int, loss: Tensor, grad_norm: Tensor, limit: float | None = None) -> None:
        """Decide about a step; to be called between the backward pass and the optimizer's step.

        Args:
            step: Number of the step, below 2^24.
            loss: This rank's loss, a scalar.
            grad_norm: Norm of the averaged gradient, a scalar.
            limit: Skip finite gradients of this norm or more, too; None skips none.
        """
        bad = ~torch.isfinite(grad_norm)
        too_large = torch.zeros_like(bad) if limit is None else (grad_norm >= limit) & ~bad
        self._optimizer.found_inf = (bad | too_large).to(torch.float32)  # type: ignore[attr-defined]  # read by fused optimizers
        self._skipped += bad
        self._too_large += too_large
        self._last_bad_loss = torch.where(torch.isfinite(loss.detach()), self._last_bad_loss, float(step))

    def step(self) -> None:
        """Step the optimizer, unless the step that was watched last is to be skipped."""
        if self._reads_decision and bool(self._optimizer.found_inf):  # type: ignore[attr-defined]
            return
        self._optimizer.step()

    def count_too_large(self) -> int:
        """Finite gradients that were skipped since the last call, the same on every rank. Waits for the device."""
        count = int(self._too_large)
        self._too_large.zero_()
        return count

    def report(self) -> str | None:
        """Non-finite steps since the last report, the same on every rank; None without any. Waits for the device."""
        seen = distributed.from_all_ranks(torch.stack([self._skipped, self._last_bad_loss])).tolist()
        self._skipped.zero_()
        self._last_bad_loss.fill_(-1)
        skipped = int(max(count for count, _ in seen))
        if not skipped:
            return None
        places = [f"step {int(step) + 1} on rank {rank}" for rank, (_, step) in enumerate(seen) if step >= 0]
        where = f"non-finite loss at {', '.join(places)}" if places else "non-finite gradient of a finite loss"
        return f"{where}; {skipped} optimizer step{'s' if skipped > 1 else ''} skipped"
