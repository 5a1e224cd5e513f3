"""A checkpoint ready to sample from.

pipeline = Pipeline.from_pretrained("DiT-XL-2-256x256")
images = pipeline.sample(labels=[207, 360], seed=0, sampler="ddim", num_sampling_steps=50, cfg_scale=4.0)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.encoders import Encoder
from data.pixels import Images
from data.writers import writer_of
from diffusion import PROCESSES, ImageNoise, row_noise
from diffusion.sampling import StepHook
from models import FAMILIES, Network
from models.contract import Conditioning
from models.loading import CheckpointInfo
from runtime import distributed
from runtime.devices import choose_device
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.settings import flags_of
from sampling.config import (
    KINDS,
    CheckpointSettings,
    EncoderSettings,
    SamplingSettings,
)
from sampling.editing import Edit
from sampling.opening import open_checkpoint, open_guide
from sampling.prompts import TextSettings, open_prompts
from sampling.publishing import push, save_folder
from sampling.resolution import preset_of, resolve
from sampling.rows import batch_indices, check_rows, take
from sampling.run import PreparedRun, WeakerNetwork, prepare_run

KEPT_RUNS = 4  # prepared runs that a pipeline keeps
SAVED = ("sampler", "num_sampling_steps", "cfg_scale", "guidance_interval")  # what saved weights can bring along


class Pipeline:
    """A network with its encoder, ready to sample from.

    Attributes:
        network: In evaluation mode, on its device.
        info: Description of its checkpoint.
        encoder: Between latents and pixels.
        process: Noise process that the network was trained under.
        image_shape: (C, H, W) of the images, or (F, C, H, W) of the clips; clips of one frame are images.
        guide: Weaker network of autoguidance; None without.
    """

    def __init__(
        self,
        network: Network,
        info: CheckpointInfo,
        encoder: Encoder,
        given: Given[SamplingSettings],
        guide: WeakerNetwork | None = None,
    ) -> None:
        self.network, self.info, self.encoder, self.guide = network, info, encoder, guide
        learns_variance = network.out_channels != network.sample_shape[-3]
        self.process = PROCESSES[info.process](**info.process_settings).make(learns_variance)
        self.image_shape = encoder.image_shape(network.sample_shape)
        if len(self.image_shape) == 4 and self.image_shape[0] == 1:
            self.image_shape = self.image_shape[1:]
        self._given, self._runs = given, OrderedDict[str, PreparedRun]()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str | None = None, **settings: object
    ) -> Pipeline:
        """Open a checkpoint.

        Args:
            source: A file (ours or an official one), a folder of `save_pretrained`, the name of a release, or of a
                model with one release, or "owner/name" on the Hugging Face hub.
            device: Where to compute; None for CUDA if there is one.
            **settings: Flags of sample.py by name: those of the network and its encoder, such as `weights="model"`,
                `vae="mse"` or `cache_depth=2`; others are those that `sample` starts from.

        Raises:
            UserError: For anything about the file or the settings that does not fit.
        """
        given = Given(SamplingSettings(checkpoint=CheckpointSettings(ckpt=Path(source))), KINDS)
        place = device if isinstance(device, torch.device) else choose_device(device)
        return cls.open(_replaced(given, {"device": place.type, **settings}), place)

    @classmethod
    def open(cls, given: Given[SamplingSettings], device: torch.device, default_vae: str | None = None) -> Pipeline:
        """Open the checkpoint that a script's settings name.

        Args:
            given: The settings.
            device: Where to compute.
            default_vae: Autoencoder for files of other code that are no release; None for that of published figures.

        Raises:
            UserError: For anything about the file or the settings that does not fit.
        """
        network, info, encoder = open_checkpoint(given, device, default_vae)
        return cls(network, info, encoder, given, open_guide(given.general, network, info, device))

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return getattr(self.network.config, "num_classes", 0) if "y" in self.network.conditioning else 0

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    def sample(
        self,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        *,
        null: Conditioning | None = None,
        count: int | None = None,
        batch_size: int | None = None,
        on_step: StepHook | None = None,
        **settings: object,
    ) -> Images:
        """Sample images or clips: those of sample_ddp.py with the same seed, labels, settings and batch size.

        Args:
            labels: Class of each image, for networks with labels.
            seed: Seed of the noise; image i has noise (seed, i).
            null: Unconditional rows for guidance; None for the network's own.
            count: Number of samples of a network without conditioning; others make one of each row.
            batch_size: Images at a time; None for all at once.
            on_step: Called as on_step(i, x, out) after each step; a tensor that it returns replaces x.
            **settings: Flags of sample.py by name: sampler, steps, guidance, caching, precision. Changed settings
                prepare a new run; the last few are kept. Tensors are conditioning of other networks, N rows in front.

        Returns:
            (N, H, W, C) uint8, or (N, F, H, W, C) of clips.

        Raises:
            UserError: For settings or conditioning that do not fit the network or each other.
        """
        tensors = {name: settings.pop(name) for name, value in [*settings.items()] if isinstance(value, Tensor)}
        given = tensors if labels is None else {"y": labels, **tensors}
        rows, count = check_rows(self.network.conditioning, self.num_classes, given, count)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        run, images, size = self.prepare(**settings), [], batch_size or count
        writer = writer_of(self.image_shape)
        for start in range(0, count, size):
            indices = batch_indices(start, size, count)
            second = None if null is None else take(null, indices)
            latents = self.denoise(run, seed, indices, take(rows, indices), null=second, on_step=on_step)
            images.append(writer.to_uint8(self.decode(latents, run)).cpu().numpy())
        return np.concatenate(images)[:count]

    def save_pretrained(
        self, folder: str | Path, *, sampling: Mapping[str, object] | None = None, **options: Any
    ) -> Path:
        """Save the network as a folder for `from_pretrained`, with a card.

        Args:
            folder: A new folder.
            sampling: Settings that samples of it have where nothing else is given, as for `sample`: sampler,
                num_sampling_steps, cfg_scale, guidance_interval. None leaves those of the checkpoint.
            **options: As for `sampling.publishing.save_folder`.

        Raises:
            UserError: If it cannot be written, the licence is against that of the weights that these came from, or the
                settings do not fit.
        """
        return save_folder(Path(folder), self.network, self._described(sampling), self.encoder, **options)

    def push_to_hub(self, repository: str, *, sampling: Mapping[str, object] | None = None, **options: Any) -> str:
        """Save the network and upload it to the Hugging Face hub; returns the address.

        Args:
            repository: "owner/name".
            sampling: As for `save_pretrained`.
            **options: As for `sampling.publishing.push`.

        Raises:
            UserError: Without a licence, against that of the weights that these came from, without a token or network,
                for a repository with other content, and if the settings do not fit.
        """
        return push(repository, self.network, self._described(sampling), self.encoder, **options)

    def _described(self, sampling: Mapping[str, object] | None) -> CheckpointInfo:
        """The checkpoint's description, with these settings as its preset."""
        if not sampling:
            return self.info
        if unknown := sorted(sampling.keys() - set(SAVED)):
            raise UserError(f"sampling: saved weights cannot bring {unknown[0]}, only {', '.join(SAVED)}")
        former, config = preset_of(self.info), self.prepare(**sampling).config
        if config.sampler is None or config.num_sampling_steps is None:
            raise UserError("sampling: the pipeline has a solver table, which cannot be saved; open it without one")
        preset = former._replace(
            sampler=config.sampler,
            steps=config.num_sampling_steps,
            cfg_scale=config.guidance.cfg_scale or 1.0,
            interval=config.guidance.guidance_interval,
            options=former.options if config.sampler == former.sampler else {},
        )
        return replace(self.info, preset=preset)

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> tuple[Conditioning, Conditioning]:
        """Encode prompts for `sample`, with the encoder that the checkpoint or `text_encoder` names, which is freed.

        Args:
            prompts: N prompts.
            negative_prompt: Prompt of the unconditional rows.

        Returns:
            Conditioning of N rows, "text" and "text_mask", and the same of unconditional rows.

        Raises:
            UserError: If the network takes no text, or the encoder cannot be had.
        """
        settings = replace(self._given.general.text, prompt=tuple(prompts), negative_prompt=negative_prompt)
        encoded = open_prompts(settings, self.network, self.info, self.device, prompts)
        assert encoded is not None and encoded.null is not None  # prompts are given, and encoded here
        return encoded.rows, encoded.null

    def prepare(self, strength: float = 1.0, /, **settings: object) -> PreparedRun:
        """Prepare the run of some settings, or find it prepared with them before.

        Args:
            strength: Share of the steps that are taken, in (0, 1]; below 1 for `denoise` from an image.
            **settings: As for `sample`.

        Raises:
            UserError: For settings that do not fit the checkpoint or each other.
        """
        for name in settings.keys() & OF_PIPELINE:
            raise UserError(f"{name}: belongs to the pipeline; give it to Pipeline.from_pretrained")
        given = self._given
        if settings.get("sampler", given.general.sampler) != given.general.sampler:
            given = Given(given.general, KINDS)  # settings of the former sampler go with it
        given = _replaced(given, settings)
        config, own = resolve(given, self.info, conditional=bool(self.network.conditioning))
        key = repr((config, own, strength))
        if key not in self._runs:
            flags = "" if config.sampler is None else given.prefix("sampler", config.sampler)
            self._runs[key] = prepare_run(
                self.network, self.info, self.process, config, own, flags, self.guide, strength
            )
        self._runs.move_to_end(key)
        if len(self._runs) > KEPT_RUNS:
            self._runs.popitem(last=False)
        return self._runs[key]

    def denoise(
        self,
        run: PreparedRun,
        seed: int,
        indices: Sequence[int],
        conditioning: Conditioning,
        *,
        null: Conditioning | None = None,
        on_step: StepHook | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Sample latents of the images with these absolute numbers; the same whatever else is in the batch.

        Args:
            run: From `prepare`.
            seed: Seed of the noise.
            indices: N image numbers; each has its own noise.
            conditioning: N rows.
            null: Unconditional rows; None for the network's own.
            on_step: As `sample_loop` takes it.
            edit: Images to start from, and to keep a part of; None starts from noise.

        Returns:
            (N, ..., h, w) float32.

        Raises:
            UserError: If the run is guided and there are no unconditional rows.
        """
        noise = ImageNoise(seed, indices, self.network.sample_shape, self.device)
        if null is None and run.takes_null:
            with error_prefix("null"):
                null = self.network.null_conditioning(len(indices))
        cond, second = (
            None if rows is None else {name: leaf.to(self.device) for name, leaf in rows.items()}
            for rows in (conditioning, null)
        )
        x = initial = noise.initial()
        if edit is not None:
            x, on_step = edit.start(run.sampler, initial), edit.keep(run.sampler, initial, on_step)
        return run.denoise(x, cond or {}, second, noise, on_step)

    @torch.no_grad()
    def encode(self, pixels: Tensor, seed: int = 0) -> Tensor:
        """Encode pixels (N, C, H, W), uint8 or float32 in [-1, 1], as latents (N, ..., h, w) float32.

        Of a stochastic encoder they are a sample, the same for the same seed and row.
        """
        if pixels.ndim == len(self.network.sample_shape):  # images, for a network of clips
            pixels = pixels.unsqueeze(1)
        raw, noise = self.encoder.encode_pixels(pixels.to(self.device)), None
        if self.encoder.stochastic:
            shape = self.encoder.latent_shape(tuple(pixels.shape[1:]))
            noise = row_noise("encoder", seed, 0, range(len(pixels)), shape, self.device)
        return self.encoder.to_latents(raw, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor, run: PreparedRun | None = None) -> Tensor:
        """Decode latents as pixels (N, C, H, W) or (N, F, C, H, W) float32, about [-1, 1].

        Args:
            latents: (N, ..., h, w); frames of clips are decoded like images, so many at a time.
            run: The run that they are from, which decides on TF32; None for the pipeline's settings.

        Raises:
            UserError: For images that are not finite.
        """
        config = self._given.general if run is None else run.config
        with distributed.tf32_inside(config.compute.allows_tf32):
            frames = latents.flatten(0, -4)  # of clips; images stay as they are
            parts = [self.encoder.decode(part) for part in frames.split(config.encoder.vae_batch_size)]
        pixels = torch.cat(parts)
        if len(self.image_shape) == 4:
            pixels = pixels.unflatten(0, latents.shape[:-3])
        if not torch.isfinite(pixels).all():
            decoded = bool(torch.isfinite(latents).all())
            source = f"--vae {self.info.encoder}" if decoded else f"--ckpt {self.info.source}"
            raise UserError(
                f"{source}: its images have NaN or infinity; are the weights damaged, or too large for bf16?"
            )
        return pixels


# Settings that a run cannot change
OF_PIPELINE = {
    "model",
    "device",
    "guide_ckpt",
    *CheckpointSettings.__dataclass_fields__,
    *EncoderSettings.__dataclass_fields__,
    *TextSettings.__dataclass_fields__,
}
OF_PIPELINE |= {flag.field.name for row in FAMILIES.values() for flag in flags_of(row.config).values()}


def _replaced(given: Given[SamplingSettings], settings: Mapping[str, object]) -> Given[SamplingSettings]:
    steps = settings.get("num_sampling_steps")
    return given.replace(**{**settings, **({"num_sampling_steps": str(steps)} if isinstance(steps, int) else {})})
