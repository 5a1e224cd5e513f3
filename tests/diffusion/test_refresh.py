"""Refresh schedules: when kept state is recomputed."""

import pytest
from diffusion.refresh import every_nth


@pytest.mark.parametrize(
    ("evaluations", "interval", "refreshed"),
    [(7, 3, [0, 3, 6]), (6, 3, [0, 3]), (4, 1, [0, 1, 2, 3]), (4, 9, [0]), (0, 2, [])],
)
def test_every_nth_refreshes_at_multiples(evaluations: int, interval: int, refreshed: list[int]) -> None:
    flags = every_nth(evaluations, interval)
    assert len(flags) == evaluations
    assert [i for i, flag in enumerate(flags) if flag] == refreshed


@pytest.mark.parametrize("interval", [0, -2])
def test_intervals_below_one_are_refused(interval: int) -> None:
    with pytest.raises(ValueError, match=f"the refresh interval must be at least 1, not {interval}"):
        every_nth(10, interval)
