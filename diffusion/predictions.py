"""Prediction types: a network's output as an affine map of the clean sample and the noise."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from torch import Tensor

from diffusion.schedules import Array

Prediction = Literal["epsilon", "x_start", "v", "velocity"]
Coefficient = TypeVar("Coefficient", float, Array, Tensor, float | Tensor)


def target_weights(
    prediction: Prediction, alpha: Coefficient, sigma: Coefficient
) -> tuple[float | Coefficient, float | Coefficient]:
    """Weights (a, b) of the training target a x_start + b noise.

    Args:
        prediction: "epsilon" is the noise, "x_start" the clean sample, "v" the one of Salimans and Ho, 2022
            (arXiv 2202.00512, section 4), "velocity" that of the linear path.
        alpha: Of x_t = alpha x_start + sigma noise.
        sigma: The same.
    """
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "x_start":
        return 1.0, 0.0
    return (-sigma, alpha) if prediction == "v" else (1.0, -1.0)


def conversion(
    source: Prediction, target: Prediction, alpha: Coefficient, sigma: Coefficient
) -> tuple[float | Coefficient, float | Coefficient]:
    """Weights (p, q) with which p x_t + q output is the target, given an output of type `source` at x_t.

    With x_t = alpha x_start + sigma noise and output = a x_start + b noise, the determinant D = alpha b - sigma a gives

        x_start = (b x_t - sigma output) / D,    noise = (alpha output - a x_t) / D.

    Alpha and sigma are numbers, arrays or tensors. D must not be 0: "epsilon" says nothing where alpha is 0, nor
    "x_start" where sigma is 0.
    """
    if source == target:
        return 0.0, 1.0
    a, b = target_weights(source, alpha, sigma)
    c, d = target_weights(target, alpha, sigma)
    determinant = alpha * b - sigma * a
    return (c * b - d * a) / determinant, (d * alpha - c * sigma) / determinant


def prediction_tables(alphas_cumprod: Array, prediction: Prediction, min_snr_gamma: float) -> dict[str, Array]:
    """Coefficients of a Gaussian process that depend on the prediction type, (T,) float64 each."""
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    target = target_weights(prediction, alpha, sigma)
    by_x, by_prediction = conversion(prediction, "x_start", alpha, sigma)
    # min(snr, gamma) weighs the error of x_start; an error of the prediction is `by_prediction` times as large there.
    min_snr = np.minimum(alphas_cumprod / (1 - alphas_cumprod), min_snr_gamma) * by_prediction**2
    tables = {
        "target_by_x_start": target[0],
        "target_by_noise": target[1],
        "x_start_by_x": by_x,
        "x_start_by_prediction": by_prediction,
        "min_snr_weight": min_snr,
    }
    return {name: value + np.zeros_like(alpha) for name, value in tables.items()}
