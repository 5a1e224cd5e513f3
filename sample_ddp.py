"""Sample many images with a trained network into one .npz that ADM's evaluation reads.

    torchrun --nproc-per-node 8 sample_ddp.py --ckpt DiT-XL-2-256x256 --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --num-fid-samples 1000

The job is cut into chunks by image number, and processes take whole chunks: the bytes do not depend on how many there
are. A job that was killed continues when the same command is typed again, on any number of processes. `arr_0` holds the
images (N, H, W, C) uint8, `arr_1` their labels; NAME.json next to the file holds settings, versions and timings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import save_png, to_uint8
from data.sample_file import SampleFile
from runtime import distributed, migrate
from runtime.background import Background
from runtime.command_line import parse
from runtime.distributed import World
from runtime.download import read_record, sha256_of
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.releases import ALIASES
from runtime.seeds import derive_seed
from runtime.settings import Values, document, flag_name, free_settings, places, setting
from sampling.config import KINDS, SamplingSettings, check_labels
from sampling.pipeline import Pipeline, PreparedRun, open_pipeline

PROGRAM = "sample_ddp.py"
# Processes wait for the slowest at the end, and for rank 0's download at the start.
TIMEOUT_SECONDS = 24 * 3600.0
AUTO_MACS = 64 * 118.6e9  # of a batch: 64 images of XL/2 at 256 pixels, which takes 118.62 G each
LARGEST_AUTO = 256
IMAGES = 50_000  # as FID-50K takes


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Which images, and where they go."""

    sample_dir: Path = setting(Path("samples"), "folder of the .npz, under a name made of the settings", free=True)
    output: Path | None = setting(None, "exact path of the .npz", shown="a name in --sample-dir", free=True)
    overwrite: bool = setting(
        False, "replace an existing .npz, and delete an unfinished job with other settings", free=True
    )
    num_fid_samples: int | None = setting(
        None, "number of images", shown="50,000, or the number that --class-seeds makes"
    )
    per_proc_batch_size: int | None = setting(
        32, "images a process computes at a time, which decides their last bits; auto: by the network's cost alone"
    )
    global_seed: int = setting(0, "seed of noise and labels")
    balanced_labels: bool = setting(False, "every class equally often, instead of random labels")
    class_labels: tuple[int, ...] | None = setting(None, "sample these classes only", shown="all")
    class_seeds: tuple[int, ...] | None = setting(
        None, "one image of each class for each of these numbers, which give the noise; instead of --num-fid-samples"
    )
    save_png: bool = setting(False, "write the images as PNG too, in a folder of the .npz's name")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("num_fid_samples", "per_proc_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if self.output is not None and self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output}: must end in .npz")
        if self.class_seeds is not None:
            if not all(0 <= number < 2**32 for number in self.class_seeds):
                raise ValueError(f"--class-seeds {' '.join(map(str, self.class_seeds))}: must lie in [0, 2^32)")
            labels = len(self.class_labels or ())
            if not _fits(self.num_fid_samples, len(self.class_seeds), labels):
                raise ValueError(_misfit(self.num_fid_samples))
            if self.balanced_labels:
                raise ValueError("--balanced-labels: has no effect with --class-seeds")


@dataclass(frozen=True, kw_only=True)
class SampleDDPSettings(SamplingSettings):
    """Settings of sample_ddp.py."""

    job: JobSettings = field(default_factory=JobSettings)


upgrade = partial(migrate.run_config, cls=SampleDDPSettings, kinds=KINDS, program=PROGRAM)


def _fits(images: int | None, seeds: int, classes: int) -> bool:
    """Check that so many images can be those of seeds and classes; 0 classes: of a number not known yet."""
    return images is None or (images == seeds * classes if classes else images % max(seeds, 1) == 0)


def _misfit(images: int | None) -> str:
    return f"--num-fid-samples {images}: --class-seeds makes one image of each class for each number; leave one out"


