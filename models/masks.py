"""Masks of exactly 0 and 1 that multiply tensors of any precision and keep a gradient."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Decisions of a router, twice.

    Attributes:
        values: Float32, exactly 0 or 1; gradients flow through them.
        on: Where they are 1, as booleans.
    """

    values: Tensor
    on: Tensor


class _Masked(torch.autograd.Function):
    """Product of a tensor and the booleans of a mask, with a gradient for its float32 values."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, on: Tensor) -> Tensor:
        """Multiply; the result has the dtype of x."""
        return x * on

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the factors."""
        x, _, on = inputs
        ctx.save_for_backward(x, on)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the product rule's terms, the mask's summed over the axes that it is repeated along, in float32."""
        x, on = ctx.saved_tensors
        repeated = [axis for axis, size in enumerate(on.shape) if size == 1]
        return grad * on, (grad * x).sum(repeated, keepdim=True, dtype=torch.float32), None


def masked(x: Tensor, mask: Mask, *axes: int) -> Tensor:
    """Multiply a tensor by a mask that is repeated along these axes; the result has the tensor's dtype.

    Args:
        x: Any dtype.
        mask: Without the axes.
        axes: In ascending order; one at least.
    """
    values, on = (reduce(Tensor.unsqueeze, axes, part) for part in mask)
    # A kernel reads booleans beside any dtype; of float32 values it would need a copy in the dtype of x.
    out: Tensor = _Masked.apply(x, values, on) if values.requires_grad else x * on
    return out
