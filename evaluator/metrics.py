"""Metrics of generated images as pure functions of features: Frechet distance, Inception Score, precision and recall.

The definitions are those of the ADM evaluator (Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis",
2021), which published DiT numbers come from. Where its code fails or loses digits, ours does not, and a Note says so.
The features may come from any network: FID is `frechet_distance` on those of InceptionV3.

Shapes: N, M rows (one per image), D features, C classes, R rank. The computation runs on the device of the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluator.statistics import (
    Array,
    Statistics,
    as_rows,
    feature_statistics,
    full_float32,
    require_same_width,
    require_two_rows,
)

DistancePrecision = Literal["adm", "float32"]

ADM_SPLIT_SIZE = 5000  # rows of one Inception Score split
ADM_BLOCK_SIZE = 10_000  # rows and columns of one block of distances


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance
#
# Between Gaussians it is |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr sqrt(S_a S_b). For any factors with A A' = S_a and
# B B' = S_b, the last trace is the sum of the singular values of A' B. A square root of the product S_a S_b itself
# (scipy's sqrtm) is slower, and turns complex or loses half its digits where a covariance is singular.


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the Frechet (2-Wasserstein) distance, squared, between two Gaussians; the D in FID and sFID.

    Cholesky factors and symmetric eigenvalues if both covariances have full rank, otherwise (fewer rows than features,
    constant features) the singular values of eigenvector factors. Nothing is added to the diagonals.

    Args:
        a: Statistics of one set.
        b: Statistics of the other, of the same width.

    Returns:
        The distance, >= 0; rounding below zero (about 1e-13 of the traces) is clamped.

    Raises:
        ValueError: If the widths differ, or a matrix is not a covariance (it has a clearly negative eigenvalue).

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule...", 2017, equation 6.

    Note:
        The ADM evaluator uses sqrtm, with 1e-6 on the diagonals where that fails. From few rows its distances come
        out too small, by up to 6e-6 of the value; otherwise the two agree to rounding.
    """
    require_same_width(len(a.mean), len(b.mean))
    overlap = _overlap_of_covariances(a.covariance, b.covariance)
    return _assemble(a.mean - b.mean, a.covariance.trace(), b.covariance.trace(), overlap)


def frechet_distance_from_features(a: Array, b: Array, *, biased: bool = False) -> float:
    """Compute the Frechet distance of two sets of features; the exact and fast way when a set has few rows.

    A set with no more rows than features is its own factor, so that its singular covariance is never formed.

    Args:
        a: (N, D) real numbers, N >= 2.
        b: (M, D) real numbers, M >= 2.
        biased: Divide covariances by the number of rows, as the Frechet video distance does, not by one less.

    Returns:
        The distance, >= 0, as `frechet_distance`.

    Raises:
        ValueError: For different widths, a single row, NaN or infinity.
    """
    a, b = as_rows(a, "features a"), as_rows(b, "features b")
    width = a.shape[1]
    require_same_width(width, b.shape[1])
    require_two_rows(min(len(a), len(b)))
    scale_a, scale_b = (1 - 1 / len(rows) if biased else 1.0 for rows in (a, b))
    if min(len(a), len(b)) > width:
        return frechet_distance(*(
            dataclasses.replace(each, covariance=each.covariance * scale)
            for each, scale in ((feature_statistics(a), scale_a), (feature_statistics(b), scale_b))
        ))  # fmt: skip
    mean_a, factor_a = _mean_and_factor(a)
    mean_b, factor_b = _mean_and_factor(b)
    factor_a, factor_b = factor_a * math.sqrt(scale_a), factor_b * math.sqrt(scale_b)
    overlap = _overlap_of_factors(factor_a, factor_b)
    return _assemble(mean_a - mean_b, factor_a.square().sum(), factor_b.square().sum(), overlap)


def _assemble(shift: Tensor, trace_a: Tensor, trace_b: Tensor, overlap: Tensor) -> float:
    distance = float(shift.dot(shift) + trace_a + trace_b - 2 * overlap)
    return max(distance, 0.0)


