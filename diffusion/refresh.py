"""When kept state is recomputed: one flag per network evaluation, decided on the host before sampling starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def sharing_budget(evaluations: int, rate: int) -> int:
    """Refreshes that a schedule of average interval `rate` may have: floor(evaluations / rate), one at least.

    Raises:
        ValueError: if the rate is below 1 or above the number of evaluations.
    """
    if not 1 <= rate <= evaluations:
        raise ValueError(f"the refresh rate must lie in 1..{evaluations}, the number of evaluations, not {rate}")
    return evaluations // rate


def reuse_cost(similarity: npt.ArrayLike, refresh: Sequence[bool]) -> float:
    """What a refresh schedule gives away: 1 - similarity of each evaluation's state to the one it is handed, summed.

    Args:
        similarity: (E, E), how alike the states of two evaluations are; 1 is the same.
        refresh: E flags, the first True.
    """
    error = 1 - np.asarray(similarity, dtype=np.float64)
    starts = np.maximum.accumulate(np.where(refresh, np.arange(len(refresh)), 0))
    return float(error[np.arange(len(refresh)), starts].sum())


def cheapest(similarity: npt.ArrayLike, refreshes: int) -> tuple[bool, ...]:
    """The schedule with so many refreshes that has the least `reuse_cost`, by dynamic programming.

    With C[k, i] the least cost of the first i evaluations with k refreshes, the last of them at j:
    C[k, i] = min over j of C[k - 1, j] + the cost of serving j..i - 1 from j. Of equal minima the first j counts.

    Args:
        similarity: (E, E), as for `reuse_cost`.
        refreshes: K, in 1..E.

    Returns:
        E flags, K of them True, the first among them.

    Raises:
        ValueError: if the matrix is not square and finite, or there are not so many evaluations.

    Source: arXiv 2504.05741, encoder sharing.
    """
    error = 1 - np.asarray(similarity, dtype=np.float64)
    count = len(error)
    if error.shape != (count, count) or not np.isfinite(error).all():
        raise ValueError(f"similarities must be finite and of every two evaluations, not {error.shape}")
    if not 1 <= refreshes <= count:
        raise ValueError(f"{refreshes} refreshes do not fit {count} evaluations")
    # serving[j, i]: evaluations j..i - 1 from the state of j; nothing else can be served from j
    below = np.tril(error).T
    serving = np.concatenate([np.zeros((count, 1)), np.cumsum(below, axis=1)], axis=1)
    serving[np.tril_indices(count, m=count + 1)] = np.inf
    cost = serving[0]
    choices = []
    for _ in range(refreshes - 1):
        totals = cost[:count, None] + serving
        choices.append(totals.argmin(axis=0))
        cost = totals.min(axis=0)
    starts, end = [], count
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return tuple(i in {0, *starts} for i in range(count))


def every_nth(evaluations: int, interval: int) -> tuple[bool, ...]:
    """Refreshes at evaluations 0, n, 2 n, ...: ceil(evaluations / n) of them.

    Args:
        evaluations: number of network evaluations.
        interval: n; 1 refreshes always.

    Raises:
        ValueError: if the interval is below 1.
    """
    if interval < 1:
        raise ValueError(f"the refresh interval must be at least 1, not {interval}")
    return tuple(i % interval == 0 for i in range(evaluations))
