"""Encodes an image folder once, so that training need not: shards of posterior moments, for `--dataset latents`.

    torchrun --nproc-per-node 8 scripts/extract_latents.py --data-path /imagenet/train --output latents
    python train.py --dataset latents --data-path latents --model DiT-XL/2

Processes take whole shards, and batches are cut at fixed places inside a shard: on CPUs the bytes do not depend on how
many there are. The same command again makes what is missing. Encoding is float32 throughout.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from data.autoencoder import KLAutoencoder, open_autoencoder
from runtime.config import flag_name, parse_config, setting
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.image_folder import ImageFolder, UnreadableImageError
from data.latents import (
    FORMAT,
    INDEX,
    MANIFEST,
    Encoded,
    finished_shard,
    is_finite,
    remove_partial,
    remove_shards,
    shard_files,
    write_index,
    write_json,
    write_shard,
)
from runtime import distributed
from runtime.distributed import World
from runtime.errors import UserError, blame, run
from runtime.files import check_writable

PROGRAM = "extract_latents.py"
WEEK = 7 * 24 * 3600.0  # a rank may wait for a whole shard of another, hours on a CPU; a dead one torchrun reports

# What decides the bytes, and the flag behind it
FLAGS = {
    "classes": "--data-path",
    "images": "--data-path",
    "paths_sha256": "--data-path",
    "image_shape": "--image-size",
    "encoder_sha256": "--vae",
    "scale": "--vae",
    "moments_shape": "--both-flips",
    "batch_size": "--batch-size",
    "shard_size": "--shard-size",
}


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of extract_latents.py."""

    data_path: Path | None = setting(None, "root of an image folder: one folder per class")
    output: Path = setting(Path("latents"), "folder for the shards")
    vae: str = setting("ema", "autoencoder: ema, mse, or a local folder")
    image_size: int = setting(256, "side of the images in pixels")
    both_flips: bool = setting(True, "store every image plain and mirrored (twice the bytes)")
    batch_size: int = setting(32, "images per process at a time")
    shard_size: int = setting(10_240, "images a shard; ImageNet then makes 254 files")
    strict: bool = setting(False, "stop at an image that cannot be read, instead of leaving it out and naming it")
    overwrite: bool = setting(False, "start anew, deleting the shards that are there")
    num_workers: int = setting(4, "loader processes per rank")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if self.data_path is None:
            raise ValueError("--data-path: needed, the root of an image folder")
        if self.vae == "none":
            raise ValueError("--vae none: pixels need no extraction; train on the image folder itself")
        for name in ("image_size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"--num-workers {self.num_workers}: must not be negative")


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before the first image."""

    config: ExtractConfig
    images: ImageFolder
    autoencoder: KLAutoencoder
    manifest: dict[str, Any]

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-len(self.images) // self.config.shard_size)

    def batches(self, number: int) -> list[range]:
        """The images of a shard, cut into batches: a function of the number alone."""
        start = number * self.config.shard_size
        stop = min(start + self.config.shard_size, len(self.images))
        return [range(i, min(i + self.config.batch_size, stop)) for i in range(start, stop, self.config.batch_size)]


def set_up(config: ExtractConfig, device: torch.device) -> Job:
    """Loads the autoencoder and lists the images; nothing is written yet."""
    assert config.data_path is not None
    with blame(f"--vae {config.vae}"):
        autoencoder = open_autoencoder(config.vae, config.image_size, device)
    assert isinstance(autoencoder, KLAutoencoder)
    channels = autoencoder.image_channels
    with blame(f"--image-size {config.image_size}"):
        latent_channels, *sides = autoencoder.latent_shape((channels, config.image_size, config.image_size))
    with blame(f"--data-path {config.data_path}"):
        images = ImageFolder(config.data_path, config.image_size, channels=channels, flip=False)
    paths = "\n".join(map(images.path, range(len(images))))
    manifest = {
        "format": FORMAT,
        "images": len(images),
        "paths_sha256": hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest(),
        "classes": images.classes,
        "image_shape": list(images.image_shape),
        "vae": config.vae,
        "encoder_sha256": autoencoder.encoder_sha256(),
        "scale": autoencoder.scale,
        "moments_shape": [2 if config.both_flips else 1, 2 * latent_channels, *sides],
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
    }
    return Job(config, images, autoencoder, manifest)


def check_settings(job: Job) -> None:
    """Refuses to continue what was begun with other settings.

    Raises:
        UserError: naming the first flag that differs.
    """
    path = job.config.output / MANIFEST
    way_out = "give the same settings, another --output, or --overwrite to start anew"
    if not path.exists():
        if found := shard_files(job.config.output):
            raise UserError(f"--output {job.config.output}: {found[0].name} is there, but no {MANIFEST}; {way_out}")
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"--output {job.config.output}: {path} is not JSON; {way_out}") from error
    if not isinstance(begun, dict) or begun.get("format") != FORMAT:
        raise UserError(f"--output {job.config.output}: {path} is of another format; {way_out}")
    for name, flag in FLAGS.items():
        ours, theirs = job.manifest[name], begun.get(name)
        if ours != theirs:
            shown = f"{name} {ours} instead of {theirs}"
            shown = f"other {name}" if name in ("classes", "paths_sha256", "encoder_sha256") else shown
            raise UserError(f"{flag}: {path} was begun differently ({shown}); {way_out}")


def check_finished(job: Job) -> list[int]:
    """Numbers of the shards still to be made.

    Raises:
        UserError: with --strict, if a finished shard left an image out.
    """
    pending = []
    for number in range(job.shard_count):
        description = finished_shard(job.config.output, number)
        if description is None:
            pending.append(number)
        elif job.config.strict and description["skipped"]:
            path, reason = description["skipped"][0]
            raise UserError(
                f"--strict: {path} could not be read ({reason}); replace or remove it, and delete shard {number:05d}"
            )
    return pending


def fail(world: World, message: str) -> NoReturn:
    """Ends this process by a mistake that only it has met; `run` itself would stay silent on other ranks than 0."""
    if not world.is_main:
        print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


class Decoded(NamedTuple):
    """A batch on its way from a loader process.

    Attributes:
        images: (n, C, H, W) uint8, those that could be read.
        indices: n places in the image folder.
        skipped: (path, reason) of the others.
        fatal: the first error that must end the work, in one line; empty if there is none.
    """

    images: Tensor
    indices: list[int]
    skipped: list[tuple[str, str]]
    fatal: str


class DecodedBatches(Dataset[Decoded]):
    """Batches of an image folder, by ranges of indices; errors come back as values, so that no worker dies of one."""

    def __init__(self, images: ImageFolder, batches: list[range], strict: bool) -> None:
        self._images, self._batches, self._strict = images, batches, strict

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __getitem__(self, position: int) -> Decoded:
        """Decodes one batch."""
        images: list[Tensor] = []
        result = Decoded(torch.empty(0), [], [], "")
        for index in self._batches[position]:
            try:
                images.append(self._images.read(index))
                result.indices.append(index)
            except UnreadableImageError as error:
                result.skipped.append((self._images.path(index), error.reason))
                if self._strict:
                    return result._replace(fatal=f"--strict: {error}")
            except OSError as error:
                return result._replace(fatal=f"--data-path: {error}")
        return result._replace(images=torch.stack(images)) if images else result


def encode(job: Job, batch: Decoded, world: World) -> Encoded:
    """Moments of a batch, plain and (if wanted) mirrored."""
    if batch.fatal:
        fail(world, batch.fatal)
    flips, *shape = job.manifest["moments_shape"]
    paths = [job.images.path(i) for i in batch.indices]
    moments = np.empty((len(paths), flips, *shape), np.float16)
    images = batch.images.to(world.device)
    for flip in range(flips if paths else 0):
        encoded = job.autoencoder.moments(images.flip(-1) if flip else images)
        moments[:, flip] = encoded.half().cpu().numpy()
    for path, row in zip(paths, moments, strict=True):
        if not is_finite(row):
            fail(world, f"--vae {job.config.vae}: the moments of {path} are not finite in float16")
    return Encoded(moments, [job.images.label(i) for i in batch.indices], paths, batch.skipped)


def extract(job: Job, pending: list[int], world: World) -> None:
    """Makes every world.size-th of the pending shards."""
    mine = pending[world.rank :: world.size]
    if not mine:
        return  # no loader processes for nothing
    loader: DataLoader[Decoded] = DataLoader(
        DecodedBatches(job.images, [batch for number in mine for batch in job.batches(number)], job.config.strict),
        batch_size=None,
        num_workers=job.config.num_workers,
    )
    batches = iter(tqdm(loader, disable=None if world.is_main else True, unit="batch"))
    for number in mine:
        write_shard(job.config.output, number, job.manifest["moments_shape"], encode_shard(job, number, batches, world))


def encode_shard(job: Job, number: int, batches: Iterator[Decoded], world: World) -> Iterator[Encoded]:
    """Takes a shard's batches from the stream, and encodes them."""
    for _ in job.batches(number):
        yield encode(job, next(batches), world)


def begin(job: Job) -> None:
    """Prepares the output folder; by one process, before the others write."""
    output = job.config.output
    if job.config.overwrite:
        remove_shards(output)
    remove_partial(output)
    if not (output / MANIFEST).exists():
        write_json(output / MANIFEST, job.manifest)


def finish(job: Job) -> None:
    """Writes the index and says what came of it; by one process, after all others."""
    with blame(f"--output {job.config.output}"):
        index = write_index(job.config.output, job.shard_count)
    for number in range(job.shard_count if index["skipped"] else 0):
        for path, reason in (finished_shard(job.config.output, number) or {})["skipped"]:
            print(f"{PROGRAM}: left out {path}: {reason}", file=sys.stderr)
    print(f"Extracted {index['count']:,} images to {job.config.output}, left out {index['skipped']:,}")
    if not index["count"]:
        raise UserError(f"--data-path {job.config.data_path}: none of its images can be read")


def main(argv: Sequence[str]) -> None:
    """Parses flags, encodes on all processes, writes the index."""
    config = parse_config(ExtractConfig, argv, program=PROGRAM, description=__doc__.split("\n")[0])
    with distributed.world(config.device, timeout_seconds=WEEK) as world:
        distributed.allow_tf32(False)
        job = set_up(config, world.device)
        if not config.overwrite:
            check_settings(job)
        check_writable(config.output / INDEX, "--output")
        distributed.barrier()  # all have read the manifest
        if world.is_main:
            begin(job)
        distributed.barrier()
        pending = check_finished(job)
        distributed.barrier()  # all have the same list, and nobody has begun
        extract(job, pending, world)
        distributed.barrier()
        if world.is_main:
            finish(job)
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
