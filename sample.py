"""Draws a few images with a trained network and lays them out in one picture.

    python sample.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --class-labels 0 1 2 3
    python sample.py --ckpt DiT-XL-2-256x256.pt --cfg-scale 4.0 --seed 1

Our own checkpoints know their model, process and autoencoder; for official files the flags say it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.autoencoder import open_autoencoder
from data.pixels import enlarge, grid, save_png, to_picture
from diffusion import GaussianDiffusion, ImageNoise, create_diffusion, guided, sample_loop
from diffusion.sampling import Sampler
from models import ModelOutput, TimeConvention, create_model, family_of, model_config
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights, read_checkpoint
from runtime.config import flag_name, parse_config, setting
from runtime.errors import UserError, blame, run
from runtime.files import check_writable

# A new sampler is one row: how its flags make it, from a process, for a network of some time convention.
SAMPLERS: dict[str, Callable[[GaussianDiffusion, SamplingConfig, bool, TimeConvention], Sampler]] = {
    "ddpm": lambda process, config, clip, convention: process.ancestral(clip, convention=convention),
    "ddim": lambda process, config, clip, convention: process.ddim(config.eta, clip, convention=convention),
}
OFFICIAL_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
OFFICIAL_GUIDANCE_CHANNELS = 3  # the released samplers guide the first 3 of 4 latent channels


@dataclass(frozen=True)
class SamplingConfig:
    """Settings that say which images a checkpoint draws; shared by sample.py and sample_ddp.py."""

    ckpt: Path | None = setting(None, "checkpoint: ours, or an official .pt (required)")
    weights: str = setting("ema", "which weights of a training checkpoint", ("ema", "model"))
    model: str | None = setting(None, "name in the registry; our checkpoints know it (official: DiT-XL/2)")
    image_size: int | None = setting(None, "side in pixels; our checkpoints know it (official: 256)")
    num_classes: int | None = setting(None, "number of classes; our checkpoints know it (official: 1000)")
    vae: str | None = setting(None, "autoencoder: ema, mse, a local folder, or none; our checkpoints know it")
    sampler: str = setting("ddpm", "ancestral sampling, or DDIM", tuple(SAMPLERS))
    num_sampling_steps: str = setting("250", "step spec, such as 250, 10,15,20 or ddim50")
    eta: float = setting(0.0, "noise of DDIM: 0 none, 1 as much as DDPM")
    clip_denoised: bool | None = setting(
        None, "clamp predicted clean images to [-1, 1]; yes for pixels, no for latents"
    )
    cfg_scale: float = setting(4.0, "guidance scale; 1 is none")
    guidance_channels: int | None = setting(None, "guide this many leading channels; 3 for official files, else all")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    tf32: bool = setting(True, "TF32 matrix products on CUDA")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if self.ckpt is None:
            raise ValueError("--ckpt: required; give a checkpoint of train.py, or an official file")
        if not 1 <= self.cfg_scale < float("inf"):
            raise ValueError(f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"--eta {self.eta}: has an effect with --sampler ddim only")
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise ValueError(f"--guidance-channels {self.guidance_channels}: must be at least 1")
        with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
            create_diffusion(self.num_sampling_steps)


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """Settings of sample.py."""

    class_labels: tuple[int, ...] | None = setting(None, "one image each; eight official classes, or one of each")
    seed: int = setting(0, "seed of the noise")
    columns: int | None = setting(None, "images per row of the picture; 4, or as many as fit best")
    output: Path = setting(Path("sample.png"), "the picture")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        super().__post_init__()
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"--columns {self.columns}: must be at least 1")
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output {self.output}: must end in .png, .jpg or .webp")


class Pipeline:
    """A checkpoint made ready to draw images: network, process, sampler, guidance, autoencoder.

    Args:
        config: what to load and how to sample.
        device: where to compute.
        vae: autoencoder for checkpoints that do not name theirs.

    Attributes:
        name: the model's name.
        num_classes: number of classes.
        image_shape: (H, W, C) of the images.

    Raises:
        UserError: for anything about checkpoint and flags that does not fit.
    """

    def __init__(self, config: SamplingConfig, device: torch.device, vae: str) -> None:
        assert config.ckpt is not None  # __post_init__ saw to it
        checkpoint = read_checkpoint(config.ckpt, config.weights)
        facts = _facts(config, checkpoint, vae)
        self.name, self.num_classes = facts["model"].pop("name"), facts["model"]["num_classes"]
        self.vae: str = facts["vae"]
        with blame(f"--vae {self.vae}"):
            self._autoencoder = open_autoencoder(self.vae, facts["image_shape"][-1], device)
            self._latent_shape = self._autoencoder.latent_shape(facts["image_shape"])
        with blame(f"--model {self.name}" if checkpoint.meta is None else f"--ckpt {config.ckpt}"):
            shape = {"input_size": self._latent_shape[-1], "in_channels": self._latent_shape[0]}
            own = model_config(self.name, **facts["model"])
            decided = family_of(self.name).network.settings_from(checkpoint.weights, own)
            network = create_model(self.name, **{**facts["model"], **shape, **decided})
        load_weights(network, checkpoint.weights, f"--ckpt {config.ckpt} as {self.name}")
        network = network.to(device).eval().requires_grad_(False)
        channels, height, width = facts["image_shape"]
        self.image_shape = (height, width, channels)

        process = create_diffusion(
            config.num_sampling_steps, learn_sigma=network.out_channels != network.in_channels, **facts["process"]
        )
        clip = self.vae == "none" if config.clip_denoised is None else config.clip_denoised
        with blame(f"--eta {config.eta}"):
            self.sampler = SAMPLERS[config.sampler](process, config, clip, network.time_convention)
        self._network = network.for_sampling(self.sampler.times)
        self._scale = config.cfg_scale
        with blame(f"--cfg-scale {config.cfg_scale}"):
            self._null_class = network.null_class if config.cfg_scale > 1 else None
        preset = OFFICIAL_GUIDANCE_CHANNELS if checkpoint.meta is None else None
        self._channels = config.guidance_channels or preset
        self._device = device

    def __call__(self, seed: int, indices: Sequence[int], labels: Tensor, progress: bool = False) -> Tensor:
        """Draws the images with these absolute numbers; the same whoever else is in the batch.

        Args:
            seed: of the job.
            indices: N image numbers; each has noise of its own.
            labels: (N,) int64.
            progress: show a bar over the sampling steps.

        Returns:
            (N, C, H, W) float32 pixels, about [-1, 1].
        """
        noise = ImageNoise(seed, indices, self._latent_shape, self._device)
        denoise = guided(self._network, labels.to(self._device), self._null_class, self._scale, self._channels)
        with tqdm(total=len(self.sampler.times), disable=None if progress else True, unit="step") as bar:

            def count(i: int, x: Tensor, out: ModelOutput) -> None:
                bar.update()

            latents = sample_loop(denoise, self.sampler, noise.initial(), noise_fn=noise, on_step=count)
        with torch.no_grad():
            return self._autoencoder.decode(latents)


def _facts(config: SamplingConfig, checkpoint: Checkpoint, vae: str) -> dict[str, Any]:
    """Model, process, autoencoder and image shape: from the checkpoint where it knows, else from flags and defaults."""
    if checkpoint.meta is None:
        model = {"name": config.model or "DiT-XL/2", "num_classes": config.num_classes or 1000}
        size = config.image_size or 256
        return {"model": model, "process": {}, "vae": config.vae or vae, "image_shape": (3, size, size)}
    meta = checkpoint.meta
    model, shape = dict(meta["model"]), tuple(meta["data"]["image_shape"])
    process = {key: value for key, value in meta["process"].items() if key not in ("name", "learn_sigma")}
    if meta["process"]["name"] != "gaussian":
        raise UserError(f"--ckpt {config.ckpt}: trained under {meta['process']['name']!r}, a process unknown here")
    known = {"model": model["name"], "num_classes": model["num_classes"], "image_size": shape[-1]}
    for field, value in known.items():
        if getattr(config, field) not in (None, value):
            raise UserError(
                f"{flag_name(field)} {getattr(config, field)}: --ckpt {config.ckpt} was trained with {value}"
            )
    return {"model": model, "process": process, "vae": config.vae or meta["data"]["vae"], "image_shape": shape}


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Refuses labels that the network has no row for.

    Raises:
        UserError: naming the first.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"--class-labels {label}: the model has classes 0 to {num_classes - 1}")


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples, writes the picture."""
    config = parse_config(SampleConfig, argv, program="sample.py", description=__doc__.split("\n")[0])
    check_writable(config.output, "--output")
    with distributed.world(config.device) as world:
        distributed.allow_tf32(config.tf32)
        pipeline = Pipeline(config, world.device, vae="mse")
        official = OFFICIAL_LABELS if pipeline.num_classes == 1000 else range(pipeline.num_classes)
        labels = config.class_labels or official
        check_labels(labels, pipeline.num_classes)
        pixels = pipeline(config.seed, range(len(labels)), torch.tensor(labels), progress=True)
        images = to_picture(pixels).cpu().numpy()
        columns = config.columns or (4 if len(labels) == len(OFFICIAL_LABELS) else min(len(labels), 10))
        factor = max(1, 64 // images.shape[1])  # digits are too small to look at
        save_png(grid(enlarge(images, factor), columns)[0], config.output)
        print(f"Saved {len(labels)} images to {config.output}")


if __name__ == "__main__":
    sys.exit(run(main, "sample.py"))
