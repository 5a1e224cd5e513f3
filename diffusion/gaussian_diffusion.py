"""The Gaussian diffusion that DiT, DyDiT and Skip-DiT share.

Ho et al., 2020 (DDPM, arXiv 2006.11239); Nichol and Dhariwal, 2021 (learned variance, hybrid loss, respacing, arXiv
2102.09672); Song et al., 2021 (DDIM, arXiv 2010.02502). Everything here is a function of a network's raw output; the
process never calls a network in training, and in sampling `sample_loop` does.

Two kinds of time appear. An *index* counts the steps of this (possibly respaced) process, 0 .. num_timesteps - 1. The
*timestep* of an index is its place in the original process, and is what a network is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from torch import Tensor

from diffusion.dpm_solver import DPMSolverSampler
from diffusion.gaussian_samplers import AncestralSampler, DDIMSampler
from diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from diffusion.sampling import Denoise
from diffusion.schedules import Array, index_to_network, named_betas, space_timesteps

if TYPE_CHECKING:
    from models.contract import TimeConvention

Prediction = Literal["epsilon", "x_start"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images.

    Attributes:
        mean: (N, C, H, W).
        log_variance: like `mean` if learned, otherwise (N, 1, 1, 1); a number where the index was one.
        pred_xstart: (N, C, H, W), the clean image behind a network's p(x_{t-1} | x_t); None elsewhere.
    """

    mean: Tensor
    log_variance: Tensor | float
    pred_xstart: Tensor | None = None


