"""A checkpoint made ready to draw images: what sample.py and sample_ddp.py have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from data.autoencoder import open_autoencoder
from diffusion import PROCESSES, ImageNoise, guided, sample_loop, skip_cache
from diffusion.refresh import cheapest, every_nth, sharing_budget, takes_cache_depth, without_state
from diffusion.sampling import StepHook
from diffusion.schedules import index_to_network
from diffusion.sharing import Calibration
from models import Network, TimeConvention, create_model, model_config
from models.acceleration import COMPILE_BACKEND, Evaluate, GraphedNetwork, autocast, cast_weights_once
from models.loading import check_family
from models.recognise import recognise
from runtime import distributed
from runtime.checkpoint import load_weights, read_checkpoint
from runtime.errors import UserError, blame
from sampling.config import SAMPLERS, C, SamplingConfig, find_facts, locate, resolve


class Pipeline(Generic[C]):
    """A checkpoint made ready to draw images: network, process, sampler, guidance, autoencoder.

    Args:
        config: what to load and how to sample.
        device: where to compute.
        vae: autoencoder for files that do not name theirs; None is what published figures were decoded with.

    Attributes:
        config: the settings, with everything that the checkpoint decided filled in.
        path: the checkpoint's file.
        release: the released checkpoint that it is; None for any other.
        step: of training, where the file knows.
        num_classes: number of classes.
        image_shape: (H, W, C) of the images.
        sampler: the sampler.
        refresh: which evaluations compute the state that the others reuse; None: all.
        multiply_adds: of one evaluation for one image.

    Raises:
        UserError: for anything about checkpoint and flags that does not fit.
    """

    def __init__(self, config: C, device: torch.device, vae: str | None = None) -> None:
        model = config.model  # as the user gave it: what is blamed
        self.path, self.release = locate(config)
        checkpoint = read_checkpoint(self.path, config.weights)
        self.step: int | None = (checkpoint.meta or {}).get("step")
        facts = find_facts(config, checkpoint, self.release, vae)
        self.config: C = resolve(config, facts)
        config = self.config
        named = model is not None and checkpoint.meta is None
        source = f"--model {model}" if named else f"--ckpt {self.path}"
        with blame(source):
            kept = _cache_depth(model_config(facts.model, **facts.config), config)
        precise = torch.float32 if config.vae_precision == "fp32" else torch.bfloat16
        with blame(f"--vae {facts.vae}"):
            self._autoencoder = open_autoencoder(facts.vae, facts.image_shape[-1], device, precise)
            self._latent_shape = self._autoencoder.latent_shape(facts.image_shape)
        with blame(source):
            shape = {"input_size": self._latent_shape[-1], "in_channels": self._latent_shape[0]}
            check_family(facts.model, checkpoint.weights)
            network = create_model(facts.model, **{**facts.config, **kept, **shape})
        load_weights(network, checkpoint.weights, f"--ckpt {self.path} as {facts.model}", _name_of)
        network = network.to(device).eval().requires_grad_(False)
        self.num_classes, self.multiply_adds = network.num_classes, sum(network.multiply_adds().values())
        channels, height, width = facts.image_shape
        self.image_shape = (height, width, channels)

        name, settings = facts.process
        assert config.sampler is not None and config.num_sampling_steps is not None  # `resolve` saw to it
        process = PROCESSES[name].for_steps(
            config.num_sampling_steps, settings, network.out_channels != network.in_channels
        )
        with blame(f"--eta {config.eta}" if config.eta else f"--num-sampling-steps {config.num_sampling_steps}"):
            self.sampler = SAMPLERS[config.sampler].make(
                process, config, bool(config.clip_denoised), network.time_convention
            )
        with blame(f"--cfg-scale {config.cfg_scale}"):
            self._null_class = network.null_class if config.cfg_scale != 1 else None
        self._interval = _in_network_time(config.guidance_interval, network.time_convention)
        self._device = device
        distributed.allow_tf32(config.tf32 and config.precision != "fp32")
        self.refresh = self._schedule(network, facts.process)
        self._evaluate = self._prepare(network)

    def _schedule(self, network: Network, process: tuple[str, dict[str, Any]]) -> Sequence[bool] | None:
        """Which evaluations compute the state that the others reuse; None: all.

        Raises:
            UserError: for a network that keeps none, or a schedule that the sampler cannot follow.
        """
        config, times = self.config, self.sampler.times
        if config.cache_interval is not None:
            with blame(f"--cache-interval {config.cache_interval}"):
                return skip_cache(network, times, config.cache_interval)
        if config.refresh_rate is None:
            return None
        with blame(f"--refresh-rate {config.refresh_rate}"):
            if not network.keeps_state:
                raise ValueError(f"{config.model} keeps no state between evaluations; {without_state(network)}")
            budget = sharing_budget(len(times), config.refresh_rate)
            if config.sharing == "uniform":
                return every_nth(len(times), config.refresh_rate)
            assert config.cfg_scale is not None  # `resolve` saw to it
            chosen = ("sampler", "sde", "heun_exact", "adams_order", "eta", "time_shift", "last_step", "clip_denoised")
            calibration = Calibration(
                network=network.for_sampling(times),
                sampler=self.sampler,
                sampling={**{name: getattr(config, name) for name in chosen}, "process": process},
                scale=config.cfg_scale,
                channels=config.guidance_channels,
                interval=self._interval,
                shape=self._latent_shape,
                autocast=torch.bfloat16 if config.precision == "bf16" else None,
            )
            similarity = distributed.by_main(lambda: calibration.similarity(config.sharing_dir).tolist())
            return cheapest(similarity, budget)

    def _prepare(self, network: Network) -> Evaluate:
        """The network for this schedule, in the precision and as fast as asked for."""
        if self.config.cuda_graphs and network.decides_by_input:
            model = self.config.model
            raise UserError(f"--cuda-graphs: {model} decides by its input what to compute; leave the flag out")
        if self.config.compile:
            network.compile_blocks(COMPILE_BACKEND)  # before plans are made, which compile what runs instead of blocks
        prepared = network.for_sampling(self.sampler.times)
        evaluate: Evaluate = prepared
        if self.config.precision == "bf16":
            evaluate = autocast(prepared, self._device, torch.bfloat16)
            x = torch.zeros(1, *self._latent_shape, device=self._device)
            y, time = torch.zeros(1, dtype=torch.int64, device=self._device), self.sampler.times[0]
            with torch.compiler.set_stance("force_eager"):  # compiled is for the rows and dtypes to come
                cast_weights_once(prepared, torch.bfloat16, lambda: evaluate(x, time, y, None))
        return GraphedNetwork(evaluate) if self.config.cuda_graphs else evaluate

    def denoise(self, seed: int, indices: Sequence[int], labels: Tensor, on_step: StepHook | None = None) -> Tensor:
        """Draws latents of the images with these absolute numbers; the same whoever else is in the batch.

        Args:
            seed: of the job.
            indices: N image numbers; each has noise of its own.
            labels: (N,) int64.
            on_step: as `sample_loop` takes it.

        Returns:
            (N, C, h, w) float32.
        """
        noise, config = ImageNoise(seed, indices, self._latent_shape, self._device), self.config
        assert config.cfg_scale is not None  # `resolve` saw to it
        denoise = guided(
            self._evaluate,
            labels.to(self._device),
            self._null_class,
            config.cfg_scale,
            config.guidance_channels,
            self._interval,
            self.sampler.times,
            self.refresh,
        )
        return sample_loop(denoise, self.sampler, noise.initial(), self.refresh, noise, on_step)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, C, H, W) float32, about [-1, 1], of latents; `vae_batch_size` at a time."""
        return torch.cat([self._autoencoder.decode(piece) for piece in latents.split(self.config.vae_batch_size)])


def _cache_depth(network: Any, config: SamplingConfig) -> dict[str, int]:
    """The user's choice as a setting of the network; empty where there is none.

    Raises:
        UserError: if the family keeps no state by it, or the network has not so many blocks.
    """
    if config.cache_depth is None:
        return {}
    if not takes_cache_depth(network):
        raise UserError(f"--cache-depth {config.cache_depth}: has no effect on {config.model}; leave it out")
    with blame(f"--cache-depth {config.cache_depth}"):
        dataclasses.replace(network, cache_depth=config.cache_depth)
    return {"cache_depth": config.cache_depth}


def _in_network_time(interval: tuple[float, float] | None, convention: TimeConvention) -> tuple[float, float] | None:
    """Bounds given as timesteps, in the network's units."""
    if interval is None:
        return None
    low, high = sorted(index_to_network(bound, convention) for bound in interval)
    return low, high


def _name_of(weights: Mapping[str, Tensor]) -> str | None:
    try:
        found = recognise(weights)
    except ValueError:
        return None
    return None if found is None else found.name
