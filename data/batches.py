"""Keys of the images of each training step: a function of (seed, step), independent of ranks, workers and restarts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data.dataset import Key
from runtime.seeds import derive_seed


class GlobalBatches:
    """Cuts an endless stream of shuffled epochs into global batches, and each of those into one slice per rank.

    Batches cross the end of an epoch, so no image is ever dropped, and a data set smaller than a batch works. For the
    `batch_sampler` of a DataLoader.

    Args:
        length: Images in the data set.
        global_batch: Images per step over all ranks.
        rank: Rank of this process.
        world: Number of processes, a divisor of `global_batch`.
        seed: Seed of the shuffles.
        steps: Range of step numbers.
    """

    def __init__(self, length: int, global_batch: int, *, rank: int, world: int, seed: int, steps: range) -> None:
        self._length, self._global_batch, self._seed, self._steps = length, global_batch, seed, steps
        self._local = range(rank * global_batch // world, (rank + 1) * global_batch // world)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Key]]:
        """For each step, the (epoch, index) keys of this rank's rows, in order."""
        for step in self._steps:
            yield [self._key(step * self._global_batch + row) for row in self._local]

    def _key(self, position: int) -> Key:
        epoch, place = divmod(position, self._length)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed("order", self._seed, epoch))
            self._order = epoch, torch.randperm(self._length, generator=generator)
        return epoch, int(self._order[1][place])
