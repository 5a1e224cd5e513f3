"""Time grids: their definitions, and that they fit the process."""

from typing import get_args

import numpy as np
import pytest

from diffusion.schedules import named_betas, space_timesteps
from diffusion.time_grids import TimeGrid, half_log_snr, interpolated, time_grid

ABAR = np.cumprod(1 - named_betas("linear", 1000))


@pytest.mark.parametrize("steps", ["1", "2", "5", "10", "50", "250"])
@pytest.mark.parametrize("grid", get_args(TimeGrid))
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_grid_has_distinct_rising_timesteps_of_the_process(schedule: str, grid: str, steps: str) -> None:
    times = time_grid(grid, steps, np.cumprod(1 - named_betas(schedule, 1000)))  # type: ignore[arg-type]
    assert len(times) == int(steps) and np.all(np.diff(times) > 0)
    assert times[0] >= 0 and times[-1] <= 999
    if grid != "trailing" and int(steps) > 1:
        assert times[0] == pytest.approx(0, abs=1e-6) and times[-1] == pytest.approx(999)
    if grid == "trailing":
        assert times[-1] == 999


def test_definitions() -> None:
    assert time_grid("uniform", "ddim50", ABAR) == space_timesteps(1000, "ddim50")
    assert time_grid("trailing", "10", ABAR) == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert time_grid("quadratic", "4", ABAR) == pytest.approx([0, 111, 444, 999])
    assert time_grid("chebyshev", "4", ABAR) == pytest.approx([0, 249.75, 749.25, 999])
    levels = half_log_snr(interpolated(ABAR, np.array(time_grid("logsnr", "7", ABAR))))
    assert np.diff(levels) == pytest.approx(np.full(6, (levels[-1] - levels[0]) / 6))
    roots = np.exp(-half_log_snr(interpolated(ABAR, np.array(time_grid("karras", "7", ABAR)))) / 7)
    assert np.diff(roots) == pytest.approx(np.full(6, (roots[-1] - roots[0]) / 6))


def test_interpolation_is_exact_at_whole_timesteps() -> None:
    assert np.array_equal(interpolated(ABAR, np.arange(1000.0)), ABAR)
    assert interpolated(ABAR, np.array([10.5]))[0] == pytest.approx((ABAR[10] * ABAR[11]) ** 0.5)
