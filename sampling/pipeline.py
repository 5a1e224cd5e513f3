"""A checkpoint ready to sample from: `Pipeline` for people, and the parts that sample.py and sample_ddp.py share.

pipeline = Pipeline.from_pretrained("DiT-XL-2-256x256")
images = pipeline.sample(labels=[207, 360], seed=0, sampler="ddim", num_sampling_steps=50, cfg_scale=4.0)
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.autoencoders import OFFICIAL_FACTOR
from data.encoders import Encoder, open_encoder
from data.pixels import to_uint8
from diffusion import (
    PROCESSES,
    Evaluation,
    ImageNoise,
    convert_time,
    evaluations,
    guided,
    make_sampler,
    sample_loop,
)
from diffusion.caching import cheapest, check_keeps_state, every_nth, sharing_budget, skip_cache
from diffusion.calibration import Calibration
from diffusion.sampling import Sampler, StepHook
from models import FAMILIES, Network, family_name, family_of, model_config
from models.acceleration import COMPILE_BACKEND, AutocastNetwork, GraphedNetwork, cast_weights_once
from models.contract import Conditioning, NetworkLike
from models.loading import CheckpointInfo, build_network, load_network, resolve_checkpoint
from runtime import distributed
from runtime.errors import UserError, error_prefix
from runtime.releases import release_of_model
from runtime.settings import Given, Values, flag_name, places, to_dict
from sampling.config import (
    KINDS,
    C,
    CheckpointSettings,
    SamplerChoice,
    SamplingSettings,
    check_channels,
    check_labels,
    preset_of,
    resolve,
)

KEPT_RUNS = 4  # prepared runs that a pipeline keeps


class PreparedRun(NamedTuple):
    """Everything that one set of settings fixes.

    Attributes:
        config: the settings, with everything that the checkpoint decides filled in.
        choice: the sampler and its settings.
        sampler: the sampler.
        table: one row per evaluation.
        network: prepared for the sampler's times, in the precision and as fast as asked for.
    """

    config: SamplingSettings
    choice: SamplerChoice
    sampler: Sampler
    table: tuple[Evaluation, ...]
    network: NetworkLike


class Pipeline:
    """A network with its encoder, ready to sample from.

    Attributes:
        network: in eval mode, on its device.
        info: about the checkpoint.
        encoder: between latents and pixels.
        config: settings that `sample` starts from.
        image_shape: (C, H, W) of the images.
    """

    def __init__(
        self,
        network: Network,
        info: CheckpointInfo,
        encoder: Encoder,
        image_shape: tuple[int, ...],
        config: SamplingSettings,
    ) -> None:
        self.network, self.info, self.encoder, self.image_shape, self.config = (
            network, info, encoder, image_shape, config,
        )  # fmt: skip
        self._runs: OrderedDict[object, PreparedRun] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str | None = None, vae: str | None = None, **overrides: Any
    ) -> Pipeline:
        """Open a checkpoint.

        Args:
            source: a file (ours or an official one), the name of a release, or of a model with one release.
            device: where to compute; None for CUDA if there is one.
            vae: autoencoder; None for the checkpoint's own.
            **overrides: `weights="model"`, and fields of the network's config that change no weights (`cache_depth`).

        Raises:
            UserError: for anything about the file that does not fit.
        """
        place = distributed.choose_device(None) if device is None else torch.device(device)
        network, info = load_network(source, device=place, **overrides)
        return cls.open(network, info, SamplingSettings(model=info.model), place, vae)

    @classmethod
    def open(
        cls, network: Network, info: CheckpointInfo, config: SamplingSettings, device: torch.device, vae: str | None
    ) -> Pipeline:
        """Add the encoder to a network.

        Raises:
            UserError: if it does not fit the network.
        """
        name = vae or info.encoder
        check_channels(name, vae, info.path, network.sample_shape[-3])
        dtype = torch.float32 if config.compute.vae_precision == "fp32" else torch.bfloat16
        with error_prefix(f"--vae {name}"):
            encoder = open_encoder(name, info.image_shape or (), device, dtype)
            shape = image_shape_of(encoder, network.sample_shape)
        return cls(network, dataclasses.replace(info, encoder=name), encoder, shape, config)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return getattr(self.network.config, "num_classes", 0)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    # ------------------------------------------------------------------------------------------------------------------
    # For people

    def sample(
        self,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        *,
        conditioning: Conditioning | None = None,
        null: Conditioning | None = None,
        on_step: StepHook | None = None,
        **settings: Any,
    ) -> npt.NDArray[np.uint8]:
        """Sample images.

        Args:
            labels: one image each; for networks with labels.
            seed: of the noise; image i has noise (seed, i).
            conditioning: of other networks, N rows in front.
            null: unconditional rows of such networks, for guidance.
            on_step: called as on_step(i, x, out) after each step; a tensor that it returns replaces x.
            **settings: the flags of sample.py by name, such as `sampler="ddim"`, `num_sampling_steps=50`, `eta=0.5`,
                `cfg_scale=4.0`, `cache_interval=2`. Changed settings prepare a new run; the last few are kept.

        Returns:
            (N, H, W, C) uint8.

        Raises:
            UserError: for settings that do not fit the checkpoint or each other.
        """
        if conditioning is None:
            check_labels(labels or (), self.num_classes)
            conditioning = {"y": torch.tensor(labels)}
        count = len(next(iter(conditioning.values())))
        run = self.prepare(**settings)
        latents = self.denoise(run, seed, range(count), conditioning, null=null, on_step=on_step)
        return to_uint8(self.decode(latents)).cpu().numpy()

    def prepare(self, **settings: Any) -> PreparedRun:
        """The run for some settings, prepared before with them or now. Arguments as for `sample`."""
        general, owned = split_settings(self.config, settings)
        return self.prepare_run(general, owned)

    @torch.no_grad()
    def encode(self, pixels: Tensor, seed: int = 0) -> Tensor:
        """Latents (N, ..., h, w) float32 of pixels (N, C, H, W), uint8 or float32 in [-1, 1]."""
        noise = ImageNoise(seed, range(len(pixels)), self.network.sample_shape, self.device).initial()
        raw = self.encoder.encode_pixels(pixels.to(self.device))
        return self.encoder.to_latents(raw, noise if self.encoder.stochastic else None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, C, H, W) float32, about [-1, 1], of latents; `vae_batch_size` at a time."""
        return torch.cat([self.encoder.decode(piece) for piece in latents.split(self.config.compute.vae_batch_size)])

    # ------------------------------------------------------------------------------------------------------------------
    # Parts

    def prepare_run(self, config: SamplingSettings, sampler_settings: dict[str, Any]) -> PreparedRun:
        """Resolve settings and prepare what they fix; the last few runs are kept.

        Raises:
            UserError: for settings that do not fit the checkpoint or each other.
        """
        resolved, choice = resolve(config, sampler_settings, self.info)
        key = (resolved, choice)
        if key not in self._runs:
            self._runs[key] = self._prepare(resolved, choice)
            if len(self._runs) > KEPT_RUNS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _prepare(self, config: SamplingSettings, choice: SamplerChoice) -> PreparedRun:
        learns_variance = self.network.out_channels != self.network.sample_shape[-3]
        process = PROCESSES[self.info.process](**self.info.process_settings).make(learns_variance)
        with error_prefix(f"--num-sampling-steps {choice.steps}"):
            pixels = self.info.encoder == "none"
            sampler = make_sampler(choice.name, process, choice.steps, choice.settings, pixels=pixels)
        scale, interval = config.guidance.cfg_scale, config.guidance.guidance_interval
        assert scale is not None  # `resolve` chose it
        if scale != 1 and not self.guidable:
            with error_prefix(f"--cfg-scale {scale}"):
                self.network.null_conditioning(1)
        if interval is not None:
            low, high = sorted(convert_time(bound, "index", sampler.time_convention) for bound in interval)
            interval = (low, high)
        distributed.allow_tf32(config.compute.tf32 and config.compute.precision != "fp32")
        refresh = self._refresh(config, choice, sampler, interval)
        table = evaluations(sampler.times, scale, interval, refresh)
        return PreparedRun(config, choice, sampler, table, self._accelerate(config, sampler))

    @property
    def guidable(self) -> bool:
        """True if unconditional rows are known: the network's own, or given with text."""
        return "y" not in self.network.conditioning or getattr(self.network.config, "class_dropout_prob", 0) > 0

    def _refresh(
        self,
        config: SamplingSettings,
        choice: SamplerChoice,
        sampler: Sampler,
        interval: tuple[float, float] | None,
    ) -> Sequence[bool] | None:
        """Which evaluations compute the state that the others reuse; None: all.

        Raises:
            UserError: for a network that keeps none, or a schedule that the sampler cannot follow.
        """
        caching, network = config.caching, self.network
        if caching.cache_interval is None and caching.sharing_interval is None:
            return None
        flag = f"--cache-interval {caching.cache_interval}"
        if caching.cache_interval is None:
            flag = f"--sharing-interval {caching.sharing_interval}"
        with error_prefix(flag):
            check_keeps_state(network)
            if caching.cache_interval is not None:
                return skip_cache(network, sampler, caching.cache_interval)
            assert caching.sharing_interval is not None
            budget = sharing_budget(len(sampler.times), caching.sharing_interval)
            if caching.sharing == "uniform":
                return every_nth(len(sampler.times), caching.sharing_interval)
            calibration = Calibration(
                network=network.for_sampling(network_times(network, sampler)),
                sampler=sampler,
                sampling={"sampler": choice.name, **to_dict(choice.settings), "process": self._process()},
                scale=config.guidance.cfg_scale or 1.0,
                channels=config.guidance.guidance_channels,
                interval=interval,
                autocast=torch.bfloat16 if config.compute.precision == "bf16" else None,
            )
            similarity = distributed.on_rank0(lambda: calibration.similarity(caching.sharing_dir).tolist())
            return cheapest(similarity, budget)

    def _process(self) -> dict[str, Any]:
        return {"name": self.info.process, **self.info.process_settings}

    def _accelerate(self, config: SamplingSettings, sampler: Sampler) -> NetworkLike:
        """The network for these times, in the precision and as fast as asked for."""
        compute, network = config.compute, self.network
        if compute.cuda_graphs and family_of(self.info.model).data_dependent:
            raise UserError(
                f"--cuda-graphs: {self.info.model} decides by its input what to compute; leave the flag out"
            )
        if compute.compile or compute.precision == "bf16":
            network = copy.deepcopy(network)  # both change it in place, and other runs use it as it is
        if compute.compile:
            network.compile_blocks(COMPILE_BACKEND)  # before plans are made, which compile their own functions
        times = network_times(network, sampler)
        prepared = network.for_sampling(times)
        if compute.precision == "bf16":
            lower = AutocastNetwork(prepared, self.device, torch.bfloat16)
            if "y" in network.conditioning:
                x = torch.zeros(1, *network.sample_shape, device=self.device)
                y = torch.zeros(1, dtype=torch.int64, device=self.device)
                with torch.compiler.set_stance("force_eager"):  # compiled is for the rows and dtypes to come
                    cast_weights_once(prepared, torch.bfloat16, lambda: lower(x, times[0], y=y))
            return GraphedNetwork(lower) if compute.cuda_graphs else lower
        return GraphedNetwork(prepared) if compute.cuda_graphs else prepared

    def denoise(
        self,
        run: PreparedRun,
        seed: int,
        indices: Sequence[int],
        conditioning: Conditioning,
        *,
        null: Conditioning | None = None,
        on_step: StepHook | None = None,
    ) -> Tensor:
        """Sample latents of the images with these absolute numbers; the same whatever else is in the batch.

        Args:
            run: from `prepare`.
            seed: of the job.
            indices: N image numbers; each has noise of its own.
            conditioning: N rows.
            null: unconditional rows; None for the network's own.
            on_step: as `sample_loop` takes it.

        Returns:
            (N, ..., h, w) float32.
        """
        noise = ImageNoise(seed, indices, self.network.sample_shape, self.device)
        cond = {name: leaf.to(self.device) for name, leaf in conditioning.items()}
        second = null
        if second is None and any(evaluation.guided for evaluation in run.table):
            second = self.network.null_conditioning(len(indices))
        denoise = guided(
            run.network,
            cond,
            second,
            times=run.sampler.time_convention,
            channels=run.config.guidance.guidance_channels,
        )
        return sample_loop(denoise, run.sampler, noise.initial(), run.table, noise_fn=noise, on_step=on_step)


