"""The Gaussian diffusion of DDPM, with learned variance, hybrid loss and respacing.

Ho et al., 2020 (DDPM, arXiv 2006.11239); Nichol and Dhariwal, 2021 (learned variance, hybrid loss, respacing, arXiv
2102.09672). Everything here is a function of a network's raw output: the process calls no network in training, and
`sample_loop` does in sampling.

There are two kinds of time. An *index* counts the steps of this (possibly respaced) process, 0 .. num_timesteps - 1.
The *timestep* of an index is its number in the original process: the time of samplers and sampling runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian_likelihood import discretized_gaussian_log_likelihood, normal_kl
from diffusion.predictions import Prediction, prediction_tables
from diffusion.sampling import Denoiser, Evaluation
from diffusion.schedules import BETA_SCHEDULES, Array, append_dims, gaussian_tables, named_betas, space_timesteps
from diffusion.time_grids import TimeGrid, interpolated, time_grid
from models.contract import TimeConvention
from runtime.settings import setting

Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
LossWeight = Literal["constant", "min_snr"]


class Gaussian(NamedTuple):
    """A diagonal Gaussian over samples.

    Attributes:
        mean: (N, ..., C, H, W).
        log_variance: Like `mean` if learned, otherwise (N, 1, ..., 1); a number where the index was one.
        pred_xstart: Clean sample predicted with p(x_{t-1} | x_t), like `mean`; None elsewhere.
    """

    mean: Tensor
    log_variance: Tensor | float
    pred_xstart: Tensor | None = None


class GaussianDiffusion:
    """A discrete diffusion process and everything computed from its betas.

    Args:
        betas: (T,) float64 of the ORIGINAL process, in (0, 1].
        timesteps: Original timesteps to keep, ascending; None keeps all.
        prediction: Meaning of the network's first C channels.
        variance: "learned_range" takes C more channels, which interpolate between the two fixed choices.
        loss: "mse" (and the variational term for a learned variance), or "kl" for the variational bound; "rescaled_*"
            scales the variational term by the number of steps.
        loss_weight: Weight of the squared error: "constant" is 1, "min_snr" that of Hang et al., 2023 (arXiv
            2303.09556), min(snr, gamma) on the clean sample, whatever is predicted.
        min_snr_gamma: Its gamma.

    Attributes:
        timesteps: Original timestep of each index, ascending.
        tables: Every coefficient as (num_timesteps,) float64, by name.

    Raises:
        ValueError: Naming the unknown choice, or the number out of range.
    """

    name: ClassVar[str] = "gaussian"
    time_convention: ClassVar[TimeConvention] = "index"

    def __init__(
        self,
        betas: Array,
        timesteps: Sequence[int] | None = None,
        *,
        prediction: Prediction = "epsilon",
        variance: Variance = "learned_range",
        loss: Loss = "mse",
        loss_weight: LossWeight = "constant",
        min_snr_gamma: float = 5.0,
    ) -> None:
        choices = ((prediction, Prediction), (variance, Variance), (loss, Loss), (loss_weight, LossWeight))
        for value, kind in choices:
            if value not in get_args(kind):
                raise ValueError(f"{value!r} is not one of {', '.join(get_args(kind))}")
        if not 0 < min_snr_gamma < math.inf:
            raise ValueError(f"the gamma of min-SNR must be positive and finite, not {min_snr_gamma}")
        if loss_weight != "constant" and loss in ("kl", "rescaled_kl"):
            raise ValueError(f"loss weight {loss_weight!r} has no effect on loss {loss!r}, which has no squared error")
        self.prediction, self.variance, self.loss = prediction, variance, loss
        self.loss_weight, self.min_snr_gamma = loss_weight, min_snr_gamma
        self._original_abar: Array = np.cumprod(1 - betas, dtype=np.float64)
        self._keep(range(len(betas)) if timesteps is None else timesteps)

    def _keep(self, timesteps: Iterable[float]) -> None:
        """Set up the process on these original timesteps."""
        self.timesteps = tuple(sorted(set(timesteps)))
        if not self.timesteps or not 0 <= self.timesteps[0] <= self.timesteps[-1] <= len(self._original_abar) - 1:
            raise ValueError(f"timesteps must be in 0 .. {len(self._original_abar) - 1}")
        # Betas that walk the original process in longer strides; the full schedule goes through the same arithmetic.
        kept = self.alphas_cumprod_at(np.asarray(self.timesteps, dtype=np.float64))
        self.tables = gaussian_tables(1 - kept / np.append(1.0, kept[:-1]))
        self.tables |= prediction_tables(self.tables["alphas_cumprod"], self.prediction, self.min_snr_gamma)
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def alphas_cumprod_at(self, timesteps: Array) -> Array:
        """Abar at original timesteps in [0, T - 1], interpolated between whole ones."""
        return interpolated(self._original_abar, timesteps)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this (respaced) process."""
        return len(self.timesteps)

    def respaced(self, spec: str | Sequence[int], grid: TimeGrid = "uniform") -> GaussianDiffusion:
        """Build the same process on the ORIGINAL timesteps of a `time_grid`, by default those of `space_timesteps`."""
        return self.restricted(time_grid(grid, spec, self._original_abar))

    def restricted(self, timesteps: Sequence[float]) -> GaussianDiffusion:
        """Build the same process on these original timesteps; at fractions, abar is interpolated by its logarithm."""
        process = copy.copy(self)
        process._keep(timesteps)
        return process

    def output_channels(self, in_channels: int) -> int:
        """Channels of the network's output: C, or 2 C if the variance is learned."""
        return in_channels * (2 if self.variance == "learned_range" else 1)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64 indices, uniform, on the generator's device."""
        return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)

    def stratified_times(self, count: int, strata: int, generator: torch.Generator) -> Tensor:
        """(count,) int64 indices, row i uniform over part i mod `strata` of the schedule, on the generator's device."""
        part = torch.arange(count, device=generator.device) % strata
        first, end = part * self.num_timesteps // strata, (part + 1) * self.num_timesteps // strata
        uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        return first + (uniform * (end - first)).long()

    def to_time(self, t: Tensor) -> Tensor:
        """Process times of indices (N,): original timesteps, float32."""
        return self.device_tables(t.device)["timesteps"][t]

    def q_sample(self, x_start: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Add noise: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for x_0 (N, ..., C, H, W) and indices t (N,) or one."""
        return self._mix("sqrt_alphas_cumprod", x_start, "sqrt_one_minus_alphas_cumprod", noise, t)

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Training losses of a raw output (N, ..., output_channels, H, W) at x_t = q_sample(x_start, t, noise).

        Returns:
            (N,) float32 each: "loss"; for "mse" also "mse", the unweighted squared error of the prediction, and, with a
            learned variance, "vb".

        Raises:
            ValueError: If the number of channels does not fit the choice of variance.

        Source: Nichol and Dhariwal, 2021, section 3.1; the variational term there is weighted by 1e-3 at a scale that
            "rescaled_mse" reproduces. DiT trains with "mse", which weighs it by exactly 1.
        """
        prediction = self.prediction_in(sample.float(), x_t)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self.variational_bound(sample.float(), x_start, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss == "rescaled_kl" else vb}
        target = self._mix("target_by_x_start", x_start, "target_by_noise", noise, t)
        mse = _row_mean((target - prediction) ** 2)
        loss = mse if self.loss_weight == "constant" else self._at("min_snr_weight", t, mse) * mse
        if self.variance != "learned_range":
            return {"loss": loss, "mse": mse}
        # The variance must not disturb the mean: the bound sees the prediction detached (hybrid loss, section 3.1).
        hybrid = torch.cat([prediction.detach(), value_in(sample.float(), x_t)], dim=-3)
        vb = self.variational_bound(hybrid, x_start, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": loss + vb, "mse": mse, "vb": vb}

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0) for x_start (N, ..., C, H, W) and indices t (N,)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return Gaussian(mean, self._at("log_one_minus_alphas_cumprod", t, x_start))

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0) with DDPM's clipped logarithm of the first variance."""
        mean = self._mix("posterior_mean_coef1", x_start, "posterior_mean_coef2", x_t, t)
        return Gaussian(mean, self._at("posterior_log_variance_clipped", t, x_t))

    def p_mean_variance(self, sample: Tensor, x_t: Tensor, t: int | Tensor, *, clip_denoised: bool = False) -> Gaussian:
        """p(x_{t-1} | x_t) according to a network's raw output (N, ..., output_channels, H, W).

        Args:
            sample: Raw output at x_t.
            x_t: (N, ..., C, H, W).
            t: Index, a number that all rows share (then nothing is copied to the device) or (N,) int64.
            clip_denoised: Clamp the predicted clean sample to [-1, 1]; right for pixels, wrong for latents.

        Raises:
            ValueError: If the number of channels does not fit the choice of variance.
        """
        x_start = self.pred_xstart(sample, x_t, t, clip_denoised=clip_denoised)
        return Gaussian(self.q_posterior(x_start, x_t, t).mean, self.log_variance(sample, x_t, t), x_start)

    def pred_xstart(self, sample: Tensor, x_t: Tensor, t: int | Tensor, *, clip_denoised: bool = False) -> Tensor:
        """Predicted clean sample, like x_t. Arguments as for `p_mean_variance`."""
        prediction = self.prediction_in(sample, x_t)
        x_start = self._mix("x_start_by_x", x_t, "x_start_by_prediction", prediction, t)
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def pred_noise(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Noise that separates x_t from a clean sample, like x_t."""
        difference = x_t - self._at("sqrt_alphas_cumprod", t, x_t) * x_start
        return difference / self._at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def prediction_in(self, sample: Tensor, x_t: Tensor) -> Tensor:
        """The first C channels of a raw output at x_t, a view.

        Raises:
            ValueError: If the number of channels does not fit the choice of variance; it might still broadcast.
        """
        channels = x_t.shape[-3]
        expected = (*x_t.shape[:-3], self.output_channels(channels), *x_t.shape[-2:])
        if sample.shape[-3] != expected[-3]:
            raise ValueError(
                f"the network has {sample.shape[-3]} output channels; variance {self.variance!r} needs {expected[-3]}"
            )
        if sample.shape != expected:
            raise ValueError(f"the network's output has shape {tuple(sample.shape)}; x needs {expected}")
        return sample.narrow(-3, 0, channels)

    def log_variance(self, sample: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor | float:
        """Logarithm of the variance of p(x_{t-1} | x_t); a number if neither t nor the choice needs a tensor."""
        small, large = self._at("posterior_log_variance_clipped", t, x_t), self._at("log_betas", t, x_t)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            return self._at("log_fixed_large", t, x_t)
        # Linear in the value, from small at -1 to large at 1 (not clamped).
        return (large + small) / 2 + (large - small) / 2 * value_in(sample, x_t)

    def variational_bound(
        self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, *, clip_denoised: bool = False
    ) -> Tensor:
        """One term of the variational bound, (N,) in bits per dimension: a KL, or at index 0 the likelihood."""
        # The decoder term bins values into 256 levels of [-1, 1]. On latents it has no such meaning; it is kept because
        # checkpoints were trained with it.
        truth = self.q_posterior(x_start, x_t, t)
        model = self.p_mean_variance(sample, x_t, t, clip_denoised=clip_denoised)
        kl = normal_kl(truth.mean, truth.log_variance, model.mean, model.log_variance)
        decoder = -discretized_gaussian_log_likelihood(x_start, model.mean, 0.5 * model.log_variance)
        return torch.where(t == 0, _row_mean(decoder), _row_mean(kl)) / math.log(2)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), (N,) in bits per dimension."""
        last = torch.full(x_start.shape[:1], self.num_timesteps - 1, device=x_start.device)
        q = self.q_mean_variance(x_start, last)
        return _row_mean(normal_kl(q.mean, q.log_variance, 0.0, 0.0)) / math.log(2)

    @torch.no_grad()
    def bits_per_dimension(
        self,
        denoise: Denoiser,
        x_start: Tensor,
        *,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
        clip_denoised: bool = True,
    ) -> dict[str, Tensor]:
        """The whole variational bound of samples, with fresh noise at every step.

        Args:
            denoise: As for `sample_loop`.
            x_start: (N, ..., C, H, W) in [-1, 1].
            noise_fn: Called once a step, from the last index down to 0.
            clip_denoised: Clamp predicted clean samples to [-1, 1].

        Returns:
            "total_bpd" and "prior_bpd" (N,); "vb", "xstart_mse", "mse" (N, steps), column 0 being the LARGEST index.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = torch.full(x_start.shape[:1], index, device=x_start.device)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            sample = denoise(x_t, Evaluation(float(self.timesteps[index]))).sample
            pred = self.pred_xstart(sample, x_t, t, clip_denoised=clip_denoised)
            columns["vb"].append(self.variational_bound(sample, x_start, x_t, t, clip_denoised=clip_denoised))
            columns["xstart_mse"].append(_row_mean((pred - x_start) ** 2))
            columns["mse"].append(_row_mean((self.pred_noise(pred, x_t, t) - noise) ** 2))
        stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self.prior_bpd(x_start)
        return {**stacked, "prior_bpd": prior, "total_bpd": stacked["vb"].sum(dim=1) + prior}

    @overload
    def _at(self, name: str, t: int, x: Tensor) -> float: ...
    @overload
    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor: ...
    @overload
    def _at(self, name: str, t: int | Tensor, x: Tensor) -> Tensor | float: ...
    def _at(self, name: str, t: int | Tensor, x: Tensor) -> Tensor | float:
        """A coefficient at one index as a number, or at (N,) indices as float32 that broadcasts over x."""
        if isinstance(t, Tensor):
            return append_dims(self.device_tables(t.device)[name][t], x)
        return float(self.tables[name][t])

    def _mix(self, name1: str, x1: Tensor, name2: str, x2: Tensor, t: int | Tensor) -> Tensor:
        return self._at(name1, t, x1) * x1 + self._at(name2, t, x2) * x2

    def device_tables(self, device: torch.device) -> dict[str, Tensor]:
        """All tables as float32 on a device; copied there once."""
        if device not in self._on_device:
            tables = {**self.tables, "timesteps": np.asarray(self.timesteps)}
            self._on_device[device] = {k: torch.from_numpy(v).float().to(device) for k, v in tables.items()}
        return self._on_device[device]


def value_in(sample: Tensor, x_t: Tensor) -> Tensor:
    """Channels of a raw output at x_t that interpolate a learned variance, a view."""
    return sample.narrow(-3, x_t.shape[-3], x_t.shape[-3])


def _row_mean(x: Tensor) -> Tensor:
    """Mean over everything but the rows: (N, ...) to (N,)."""
    return x.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class GaussianSettings:
    """Settings of the Gaussian diffusion."""

    noise_schedule: str = setting("linear", "betas", BETA_SCHEDULES)
    prediction: Prediction = setting("epsilon", "what the network predicts", was={"--predict-xstart": "x_start"})
    loss_weight: LossWeight = setting("constant", "weight of the squared error by noise level")
    min_snr_gamma: float = setting(5.0, "largest signal-to-noise ratio that --loss-weight min_snr weighs by")

    has_variance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the fields."""
        self.make(learn_sigma=True)

    def make(self, learn_sigma: bool) -> GaussianDiffusion:
        """Build the process, for a network that predicts its variance or not."""
        return GaussianDiffusion(
            named_betas(self.noise_schedule, 1000),
            prediction=self.prediction,
            variance="learned_range" if learn_sigma else "fixed_large",
            loss_weight=self.loss_weight,
            min_snr_gamma=self.min_snr_gamma,
        )


def create_diffusion(
    timestep_respacing: str | Sequence[int] | None = None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    *,
    prediction: Prediction | None = None,
) -> GaussianDiffusion:
    """Build a process from the official arguments, with the official defaults.

    Args:
        timestep_respacing: Step spec of `space_timesteps`, such as "250" or "ddim50"; None or "" keeps all steps.
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: Train on the variational bound alone.
        sigma_small: With `learn_sigma=False`, the smaller of the two fixed variances.
        predict_xstart: The network predicts the clean sample instead of the noise.
        learn_sigma: The network's output has variance values after its prediction.
        rescale_learned_sigmas: Weigh the variational term by steps / 1000 (the same at 1000 steps).
        diffusion_steps: Length of the original process.
        prediction: Prediction type of any kind, instead of `predict_xstart`.

    Raises:
        ValueError: Naming the step spec or schedule that is unknown or out of range.
    """
    variance: Variance = "learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        named_betas(noise_schedule, diffusion_steps),
        space_timesteps(diffusion_steps, timestep_respacing or ""),
        prediction=prediction or ("x_start" if predict_xstart else "epsilon"),
        variance=variance,
        loss="rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
    )
