"""Parts of the official code that no run of ours uses, kept with their recorded values: a place to start from.

Older noise schedules, and training on timesteps with large losses more often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffusion.schedules import Array

Chooser = np.random.RandomState | np.random.Generator


def endpoint_betas(name: str, start: float, end: float, num_timesteps: int) -> Array:
    """Betas of the older schedules, which are given by their endpoints.

    Args:
        name: "quad", "linear", "warmup10", "warmup50", "const" or "jsd".
        start: First beta, where the schedule has one.
        end: Last beta.
        num_timesteps: T.

    Returns:
        (T,) float64 in (0, 1].

    Raises:
        ValueError: For an unknown name.
    """
    betas = np.full(num_timesteps, end, dtype=np.float64)
    if name == "quad":
        betas = np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2
    elif name == "linear":
        betas = np.linspace(start, end, num_timesteps, dtype=np.float64)
    elif name in ("warmup10", "warmup50"):
        rising = int(num_timesteps * int(name[-2:]) / 100)
        betas[:rising] = np.linspace(start, end, rising, dtype=np.float64)
    elif name == "jsd":
        betas = 1.0 / np.arange(num_timesteps, 0, -1, dtype=np.float64)
    elif name != "const":
        raise ValueError(f"unknown noise schedule {name!r}; known: quad, linear, warmup10, warmup50, const, jsd")
    return betas


class UniformSampler:
    """Every timestep equally often."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def weights(self) -> Array:
        """(T,) positive, not normalised."""
        return np.ones(self.num_timesteps)

    def sample(self, count: int, rng: Chooser) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Draws timesteps with the weights that keep the expected loss unbiased.

        Args:
            count: how many.
            rng: numpy's generator, new or legacy.

        Returns:
            Indices (count,) int64 and importance weights (count,) float32 to multiply the losses with.
        """
        p = self.weights()
        p = p / p.sum()
        indices = rng.choice(len(p), size=(count,), p=p)
        return indices, (1 / (len(p) * p[indices])).astype(np.float32)


class LossSecondMomentSampler(UniformSampler):
    """Timesteps in proportion to the root mean square of their recent losses (Nichol and Dhariwal, 2021, eq. 18).

    Args:
        num_timesteps: T.
        history_per_term: losses remembered per timestep; until each has as many, the draw is uniform.
        uniform_prob: share of the draw that stays uniform, so that no timestep starves.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self._history = np.zeros((num_timesteps, history_per_term))
        self._seen = np.zeros(num_timesteps, dtype=np.int64)

    @property
    def warmed_up(self) -> bool:
        """Whether every timestep has a full history."""
        return bool((self._seen >= self._history.shape[1]).all())

    def weights(self) -> Array:
        """(T,) positive; they sum to 1 once warmed up."""
        if not self.warmed_up:
            return super().weights()
        p = np.sqrt((self._history**2).mean(axis=1))
        weights: Array = p / p.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(p)
        return weights

    def update(self, indices: Sequence[int], losses: Sequence[float]) -> None:
        """Remembers losses, oldest first; on several ranks, of all ranks in the same order everywhere.

        Args:
            indices: timesteps.
            losses: the loss at each.
        """
        for t, loss in zip(indices, losses, strict=True):
            self._history[t] = np.append(self._history[t, 1:], loss)
            self._seen[t] += 1
