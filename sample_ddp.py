"""Draws many images with a trained network into one .npz that ADM's evaluation reads.

    torchrun --nproc-per-node 8 sample_ddp.py --ckpt DiT-XL-2-256x256.pt --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --num-fid-samples 1000

The job is cut into chunks by image number, and processes take whole chunks: the bytes do not depend on how many there
are. `arr_0` holds the images (N, H, W, C) uint8, `arr_1` their labels; the settings lie beside them as JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from data.sample_file import SampleFile
from runtime import distributed
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.distributed import World
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.seeds import derive_seed
from sample import Pipeline, SamplingConfig


@dataclass(frozen=True)
class SampleDDPConfig(SamplingConfig):
    """Settings of sample_ddp.py."""

    cfg_scale: float = setting(1.5, "guidance scale; 1 is none")
    sample_dir: Path = setting(Path("samples"), "where the .npz goes, under a name made of the settings")
    output: Path | None = setting(None, "exact path of the .npz, instead of a name in --sample-dir")
    overwrite: bool = setting(False, "replace an existing .npz")
    num_fid_samples: int = setting(50_000, "number of images")
    per_proc_batch_size: int = setting(32, "images per process at a time")
    global_seed: int = setting(0, "seed of noise and labels")
    balanced_labels: bool = setting(False, "every class equally often, instead of drawn at random")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        super().__post_init__()
        for name in ("num_fid_samples", "per_proc_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.output is not None and self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output}: must end in .npz")


def output_path(config: SampleDDPConfig, pipeline: Pipeline) -> Path:
    """The official folder name, extended by sampler, steps, and a digest of everything else that decides the images."""
    if config.output is not None:
        return config.output
    assert config.ckpt is not None
    parts = [
        pipeline.name.replace("/", "-"), config.ckpt.stem, "size", pipeline.image_shape[0], "vae",
        Path(pipeline.vae).name, "cfg", config.cfg_scale, "seed", config.global_seed,
        config.sampler, config.num_sampling_steps, digest(config),
    ]  # fmt: skip
    return config.sample_dir / f"{'-'.join(map(str, parts))}.npz"


def digest(config: SampleDDPConfig) -> str:
    """Eight characters that differ between jobs whose images differ."""
    free = ("sample_dir", "output", "overwrite", "device")
    settings = {name: value for name, value in to_dict(config).items() if name not in free}
    settings["ckpt"] = str(Path(settings["ckpt"]).resolve())
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()


def draw_labels(config: SampleDDPConfig, num_classes: int) -> Tensor:
    """(N,) int64 labels of the whole job, the same on every process."""
    if config.balanced_labels:
        return torch.arange(config.num_fid_samples) % num_classes
    generator = torch.Generator().manual_seed(derive_seed("labels", config.global_seed))
    return torch.randint(num_classes, (config.num_fid_samples,), generator=generator)


def sample_chunks(config: SampleDDPConfig, pipeline: Pipeline, labels: Tensor, file: SampleFile, world: World) -> None:
    """Draws every world.size-th chunk. The last one is padded: a chunk's size must not depend on who draws it."""
    size = config.per_proc_batch_size
    starts = range(world.rank * size, len(labels), world.size * size)
    with tqdm(total=len(labels), disable=None if world.is_main else True, unit="image") as bar:
        for start in starts:
            indices = range(start, start + size)
            padded = labels[[i % len(labels) for i in indices]]
            file.write(start, to_uint8(pipeline(config.global_seed, indices, padded)).cpu().numpy())
            bar.update(min(size * world.size, len(labels) - bar.n))


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples on all processes, writes one file."""
    config = parse_config(SampleDDPConfig, argv, program="sample_ddp.py", description=__doc__.split("\n")[0])
    with distributed.world(config.device) as world:
        distributed.allow_tf32(config.tf32)
        pipeline = Pipeline(config, world.device, vae="ema")
        path = output_path(config, pipeline)
        check_writable(path, "--output" if config.output else "--sample-dir")
        if path.exists() and not config.overwrite:
            flag = "--output" if config.output else "--sample-dir"
            raise UserError(f"{flag}: {path} exists already; --overwrite replaces it")
        labels = draw_labels(config, pipeline.num_classes)
        file = SampleFile(path, (config.num_fid_samples, *pipeline.image_shape))
        if world.is_main:
            file.create()
        distributed.barrier()
        started = time.perf_counter()
        try:
            sample_chunks(config, pipeline, labels, file, world)
            distributed.barrier()
        except BaseException:
            file.discard()  # nobody goes on with it
            raise
        if world.is_main:
            file.finish(labels.numpy())
            resolved = dataclasses.replace(config, model=pipeline.name, vae=pipeline.vae, output=path)
            seconds = round(time.perf_counter() - started, 2)
            facts = {"world_size": world.size, "seconds": seconds, "torch": torch.__version__}
            document = {"config": to_dict(resolved), "run": facts}
            with atomic_path(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(document, indent=2) + "\n")
            print(f"Saved {config.num_fid_samples:,} images to {path}")
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, "sample_ddp.py"))
