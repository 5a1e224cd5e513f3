"""Draws a few images with a trained network and lays them out in one picture.

    python sample.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --class-labels 0 1 2 3
    python sample.py --ckpt DiT-XL-2-256x256 --sampler dpm++ --seed 1
    python sample.py --ckpt DiT-XL-2-256x256 --trajectory steps.gif

Our own checkpoints know everything that is needed; released ones are downloaded by their name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import Images, enlarge, grid, save_gif, save_png, to_picture
from models import ModelOutput
from runtime import distributed
from runtime.config import parse_config, setting
from runtime.errors import run
from runtime.files import check_writable
from sampling.config import SamplingConfig, check_labels
from sampling.pipeline import Pipeline

OFFICIAL_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
LOOKED_AT = 64  # digits are too small to look at: enlarged to about this many pixels


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """Settings of sample.py."""

    cfg_scale: float | None = setting(4.0, "guidance scale; 1 is none")
    class_labels: tuple[int, ...] | None = setting(None, "one image each; eight official classes, or one of each")
    seed: int = setting(0, "seed of the noise")
    columns: int | None = setting(None, "images per row of the picture; 4, or as many as fit best")
    output: Path = setting(Path("sample.png"), "the picture")
    trajectory: Path | None = setting(None, "also show how the images come about: a .png strip, or a .gif")
    trajectory_frames: int = setting(10, "moments of the trajectory that are shown")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        super().__post_init__()
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"--columns {self.columns}: must be at least 1")
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output {self.output}: must end in .png, .jpg or .webp")
        if self.trajectory is not None and self.trajectory.suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"--trajectory {self.trajectory}: must end in .png (a strip) or .gif")
        if self.trajectory_frames < 2:
            raise ValueError(f"--trajectory-frames {self.trajectory_frames}: must be at least 2")


def draw(pipeline: Pipeline[SampleConfig], labels: Sequence[int]) -> list[Tensor]:
    """Latents (N, C, h, w) of the images, shown with a progress bar.

    Returns:
        The last one being the result: after as many evenly spaced steps as the trajectory shows, or after the last.
    """
    config, steps = pipeline.config, len(pipeline.sampler.times)
    frames = min(config.trajectory_frames, steps) if config.trajectory else 1
    shown = {steps - 1 - round(k * (steps - 1) / max(1, frames - 1)) for k in range(frames)}
    kept: list[Tensor] = []
    with tqdm(total=steps, disable=None, unit="step") as bar:

        def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
            bar.update()
            if i in shown:
                kept.append(x)

        pipeline.denoise(config.seed, range(len(labels)), torch.tensor(labels), on_step)
    return kept


def save_trajectory(moments: Sequence[Images], columns: int, path: Path) -> None:
    """A strip with a row an image and a column a moment; or an animation of the whole picture."""
    if path.suffix.lower() == ".gif":
        save_gif([grid(images, columns)[0] for images in moments], path)
    else:
        rows = np.stack([image for images in zip(*moments, strict=True) for image in images])
        save_png(grid(rows, len(moments))[0], path)


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples, writes the picture."""
    config = parse_config(SampleConfig, argv, program="sample.py", description=__doc__.split("\n")[0])
    check_writable(config.output, "--output")
    if config.trajectory is not None:
        check_writable(config.trajectory, "--trajectory")
    with distributed.world(config.device) as world:
        pipeline = Pipeline(config, world.device, vae="mse")
        official = OFFICIAL_LABELS if pipeline.num_classes == 1000 else range(pipeline.num_classes)
        labels = config.class_labels or tuple(official)
        check_labels(labels, pipeline.num_classes)
        columns = config.columns or (4 if len(labels) == len(OFFICIAL_LABELS) else min(len(labels), 10))
        factor = max(1, LOOKED_AT // pipeline.image_shape[0])
        moments = [
            enlarge(to_picture(pipeline.decode(latents)).cpu().numpy(), factor) for latents in draw(pipeline, labels)
        ]
        save_png(grid(moments[-1], columns)[0], config.output)
        print(f"Saved {len(labels)} images to {config.output}")
        if config.trajectory is not None:
            save_trajectory(moments, columns, config.trajectory)
            print(f"Saved {len(moments)} moments of them to {config.trajectory}")


if __name__ == "__main__":
    sys.exit(run(main, "sample.py"))