def auto_batch_size(macs: int) -> int:
    """Images per batch for a network of this cost: a power of two that keeps a large GPU busy and fits a small one.

    It depends neither on free memory nor on the number of processes: a job's bytes would depend on them.
    """
    fitting = max(1, round(AUTO_MACS / macs))
    return min(LARGEST_AUTO, 1 << fitting.bit_length() - 1)


def deciding_settings(
    config: SampleDDPSettings, run: PreparedRun, device: torch.device, checkpoint_hash: str
) -> Values:
    """Everything that decides the images, by flag."""
    free, settings = free_settings(SampleDDPSettings), {}
    values = document(config, sampler=(run.choice.name, run.choice.settings))
    for flag, place in places(SampleDDPSettings, KINDS).items():
        path = [*place.path, "name"] if place.path == ("sampler",) else place.path
        value = values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if ".".join(place.path) not in free and place.stands_for is None and (place.kind is None or value is not None):
            settings[flag] = value
    return {"--ckpt": checkpoint_hash, "--device": device.type, **settings}


def output_path(config: SampleDDPSettings, pipeline: Pipeline, settings: Values) -> Path:
    """The official folder name, extended by sampler, steps, and a digest of everything else that decides the images."""
    if config.job.output is not None:
        return config.job.output
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    parts = [
        config.model, pipeline.info.path.stem, "size", pipeline.image_shape[-2], "vae",
        Path(config.checkpoint.vae or "").name, "cfg", config.guidance.cfg_scale, "seed", config.job.global_seed,
        config.sampler, config.num_sampling_steps, digest,
    ]  # fmt: skip
    return config.job.sample_dir / f"{'-'.join(map(str, parts)).replace('/', '-')}.npz"


class Job(NamedTuple):
    """The images of a job, the same on every process.

    Attributes:
        labels: (N,) int64.
        noise: N numbers; images with the same one have the same noise.
    """

    labels: Tensor
    noise: Sequence[int]


def plan(config: JobSettings, num_classes: int) -> Job:
    """Labels and noise of all images.

    Raises:
        UserError: for a class that the model does not have, or a number of images that is not the seeds'.
    """
    check_labels(config.class_labels or (), num_classes)
    classes = torch.tensor(config.class_labels or range(num_classes))
    if config.class_seeds is not None:
        count = len(config.class_seeds)
        if not _fits(config.num_fid_samples, count, len(classes)):
            raise UserError(_misfit(config.num_fid_samples))
        return Job(classes.repeat_interleave(count), list(config.class_seeds) * len(classes))
    every = range(IMAGES if config.num_fid_samples is None else config.num_fid_samples)
    if config.balanced_labels:
        return Job(classes[torch.tensor(every) % len(classes)], every)
    generator = torch.Generator().manual_seed(derive_seed("labels", config.global_seed))
    return Job(classes[torch.randint(len(classes), (len(every),), generator=generator)], every)


def open_file(config: JobSettings, file: SampleFile, settings: Values, flag: str) -> list[int]:
    """Start the file or continue it, on one process; returns the chunks that are still to be made.

    Raises:
        UserError: if the file cannot be started or continued, naming the flag of its path.
    """
    try:
        missing = file.open({**settings, "torch": torch.__version__}, overwrite=config.overwrite)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if config.save_png:
        file.path.with_suffix("").mkdir(exist_ok=True)
    if len(missing) < file.chunks:
        print(f"Continuing {file.partial}: {file.chunks - len(missing)} of {file.chunks} chunks are there")
    return missing


def sample_chunks(
    pipeline: Pipeline, prepared: PreparedRun, config: JobSettings, job: Job, file: SampleFile,
    missing: Sequence[int], world: World,
) -> None:  # fmt: skip
    """Sample this process's share of the missing chunks; while one is denoised, the one before is decoded and written.

    A chunk always has the same number of rows (the last one is padded), on whichever process.
    """
    left, total = sum(map(file.rows_in, missing)), len(job.labels)
    bar = tqdm(total=total, initial=total - left, disable=None if world.is_main else True, unit="image")

    def store(chunk: int, latents: Tensor) -> None:
        images = to_uint8(pipeline.decode(latents)).cpu().numpy()[: file.rows_in(chunk)]
        if config.save_png:
            for index, image in enumerate(images, start=chunk * file.chunk):
                save_png(image, file.path.with_suffix("") / f"{index:06d}.png")
        file.write(chunk, images)
        bar.update(min(len(images) * world.size, total - bar.n))

    with bar, Background(world.device) as background:
        for chunk in missing[world.rank :: world.size]:
            rows = [i % total for i in range(chunk * file.chunk, (chunk + 1) * file.chunk)]
            noise, conditioning = [job.noise[i] for i in rows], {"y": job.labels[rows]}
            latents = pipeline.denoise(prepared, config.global_seed, noise, conditioning)
            background.submit(partial(store, chunk, latents))


