"""When kept state is recomputed: one flag per network evaluation, decided on the host before sampling starts."""

from __future__ import annotations


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
