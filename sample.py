"""Sample a few images with a trained network and lay them out in one picture; or clips, which are animated, too.

    python sample.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --class-labels 0 1 2 3
    python sample.py --ckpt DiT-XL-2-256x256 --sampler unipc --init-image photo.jpg --strength 0.6 --class-labels 207

Our own checkpoints hold everything that is needed; released ones are downloaded by their name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime  # noqa: F401  # first: it reports other packages named models
from data.image_folder import center_crop, decode_image
from data.pixels import GAP, Images, enlarge, save_gif, save_png, to_picture, written_by
from data.writers import Writer
from diffusion.sampling import StepHook
from models import ModelOutput
from runtime import distributed
from runtime.errors import UserError, error_prefix, run
from runtime.files import check_writable, remove_temporary
from runtime.settings import flag_name, setting
from sampling.clips import ClipSettings
from sampling.config import GuidanceSettings, SamplingSettings, check_labels, check_unlabelled, parse_settings
from sampling.editing import Edit
from sampling.picture_note import write_note
from sampling.pipeline import Pipeline
from sampling.plan import Plan
from sampling.prompts import Prompts, open_prompts
from sampling.run import PreparedRun

PROGRAM = "sample.py"
OFFICIAL_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
MOMENT, LAST_MOMENT = 120, 2000  # milliseconds for which a trajectory shows each moment
SMALLEST = 64  # pixels; digits are too small to see and are enlarged to about this size


@dataclass(frozen=True, kw_only=True)
class PictureGuidance(GuidanceSettings):
    """Guidance with the official script's scale."""

    default_scale: ClassVar[float | None] = 4.0

    cfg_scale: float | None = setting(None, "guidance scale; 1: no guidance", shown="4.0; 1 without labels")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Labels, seed and output."""

    class_labels: tuple[str, ...] | None = setting(
        None, "classes of the images, by number or by name", shown="eight official classes, or one of each"
    )
    num_samples: int | None = setting(
        None, "number of samples of a network without labels; prompts are taken in turn", shown="8; one of each prompt"
    )
    seed: int = setting(0, "seed of the noise")
    batch_size: int | None = setting(None, "images sampled at a time", shown="all of them")
    columns: int | None = setting(None, "images in a row of the picture", shown="4, or as many as fit best")
    output: Path = setting(Path("sample.png"), "the picture; of clips with their frames, and a GIF of that name")
    trajectory: Path | None = setting(None, "also show the steps of sampling: a .png strip, or a .gif")
    trajectory_frames: int = setting(10, "moments of the trajectory that are shown")
    overwrite: bool = setting(False, "replace existing files and unfinished jobs with other settings")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("columns", "batch_size", "num_samples"):
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
    clips: ClipSettings = field(default_factory=ClipSettings)


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
        UserError: If an image cannot be read, or the network makes clips.
    """
    if settings.init_image is None:
        return None
    if len(pipeline.image_shape) != 3:
        raise UserError(f"--init-image {settings.init_image}: is an image, and the network of --ckpt makes clips")
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
    plan: Plan,
    edit: Edit | None = None,
    watch: StepHook | None = None,
) -> list[Tensor]:
    """Sample latents (N, ..., C, h, w) with a progress bar.

    Args:
        pipeline: Samples.
        prepared: From the pipeline.
        settings: Seed, batches and trajectory.
        plan: Labels or prompts of the N samples.
        edit: Images to start from.
        watch: Called as watch(i, x, out) after each step of a batch; what it returns is not used.

    Returns:
        Latents after as many evenly spaced steps as the trajectory shows, or after the last; the last ones are the
        result.
    """
    steps = len(prepared.table)
    frames = min(settings.trajectory_frames, steps) if settings.trajectory else 1
    shown = {steps - 1 - round(k * (steps - 1) / max(1, frames - 1)) for k in range(frames)}
    kept: dict[int, list[Tensor]] = {i: [] for i in sorted(shown)}
    count = len(plan.noise)
    batches = torch.arange(count).split(settings.batch_size or count)
    with tqdm(total=steps * len(batches), disable=None, unit="step") as bar:

        def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
            bar.update()
            if watch is not None:
                watch(i, x, out)
            if i in shown:
                kept[i].append(x)

        for rows in batches:
            indices = rows.tolist()
            conditioning, null = plan.conditioning(indices)
            pipeline.denoise(prepared, settings.seed, indices, conditioning, null=null, on_step=on_step, edit=edit)
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


def overviews(writer: Writer, settings: PictureSettings, clips: ClipSettings) -> tuple[Path, ...]:
    """Files that show all samples.

    Raises:
        UserError: If one cannot be written, would replace a file of another origin, or is the trajectory's.
    """
    more = (settings.output.with_suffix(".mp4"),) if clips.save_mp4 else ()
    paths = (*writer.overviews(settings.output), *more)
    for path in paths[1:]:
        if path == settings.trajectory:
            raise UserError(f"--trajectory {path}: is written with --output {settings.output}; give another name")
        check_replaceable(path, "--output", settings.overwrite)
    return paths


def choose_labels(
    settings: PictureSettings, num_classes: int, names: Sequence[str] | None = None
) -> tuple[int, ...] | None:
    """Labels of the samples; None for a network that takes none.

    Args:
        settings: Settings of the picture.
        num_classes: Number of the network's classes.
        names: Their names, if the checkpoint has them.

    Raises:
        UserError: For labels or names that the network does not have.
    """
    if num_classes == 0:
        check_unlabelled({"--class-labels": settings.class_labels})
        return None
    if settings.num_samples is not None:
        raise UserError(f"--num-samples {settings.num_samples}: the network takes labels; give --class-labels")
    labels = tuple(find_label(text, num_classes, names or ()) for text in settings.class_labels or ())
    labels = labels or (OFFICIAL_LABELS if num_classes == 1000 else tuple(range(num_classes)))
    check_labels(labels, num_classes)
    return labels