def open_pipeline(
    given: Given[C], device: torch.device, default_vae: str | None = None
) -> tuple[Pipeline, PreparedRun]:
    """Open the pipeline that flags ask for, and prepare its run.

    Args:
        given: settings of a script.
        device: where to compute.
        default_vae: autoencoder for files that name none; None for the one of published figures.

    Raises:
        UserError: for anything about checkpoint and flags that does not fit.
    """
    config = given.general
    chosen = config.checkpoint
    if config.sampler is not None:  # before anything is downloaded or read
        given.check_owners(sampler=config.sampler)
        given.build("sampler", config.sampler)
    if config.model is not None:
        with error_prefix(f"--model {config.model}"):
            family_of(config.model)
    source = chosen.ckpt
    if source is None:
        source = Path(release_of_model(config.model or "DiT-XL/2", chosen.image_size, FAMILIES).name)
    info, weights = resolve_checkpoint(
        source, weights=chosen.weights, model=config.model, download_dir=chosen.pretrained_dir
    )
    if info.process not in PROCESSES:
        raise UserError(f"--ckpt {info.path}: trained under {info.process!r}, a process unknown here")
    family, sampler = family_name(info.model), config.sampler or preset_of(info).sampler
    given.check_owners(model=family, sampler=sampler)
    if info.meta is None and info.release is None and default_vae is not None:
        info = dataclasses.replace(info, encoder=default_vae)
    fields = given.fields("model", family)
    if fields and config.caching.cache_interval is None and config.caching.sharing_interval is None:
        flags = given.prefix("model", family)
        raise UserError(f"{flags}: has no effect without --cache-interval or --sharing-interval")
    fields |= fields_of_images(info, chosen)
    with error_prefix(given.prefix("model", family) or f"--ckpt {info.path}"):
        model_config(info.model, **{**info.config, **fields})
    network = build_network(info, weights, device=device, **fields)
    pipeline = Pipeline.open(network, info, config, device, chosen.vae)
    return pipeline, pipeline.prepare_run(config, given.fields("sampler", sampler))