def _overlap_of_covariances(a: Tensor, b: Tensor) -> Tensor:
    """Return tr sqrt(a b) for covariances a, b (D, D)."""
    factor_a, factor_b = _cholesky(a), _cholesky(b)
    if factor_a is None or factor_b is None:
        factor_a = _eigenvector_factor(a) if factor_a is None else factor_a
        factor_b = _eigenvector_factor(b) if factor_b is None else factor_b
        return _overlap_of_factors(factor_a, factor_b)
    # the squares of the singular values of A' B, four times faster
    similar_to_product = factor_a.T @ b @ factor_a
    return torch.linalg.eigvalsh(similar_to_product).clamp(min=0).sqrt().sum()


def _overlap_of_factors(a: Tensor, b: Tensor) -> Tensor:
    """Return tr sqrt(a a' b b') for factors (D, R_a) and (D, R_b)."""
    return torch.linalg.svdvals(a.T @ b).sum()


def _mean_and_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and a factor (D, R) of the covariance of features (N, D), R <= min(N, D)."""
    count, width = features.shape
    require_two_rows(count)
    if count > width:
        statistics = feature_statistics(features)
        factor = _cholesky(statistics.covariance)
        return statistics.mean, _eigenvector_factor(statistics.covariance) if factor is None else factor
    rows = features.double()
    mean = rows.mean(dim=0)
    return mean, (rows - mean).T / math.sqrt(count - 1)


def _cholesky(covariance: Tensor) -> Tensor | None:
    """Return the lower triangular factor, or None if the matrix is singular to working precision."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if failed else factor


