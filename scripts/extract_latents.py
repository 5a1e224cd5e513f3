"""Encode a folder of images or videos once, for training with `--dataset latents`.

    torchrun --nproc-per-node 8 scripts/extract_latents.py --data-path /imagenet/train --output latents
    python train.py --dataset latents --data-path latents --model DiT-XL/2
    python scripts/extract_latents.py --dataset videofolder --data-path videos --num-frames 16 --output latents

Of videos all clips are stored that follow each other without a common frame; there, --shard-size counts clips.
Each process makes whole shards, and a shard is cut into batches at fixed positions: on CPUs the bytes do not depend on
the number of processes. The same command again makes only what is missing. Encoding is float32 throughout, unless
--vae-precision bf16 asks for less.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import COLUMNS, open_dataset
from data.caption_files import NULL, finished_text, write_text
from data.captions import check_captions, read_captions
from data.clip_settings import FRAMES, ClipSettings
from data.clip_windows import ClipWindows
from data.columns import ColumnSettings
from data.decoded_batches import Decoded, DecodedBatches
from data.encoders import FP32, PRECISIONS, Encoder, open_encoder
from data.image_folder import EncodedImages
from data.latent_files import (
    INDEX,
    MANIFEST,
    PART,
    Encoded,
    Json,
    finished_shard,
    is_finite,
    remove_partial,
    remove_shards,
    write_shard,
)
from data.latent_manifest import check_ranks, check_settings, make_manifest
from data.latent_parts import index_store, write_part
from data.text_encoders import TextEncoder, default_length, open_text_encoder
from data.words import Words
from runtime import distributed
from runtime.command_line import parse_config
from runtime.devices import DeviceName, check_mps, slow_bf16
from runtime.distributed import World
from runtime.errors import UserError, error_prefix, is_first, run
from runtime.files import check_writable
from runtime.json_file import write_json
from runtime.locks import NAME as LOCK
from runtime.locks import locked
from runtime.settings import flag_name, setting
from runtime.shards import Shard
from runtime.stores import check_store, fetch, is_there, staged, upload

PROGRAM = "extract_latents.py"
WEEK = 7 * 24 * 3600.0  # a rank may wait for a whole shard of another, hours on a CPU; torchrun reports a dead one


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of extract_latents.py."""

    data_path: Path | None = setting(
        None, "root of images or videos, one folder per class; tables or shards", remote=True
    )
    dataset: Literal["imagefolder", "videofolder", "huggingface", "webdataset"] = setting(
        "imagefolder", "images of a folder, of tables or shards, or clips of videos"
    )
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    num_frames: int | None = setting(None, "frames of a clip", shown=str(FRAMES))
    clips: ClipSettings = field(default_factory=ClipSettings)
    output: Path = setting(Path("latents"), "folder for the shards", remote=True)
    vae: str = setting("ema", "autoencoder: ema, mse, or a local folder of diffusers")
    vae_precision: Literal["fp32", "bf16"] = setting(
        FP32, "of the autoencoder; bf16 decodes about three times as fast, and rounds latents"
    )
    captions: str | None = setting(
        None, "captions to store encoded: a .json or .csv of paths and captions, or txt for a .txt next to each file"
    )
    text_encoder: str | None = setting(
        None, "encoder of the captions: a folder of diffusers or repository on the hub with a T5, or words"
    )
    text_length: int | None = setting(
        None, "tokens of a caption of a T5: it is cut or filled up", shown="120; words has 8"
    )
    image_size: tuple[int, ...] = setting((256,), "side of square images in pixels, or height and width")
    both_flips: bool = setting(True, "store every image plain and mirrored (twice the bytes)")
    batch_size: int = setting(32, "images or frames per batch, on each process; at least one clip")
    shard_size: int = setting(10_240, "images per shard; ImageNet makes 254 files of the default")
    shard: str | None = setting(
        None, "make this part only, such as 1/3 of the store; scripts/merge.py puts parts together", shown="all"
    )
    strict: bool = setting(False, "stop at an image that cannot be read, instead of skipping and naming it")
    overwrite: bool = setting(False, "delete the shards in the output folder first")
    num_workers: int = setting(4, "data loading processes per rank")
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.data_path is None:
            raise ValueError("--data-path: needed, the root of an image folder, or tables or shards")
        if self.dataset != "videofolder" and (self.num_frames is not None or self.clips != ClipSettings()):
            raise ValueError(
                "--num-frames, --frame-interval, --clip-window, --clip-crop: are for --dataset videofolder"
            )
        self.columns.check_used(self.dataset in COLUMNS, f"--dataset {' or '.join(COLUMNS)}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"--num-frames {self.num_frames}: must be at least 1")
        if not 1 <= len(self.image_size) <= 2:
            raise ValueError(f"--image-size {self.image_size}: give one side, or height and width")
        if self.vae == "none":
            raise ValueError("--vae none: pixels need no extraction; train on the image folder itself")
        if min(self.image_size) < 1:
            raise ValueError(f"--image-size {min(self.image_size)}: must be at least 1")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if (self.captions is None) != (self.text_encoder is None):
            given, needed = ("captions", "text_encoder") if self.captions else ("text_encoder", "captions")
            raise ValueError(f"{flag_name(given)} {getattr(self, given)}: needs {flag_name(needed)}")
        if self.text_length is not None:
            if self.text_length < 1:
                raise ValueError(f"--text-length {self.text_length}: must be at least 1")
            if self.text_encoder == Words.name and self.text_length != Words.length:
                raise ValueError(f"--text-length {self.text_length}: words has {Words.length} tokens; leave it out")
        if self.shard is not None:
            Shard.parse(self.shard)
        if self.num_workers < 0:
            raise ValueError(f"--num-workers {self.num_workers}: must not be negative")
        check_mps(self.device, {"--vae-precision bf16": self.vae_precision != FP32})


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before the first image."""

    config: ExtractConfig
    images: EncodedImages | ClipWindows
    encoder: Encoder
    row_shape: tuple[int, ...]  # flips, then the shape of raw latents
    manifest: Json  # all settings that fix the bytes
    numbers: range  # of the shards to be made here
    text_encoder: TextEncoder | None = None
    captions: dict[str, str] = field(default_factory=dict)  # by path

    @property
    def last(self) -> str:
        """Name of the file that is written last."""
        return PART if self.config.shard else INDEX

    def batches(self, number: int) -> list[range]:
        """Images of a shard, cut into batches."""
        start = number * self.config.shard_size
        stop = min(start + self.config.shard_size, len(self.images))
        size = max(1, self.config.batch_size // math.prod(self.images.image_shape[:-3]))
        return [range(i, min(i + size, stop)) for i in range(start, stop, size)]


def set_up(config: ExtractConfig, device: torch.device) -> Job:
    """Load the encoder and list the images, without writing anything."""
    assert config.data_path is not None
    size = config.image_size[0], config.image_size[-1]
    config = replace(config, data_path=fetch(config.data_path, "--data-path"))
    assert config.data_path is not None
    check_sources(config, config.data_path)  # before an autoencoder is downloaded
    with error_prefix(f"--vae {config.vae}"):
        encoder = open_encoder(config.vae, (3, *size), device, PRECISIONS[config.vae_precision])
    if config.vae_precision != FP32 and (slow := slow_bf16(device, "--vae-precision")) and is_first():
        print(f"warning: {slow}", file=sys.stderr)
    channels = encoder.image_channels
    with error_prefix("--image-size"):
        encoder.raw_shape((channels, *size))
    with error_prefix(f"--data-path {config.data_path}"):
        images = open_images(config, size, channels)
    raw_shape = encoder.raw_shape(images.image_shape)
    row_shape = (2 if config.both_flips else 1, *raw_shape)
    text_encoder, captions, text = open_captions(config, images, device)
    manifest = make_manifest(images, encoder, row_shape, config.batch_size, config.shard_size, text)
    numbers = range(-(-len(images) // config.shard_size))
    if config.shard is not None:
        numbers = Shard.parse(config.shard).range(len(numbers), f"files of {config.shard_size:,} (--shard-size)")
    return Job(config, images, encoder, row_shape, manifest, numbers, text_encoder, captions)


def check_sources(config: ExtractConfig, data_path: Path) -> None:
    """Check that folder and captions can be read; a UserError if not."""
    if config.dataset not in COLUMNS and not data_path.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    if config.captions is not None:
        with error_prefix(f"--captions {config.captions}"):
            check_captions(config.captions)


def open_captions(
    config: ExtractConfig, images: EncodedImages | ClipWindows, device: torch.device
) -> tuple[TextEncoder | None, dict[str, str], Json | None]:
    """Read all captions and load their encoder; none without captions.

    Returns:
        The encoder, the captions by path, and the description of both for the manifest.
    """
    if config.captions is None or config.text_encoder is None:
        return None, {}, None
    assert config.data_path is not None
    paths = [images.path(i) for i in range(len(images))]
    with error_prefix(f"--captions {config.captions}"):
        captions = dict(zip(paths, read_captions(config.captions, config.data_path, paths), strict=True))
    with error_prefix(f"--text-encoder {config.text_encoder}"):
        length = config.text_length or default_length(config.text_encoder)
        encoder = open_text_encoder(config.text_encoder, length, device)
    with error_prefix(f"--captions {config.captions}"):
        cut = sum(encoder.read_part(caption) is not None for caption in captions.values())
    if cut and is_first():
        print(f"warning: {cut} captions are longer than {encoder.length} tokens, and are cut", file=sys.stderr)
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    return encoder, captions, {"encoder": encoder.describe(), "captions_sha256": digest}


def open_images(config: ExtractConfig, size: tuple[int, int], channels: int) -> EncodedImages | ClipWindows:
    """The images or clips of the folder; a ValueError if there are none."""
    assert config.data_path is not None
    if config.dataset != "videofolder":
        captioned = config.captions is not None
        images = open_dataset(
            config.dataset, config.data_path, size, channels, flip=False, columns=config.columns, captioned=captioned
        )
        assert isinstance(images, EncodedImages)
        return images
    frames, settings = config.num_frames or FRAMES, config.clips
    return ClipWindows(
        config.data_path, size, frames=frames, settings=settings, channels=channels, strict=config.strict
    )


def check_finished(job: Job) -> list[int]:
    """Numbers of the shards still to be made.

    Raises:
        UserError: With --strict, if an image is missing from a finished shard.
    """
    pending = []
    for number in job.numbers:
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
    """End this process by its own error; `run` prints errors of rank 0 only."""
    if not world.is_main:
        print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


def encode(job: Job, batch: Decoded, world: World) -> Encoded:
    """Raw latents of a batch, plain and, if both flips are stored, mirrored."""
    if batch.fatal:
        fail(world, batch.fatal)
    paths = [job.images.path(i) for i in batch.indices]
    raw = np.empty((len(paths), *job.row_shape), np.float16)
    images = batch.images.to(world.device)
    for flip in range(job.row_shape[0] if paths else 0):
        encoded = job.encoder.encode_pixels(images.flip(-1) if flip else images)
        raw[:, flip] = encoded.half().cpu().numpy()
    for path, row in zip(paths, raw, strict=True):
        if not is_finite(row):
            fail(world, f"--vae {job.config.vae}: the latents of {path} are not finite in float16")
    return Encoded(raw, [job.images.label(i) for i in batch.indices], paths, batch.skipped)


def extract(job: Job, pending: list[int], world: World) -> None:
    """Make every world.size-th of the pending shards."""
    mine = pending[world.rank :: world.size]
    if not mine:
        return  # starts no loader processes
    loader: DataLoader[Decoded] = DataLoader(
        DecodedBatches(job.images, [batch for number in mine for batch in job.batches(number)], job.config.strict),
        batch_size=None,
        num_workers=job.config.num_workers,
    )
    batches = iter(tqdm(loader, disable=None if world.is_main else True, unit="batch"))
    for number in mine:
        write_shard(job.config.output, number, job.row_shape, encode_shard(job, number, batches, world))


def encode_shard(job: Job, number: int, batches: Iterator[Decoded], world: World) -> Iterator[Encoded]:
    """Take a shard's batches from the loader, and encode them."""
    for _ in job.batches(number):
        yield encode(job, next(batches), world)


def encode_captions(job: Job, world: World) -> None:
    """Encode the captions of every world.size-th shard, and the empty one, unless that is done."""
    if job.text_encoder is None:
        return
    folder, names = job.config.output, [f"{number:05d}" for number in job.numbers]
    for name in tqdm([*names, NULL][world.rank :: world.size], disable=None if world.is_main else True, unit="shard"):
        captions = [""]
        if name != NULL:
            description = finished_shard(folder, int(name))
            assert description is not None  # made before
            captions = [job.captions[path] for path in description["paths"]]
        if finished_text(folder, name, captions) is None:
            with error_prefix(f"--captions {job.config.captions}"):
                write_text(folder, name, job.text_encoder, captions)


def start(job: Job) -> None:
    """Prepare the output folder; on one process, before the others write."""
    path = job.config.output / MANIFEST
    if job.config.overwrite:
        remove_shards(job.config.output)
    remove_partial(job.config.output)
    there = json.loads(path.read_text()) if path.exists() else {}
    # Anew for one of an earlier format, an encoder that has moved, or captions that come later
    if not there or any(there.get(name) != job.manifest.get(name) for name in ("encoder", "text")):
        write_json(path, job.manifest)


def finish(job: Job, target: Path) -> None:
    """Write the index or a part's description, upload the store, and print the result; on one process, after all."""
    with error_prefix(f"--output {job.config.output}"):
        if job.config.shard is None:
            index = index_store(job.config.output, len(job.numbers))
        else:
            index = write_part(job.config.output, Shard.parse(job.config.shard), job.numbers)
    for number in job.numbers if index["skipped"] else ():
        description = finished_shard(job.config.output, number)
        for path, reason in description["skipped"] if description else ():
            print(f"{PROGRAM}: left out {path}: {reason}", file=sys.stderr)
    unit = "images" if len(job.images.image_shape) == 3 else "clips"
    if index["count"] or job.config.shard:
        upload(job.config.output, target, "--output", last=job.last)
    print(f"Extracted {index['count']:,} {unit} to {target}, left out {index['skipped']:,}")
    if not index["count"] and not job.config.shard:
        raise UserError(f"--data-path {job.config.data_path}: none of its {unit} can be read")


def main(argv: Sequence[str]) -> None:
    """Parse flags, encode on all processes, write the index."""
    config = parse_config(ExtractConfig, argv, program=PROGRAM, doc=__doc__)
    target = Shard.parse(config.shard).path(config.output) if config.shard else config.output
    config = replace(config, output=staged(target))
    with distributed.world(config.device, timeout_seconds=WEEK) as world, ExitStack() as held:
        distributed.allow_tf32(False)
        with distributed.raise_on_all_ranks():
            job = set_up(config, world.device)
        check_ranks(job.manifest)
        with distributed.raise_on_all_ranks():
            check_store(target / job.last, "--output")
            if target != config.output and not config.overwrite and is_there(target / job.last, "--output"):
                raise UserError(f"--output {target}: {job.last} is there already; --overwrite replaces it")
            check_writable(config.output / job.last, "--output")
            if world.is_main:
                held.enter_context(locked(config.output, f"--output {config.output}"))
                held.callback((config.output / LOCK).unlink, missing_ok=True)  # before it is released
                check_settings(config.output, job.manifest, job.encoder, overwrite=config.overwrite)
                start(job)
        pending = check_finished(job)
        distributed.barrier()  # all have the same list, and none has started
        extract(job, pending, world)
        distributed.barrier()
        encode_captions(job, world)
        distributed.barrier()
        if world.is_main:
            finish(job, target)
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
