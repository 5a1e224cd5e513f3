"""Flow matching on the linear path, the process of DDT.

Lipman et al., 2023 (arXiv 2210.02747); Ma et al., 2024 (SiT, arXiv 2401.08740). Time runs from 0 (noise) to 1 (data):
x_t = t x_1 + (1 - t) noise, and the network predicts the velocity x_1 - noise, or what it can be computed from. Like
every process it is a function of raw outputs: it calls no network and makes no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.predictions import Prediction, conversion, target_weights
from diffusion.schedules import append_dims, check_shift, shift_time
from models.contract import TimeConvention
from runtime.settings import setting

TimeDistribution = Literal["logit_normal", "uniform"]
FlowWeight = Literal["constant", "inverse_variance", "ratio", "ratio_at_least_5", "ratio_at_most_5"]
FlowPrediction = Literal["velocity", "x_start", "v"]


@dataclass(frozen=True)
class FlowMatching:
    """The linear path and its losses; also the settings that a checkpoint keeps.

    Args:
        times: Distribution of training times: "logit_normal", the sigmoid of a standard normal (Esser et al., 2024,
            arXiv 2403.03206, section 3.1), or "uniform" on [0, 1).
        shift: Shift of these times, towards noise if above 1.
        weight: Weight of the squared error at time t: "constant" is 1; "inverse_variance" 1 / (1 - t)^2; "ratio"
            t / (1 - t), also clipped from below or above at 5. All but the first and last grow without bound at t = 1.
        cosine: Weight of 1 - cosine between the prediction and its target over the channels, which is added.
        prediction: Meaning of the network's output. The noise is no choice: at t = 0 it says nothing about the data.

    Raises:
        ValueError: Naming the unknown choice, or the number out of range.
    """

    times: TimeDistribution = setting("logit_normal", "distribution of training times", flag="--flow-times")
    shift: float = setting(1.0, "shift of training times, above 1 towards noise", flag="--flow-shift")
    weight: FlowWeight = setting("constant", "weight of the squared error by time", flag="--flow-weight")
    cosine: float = setting(
        0.0, "weight of 1 - cosine between prediction and target", flag="--flow-cosine", was={"--flow-direction": None}
    )
    prediction: FlowPrediction = setting("velocity", "what the network predicts")

    name: ClassVar[str] = "flow"
    time_convention: ClassVar[TimeConvention] = "unit"
    has_variance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the fields."""
        for value, kind in ((self.times, TimeDistribution), (self.weight, FlowWeight)):
            if value not in get_args(kind):
                raise ValueError(f"{value!r} is not one of {', '.join(get_args(kind))}")
        check_shift(self.shift)
        if not 0 <= self.cosine < float("inf"):
            raise ValueError(f"the weight of the cosine loss must not be negative, and finite, not {self.cosine}")
        if self.prediction not in get_args(FlowPrediction):
            raise ValueError(
                f"a flow has no prediction {self.prediction!r} (that of the noise is singular at time 0); "
                f"choose from {', '.join(get_args(FlowPrediction))}"
            )

    def make(self, learn_sigma: bool) -> FlowMatching:
        """Return the process, which is these settings; a ValueError for a network that predicts a variance."""
        if learn_sigma:
            raise ValueError("a flow has no variance to predict, and the network predicts one")
        return self

    def output_channels(self, in_channels: int) -> int:
        """Channels of the network's output: as many as x has."""
        return in_channels

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 flow times, on the generator's device."""
        if self.times == "uniform":
            t = torch.rand(count, generator=generator, device=generator.device)
        else:
            t = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return shift_time(t, self.shift)

    def stratified_times(self, count: int, strata: int, generator: torch.Generator) -> Tensor:
        """The same, but row i from part i mod `strata` of the timesteps; in it, as `draw_times` distributes them."""
        part = torch.arange(count, device=generator.device) % strata
        uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        clean, noisy = (shift_time(1 - (part + k).double() / strata, 1 / self.shift) for k in (0, 1))  # unshifted
        if self.times == "uniform":
            return shift_time(torch.lerp(clean, noisy, uniform), self.shift).float()
        clean, noisy = (torch.special.ndtr(bound.logit()) for bound in (clean, noisy))
        t: Tensor = torch.special.ndtri(torch.lerp(clean, noisy, uniform)).sigmoid()
        return shift_time(t, self.shift).float()

    def to_time(self, t: Tensor) -> Tensor:
        """Process times of drawn times: the same."""
        return t

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Add noise: t x_start + (1 - t) noise, for samples and noise (N, ..., C, H, W) and t (N,) in [0, 1]."""
        return torch.lerp(noise, x_start, append_dims(t, noise))

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Training losses of a raw output at x_t = q_sample(x_start, t, noise), in the shape of x_t.

        Returns:
            (N,) float32 each: "loss" and "mse", the unweighted squared error; "cosine" where it has a weight.

        Raises:
            ValueError: If the network has another number of output channels.
        """
        check_prediction(sample, x_start)
        sample, rows = sample.float(), append_dims(t, x_start)
        a, b = target_weights(self.prediction, rows, 1 - rows)
        target = a * x_start + b * noise
        mse = (sample - target).square().flatten(1).mean(dim=1)
        losses = {"loss": self.loss_weight(t) * mse, "mse": mse}
        if self.cosine:
            angle = 1 - functional.cosine_similarity(sample, target, dim=-3).flatten(1).mean(dim=1)
            losses |= {"loss": losses["loss"] + self.cosine * angle, "cosine": angle}
        return losses

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error at times t (N,)."""
        if self.weight == "constant":
            return torch.ones_like(t)
        if self.weight == "inverse_variance":
            return (1 - t) ** -2
        ratio = t / (1 - t)
        if self.weight == "ratio_at_least_5":
            return ratio.clamp(min=5)
        return ratio.clamp(max=5) if self.weight == "ratio_at_most_5" else ratio

    def convert(self, sample: Tensor, x_t: Tensor, t: float | Tensor, target: Prediction) -> Tensor:
        """Compute the clean sample ("x_start"), the noise ("epsilon") or the velocity from a raw output at x_t.

        Args:
            sample: Raw output, like x_t; returned as it is where the network predicts the target.
            x_t: (N, ..., C, H, W).
            t: A number, or (N,). A velocity from "x_start" needs t below 1.
            target: Type to convert to.

        Raises:
            ValueError: If the network has another number of output channels.
        """
        check_prediction(sample, x_t)
        if target == self.prediction:
            return sample
        rows = append_dims(t, x_t)
        by_x, by_sample = conversion(self.prediction, target, rows, 1 - rows)
        return by_x * x_t + by_sample * sample


def check_prediction(sample: Tensor, x: Tensor) -> None:
    """Raise a ValueError unless a raw output has the shape of x; another one might still broadcast."""
    if sample.shape != x.shape:
        raise ValueError(f"the network's output has shape {tuple(sample.shape)}; a flow's x has {tuple(x.shape)}")
