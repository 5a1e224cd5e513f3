"""Draws many images with a trained network into one .npz that ADM's evaluation reads.

    torchrun --nproc-per-node 8 sample_ddp.py --ckpt DiT-XL-2-256x256 --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --num-fid-samples 1000

The job is cut into chunks by image number, and processes take whole chunks: the bytes do not depend on how many there
are. A job that was killed goes on when the same command is typed again, on any number of processes. `arr_0` holds the
images (N, H, W, C) uint8, `arr_1` their labels; beside the file lies NAME.json with settings, versions and timings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import save_png, to_uint8
from data.sample_file import SampleFile
from runtime import distributed
from runtime.background import Background
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.distributed import World
from runtime.download import read_record, sha256_of
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.seeds import derive_seed
from sampling.config import SamplingConfig, check_labels
from sampling.pipeline import Pipeline

# Processes wait for the slowest at the end, and for the first one's download at the start.
PATIENCE_SECONDS = 24 * 3600.0
AUTO_MULTIPLY_ADDS = 64 * 118.6e9  # of a batch: 64 images of XL/2 at 256 pixels, which takes 118.62 G each
LARGEST_AUTO = 256
IMAGES = 50_000  # as FID-50K takes
# Settings that say where and how a job runs, not what its images are.
FREE = frozenset("ckpt sample_dir output overwrite pretrained_dir sharing_dir device".split())


@dataclass(frozen=True)
class SampleDDPConfig(SamplingConfig):
    """Settings of sample_ddp.py."""

    sample_dir: Path = setting(Path("samples"), "where the .npz goes, under a name made of the settings")
    output: Path | None = setting(None, "exact path of the .npz, instead of a name in --sample-dir")
    overwrite: bool = setting(False, "replace an existing .npz, and throw away one begun with other settings")
    num_fid_samples: int | None = setting(None, "number of images (50,000, or what --class-seeds makes)")
    per_proc_batch_size: int | None = setting(
        32, "images per process at a time, part of what decides their last bits; auto: by the network's cost alone"
    )
    global_seed: int = setting(0, "seed of noise and labels")
    balanced_labels: bool = setting(False, "every class equally often, instead of drawn at random")
    class_labels: tuple[int, ...] | None = setting(None, "draw these classes only")
    class_seeds: tuple[int, ...] | None = setting(
        None, "one image of each class for each of these numbers, which give the noise; instead of --num-fid-samples"
    )
    save_png: bool = setting(False, "write the images as PNG too, in a folder of the .npz's name")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        super().__post_init__()
        for name in ("num_fid_samples", "per_proc_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.output is not None and self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output}: must end in .npz")
        if self.class_seeds is not None:
            if not all(0 <= number < 2**32 for number in self.class_seeds):
                raise ValueError(f"--class-seeds {' '.join(map(str, self.class_seeds))}: must lie in [0, 2^32)")
            labels = len(self.class_labels or ())
            if not _counted(self.num_fid_samples, len(self.class_seeds), labels):
                raise ValueError(_refused(self.num_fid_samples))
            if self.balanced_labels:
                raise ValueError("--balanced-labels: has no effect with --class-seeds")


def _counted(images: int | None, seeds: int, classes: int) -> bool:
    """Whether so many images can be those of seeds and classes; 0 classes: of some number of them, not known yet."""
    return images is None or (images == seeds * classes if classes else images % max(seeds, 1) == 0)


def _refused(images: int | None) -> str:
    return f"--num-fid-samples {images}: --class-seeds makes one image of each class for each number; leave one out"


def auto_batch_size(multiply_adds: int) -> int:
    """Images per batch for a network of this cost: a power of two that keeps a large GPU busy and fits a small one.

    Neither the free memory nor the number of processes has a say: a job's bytes would depend on it.
    """
    fitting = max(1, round(AUTO_MULTIPLY_ADDS / multiply_adds))
    return min(LARGEST_AUTO, 1 << fitting.bit_length() - 1)


def deciding_settings(config: SampleDDPConfig, device: torch.device, checkpoint_hash: str) -> dict[str, Any]:
    """Everything that decides the images, by flag or by name."""
    settings = {flag_name(name): value for name, value in to_dict(config).items() if name not in FREE}
    return {"--ckpt": checkpoint_hash, "--device": device.type, **settings}


def output_path(config: SampleDDPConfig, pipeline: Pipeline[SampleDDPConfig], settings: dict[str, Any]) -> Path:
    """The official folder name, extended by sampler, steps, and a digest of everything else that decides the images."""
    if config.output is not None:
        return config.output
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    parts = [
        config.model, pipeline.path.stem, "size", pipeline.image_shape[0], "vae", Path(config.vae or "").name,
        "cfg", config.cfg_scale, "seed", config.global_seed, config.sampler, config.num_sampling_steps, digest,
    ]  # fmt: skip
    return config.sample_dir / f"{'-'.join(map(str, parts)).replace('/', '-')}.npz"


class Job(NamedTuple):
    """What is drawn, the same on every process.

    Attributes:
        labels: (N,) int64.
        noise: N numbers; images with the same one have the same noise.
    """

    labels: Tensor
    noise: Sequence[int]


def plan(config: SampleDDPConfig, num_classes: int) -> Job:
    """Labels and noise of all images.

    Raises:
        UserError: for a class that the model does not have, or a number of images that is not the seeds'.
    """
    check_labels(config.class_labels or (), num_classes)
    classes = torch.tensor(config.class_labels or range(num_classes))
    if config.class_seeds is not None:
        count = len(config.class_seeds)
        if not _counted(config.num_fid_samples, count, len(classes)):
            raise UserError(_refused(config.num_fid_samples))
        return Job(classes.repeat_interleave(count), list(config.class_seeds) * len(classes))
    every = range(IMAGES if config.num_fid_samples is None else config.num_fid_samples)
    if config.balanced_labels:
        return Job(classes[torch.tensor(every) % len(classes)], every)
    generator = torch.Generator().manual_seed(derive_seed("labels", config.global_seed))
    return Job(classes[torch.randint(len(classes), (len(every),), generator=generator)], every)


def begin(config: SampleDDPConfig, file: SampleFile, settings: dict[str, Any], flag: str) -> list[int]:
    """Begins the file, or goes on with it; by one process. Returns the chunks that are still to be made.

    Raises:
        UserError: if the file cannot be begun or gone on with, naming the flag behind its path.
    """
    try:
        missing = file.take_up({**settings, "torch": torch.__version__}, overwrite=config.overwrite)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if config.save_png:
        file.path.with_suffix("").mkdir(exist_ok=True)
    if len(missing) < file.chunks:
        print(f"Going on with {file.partial}: {file.chunks - len(missing)} of {file.chunks} chunks are there")
    return missing


def sample_chunks(
    pipeline: Pipeline[SampleDDPConfig], job: Job, file: SampleFile, missing: Sequence[int], world: World
) -> None:
    """Draws this process's share of the missing chunks; while one is denoised, the one before is decoded and written.

    A chunk always has the same number of rows (the last one is padded), whoever draws it.
    """
    config, left, total = pipeline.config, sum(map(file.rows_in, missing)), len(job.labels)
    bar = tqdm(total=total, initial=total - left, disable=None if world.is_main else True, unit="image")

    def store(chunk: int, latents: Tensor) -> None:
        images = to_uint8(pipeline.decode(latents)).cpu().numpy()[: file.rows_in(chunk)]
        if config.save_png:
            for index, image in enumerate(images, start=chunk * file.chunk):
                save_png(image, file.path.with_suffix("") / f"{index:06d}.png")
        file.write(chunk, images)
        bar.update(min(len(images) * world.size, total - bar.n))

    with bar, Background(world.device) as behind:
        for chunk in missing[world.rank :: world.size]:
            rows = [i % total for i in range(chunk * file.chunk, (chunk + 1) * file.chunk)]
            latents = pipeline.denoise(config.global_seed, [job.noise[i] for i in rows], job.labels[rows])
            behind.submit(partial(store, chunk, latents))


def fingerprint(path: Path) -> str:
    """SHA-256 of the checkpoint, computed by one process.

    Raises:
        UserError: if it was downloaded and is not what it was then.
    """
    digest = distributed.by_main(lambda: sha256_of(path))
    record = read_record(path)
    if record is not None and record["sha256"] != digest:
        raise UserError(f"--ckpt {path}: damaged since it was downloaded; delete it to download it again")
    return digest


def document(
    config: SampleDDPConfig, pipeline: Pipeline[SampleDDPConfig], settings: dict[str, Any], timings: dict[str, Any]
) -> str:
    """The JSON beside the samples."""
    release = pipeline.release
    told = {
        "config": to_dict(config),
        "checkpoint": {
            "file": pipeline.path.name,
            "sha256": settings["--ckpt"],
            "step": pipeline.step,
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
    return json.dumps(told, indent=2) + "\n"


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples on all processes, writes one file."""
    config = parse_config(SampleDDPConfig, argv, program="sample_ddp.py", description=__doc__.split("\n")[0])
    began = time.perf_counter()
    with distributed.world(config.device, PATIENCE_SECONDS) as world:
        pipeline = Pipeline(config, world.device)
        batch_size = config.per_proc_batch_size or auto_batch_size(pipeline.multiply_adds)
        job = plan(pipeline.config, pipeline.num_classes)
        count = len(job.labels)
        config = dataclasses.replace(pipeline.config, per_proc_batch_size=batch_size, num_fid_samples=count)
        settings = deciding_settings(config, world.device, fingerprint(pipeline.path))
        path = output_path(config, pipeline, settings)
        flag = "--output" if config.output else "--sample-dir"
        check_writable(path, flag)
        file = SampleFile(path, (count, *pipeline.image_shape), batch_size, world.rank)
        missing = distributed.by_main(lambda: begin(config, file, settings, flag))
        started = time.perf_counter()
        sample_chunks(pipeline, job, file, missing, world)
        distributed.barrier()
        if world.is_main:
            seconds, images = time.perf_counter() - started, sum(map(file.rows_in, missing))
            file.finish(job.labels.numpy())
            timings = {
                "world_size": world.size,
                "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
                "images": images,
                "seconds": round(seconds, 2),
                "images_per_second": round(images / seconds, 3),
                "seconds_before": round(started - began, 2),
                "seconds_after": round(time.perf_counter() - started - seconds, 2),
            }
            with atomic_path(path.with_suffix(".json")) as temporary:
                temporary.write_text(document(dataclasses.replace(config, output=path), pipeline, settings, timings))
            print(f"Saved {count:,} images to {path}")
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, "sample_ddp.py"))