def _eigenvector_factor(covariance: Tensor) -> Tensor:
    """Return a factor (D, R) of a covariance of numerical rank R.

    Eigenvalues at rounding level are left out: their square roots are not at rounding level, and thousands add up.
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    largest = float(values[-1])
    if float(values[0]) < -1e-4 * abs(largest):  # stored float32 matrices reach -1e-6
        raise ValueError(f"not a covariance: its eigenvalues reach from {float(values[0]):.3g} to {largest:.3g}")
    kept = values > largest * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Kernel distance


def kernel_distance(a: Array, b: Array, *, block_size: int = ADM_BLOCK_SIZE) -> float:
    """Compute the squared maximum mean discrepancy for the kernel (x y / D + 1)^3, the D in KID.

    Unlike FID it has no bias from few rows: its expectation does not depend on their number.

    Args:
        a: (N, D) features, N >= 2.
        b: (M, D) features, M >= 2.
        block_size: Rows and columns of products held at a time; bounds memory.

    Returns:
        The unbiased estimate over all pairs of rows; near 0, on either side, for sets of one distribution.

    Raises:
        ValueError: For different widths, a single row, NaN or infinity.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, section 4.

    Note:
        Published values are means over random subsets of 1,000 rows, with the same expectation, often times 1,000.
    """
    a, b = as_rows(a, "features a"), as_rows(b, "features b")
    require_same_width(a.shape[1], b.shape[1])
    require_two_rows(min(len(a), len(b)))

    def kernel_sum(u: Tensor, v: Tensor) -> float:
        total = 0.0
        for rows in u.float().split(block_size):
            for columns in v.float().split(block_size):
                with full_float32():
                    products = rows @ columns.T
                total += float(products.double().div_(u.shape[1]).add_(1).pow_(3).sum())
        return total

    def own_mean(u: Tensor) -> float:
        with_themselves = float(u.double().square().sum(dim=1).div(u.shape[1]).add(1).pow(3).sum())
        return (kernel_sum(u, u) - with_themselves) / (len(u) * (len(u) - 1))

    return own_mean(a) + own_mean(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


# ----------------------------------------------------------------------------------------------------------------------
# Inception Score


def inception_score(probabilities: Array, split_size: int = ADM_SPLIT_SIZE) -> float:
    """Compute the Inception Score, averaged over consecutive splits.

    Of each split it is exp(mean KL(p(y|x) || p(y))), from 1 (all rows alike) to C (certain, and classes balanced).

    Args:
        probabilities: (N, C) softmax outputs of a classifier, rows in sampling order; exact zeros are allowed.
        split_size: Rows of a split; the last split may be short, and counts as much as the others.

    Returns:
        The plain mean over splits, in [1, C].

    Raises:
        ValueError: If the rows are not probabilities, or for split_size < 1.

    Source: Salimans et al., "Improved Techniques for Training GANs", 2016, section 4.

    Note:
        The ADM evaluator splits by 5,000 rows, not into 10 parts, and returns NaN once a probability underflows.
    """
    rows = as_rows(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, not {split_size}")
    if float(rows.min()) < 0 or float((rows.sum(dim=1, dtype=torch.float64) - 1).abs().max()) > 1e-3:
        raise ValueError("probabilities must be >= 0 and sum to 1 in each row; pass softmax outputs, not logits")
    scores = [_score_of_split(split.double()) for split in rows.split(split_size)]
    return float(torch.stack(scores).mean())


def _score_of_split(probabilities: Tensor) -> Tensor:
    # mean KL = entropy of the mean - mean of the entropies; entr(0) = 0, so no logarithm of zero is ever taken
    entropy_of_mean = torch.special.entr(probabilities.mean(dim=0)).sum()
    mean_of_entropies = torch.special.entr(probabilities).sum(dim=1).mean()
    return torch.exp(entropy_of_mean - mean_of_entropies)


# ----------------------------------------------------------------------------------------------------------------------
# Precision and recall


class PrecisionRecall(NamedTuple):
    """Fidelity and coverage, both in [0, 1].

    Attributes:
        precision: Share of the samples inside the manifold of the reference.
        recall: Share of the reference inside the manifold of the samples.
    """

    precision: float
    recall: float


def precision_recall(
    reference: Array,
    samples: Array,
    k: int = 3,
    *,
    precision: DistancePrecision = "adm",
    clamp_to_percentile: float | None = None,
    block_size: int = ADM_BLOCK_SIZE,
    device: torch.device | str | None = None,
) -> PrecisionRecall:
    """Compute improved precision and recall: the shares of rows inside any ball around a row of the other set.

    A ball reaches from its row to the k-th nearest neighbour in the same set.

    Args:
        reference: (N, D) features of real images, N >= k + 1.
        samples: (M, D) features of generated images, M >= k + 1.
        k: The neighbour that sets the radius, >= 1.
        precision: "adm" rounds distances to float16 as published numbers do, "float32" does not; the two differ by up
            to about 0.01 and must not be compared with one another.
        clamp_to_percentile: Shrink the balls above this percentile of radii, in [0, 100], to points; None keeps all.
        block_size: Rows and columns of distances held at a time; bounds memory (2 x 4 bytes a pair), and is the unit
            in which "adm" falls back to float32 where a distance overflows float16.
        device: Device of the computation; None means that of the features.

    Returns:
        Precision and recall.

    Raises:
        ValueError: As `manifold_radii`, or for different widths.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
        equations 1 and 2.
    """
    reference, samples = as_rows(reference, "reference", device), as_rows(samples, "samples", device)
    require_same_width(reference.shape[1], samples.shape[1])
    reference_radii, sample_radii = (
        manifold_radii(rows, k, precision=precision, clamp_to_percentile=clamp_to_percentile, block_size=block_size)
        for rows in (reference, samples)
    )
    reference_covered = torch.zeros_like(reference_radii, dtype=torch.bool)
    sample_covered = torch.zeros_like(sample_radii, dtype=torch.bool)
    for rows, columns, distances in _distance_blocks(reference, samples, precision, block_size):
        sample_covered[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
        reference_covered[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
    return PrecisionRecall(*(int(covered.sum()) / len(covered) for covered in (sample_covered, reference_covered)))


def manifold_radii(
    features: Array,
    k: int = 3,
    *,
    precision: DistancePrecision = "adm",
    clamp_to_percentile: float | None = None,
    block_size: int = ADM_BLOCK_SIZE,
    device: torch.device | str | None = None,
) -> Tensor:
    """Compute for each row the SQUARED distance to its k-th nearest neighbour, the row itself not counted.

    Args:
        features: (N, D) real numbers, N >= k + 1.
        k: The neighbour, >= 1.
        precision: As in `precision_recall`.
        clamp_to_percentile: As in `precision_recall`.
        block_size: As in `precision_recall`.
        device: As in `precision_recall`.

    Returns:
        (N,) float32.

    Raises:
        ValueError: If they are not a finite (N, D) matrix, for fewer than k + 1 rows, or an argument out of its range.
    """
    rows = as_rows(features, "features", device)
    _check_manifold_arguments(len(rows), k, precision, clamp_to_percentile, block_size)
    nearest = torch.full((len(rows), k + 1), torch.inf, device=rows.device)  # (N, k + 1), the row itself among them
    for block, _, distances in _distance_blocks(rows, rows, precision, block_size):
        nearest_in_block = _smallest(distances, k + 1)
        nearest[block] = _smallest(torch.cat([nearest[block], nearest_in_block], dim=1), k + 1)
    radii = nearest.amax(dim=1)
    if clamp_to_percentile is not None:
        radii[radii > torch.quantile(radii, clamp_to_percentile / 100)] = 0
    return radii


def float16_noise(reference: Array, samples: Array) -> float:
    """Estimate float16's rounding of squared distances, relative to their mean.

    Distances are differences of squared norms, so their steps are those of float16 at the norms, however close the rows
    are to each other. Above 0.01, precision and recall by "adm" and "float32" may differ by several hundredths.

    Args:
        reference: (N, D) features.
        samples: (M, D) features.

    Returns:
        Spacing of float16 at twice the mean squared norm, over the mean squared distance of two rows; 0 where it
        overflows, because distances are then computed in float32.
    """
    sets = [as_rows(reference, "reference"), as_rows(samples, "samples")]
    count = sum(map(len, sets))
    norm = sum(float(rows.float().square().sum(dim=1).sum(dtype=torch.float64)) for rows in sets) / count
    mean = torch.stack([rows.sum(dim=0, dtype=torch.float64) for rows in sets]).sum(dim=0) / count
    distance = 2 * (norm - float(mean.square().sum()))
    if 2 * norm > torch.finfo(torch.float16).max or distance <= 0:
        return 0.0
    return float(np.spacing(np.float16(2 * norm))) / distance


def _check_manifold_arguments(
    count: int, k: int, precision: str, clamp_to_percentile: float | None, block_size: int
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if count < k + 1:
        raise ValueError(f"the {k}-th nearest neighbour needs at least k + 1 = {k + 1} rows of features, not {count}")
    if precision not in ("adm", "float32"):
        raise ValueError(f"precision must be 'adm' or 'float32', not {precision!r}")
    if clamp_to_percentile is not None and not 0 <= clamp_to_percentile <= 100:
        raise ValueError(f"clamp_to_percentile must be in [0, 100], not {clamp_to_percentile}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")


def _smallest(values: Tensor, count: int) -> Tensor:
    """Return the `count` smallest of each row, or all if there are fewer, in no order."""
    return values.topk(min(count, values.shape[1]), dim=1, largest=False, sorted=False).values


def _distance_blocks(
    u: Tensor, v: Tensor, precision: DistancePrecision, block_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows of u (N, D), columns (rows of v, (M, D)) and their squared distances in float32, block by block."""
    for start in range(0, len(u), block_size):
        rows = slice(start, start + block_size)
        for other in range(0, len(v), block_size):
            columns = slice(other, other + block_size)
            with full_float32():
                distances = _squared_distances(u[rows].float(), v[columns].float(), precision)
            yield rows, columns, distances


def _squared_distances(u: Tensor, v: Tensor, precision: DistancePrecision) -> Tensor:
    """Return max(0, |u|^2 - 2 u v + |v|^2) in float32, (N, M), each term rounded to float16 first for "adm".

    Note:
        ADM looks for overflow after the maximum, which turns an overflow of 2 u v into the distance 0; we look before.
    """
    if precision == "adm":
        distances = _expanded_square(u.half(), v.half())
        if torch.isfinite(distances).all():
            return distances.clamp_(min=0).float()
    return _expanded_square(u, v).clamp_(min=0)


def _expanded_square(u: Tensor, v: Tensor) -> Tensor:
    """Return |u|^2 - 2 u v + |v|^2 in the dtype of u; the sums over features run in float32, then are rounded."""
    dtype, u, v = u.dtype, u.float(), v.float()
    distances = (u @ v.T).to(dtype)
    distances.mul_(-2).add_(u.square().sum(dim=1, keepdim=True).to(dtype))
    return distances.add_(v.square().sum(dim=1).to(dtype))
