"""When kept state is recomputed: one flag per network evaluation, decided on the host before sampling starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffusion.schedules import network_to_index

if TYPE_CHECKING:
    from models.contract import Network


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


class Zones(NamedTuple):
    """Where Skip-Cache's interval gives way to the noise level; times are on the index scale (0..999, 0 = clean).

    Attributes:
        t_high: evaluations at and above this time always refresh.
        t_low: start of the tail zone, where images get their last details.
        low_inclusive: whether `t_low` itself belongs to the tail zone.
    """

    t_high: float
    t_low: float
    low_inclusive: bool

    def in_tail(self, t: float) -> bool:
        """Whether a time lies in the tail zone."""
        return t < self.t_low or (self.low_inclusive and t == self.t_low)


# The released class-to-image network's: no time is so noisy that it refreshes for that.
CLASS_TO_IMAGE = Zones(t_high=1000.0, t_low=20.0, low_inclusive=True)


def takes_cache_depth(config: Any) -> bool:
    """Whether networks of this config's family keep state where a `cache_depth` is set."""
    try:
        dataclasses.replace(config, cache_depth=1)
    except (TypeError, ValueError):  # no such field, or one that stays empty
        return False
    return True


def without_state(network: Network) -> str:
    """What to do about a network that keeps no state, in the words of the command line."""
    if takes_cache_depth(network.config):
        return "give --cache-depth B, the blocks at an end that run when state is reused, or leave this flag out"
    return "no setting makes it; leave this flag out"


def skip_cache(
    network: Network, times: Sequence[float], interval: int, zones: Zones = CLASS_TO_IMAGE
) -> tuple[bool, ...]:
    """Skip-Cache's refresh schedule for a network and a sampler.

    Args:
        network: whose state is reused.
        times: the sampler's, in the network's units.
        interval: N; 1 refreshes always.
        zones: where the interval gives way.

    Returns:
        One flag per evaluation; the first is True.

    Raises:
        ValueError: if the network keeps no state, or for what `skip_cache_flags` refuses.
    """
    if not network.keeps_state:
        raise ValueError(f"this network keeps nothing to reuse; {without_state(network)}")
    return skip_cache_flags([network_to_index(t, network.time_convention) for t in times], interval, zones)


def skip_cache_flags(times: Sequence[float], interval: int, zones: Zones = CLASS_TO_IMAGE) -> tuple[bool, ...]:
    """Refreshes every N-th evaluation, all that are noisy enough, and those in the tail but possibly its first.

    Evaluations are counted from the first one; forced refreshes count like all others. Behind each evaluation in the
    tail zone the count starts over with nothing kept. So the first one in the zone may still reuse state, and those
    after it never do.

    Args:
        times: of the evaluations, on the index scale, falling.
        interval: N.
        zones: where the interval gives way.

    Raises:
        ValueError: if the interval is below 1, or times do not fall. With a sampler that evaluates more than once a
            step, or goes from image to noise, every N-th evaluation would not be what the rule means.

    Source: arXiv 2411.17616, section 3; the phase is that of the released code.
    """
    if interval < 1:
        raise ValueError(f"the refresh interval must be at least 1, not {interval}")
    for before, after in pairwise(times):
        if not after < before:
            raise ValueError(
                "this refresh interval needs a sampler that evaluates the network once a step, from noise to image; "
                f"here time goes from {before:g} to {after:g}"
            )
    flags = []
    count, kept = 0, False
    for t in times:
        flags.append(count % interval == 0 or not kept or t >= zones.t_high)
        count, kept = (0, False) if zones.in_tail(t) else (count + 1, True)
    return tuple(flags)


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
