"""Which timesteps a batch is trained on: uniformly, or more often where the loss is large.

Library pieces for people who train with importance sampling; DiT itself draws timesteps uniformly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffusion.schedules import Array

Chooser = np.random.RandomState | np.random.Generator


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
