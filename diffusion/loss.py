"""The training loss as a module that holds the network, and the randomness of a training step.

Networks and processes make no random numbers. All of a step's are made here and belong to rows of the GLOBAL
batch: numbers as large as a latent have one generator per (purpose, seed, step, row), so a rank makes only those of its
rows; single numbers per row come from one generator per step and are cut. So training does not depend on the number of
ranks or micro-batches, and a checkpoint needs no random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion.alignment import Alignment
from diffusion.schedules import append_dims, convert_time
from models.contract import ModelOutput, Network, TimeConvention
from runtime.devices import float64_device
from runtime.seeds import derive_seed, image_seed


class Process(Protocol):
    """Interface of a noise process in training; `GaussianDiffusion` and `FlowMatching` have it.

    Its `t` is an index or a flow time; `to_time` converts it to the process time.
    """

    name: ClassVar[str]  # in checkpoints and flags
    time_convention: ClassVar[TimeConvention]  # of process times

    def output_channels(self, in_channels: int) -> int:
        """Channels of the network's output."""

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) random t."""

    def stratified_times(self, count: int, strata: int, generator: torch.Generator) -> Tensor:
        """The same, but row i from part i mod `strata` of the timesteps, cut into equal parts from 0 (clean) up."""

    def to_time(self, t: Tensor) -> Tensor:
        """Process times of t."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy samples at t."""

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of rows, (N,) each, "loss" among them."""


@dataclass(frozen=True)
class Batch:
    """Data of a training step."""

    x_start: Tensor  # (N, ..., C, H, W) float32 clean latents (or pixels in [-1, 1])
    conditioning: dict[str, Tensor]  # of the N rows
    index: Tensor  # (N,) int64 place in the data set
    image: Tensor | None = None  # (N, 3, H, W) float32 raw images in [0, 1], for alignment losses
    null: dict[str, Tensor] | None = None  # unconditional rows, where they come from data (text), or ask the network


class Draws(NamedTuple):
    """Randomness of rows of a training step.

    Attributes:
        t: (N,) times in the units of the process's `q_sample`.
        noise: (N, ..., C, H, W) standard normal.
        dropped: (passes, N) bool, rows without conditioning in each forward pass; None: none.
        extra: What a family's loss needs besides, (N, ...) each.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor | None = None
    extra: Mapping[str, Tensor] = MappingProxyType({})

    def rows(self, start: int, stop: int) -> Draws:
        """Cut out the rows start .. stop - 1, for a micro-batch."""
        rows = slice(start, stop)
        dropped = None if self.dropped is None else self.dropped[:, rows]
        return Draws(self.t[rows], self.noise[rows], dropped, {k: v[rows] for k, v in self.extra.items()})

    def to(self, device: torch.device | str) -> Draws:
        """Move all of them to a device."""
        dropped = None if self.dropped is None else self.dropped.to(device)
        return Draws(
            self.t.to(device), self.noise.to(device), dropped, {k: v.to(device) for k, v in self.extra.items()}
        )


def row_generators(
    purpose: str, seed: int, step: int, rows: range, device: torch.device | str = "cpu"
) -> Iterator[torch.Generator]:
    """Yield the generator of each row of the global batch; each is valid until the next."""
    generator, job = torch.Generator(device), derive_seed(purpose, seed, step)
    for row in rows:
        yield generator.manual_seed(image_seed(job, row))