def fields_of_images(info: CheckpointInfo, chosen: CheckpointSettings) -> Values:
    """Fields of the network's config that the flags about images decide.

    Raises:
        UserError: if they contradict the checkpoint.
    """
    fields: Values = {} if chosen.num_classes is None else {"num_classes": chosen.num_classes}
    known = None if info.image_shape is None else info.image_shape[-1]
    if known is not None and chosen.image_size not in (None, known):
        raise UserError(f"--image-size {chosen.image_size}: --ckpt {info.path} was trained with {known}")
    size = chosen.image_size or known
    if info.meta is None and size is not None:
        config = model_config(info.model, **info.config)
        side = size // (1 if (chosen.vae or info.encoder) == "none" else OFFICIAL_FACTOR)
        fields["sample_shape"] = (config.sample_shape[-3], side, side)
    return fields


def network_times(network: Network, sampler: Sampler) -> list[float]:
    """A sampler's times in the network's units."""
    return [convert_time(t, sampler.time_convention, network.time_convention) for t in sampler.times]


def split_settings(config: C, values: dict[str, Any]) -> tuple[C, dict[str, Any]]:
    """General settings with some replaced, and those of the sampler, from settings by name.

    Raises:
        UserError: for a name that is no setting of sampling.
    """
    known = places(type(config), KINDS)
    owned: dict[str, Any] = {}
    for name, value in values.items():
        place = known.get(flag_name(name))
        if place is None or place.kind == "model":
            hint = "; give it to Pipeline.from_pretrained" if place is not None else ""
            raise UserError(f"{name}: is no setting of sampling{hint}")
        if place.kind is not None:
            owned[place.path[-1]] = value
            continue
        value = str(value) if name == "num_sampling_steps" else value
        *groups, field = place.path
        try:
            part = {field: value}
            if groups:
                part = {groups[0]: dataclasses.replace(getattr(config, groups[0]), **part)}
            config = dataclasses.replace(config, **part)
        except ValueError as error:
            raise UserError(str(error)) from error
    return config, owned


def image_shape_of(encoder: Encoder, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the images behind latents.

    Raises:
        ValueError: if the encoder's latents are not the network's.
    """
    *frames, channels, height, width = sample_shape
    image = (*frames, encoder.image_channels, height * encoder.factor, width * encoder.factor)
    if encoder.name == "none":
        image = sample_shape
    if encoder.latent_shape(image) != sample_shape:
        raise ValueError(f"its latents are {encoder.latent_shape(image)}, the network's {sample_shape}")
    return image
