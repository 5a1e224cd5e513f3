"""When kept state is recomputed: one flag per network evaluation, decided on the host before sampling starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diffusion.sampling import Sampler
from diffusion.schedules import convert_time
from models.contract import Network


def every_nth(evaluations: int, interval: int) -> tuple[bool, ...]:
    """Refresh at evaluations 0, n, 2 n, ... with interval n; a ValueError if it is below 1."""
    _check_interval(interval)
    return tuple(i % interval == 0 for i in range(evaluations))


class CacheSchedule(NamedTuple):
    """Bounds between which Skip-Cache's interval holds, as timesteps (0..999, 0 = clean).

    Attributes:
        t_high: Evaluations at and above this time always refresh.
        t_low: Start of the low times, where images get their last details.
        low_inclusive: Whether `t_low` itself is one of them.
    """

    t_high: float
    t_low: float
    low_inclusive: bool

    def is_low(self, t: float) -> bool:
        """True for the low times."""
        return t < self.t_low or (self.low_inclusive and t == self.t_low)


# The released class-to-image network's: no time is so noisy that it refreshes for that.
CLASS_TO_IMAGE = CacheSchedule(t_high=1000.0, t_low=20.0, low_inclusive=True)
# Those of the text-to-image and text-to-video networks.
TEXT = CacheSchedule(t_high=700.0, t_low=50.0, low_inclusive=True)


def skip_cache(
    network: Network, sampler: Sampler, interval: int, schedule: CacheSchedule = CLASS_TO_IMAGE
) -> tuple[bool, ...]:
    """Skip-Cache's refresh schedule for a network and a sampler, one flag per evaluation; see `skip_cache_flags`.

    Raises:
        ValueError: If the network keeps no state, or as for `skip_cache_flags`.
    """
    check_keeps_state(network)
    # Flow times are rounded numbers, and evaluations fall on the bounds: rounded to a millionth they do so exactly.
    timesteps = [round(convert_time(t, sampler.time_convention, "index"), 6) for t in sampler.times]
    return skip_cache_flags(timesteps, interval, schedule)


class SkipCacheRule:
    """Skip-Cache's refresh rule, one evaluation after the other; `skip_cache_flags` applies it to a whole run.

    Args:
        interval: N; 1 refreshes always.
        schedule: Bounds of the interval.

    Attributes:
        kept: State of the last evaluation is kept for the next one.

    Raises:
        ValueError: If the interval is below 1.
    """

    def __init__(self, interval: int, schedule: CacheSchedule = CLASS_TO_IMAGE) -> None:
        _check_interval(interval)
        self._interval, self._schedule = interval, schedule
        self.restart()

    def restart(self) -> None:
        """Begin a run: count from 0, with nothing kept."""
        self._count, self.kept = 0, False

    def refresh(self, t: float) -> bool:
        """True if the next evaluation, at timestep t, is a refresh; counts it."""
        fresh = self._count % self._interval == 0 or not self.kept or t >= self._schedule.t_high
        self._count, self.kept = (0, False) if self._schedule.is_low(t) else (self._count + 1, True)
        return fresh


def skip_cache_flags(
    times: Sequence[float], interval: int, schedule: CacheSchedule = CLASS_TO_IMAGE
) -> tuple[bool, ...]:
    """Refresh at every N-th evaluation, at all that are noisy enough, and at low times but possibly the first.

    Evaluations are counted from the first one; forced refreshes count like all others. After each evaluation at a low
    time the count starts over with nothing kept. So the first low one may still reuse state, and later ones never do.

    Args:
        times: Timesteps of the evaluations, falling.
        interval: N; 1 refreshes always.
        schedule: Bounds of the interval.

    Raises:
        ValueError: If the interval is below 1, or times do not fall: with a sampler that evaluates more than once a
            step, or goes from image to noise, every N-th evaluation would mean something else.

    Source: arXiv 2411.17616, section 3; the phase is that of the released code.
    """
    rule = SkipCacheRule(interval, schedule)
    for before, after in pairwise(times):
        if not after < before:
            raise ValueError(
                "this refresh interval needs a sampler that evaluates the network once a step, from noise to image; "
                f"here the timestep changes from {before:g} to {after:g}"
            )
    return tuple(rule.refresh(t) for t in times)


def _check_interval(interval: int) -> None:
    if interval < 1:
        raise ValueError(f"the refresh interval must be at least 1, not {interval}")


def takes_cache_depth(config: object) -> bool:
    """True if networks of this config's family keep state where a `cache_depth` is set."""
    try:
        dataclasses.replace(config, cache_depth=1)  # type: ignore[type-var]
    except (TypeError, ValueError):  # no such field, or one that stays empty
        return False
    return True


def check_keeps_state(network: Network) -> None:
    """Raise a ValueError, with the remedy on the command line, unless a network keeps state between evaluations."""
    if not network.keeps_state:
        remedy = "no setting makes it; leave this flag out"
        if takes_cache_depth(network.config):
            remedy = "give --cache-depth B, the blocks at an end that run when state is reused, or leave this flag out"
        raise ValueError(f"this network keeps nothing to reuse; {remedy}")


def sharing_budget(evaluations: int, interval: int) -> int:
    """Refreshes of a schedule with this average interval: floor(evaluations / interval), at least one.

    Raises:
        ValueError: If the interval is below 1 or above the number of evaluations.
    """
    if not 1 <= interval <= evaluations:
        raise ValueError(f"the sharing interval must be in 1..{evaluations}, the number of evaluations, not {interval}")
    return evaluations // interval


def reuse_cost(similarity: npt.ArrayLike, refresh: Sequence[bool]) -> float:
    """Sum of 1 - similarity between each evaluation's state and the one it reuses.

    Args:
        similarity: (E, E), similarity of the states of every two evaluations; 1 is the same.
        refresh: E flags, the first True.
    """
    error = 1 - np.asarray(similarity, dtype=np.float64)
    starts = np.maximum.accumulate(np.where(refresh, np.arange(len(refresh)), 0))
    return float(error[np.arange(len(refresh)), starts].sum())


def cheapest(similarity: npt.ArrayLike, refreshes: int) -> tuple[bool, ...]:
    """Find the schedule of a number of refreshes with the least `reuse_cost`, by dynamic programming.

    With C[k, i] the least cost of the first i evaluations with k refreshes, the last of them at j:
    C[k, i] = min over j of C[k - 1, j] + the cost of serving j..i - 1 from j. Of equal minima the first j counts.

    Args:
        similarity: (E, E), as for `reuse_cost`.
        refreshes: K, in 1..E.

    Returns:
        E flags, K of them True, the first among them.

    Raises:
        ValueError: If the matrix is not square and finite, or there are fewer evaluations.

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