def row_noise(
    purpose: str, seed: int, step: int, rows: range, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of rows of the global batch, (len(rows), *shape) float32, by (purpose, seed, step, row).

    A row's noise is the same whichever rows it is made with. CPU and CUDA give different numbers; MPS has the CPU's.
    """
    place = float64_device(device)
    noise = torch.empty(len(rows), *shape, device=place)
    for row, generator in zip(noise, row_generators(purpose, seed, step, rows, place), strict=True):
        row.normal_(generator=generator)
    return noise.to(device)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of a loss; the plain one has none."""

    def check(self, *, rows: int, ranks: int, from_weights: bool) -> None:
        """Raise a ValueError unless the settings fit a run.

        Args:
            rows: Rows of a step on each process.
            ranks: Number of processes.
            from_weights: Training starts from the weights in a file.
        """

    @property
    def images_behind(self) -> int:
        """Number of single images that the data have behind every clip."""
        return 0

    def network_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the network's samples for data of this shape; a ValueError if there is none."""
        return shape


class DiffusionLoss(nn.Module):
    """Losses of a network under a process. A family's own loss is a subclass.

    Args:
        network: Network to train.
        process: How samples are noised and what is predicted.
        seed: Seed of all randomness in training.
        dropout_prob: Share of rows without conditioning, for guidance; None is the config's `class_dropout_prob`, or 0.
        autocast: Lower precision of the networks, and of nothing else; None is that of the weights.
        alignment: Alignment of the network's features with those of a vision encoder.
        settings: Settings of the loss; None takes the defaults.

    Attributes:
        logged: Names of losses that belong into the log line.

    Raises:
        ValueError: If the network's output is not that of the process, or a row cannot be unconditional.
    """

    Settings: ClassVar[type[LossSettings]] = LossSettings
    logged: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        seed: int = 0,
        dropout_prob: float | None = None,
        autocast: torch.dtype | None = None,
        alignment: Alignment | None = None,
        settings: LossSettings | None = None,
    ) -> None:
        super().__init__()
        channels = network.sample_shape[-3]
        expected = process.output_channels(channels)
        if network.out_channels != expected:
            raise ValueError(
                f"the network has {network.out_channels} output channels, but the process needs {expected} for "
                f"{channels} input channels; check --learn-sigma on both sides"
            )
        if dropout_prob is None:
            dropout_prob = getattr(network.config, "class_dropout_prob", 0.0)
        if not 0 <= dropout_prob < 1:
            raise ValueError(f"the share of rows without conditioning must be in [0, 1), not {dropout_prob}")
        self.network, self.process, self.seed, self.dropout_prob = network, process, seed, dropout_prob
        self.autocast, self.alignment, self.settings = autocast, alignment, settings or self.Settings()

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of a row of the data: that of the network's samples."""
        return self.network.sample_shape

    def warnings(self, total_steps: int) -> list[str]:
        """Lines about settings that a user who trains for so many steps may regret."""
        return []

    def start(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Prepare a network that was filled from a file for the first step, in place; return a line for each change.

        Args:
            weights: Content of the file; the network has fresh values for what it lacks.

        Raises:
            ValueError: If a setting does not go with these weights.
        """
        return []

    def draw(self, step: int, count: int, rows: range | None = None, device: torch.device | str = "cpu") -> Draws:
        """Make the randomness of some rows (None: all) of a step's GLOBAL batch of `count`; CPU and CUDA differ."""
        target, device = device, float64_device(device)
        rows = range(count) if rows is None else rows
        own = slice(rows.start, rows.stop)
        dropped = None
        if self.dropout_prob:
            generator = self._generator("dropped", step, device)
            uniform = torch.rand((self.passes(step), count), generator=generator, device=device)
            dropped = uniform[:, own] < self.dropout_prob
        return Draws(
            self.draw_times(count, self._generator("times", step, device))[own],
            row_noise("noise", self.seed, step, rows, self.data_shape, device),
            dropped,
            self.draw_extra(step, rows, device),
        ).to(target)

    def passes(self, step: int) -> int:
        """Number of forward passes in a step; each drops the conditioning of other rows."""
        return 1

    def macs(self, step: int) -> float:
        """MACs of one row's forward passes in a step, everything in the network computed."""
        return self.passes(step) * sum(self.network.cost().values())

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of the global batch, (count,)."""
        return self.process.draw_times(count, generator)

    def draw_extra(self, step: int, rows: range, device: torch.device | str) -> dict[str, Tensor]:
        """`Draws.extra` of these rows of the global batch."""
        return {}

    def _generator(self, purpose: str, step: int, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(derive_seed(purpose, self.seed, step))

    def shared(self, pieces: Sequence[tuple[Batch, Draws]], step: int) -> dict[str, Tensor]:
        """Compute what the losses need to know over the global batch before the first backward pass: here, nothing.

        All processes call together, each with its micro-batches.
        """
        return {}

    def forward(self, batch: Batch, draws: Draws, step: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add noise to N rows, evaluate the network, and compute the losses, given draws of these rows and `shared`'s.

        Returns:
            (N,) float32 each; "loss" is the one to minimise.
        """
        x_t = self.process.q_sample(batch.x_start, draws.t, draws.noise)
        return self.losses(self.evaluate(x_t, batch, draws), x_t, batch, draws)

    def evaluate(self, x_t: Tensor, batch: Batch, draws: Draws, number: int = 0, **options: object) -> ModelOutput:
        """Evaluate the network at noisy samples of a batch, without the conditioning that pass `number` drops.

        `options` are more arguments of the network's forward.
        """
        t = convert_time(self.process.to_time(draws.t), self.process.time_convention, self.network.time_convention)
        conditioning = batch.conditioning
        if draws.dropped is not None:
            conditioning = self._without(conditioning, draws.dropped[number], batch.null)
        if self.alignment is not None:
            options["features_at"] = (self.alignment.block,)
        with self._precision(x_t.device):
            return self.network(x_t, t, **conditioning, **options)

    def losses(self, out: ModelOutput, x_t: Tensor, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Losses of one evaluation: the process's, and the alignment's."""
        losses = self.process.losses(out.sample, batch.x_start, x_t, draws.t, draws.noise)
        if self.alignment is None:
            return losses
        with self._precision(x_t.device):
            return self.alignment.add_to(losses, out.features.get(self.alignment.block), batch.image)

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)

    def _without(
        self, conditioning: Mapping[str, Tensor], dropped: Tensor, null: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Conditioning with the unconditional one in dropped rows (N,), in every tensor alike."""
        null = self.network.null_conditioning(len(dropped)) if null is None else null
        if null.keys() != conditioning.keys():
            raise ValueError(f"the unconditional rows have {sorted(null)}, the conditional ones {sorted(conditioning)}")
        return {k: torch.where(append_dims(dropped, v), null[k], v) for k, v in conditioning.items()}