def plan_samples(settings: PictureSettings, pipeline: Pipeline, prompts: Prompts | None) -> Plan:
    """Labels or prompts of all samples.

    Raises:
        UserError: As `choose_labels`.
    """
    labels = choose_labels(settings, pipeline.num_classes, pipeline.info.classes)
    if labels is not None:
        return Plan(torch.tensor(labels), range(len(labels)))
    count = settings.num_samples or (len(OFFICIAL_LABELS) if prompts is None else prompts.size)
    return Plan(None, range(count), prompts)


def find_label(text: str, num_classes: int, names: Sequence[str]) -> int:
    """Find the label of a class that is given by its number or its name.

    Raises:
        UserError: With names that are close to an unknown one.
    """
    try:
        return names.index(text) if text in names and not text.isdecimal() else int(text)
    except ValueError:
        close = get_close_matches(text, names) or names[:8]
        known = f"close to it, or the first: {', '.join(close)}" if names else "the checkpoint has no names"
        number = f"give a number of 0 to {num_classes - 1}"
        raise UserError(f"--class-labels {text}: no class of this name ({known}); {number}, or a name") from None


def save_trajectory(moments: Sequence[Images], columns: int, path: Path, writer: Writer) -> None:
    """Save a strip with a row an image and a column a moment, of clips with a row a moment; or an animated picture."""
    if path.suffix.lower() == ".gif":
        durations = [MOMENT] * (len(moments) - 1) + [LAST_MOMENT]
        save_gif([writer.sheet(samples, columns) for samples in moments], path, durations, PROGRAM)
    else:
        rows = np.stack([sample for samples in zip(*moments, strict=True) for sample in samples])
        save_png(writer.sheet(rows, len(moments)), path, PROGRAM)


class Made(NamedTuple):
    """Samples, ready to be written.

    Attributes:
        moments: Samples (N, ..., H, W, C) uint8 after as many steps as the trajectory shows; the last is the result.
        columns: Samples in a row of the picture.
        captions: Texts under them; none without prompts.
        labels: Their classes; none without labels.
        note: Settings that make them again, for their files.
    """

    moments: list[Images]
    columns: int
    captions: list[str]
    labels: list[int]
    note: str = ""


def make(pipeline: Pipeline, config: SampleSettings, texts: Sequence[str], watch: StepHook | None = None) -> Made:
    """Sample what the settings ask for.

    Args:
        pipeline: Opened with the settings.
        config: The settings.
        texts: Their prompts.
        watch: Called as watch(i, x, out) after each step of a batch.

    Raises:
        UserError: For settings that do not fit the network or each other.
    """
    settings = config.picture
    edit = read_edit(pipeline, config.image)
    prepared = pipeline.prepare(config.image.chosen_strength)
    prompts = open_prompts(
        config.text, pipeline.network, pipeline.info, pipeline.device, texts, guided=prepared.takes_null
    )
    plan = plan_samples(settings, pipeline, prompts)
    count, labels = len(plan.noise), [] if plan.labels is None else plan.labels.tolist()
    captions = [] if prompts is None or not prompts.texts else [prompts.text_of(i) for i in range(count)]
    moments = [shown(pipeline, x, prepared) for x in sample(pipeline, prepared, settings, plan, edit, watch)]
    return Made(moments, columns_of(settings, count), captions, labels, write_note(PROGRAM, pipeline, prepared, labels))


def columns_of(settings: PictureSettings, count: int) -> int:
    """Samples in a row of the picture: as asked for, four of the official eight, or up to ten."""
    return settings.columns or (4 if count == len(OFFICIAL_LABELS) else min(count, 10))


def shown(pipeline: Pipeline, latents: Tensor, prepared: PreparedRun | None = None) -> Images:
    """Decode latents as pictures (N, ..., H, W, C) uint8; tiny ones are enlarged."""
    factor = max(1, SMALLEST // pipeline.image_shape[-2])
    return enlarge(to_picture(pipeline.decode(latents, prepared)).cpu().numpy(), factor)


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample, write the picture."""
    given = parse_settings(SampleSettings, argv, PROGRAM, __doc__)
    settings, texts = given.general.picture, given.general.text.read()
    check_replaceable(settings.output, "--output", settings.overwrite)
    if settings.trajectory is not None:
        check_replaceable(settings.trajectory, "--trajectory", settings.overwrite)
    with distributed.world(given.general.compute.device) as world:
        pipeline = Pipeline.open(given, world.device, default_vae="mse")
        writer = given.general.clips.writer(pipeline.image_shape, pipeline.info.path)
        paths = overviews(writer, settings, given.general.clips)
        made = make(pipeline, given.general, texts)
        for path in paths:
            writer.save(
                made.moments[-1], path, made.columns, gap=GAP, software=PROGRAM, texts=made.captions, note=made.note
            )
        names = pipeline.info.classes or ()
        named = dict.fromkeys(f"{i} {names[i]}" for i in made.labels if names and names[i] != str(i))
        classes = f"; classes: {', '.join(named)}" if named else ""
        count = len(made.moments[-1])
        plural = "" if count == 1 else "s"
        print(f"Saved {count} {writer.unit}{plural} to {', '.join(map(str, paths))}{classes}")
        if settings.trajectory is not None:
            save_trajectory(made.moments, made.columns, settings.trajectory, writer)
            print(f"Saved {len(made.moments)} moments of them to {settings.trajectory}")


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
