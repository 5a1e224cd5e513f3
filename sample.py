"""Sample a few images with a trained network and lay them out in one picture.

    python sample.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --class-labels 0 1 2 3
    python sample.py --ckpt DiT-XL-2-256x256 --sampler unipc --init-image photo.jpg --strength 0.6 --class-labels 207

Our own checkpoints hold everything that is needed; released ones are downloaded by their name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime  # noqa: F401  # first: it reports other packages named models
from data.image_folder import center_crop, decode_image
from data.pixels import Images, enlarge, grid, save_gif, save_png, to_picture, written_by
from models import ModelOutput
from runtime import distributed
from runtime.errors import UserError, error_prefix, run
from runtime.files import check_writable, remove_temporary
from runtime.settings import flag_name, setting
from sampling.config import GuidanceSettings, SamplingSettings, check_labels, parse_settings
from sampling.editing import Edit
from sampling.pipeline import Pipeline
from sampling.run import PreparedRun

PROGRAM = "sample.py"
OFFICIAL_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
SMALLEST = 64  # pixels; digits are too small to see and are enlarged to about this size


@dataclass(frozen=True, kw_only=True)
class PictureGuidance(GuidanceSettings):
    """Guidance with the official script's scale."""

    cfg_scale: float | None = setting(4.0, "guidance scale; 1: no guidance")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Labels, seed and output."""

    class_labels: tuple[int, ...] | None = setting(
        None, "labels of the images", shown="eight official classes, or one of each"
    )
    seed: int = setting(0, "seed of the noise")
    batch_size: int | None = setting(None, "images sampled at a time", shown="all of them")
    columns: int | None = setting(None, "images in a row of the picture", shown="4, or as many as fit best")
    output: Path = setting(Path("sample.png"), "the picture")
    trajectory: Path | None = setting(None, "also show the steps of sampling: a .png strip, or a .gif")
    trajectory_frames: int = setting(10, "moments of the trajectory that are shown")
    overwrite: bool = setting(False, "replace existing files and unfinished jobs with other settings")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("columns", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output {self.output}: must end in .png, .jpg or .webp")
        if self.trajectory is not None and self.trajectory.suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"--trajectory {self.trajectory}: must end in .png (a strip) or .gif")
        if self.trajectory == self.output:
            raise ValueError(f"--trajectory {self.trajectory}: is --output, too; give another name")
        if self.trajectory_frames < 2:
            raise ValueError(f"--trajectory-frames {self.trajectory_frames}: must be at least 2")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """An image to start from."""

    init_image: Path | None = setting(None, "start from this image, cropped to the network's size")
    strength: float | None = setting(None, "share of the steps that are taken from it", shown="0.6; 1 with --mask")
    mask: Path | None = setting(None, "keep the image where this one is black, and make anew where it is white")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("strength", "mask"):
            if self.init_image is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} {getattr(self, name)}: has no effect without --init-image")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"--strength {self.strength}: must be in (0, 1]")

    @property
    def chosen_strength(self) -> float:
        """Share of the steps that are taken."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.init_image is None or self.mask is not None else 0.6


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings):
    """Settings of sample.py."""

    image: ImageSettings = field(default_factory=ImageSettings)

    guidance: PictureGuidance = field(default_factory=PictureGuidance)
    picture: PictureSettings = field(default_factory=PictureSettings)


def read_image(path: Path, flag: str, pipeline: Pipeline, channels: int) -> Tensor:
    """Read an image (1, C, H, W) uint8, cropped to the size of the network's images.

    Raises:
        UserError: If it cannot be read.
    """
    height, width = pipeline.image_shape[-2:]
    with error_prefix(f"{flag} {path}"):
        try:
            image = center_crop(decode_image(path.read_bytes(), channels), (height, width))
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
    return torch.from_numpy(np.array(image)).view(1, height, width, channels).movedim(-1, 1)