def _tables(betas: Array) -> dict[str, Array]:
    """All per-index coefficients in float64. Names as in the papers' code, except that abar is `alphas_cumprod`."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The first posterior variance is 0, so its logarithm is taken from the second; with one step alone there is no
    # second (the official code fails there), and beta is the only variance at hand.
    second = posterior_variance[1] if len(betas) > 1 else betas[0]
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(np.append(second, posterior_variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        "log_betas": np.log(betas),
        "log_fixed_large": np.log(np.append(second, betas[1:])),
    }


class GaussianDiffusion:
    """A discrete diffusion process and everything computed from its betas.

    Args:
        betas: (T,) float64 of the ORIGINAL process, in (0, 1].
        timesteps: the original timesteps to keep, ascending; None keeps all.
        prediction: what the network's first C channels mean.
        variance: "learned_range" takes C more channels, interpolating between the two fixed choices.
        loss: "mse" (+ variational term for a learned variance), or "kl" for the variational bound; "rescaled_*"
            scales the variational term by the number of steps.

    Attributes:
        timesteps: original timestep of each index, ascending.
        tables: every coefficient as (num_timesteps,) float64, by name.

    Raises:
        ValueError: for an unknown choice, naming it.
    """

    name: ClassVar[str] = "gaussian"

    def __init__(
        self,
        betas: Array,
        timesteps: Sequence[int] | None = None,
        *,
        prediction: Prediction = "epsilon",
        variance: Variance = "learned_range",
        loss: Loss = "mse",
    ) -> None:
        for value, kind in ((prediction, Prediction), (variance, Variance), (loss, Loss)):
            if value not in get_args(kind):
                raise ValueError(f"{value!r} is none of {', '.join(get_args(kind))}")
        self.prediction, self.variance, self.loss = prediction, variance, loss
        self.timesteps = tuple(range(len(betas)) if timesteps is None else sorted(set(timesteps)))
        if not self.timesteps or not 0 <= self.timesteps[0] <= self.timesteps[-1] < len(betas):
            raise ValueError(f"timesteps must be some of 0 .. {len(betas) - 1}")
        # Betas that walk the original process in longer strides; the full schedule goes the same way.
        kept = np.cumprod(1 - betas)[list(self.timesteps)]
        self.tables = _tables(1 - kept / np.append(1.0, kept[:-1]))
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this (respaced) process."""
        return len(self.timesteps)

    # ------------------------------------------------------------------------------------------------------------------
    # The interface of every process that `Objective` and the scripts use

    def output_channels(self, in_channels: int) -> int:
        """Channels that a network must put out: C, or 2 C if the variance is learned."""
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

    def network_times(self, t: Tensor, convention: TimeConvention = "index") -> Tensor:
        """What a network is told at these indices: original timesteps, in the units it declares."""
        return index_to_network(self.device_tables(t.device)["timesteps"][t], convention)

    def host_times(self, convention: TimeConvention = "index") -> tuple[float, ...]:
        """The same for every index, as host numbers, ascending."""
        return tuple(index_to_network(t, convention) for t in self.timesteps)

    # ------------------------------------------------------------------------------------------------------------------
    # Forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noises clean images: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

        Args:
            x_start: (N, C, H, W).
            t: (N,) int64 indices.
            noise: like `x_start`, standard normal.
        """
        return self._at("sqrt_alphas_cumprod", t) * x_start + self._at("sqrt_one_minus_alphas_cumprod", t) * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0) for x_start (N, C, H, W) and indices t (N,)."""
        return Gaussian(self._at("sqrt_alphas_cumprod", t) * x_start, self._at("log_one_minus_alphas_cumprod", t))

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0) with DDPM's clipped logarithm of the first variance."""
        mean = self._at("posterior_mean_coef1", t) * x_start + self._at("posterior_mean_coef2", t) * x_t
        return Gaussian(mean, self._at("posterior_log_variance_clipped", t))

    # ------------------------------------------------------------------------------------------------------------------
    # Reverse process

    def p_mean_variance(self, sample: Tensor, x_t: Tensor, t: int | Tensor, *, clip_denoised: bool = False) -> Gaussian:
        """Reads a network's raw output as p(x_{t-1} | x_t).

        Args:
            sample: (N, output_channels, H, W) raw output at x_t.
            x_t: (N, C, H, W).
            t: index, a number that all rows share (then nothing is copied to the device) or (N,) int64.
            clip_denoised: clamp the predicted clean image to [-1, 1]; right for pixels, wrong for latents.

        Raises:
            ValueError: if the number of channels does not fit the choice of variance.
        """
        x_start = self.pred_xstart(sample, x_t, t, clip_denoised=clip_denoised)
        return Gaussian(self.q_posterior(x_start, x_t, t).mean, self.log_variance(sample, x_t, t), x_start)

    def pred_xstart(self, sample: Tensor, x_t: Tensor, t: int | Tensor, *, clip_denoised: bool = False) -> Tensor:
        """The clean image (N, C, H, W) that a raw output at x_t stands for. Arguments as for `p_mean_variance`."""
        x_start = self.prediction_in(sample, x_t)
        if self.prediction == "epsilon":
            scaled = self._at("sqrt_recip_alphas_cumprod", t) * x_t
            x_start = scaled - self._at("sqrt_recipm1_alphas_cumprod", t) * x_start
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def prediction_in(self, sample: Tensor, x_t: Tensor) -> Tensor:
        """The first C channels (N, C, H, W) of a raw output at x_t, a view.

        Raises:
            ValueError: if the number of channels does not fit the choice of variance.
        """
        self._check_channels(sample, x_t)
        return sample.narrow(-3, 0, x_t.shape[-3])

    def pred_epsilon(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The noise that separates x_t from a clean image, all (N, C, H, W)."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t) * x_t
        return (scaled - x_start) / self._at("sqrt_recipm1_alphas_cumprod", t)

    def log_variance(self, sample: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor | float:
        """Logarithm of the variance of p(x_{t-1} | x_t); a number if neither t nor the choice needs a tensor."""
        small, large = self._at("posterior_log_variance_clipped", t), self._at("log_betas", t)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            return self._at("log_fixed_large", t)
        channels = x_t.shape[-3]
        value = sample.narrow(-3, channels, channels)
        # Linear in the value, from small at -1 to large at 1 (not clamped).
        return (large + small) / 2 + (large - small) / 2 * value

    def _check_channels(self, sample: Tensor, x_t: Tensor) -> None:
        found, wanted = sample.shape[-3], self.output_channels(x_t.shape[-3])
        if found != wanted:
            raise ValueError(f"the network puts out {found} channels; variance {self.variance!r} needs {wanted}")

    # ------------------------------------------------------------------------------------------------------------------
    # Losses

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Training losses of a network's raw output at x_t = q_sample(x_start, t, noise).

        Args:
            sample: (N, output_channels, H, W) raw output.
            x_start: (N, C, H, W) clean images.
            x_t: (N, C, H, W).
            t: (N,) int64 indices.
            noise: (N, C, H, W), the noise in x_t.

        Returns:
            (N,) float32 each: "loss"; for "mse" also "mse" and, with a learned variance, "vb".

        Raises:
            ValueError: if the number of channels does not fit the choice of variance.

        Source: Nichol and Dhariwal, 2021, section 3.1; the variational term there is weighted by 1e-3 at a scale that
            "rescaled_mse" reproduces. DiT trains with "mse", which weighs it by exactly 1.
        """
        self._check_channels(sample, x_t)  # channels that do not fit might still broadcast
        sample = sample.float()
        if self.loss in ("kl", "rescaled_kl"):
            vb = self.variational_bound(sample, x_start, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss == "rescaled_kl" else vb}

        target = noise if self.prediction == "epsilon" else x_start
        if self.variance != "learned_range":
            mse = _image_mean((target - sample) ** 2)
            return {"loss": mse, "mse": mse}

        prediction, value = sample.chunk(2, dim=-3)
        # The variance must not disturb the mean: the bound sees the prediction detached (hybrid loss, section 3.1).
        vb = self.variational_bound(torch.cat([prediction.detach(), value], dim=-3), x_start, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        mse = _image_mean((target - prediction) ** 2)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def variational_bound(
        self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, *, clip_denoised: bool = False
    ) -> Tensor:
        """One term of the variational bound, (N,) in bits per dimension: a KL, or at index 0 the decoder's likelihood.

        Note:
            The decoder term bins values into 256 levels of [-1, 1]. On latents it has no such meaning; it is kept
            because checkpoints were trained with it.
        """
        truth = self.q_posterior(x_start, x_t, t)
        model = self.p_mean_variance(sample, x_t, t, clip_denoised=clip_denoised)
        kl = normal_kl(truth.mean, truth.log_variance, model.mean, model.log_variance)
        decoder = -discretized_gaussian_log_likelihood(x_start, model.mean, 0.5 * model.log_variance)
        return torch.where(t == 0, _image_mean(decoder), _image_mean(kl)) / math.log(2)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), (N,) in bits per dimension."""
        last = torch.full(x_start.shape[:1], self.num_timesteps - 1, device=x_start.device)
        q = self.q_mean_variance(x_start, last)
        return _image_mean(normal_kl(q.mean, q.log_variance, 0.0, 0.0)) / math.log(2)

    @torch.no_grad()
    def bits_per_dimension(
        self,
        denoise: Denoise,
        x_start: Tensor,
        *,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
        clip_denoised: bool = True,
        convention: TimeConvention = "index",
    ) -> dict[str, Tensor]:
        """The whole variational bound of images, with fresh noise at every step.

        Args:
            denoise: as `sample_loop` takes it.
            x_start: (N, C, H, W) in [-1, 1].
            noise_fn: called once a step, from the last index down to 0.
            clip_denoised: clamp predicted clean images to [-1, 1].
            convention: the network's time convention.

        Returns:
            "total_bpd" and "prior_bpd" (N,); "vb", "xstart_mse", "mse" (N, steps), column 0 being the LARGEST index.
        """
        times = self.host_times(convention)
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = torch.full(x_start.shape[:1], index, device=x_start.device)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            sample = denoise(x_t, times[index], None).sample
            pred = self.pred_xstart(sample, x_t, t, clip_denoised=clip_denoised)
            columns["vb"].append(self.variational_bound(sample, x_start, x_t, t, clip_denoised=clip_denoised))
            columns["xstart_mse"].append(_image_mean((pred - x_start) ** 2))
            columns["mse"].append(_image_mean((self.pred_epsilon(pred, x_t, t) - noise) ** 2))
        stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self.prior_bpd(x_start)
        return {**stacked, "prior_bpd": prior, "total_bpd": stacked["vb"].sum(dim=1) + prior}

    # ------------------------------------------------------------------------------------------------------------------
    # Samplers

    def ancestral(self, clip_denoised: bool = False, *, convention: TimeConvention = "index") -> AncestralSampler:
        """DDPM's own sampler: one draw from p(x_{t-1} | x_t) a step. For a network of that time convention."""
        return AncestralSampler(self, clip_denoised=clip_denoised, convention=convention)

    def ddim(
        self, eta: float = 0.0, clip_denoised: bool = False, *, convention: TimeConvention = "index"
    ) -> DDIMSampler:
        """DDIM: deterministic at eta 0, as noisy as DDPM at eta 1."""
        return DDIMSampler(self, eta=eta, clip_denoised=clip_denoised, convention=convention)

    def ddim_reverse(self, clip_denoised: bool = False, *, convention: TimeConvention = "index") -> DDIMSampler:
        """DDIM run backwards, from an image to the noise that would produce it."""
        return DDIMSampler(self, reverse=True, clip_denoised=clip_denoised, convention=convention)

    def dpm_solver(self, clip_denoised: bool = False, *, convention: TimeConvention = "index") -> DPMSolverSampler:
        """DPM-Solver++(2M): deterministic and of second order, for few steps."""
        return DPMSolverSampler(self, clip_denoised=clip_denoised, convention=convention)

    # ------------------------------------------------------------------------------------------------------------------
    # Coefficients

    @overload
    def _at(self, name: str, t: int) -> float: ...
    @overload
    def _at(self, name: str, t: Tensor) -> Tensor: ...
    def _at(self, name: str, t: int | Tensor) -> Tensor | float:
        """A coefficient at one index as a number, or at (N,) indices as (N, 1, 1, 1) float32."""
        if isinstance(t, Tensor):
            return self.device_tables(t.device)[name][t].view(-1, 1, 1, 1)
        return float(self.tables[name][t])

    def device_tables(self, device: torch.device) -> dict[str, Tensor]:
        """All tables as float32 on a device; moved there once."""
        if device not in self._on_device:
            tables = {**self.tables, "timesteps": np.asarray(self.timesteps)}
            self._on_device[device] = {k: torch.from_numpy(v).float().to(device) for k, v in tables.items()}
        return self._on_device[device]


def _image_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)


def create_diffusion(
    timestep_respacing: str | Sequence[int] | None = None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Builds a process from the official arguments, with the official defaults.

    Args:
        timestep_respacing: step spec of `space_timesteps`, such as "250" or "ddim50"; None or "" keeps all steps.
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: train on the variational bound alone.
        sigma_small: with `learn_sigma=False`, the smaller of the two fixed variances.
        predict_xstart: the network predicts the clean image instead of the noise.
        learn_sigma: the network puts out variance values behind its prediction.
        rescale_learned_sigmas: weigh the variational term by steps / 1000 (the same at 1000 steps).
        diffusion_steps: length of the original process.

    Raises:
        ValueError: for a step spec or a schedule that cannot be met, naming it.
    """
    variance: Variance = "learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        named_betas(noise_schedule, diffusion_steps),
        space_timesteps(diffusion_steps, timestep_respacing or ""),
        prediction="x_start" if predict_xstart else "epsilon",
        variance=variance,
        loss="rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
    )
