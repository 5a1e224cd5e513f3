"""Flow matching on the linear path: the other way to add noise, that of DDT.

Lipman et al., 2023 (arXiv 2210.02747); Ma et al., 2024 (SiT, arXiv 2401.08740). Time runs from 0 (noise) to 1 (data):
x_t = t x_1 + (1 - t) noise, and the network predicts the velocity x_1 - noise. Like every process it is a function of
raw outputs: it calls no network and draws nothing by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.flow_samplers import AdamsSampler, EulerSampler, HeunSampler, Kind
from diffusion.schedules import shift_time, unit_grid, unit_to_network

if TYPE_CHECKING:
    from models.contract import TimeConvention

TimeDistribution = Literal["logit_normal", "uniform"]
LossWeight = Literal["constant", "inverse_variance", "ratio", "ratio_at_least_5", "ratio_at_most_5"]
FEW_STEPS_SHIFT = 2.0


class FlowMatching:
    """The linear path, its losses, and its samplers.

    Args:
        times: what training times are drawn from: "logit_normal", the sigmoid of a standard normal (Esser et al.,
            2024, arXiv 2403.03206, section 3.1), or "uniform" on [0, 1).
        shift: of the drawn times, towards noise if above 1.
        weight: of the squared error at time t: "constant" is 1; "inverse_variance" 1 / (1 - t)^2; "ratio"
            t / (1 - t), also clipped from below or above at 5. All but the first and last grow without bound at t = 1.
        direction: weight of 1 - cosine between predicted and true velocity over the channels, which is added.

    Raises:
        ValueError: for an unknown choice or a number without a meaning, naming it.
    """

    name: ClassVar[str] = "flow"

    def __init__(
        self,
        *,
        times: TimeDistribution = "logit_normal",
        shift: float = 1.0,
        weight: LossWeight = "constant",
        direction: float = 0.0,
    ) -> None:
        for value, kind in ((times, TimeDistribution), (weight, LossWeight)):
            if value not in get_args(kind):
                raise ValueError(f"{value!r} is none of {', '.join(get_args(kind))}")
        if not 0 < shift < float("inf"):
            raise ValueError(f"the time shift must be positive and finite, not {shift}")
        if not 0 <= direction < float("inf"):
            raise ValueError(f"the weight of the direction must not be negative, and finite, not {direction}")
        self.times, self.shift, self.weight, self.direction = times, shift, weight, direction

    # ------------------------------------------------------------------------------------------------------------------
    # The interface of every process that `Objective` and the scripts use

    def output_channels(self, in_channels: int) -> int:
        """Channels that a network must put out: a velocity's, as many as x has."""
        return in_channels

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 unit times, on the generator's device."""
        if self.times == "uniform":
            t = torch.rand(count, generator=generator, device=generator.device)
        else:
            t = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return shift_time(t, self.shift)

    def stratified_times(self, count: int, strata: int, generator: torch.Generator) -> Tensor:
        """The same, but row i from part i mod `strata` of the index scale, cut into equal parts from 0 (clean) up.

        Within its part a time has the distribution of `draw_times`.
        """
        part = torch.arange(count, device=generator.device) % strata
        uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        clean, noisy = (shift_time(1 - (part + k).double() / strata, 1 / self.shift) for k in (0, 1))  # unshifted
        if self.times == "uniform":
            return shift_time(torch.lerp(clean, noisy, uniform), self.shift).float()
        clean, noisy = (torch.special.ndtr(bound.logit()) for bound in (clean, noisy))
        t = torch.special.ndtri(torch.lerp(clean, noisy, uniform)).sigmoid()
        return shift_time(t, self.shift).float()

    def network_times(self, t: Tensor, convention: TimeConvention = "unit") -> Tensor:
        """What a network is told at these unit times, in the units it declares."""
        return unit_to_network(t, convention)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noises clean images: t x_start + (1 - t) noise.

        Args:
            x_start: (N, C, H, W).
            t: (N,) in [0, 1].
            noise: like `x_start`, standard normal.
        """
        return torch.lerp(noise, x_start, _rows(t))

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Training losses of a network's raw output at x_t = q_sample(x_start, t, noise).

        Args:
            sample: (N, C, H, W) predicted velocities.
            x_start: (N, C, H, W) clean images.
            x_t: (N, C, H, W).
            t: (N,) in [0, 1].
            noise: (N, C, H, W), the noise in x_t.

        Returns:
            (N,) float32 each: "loss" and "mse", the unweighted squared error; "direction" where it has a weight.

        Raises:
            ValueError: if the network puts out another number of channels.
        """
        if sample.shape != x_start.shape:  # other channels might still broadcast
            raise ValueError(f"the network puts out {sample.shape[-3]} channels; a velocity has {x_start.shape[-3]}")
        sample, velocity = sample.float(), x_start - noise
        mse = (sample - velocity).square().flatten(1).mean(dim=1)
        losses = {"loss": self.loss_weight(t) * mse, "mse": mse}
        if self.direction:
            angle = 1 - functional.cosine_similarity(sample, velocity, dim=-3).flatten(1).mean(dim=1)
            losses |= {"loss": losses["loss"] + self.direction * angle, "direction": angle}
        return losses

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error at times t (N,), or 1 everywhere."""
        if self.weight == "constant":
            return torch.ones_like(t)
        if self.weight == "inverse_variance":
            return (1 - t) ** -2
        ratio = t / (1 - t)
        if self.weight == "ratio_at_least_5":
            return ratio.clamp(min=5)
        return ratio.clamp(max=5) if self.weight == "ratio_at_most_5" else ratio

    # ------------------------------------------------------------------------------------------------------------------
    # Velocity, clean image and noise: any one of them, with x_t, gives the others

    def pred_xstart(self, velocity: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The clean image (N, C, H, W) behind a velocity at time t, a number or (N,)."""
        return x_t + (1 - _rows(t)) * velocity

    def pred_noise(self, velocity: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The noise (N, C, H, W) behind a velocity at time t, a number or (N,)."""
        return x_t - _rows(t) * velocity

    def velocity_from_xstart(self, x_start: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity (N, C, H, W) that leads from x_t to a clean image; t below 1."""
        return (x_start - x_t) / (1 - _rows(t))

    def velocity_from_noise(self, noise: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity (N, C, H, W) that leads away from the noise in x_t; t above 0."""
        return (x_t - noise) / _rows(t)

    # ------------------------------------------------------------------------------------------------------------------
    # Samplers

    def euler(
        self,
        num_steps: int,
        shift: float = 1.0,
        last_step: float | None = None,
        kind: Kind = "ode",
        *,
        convention: TimeConvention = "unit",
    ) -> EulerSampler:
        """Euler steps; published results (arXiv 2504.05741) are those of 250 with a last step of 0.04.

        Args:
            num_steps: N; as many evaluations.
            shift: of time, above 1 for more steps near the noise.
            last_step: length of the last step before the shift; None makes all equally long.
            kind: "ode", or a stochastic process of the same distributions (`EulerSampler`).
            convention: the network's.

        Raises:
            ValueError: naming the setting that makes no sampler.
        """
        return EulerSampler(unit_grid(num_steps, shift, last_step), kind=kind, convention=convention)

    def heun(
        self,
        num_steps: int,
        shift: float = 1.0,
        last_step: float | None = None,
        exact: bool = False,
        *,
        convention: TimeConvention = "unit",
    ) -> HeunSampler:
        """Heun's method; N evaluations, or 2 N - 1 if exact. Other arguments as for `euler`."""
        return HeunSampler(unit_grid(num_steps, shift, last_step), exact=exact, convention=convention)

    def adams(
        self,
        num_steps: int,
        order: int = 2,
        shift: float = 1.0,
        last_step: float | None = None,
        in_log_snr: bool = False,
        *,
        convention: TimeConvention = "unit",
    ) -> AdamsSampler:
        """Adams-Bashforth of order 1 to 4, N evaluations.

        Args:
            num_steps: N.
            order: velocities that a step looks back on.
            shift: as for `euler`.
            last_step: as for `euler`.
            in_log_snr: extrapolate in the logarithm of the signal-to-noise ratio instead of in time.
            convention: the network's.

        Raises:
            ValueError: naming the setting that makes no sampler.
        """
        grid = unit_grid(num_steps, shift, last_step)
        return AdamsSampler(grid, order=order, in_log_snr=in_log_snr, convention=convention)

    def few_steps(self, num_steps: int = 8, *, convention: TimeConvention = "unit") -> AdamsSampler:
        """The preset for 5 to 12 evaluations: second order, time shifted by 2.

        The few-step results published with arXiv 2504.05741 are best at that shift for each of these numbers.
        """
        return self.adams(num_steps, shift=FEW_STEPS_SHIFT, convention=convention)


def _rows(t: float | Tensor) -> float | Tensor:
    """A number as it is, (N,) as (N, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else t