def read_edit(pipeline: Pipeline, settings: ImageSettings) -> Edit | None:
    """Read the image to start from, and its mask; None for noise.

    Raises:
        UserError: If an image cannot be read.
    """
    if settings.init_image is None:
        return None
    clean = pipeline.encode(read_image(settings.init_image, "--init-image", pipeline, pipeline.image_shape[-3]))
    if settings.mask is None:
        return Edit(clean)
    mask = read_image(settings.mask, "--mask", pipeline, 1).to(pipeline.device)
    share = torch.nn.functional.adaptive_avg_pool2d(mask / 255, (clean.shape[-2], clean.shape[-1]))
    return Edit(clean, (share > 0.5).to(clean))


def sample(
    pipeline: Pipeline,
    prepared: PreparedRun,
    settings: PictureSettings,
    labels: Sequence[int],
    edit: Edit | None = None,
) -> list[Tensor]:
    """Sample latents (N, C, h, w) with a progress bar.

    Returns:
        Latents after as many evenly spaced steps as the trajectory shows, or after the last; the last ones are the
        result.
    """
    steps = len(prepared.table)
    frames = min(settings.trajectory_frames, steps) if settings.trajectory else 1
    shown = {steps - 1 - round(k * (steps - 1) / max(1, frames - 1)) for k in range(frames)}
    kept: dict[int, list[Tensor]] = {i: [] for i in sorted(shown)}
    batches = torch.arange(len(labels)).split(settings.batch_size or len(labels))
    with tqdm(total=steps * len(batches), disable=None, unit="step") as bar:

        def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
            bar.update()
            if i in shown:
                kept[i].append(x)

        for rows in batches:
            conditioning = {"y": torch.tensor(labels)[rows]}
            pipeline.denoise(prepared, settings.seed, rows.tolist(), conditioning, on_step=on_step, edit=edit)
    return [torch.cat(parts) for parts in kept.values()]


def check_replaceable(path: Path, flag: str, overwrite: bool) -> None:
    """Check before sampling that a picture can be written, and replaces none of another origin.

    Raises:
        UserError: Naming the flag.
    """
    check_writable(path, flag)
    remove_temporary(path)
    if path.exists() and not (overwrite or written_by(path, PROGRAM)):
        raise UserError(f"{flag} {path}: exists, and is no picture of {PROGRAM}; --overwrite replaces it")


def save_trajectory(moments: Sequence[Images], columns: int, path: Path) -> None:
    """Save a strip with a row an image and a column a moment; or an animation of the whole picture."""
    if path.suffix.lower() == ".gif":
        save_gif([grid(images, columns)[0] for images in moments], path, software=PROGRAM)
    else:
        rows = np.stack([image for images in zip(*moments, strict=True) for image in images])
        save_png(grid(rows, len(moments))[0], path, PROGRAM)


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample, write the picture."""
    given = parse_settings(SampleSettings, argv, PROGRAM, __doc__)
    settings = given.general.picture
    check_replaceable(settings.output, "--output", settings.overwrite)
    if settings.trajectory is not None:
        check_replaceable(settings.trajectory, "--trajectory", settings.overwrite)
    with distributed.world(given.general.compute.device) as world:
        pipeline = Pipeline.open(given, world.device, default_vae="mse")
        edit = read_edit(pipeline, given.general.image)
        prepared = pipeline.prepare(given.general.image.chosen_strength)
        official = OFFICIAL_LABELS if pipeline.num_classes == 1000 else range(pipeline.num_classes)
        labels = settings.class_labels or tuple(official)
        check_labels(labels, pipeline.num_classes)
        columns = settings.columns or (4 if len(labels) == len(OFFICIAL_LABELS) else min(len(labels), 10))
        factor = max(1, SMALLEST // pipeline.image_shape[-2])
        moments = [
            enlarge(to_picture(pipeline.decode(latents, prepared)).cpu().numpy(), factor)
            for latents in sample(pipeline, prepared, settings, labels, edit)
        ]
        save_png(grid(moments[-1], columns)[0], settings.output, PROGRAM)
        print(f"Saved {len(labels)} images to {settings.output}")
        if settings.trajectory is not None:
            save_trajectory(moments, columns, settings.trajectory)
            print(f"Saved {len(moments)} moments of them to {settings.trajectory}")


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
