"""Closed-form likelihood terms of the variational bound, in nats, element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)); arguments broadcast, at least one is a tensor."""
    difference = _exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * _exp(-logvar2)
    return torch.as_tensor(0.5 * (logvar2 - logvar1 - 1.0 + difference))


def _exp(x: Tensor | float) -> Tensor | float:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Tanh approximation of the standard normal's cumulative distribution (the one inside GELU)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor | float) -> Tensor:
    """Log-probability of 8-bit values under a Gaussian integrated over each value's bin.

    Args:
        x: Values in [-1, 1] that were 256 equal levels.
        means: Like `x`.
        log_scales: Logarithm of the standard deviation, broadcastable.

    Returns:
        Like `x`; the outermost bins reach to infinity.

    Source: Ho et al., 2020, equation 13.
    """
    inverse_std = _exp(-log_scales)
    above = approx_standard_normal_cdf((x - means + 1 / 255) * inverse_std)
    below = approx_standard_normal_cdf((x - means - 1 / 255) * inverse_std)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