def fingerprint(path: Path) -> str:
    """SHA-256 of the checkpoint, computed by one process.

    Raises:
        UserError: if it was downloaded and is not what it was then.
    """
    digest = distributed.on_rank0(lambda: sha256_of(path))
    record = read_record(path)
    if record is not None and record["sha256"] != digest:
        raise UserError(f"--ckpt {path}: damaged since it was downloaded; delete it to download it again")
    return digest


def result(config: SampleDDPSettings, pipeline: Pipeline, run: PreparedRun, settings: Values, timings: Values) -> str:
    """The JSON next to the samples."""
    info, release = pipeline.info, pipeline.info.release
    sections = document(config, sampler=(run.choice.name, run.choice.settings), model=(info.model, None))
    if (depth := getattr(pipeline.network.config, "cache_depth", None)) is not None:
        sections["model"]["cache_depth"] = depth
    values = {
        "config": {"format": 2, "script": PROGRAM, **sections},
        "checkpoint": {
            "file": info.path.name,
            "sha256": settings["--ckpt"],
            "step": info.step,
            "release": release.name if release else None,
            "reported_fid": release.fid if release else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda if settings["--device"] == "cuda" else None,
        },
        "run": timings,
    }
    return json.dumps(values, indent=2) + "\n"


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample on all processes, write one file."""
    given = parse(SampleDDPSettings, argv, program=PROGRAM, doc=__doc__, kinds=KINDS, aliases=ALIASES, migrate=upgrade)
    started = time.perf_counter()
    with distributed.world(given.general.compute.device, TIMEOUT_SECONDS) as world:
        pipeline, prepared = open_pipeline(given, world.device)
        job_settings = given.general.job
        batch_size = job_settings.per_proc_batch_size or auto_batch_size(sum(pipeline.network.cost().values()))
        job = plan(job_settings, pipeline.num_classes)
        count = len(job.labels)
        job_settings = dataclasses.replace(job_settings, per_proc_batch_size=batch_size, num_fid_samples=count)
        assert isinstance(prepared.config, SampleDDPSettings)
        config = dataclasses.replace(prepared.config, job=job_settings)
        settings = deciding_settings(config, prepared, world.device, fingerprint(pipeline.info.path))
        path = output_path(config, pipeline, settings)
        flag = "--output" if job_settings.output else "--sample-dir"
        check_writable(path, flag)
        channels, height, width = pipeline.image_shape
        file = SampleFile(path, (count, height, width, channels), batch_size, world.rank)
        missing = distributed.on_rank0(lambda: open_file(job_settings, file, settings, flag))
        ready = time.perf_counter()
        sample_chunks(pipeline, prepared, job_settings, job, file, missing, world)
        distributed.barrier()
        if world.is_main:
            seconds, images = time.perf_counter() - ready, sum(map(file.rows_in, missing))
            file.finish(job.labels.numpy())
            timings: Values = {
                "world_size": world.size,
                "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
                "images": images,
                "seconds": round(seconds, 2),
                "images_per_second": round(images / seconds, 3),
                "seconds_before": round(ready - started, 2),
                "seconds_after": round(time.perf_counter() - ready - seconds, 2),
            }
            config = dataclasses.replace(config, job=dataclasses.replace(job_settings, output=path))
            with atomic_path(path.with_suffix(".json")) as temporary:
                temporary.write_text(result(config, pipeline, prepared, settings, timings))
            print(f"Saved {count:,} images to {path}")
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
