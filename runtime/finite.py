"""Keeping non-finite numbers out of weights and averages, without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime import distributed


class FiniteGuard:
    """Skips optimizer steps whose gradient is not finite, and remembers on which step and rank a loss was to blame.

    The decision stays on the device: fused optimizers skip an update where their `found_inf` is 1. Gradients are
    already averaged over ranks, so all ranks skip together.

    Args:
        optimizer: a fused one.
        device: where the losses live.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._skipped = torch.zeros((), device=device)
        self._too_large = torch.zeros((), device=device)
        self._last_bad_loss = torch.full((), -1.0, device=device)

    def watch(self, step: int, loss: Tensor, grad_norm: Tensor, limit: float | None = None) -> None:
        """To be called between backward and the optimizer's step.

        Args:
            step: number of the step, below 2^24.
            loss: this rank's loss, a scalar.
            grad_norm: norm of the averaged gradient, a scalar.
            limit: skip finite gradients of this norm or more, too; None skips none.
        """
        bad = ~torch.isfinite(grad_norm)
        too_large = torch.zeros_like(bad) if limit is None else (grad_norm >= limit) & ~bad
        self._optimizer.found_inf = (bad | too_large).float()  # type: ignore[attr-defined]  # read by fused AdamW
        self._skipped += bad
        self._too_large += too_large
        self._last_bad_loss = torch.where(torch.isfinite(loss.detach()), self._last_bad_loss, float(step))

    def count_too_large(self) -> int:
        """How many finite gradients were skipped since the last call, the same on every rank. Waits for the device."""
        count = int(self._too_large)
        self._too_large.zero_()
        return count

    def report(self) -> str | None:
        """What happened since the last report, the same on every rank; None if nothing did. Waits for the device."""
        seen = distributed.from_all_ranks(torch.stack([self._skipped, self._last_bad_loss])).tolist()
        self._skipped.zero_()
        self._last_bad_loss.fill_(-1)
        skipped = int(max(count for count, _ in seen))
        if not skipped:
            return None
        places = [f"step {int(step) + 1} on rank {rank}" for rank, (_, step) in enumerate(seen) if step >= 0]
        where = f"non-finite loss at {', '.join(places)}" if places else "non-finite gradient of a finite loss"
        return f"{where}; {skipped} optimizer step{'s' if skipped > 1 else ''} skipped"
