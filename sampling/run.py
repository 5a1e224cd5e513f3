"""A sampling run made ready: sampler, table of evaluations, and the network as it will be evaluated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import Evaluation, convert_time, evaluations, guided, make_sampler, sample_loop
from diffusion.caching import CacheSchedule, cheapest, check_keeps_state, every_nth, sharing_budget, skip_cache
from diffusion.calibration import Calibration
from diffusion.flow import FlowMatching
from diffusion.forecast import Forecast, ForecastState, forecast_schedule
from diffusion.gaussian import GaussianDiffusion
from diffusion.guidance import Guide, scheduled, zero_init, zero_star
from diffusion.loss import Process
from diffusion.sampling import Denoiser, NoiseFn, Sampler, StepHook
from diffusion.solver_table import SolverTable, TableSampler
from models import Network, family_of
from models.acceleration import COMPILE_BACKEND, AutocastNetwork, GraphedNetwork, cast_weights_once
from models.contract import Conditioning, NetworkLike
from models.loading import CheckpointInfo
from runtime import distributed
from runtime.devices import slow_bf16
from runtime.documents import to_dict
from runtime.errors import UserError, error_prefix
from sampling.config import ComputeSettings, SamplingSettings


class WeakerNetwork(NamedTuple):
    """Guide of autoguidance, and the description of its checkpoint."""

    network: Network
    info: CheckpointInfo


class PreparedRun(NamedTuple):
    """Everything that one set of settings fixes.

    Attributes:
        config: The settings, with everything that the checkpoint decides filled in.
        settings: Settings of the sampler, or the table that it follows.
        sampler: The sampler.
        table: One row per evaluation.
        network: Prepared for the sampler's times; a copy, where compiling or bf16 changes it.
        evaluate: The same in the precision that is asked for, perhaps recorded.
        guide: Weaker network of autoguidance, as it will be evaluated; None without.
    """

    config: SamplingSettings
    settings: object
    sampler: Sampler
    table: tuple[Evaluation, ...]
    network: Network
    evaluate: NetworkLike
    guide: NetworkLike | None = None

    @property
    def takes_null(self) -> bool:
        """True if unconditional rows are evaluated."""
        return self.guide is None and any(evaluation.guided for evaluation in self.table)

    def denoise(
        self,
        x: Tensor,
        conditioning: Conditioning,
        null: Conditioning | None,
        noise_fn: NoiseFn,
        on_step: StepHook | None = None,
    ) -> Tensor:
        """Carry noise x (N, ..., C, H, W) through all evaluations; returns latents like x."""
        guidance, caching = self.config.guidance, self.config.caching
        denoise: Denoiser = guided(
            self.evaluate,
            conditioning,
            null if self.guide is None else Guide(self.guide, conditioning),
            times=self.sampler.time_convention,
            channels=guidance.guidance_channels,
            mix=zero_star if guidance.guidance == "cfg-zero-star" else None,
        )
        if (numbers := caching.forecast_numbers) is not None:
            denoise = Forecast(denoise, numbers[1])
        cache = None if caching.cache_forecast is None else ForecastState(caching.cache_forecast)
        with distributed.tf32_inside(self.config.compute.allows_tf32):
            return sample_loop(denoise, self.sampler, x, self.table, cache=cache, noise_fn=noise_fn, on_step=on_step)


def prepare_run(
    network: Network,
    info: CheckpointInfo,
    process: Process,
    config: SamplingSettings,
    settings: object,
    flags: str,
    guide: WeakerNetwork | None = None,
    strength: float = 1.0,
) -> PreparedRun:
    """Prepare what settings fix; the network stays as it is.

    Args:
        network: The network.
        info: Description of its checkpoint.
        process: Its process.
        config: Settings with nothing left to the checkpoint.
        settings: Settings of the sampler.
        flags: These as they were given, for messages.
        guide: Weaker network of autoguidance.
        strength: Share of the steps that are taken; below 1, x starts as an image with noise.

    Raises:
        UserError: For settings that do not fit the network or each other.
    """
    assert config.guidance.cfg_scale is not None  # chosen by `resolve`
    scale, interval = config.guidance.cfg_scale, config.guidance.guidance_interval
    if config.solver_table is not None:
        flags = f"--solver-table {config.solver_table}"
    with error_prefix(f"{flags} --num-sampling-steps {config.num_sampling_steps}".strip()):
        sampler = choose_sampler(process, config, settings, pixels=info.encoder == "none", strength=strength)
    check_guidance(config, process)
    if (
        scale != 1 and guide is None and {*network.conditioning} <= {"y"}
    ):  # unconditional rows of text come with the text
        with error_prefix(f"--cfg-scale {scale}"):
            network.null_conditioning(1)
    if interval is not None:
        low, high = sorted(convert_time(bound, "index", sampler.time_convention) for bound in interval)
        interval = (low, high)
    with distributed.tf32_inside(config.compute.allows_tf32):
        refresh = refresh_schedule(network, info, config, settings, sampler, interval)
        prepared, evaluate = accelerate(network, info.model, sampler, config.compute)
        weaker = None if guide is None else accelerate(guide.network, guide.info.model, sampler, config.compute)[1]
    scales = scheduled(config.guidance.guidance_schedule, scale, sampler.times, sampler.time_convention)
    table = evaluations(sampler.times, scales, interval, refresh)
    if config.guidance.guidance == "cfg-zero-star":
        table = zero_init(table)
    if (numbers := config.caching.forecast_numbers) is not None:
        with error_prefix(f"--forecast {config.caching.forecast}"):
            table = forecast_schedule(table, numbers[0])
    return PreparedRun(config, settings, sampler, table, prepared, evaluate, weaker)


def check_guidance(config: SamplingSettings, process: Process) -> None:
    """Check that the kind of guidance goes with the process and with what reuses state.

    Raises:
        UserError: If it does not.
    """
    kind, caching = config.guidance.guidance, config.caching
    if kind == "cfg-zero-star" and (process.name != "flow" or getattr(process, "prediction", None) != "velocity"):
        raise UserError(f"--guidance {kind}: needs a flow, and a network that predicts the velocity")
    if kind != "cfg" and caching.sharing == "cheapest":
        raise UserError(f"--guidance {kind}: --sharing cheapest is measured with cfg; give --sharing uniform")


def choose_sampler(
    process: Process, config: SamplingSettings, settings: object, *, pixels: bool, strength: float = 1.0
) -> Sampler:
    """Build the sampler of resolved settings, or the one that follows a table.

    Raises:
        ValueError: If settings or table do not fit the process.
    """
    if config.sampler is not None:
        steps = config.num_sampling_steps
        return make_sampler(config.sampler, process, steps, settings, pixels=pixels, strength=strength)
    if strength != 1:
        raise ValueError(f"a table is followed from its first step; --strength {strength} needs a --sampler")
    assert isinstance(settings, SolverTable) and isinstance(process, GaussianDiffusion | FlowMatching)
    return TableSampler(process, settings, clip_denoised=pixels)


def refresh_schedule(
    network: Network,
    info: CheckpointInfo,
    config: SamplingSettings,
    settings: object,
    sampler: Sampler,
    interval: tuple[float, float] | None,
) -> Sequence[bool] | None:
    """Choose the evaluations that compute the state which the others reuse; None: all.

    Raises:
        UserError: For a network that keeps no state, or a schedule that the sampler cannot follow.
    """
    caching, guidance, count = config.caching, config.guidance, len(sampler.times)
    if caching.cache_interval is not None:
        with error_prefix(f"--cache-interval {caching.cache_interval}"):
            bounds = CacheSchedule(*family_of(info.model).cache_bounds)
            if caching.cache_bounds is not None:
                bounds = bounds._replace(t_high=caching.cache_bounds[0], t_low=caching.cache_bounds[1])
            return skip_cache(network, sampler, caching.cache_interval, bounds)
    if caching.sharing_interval is None:
        return None
    with error_prefix(f"--sharing-interval {caching.sharing_interval}"):
        check_keeps_state(network)
        budget = sharing_budget(count, caching.sharing_interval)
        if caching.sharing == "uniform":
            return every_nth(count, caching.sharing_interval)
        process = {"name": info.process, **info.process_settings}
        calibration = Calibration(
            network=network.for_sampling(network_times(network, sampler)),
            sampler=sampler,
            sampling={"sampler": config.sampler, **to_dict(settings), "process": process},
            scale=guidance.cfg_scale or 1.0,
            channels=guidance.guidance_channels,
            interval=interval,
            autocast=torch.bfloat16 if config.compute.precision == "bf16" else None,
        )
        similarity = distributed.on_rank0(lambda: calibration.similarity(caching.sharing_dir).tolist())
        return cheapest(similarity, budget)


def accelerate(network: Network, model: str, sampler: Sampler, compute: ComputeSettings) -> tuple[Network, NetworkLike]:
    """Prepare a network for a sampler's times, in the precision and as fast as asked for.

    Returns:
        The prepared network, and what evaluates it.

    Raises:
        UserError: If evaluations cannot be recorded because they depend on their input.
    """
    if compute.cuda_graphs and family_of(model).data_dependent:
        raise UserError(f"--cuda-graphs: evaluations of {model} depend on their input; leave the flag out")
    backend = COMPILE_BACKEND if compute.compile else network.compile_backend
    if compute.compile or compute.precision == "bf16":
        network = copy.deepcopy(network)  # both change it in place, and other runs use it as it is
        if backend is not None:
            network.compile_blocks(backend)  # before plans are made, which compile their own functions
    times = network_times(network, sampler)
    prepared = network.for_sampling(times)
    evaluate: NetworkLike = prepared
    if compute.precision == "bf16":
        device = next(prepared.parameters()).device
        if slow := slow_bf16(device):
            warnings.warn(slow, stacklevel=2)
        evaluate = lower = AutocastNetwork(prepared, device, torch.bfloat16)
        if {*network.conditioning} <= {"y"}:
            x = torch.zeros(1, *network.sample_shape, device=device)
            labels = {name: torch.zeros(1, dtype=torch.int64, device=device) for name in network.conditioning}
            with torch.compiler.set_stance("force_eager"):  # compiled is for the rows and dtypes to come
                cast_weights_once(prepared, torch.bfloat16, lambda: lower(x, times[0], **labels))
    return prepared, GraphedNetwork(evaluate) if compute.cuda_graphs else evaluate


def network_times(network: Network, sampler: Sampler) -> list[float]:
    """A sampler's times in the network's units."""
    return [convert_time(t, sampler.time_convention, network.time_convention) for t in sampler.times]
