"""Sample many images with a trained network into one .npz that ADM's evaluation reads.

    torchrun --nproc-per-node 8 sample_ddp.py --ckpt DiT-XL-2-256x256 --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-digits-2/checkpoints/0002000.safetensors --num-fid-samples 1000

The job is cut into chunks by image number, and processes take whole chunks: the bytes do not depend on how many there
are. A job that was killed continues when the same command is typed again, on any number of processes. `arr_0` holds the
images (N, H, W, C) uint8, or clips (N, F, H, W, C), and `arr_1` their labels; NAME.json next to the file holds
settings, versions and timings, and NAME.txt the prompts of networks that take text, one line a sample.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

import runtime  # noqa: F401  # first: it reports other packages named models
from runtime import distributed
from runtime.errors import run
from sampling.config import parse_settings
from sampling.job import PROGRAM, Job, SampleDDPSettings
from sampling.pipeline import Pipeline
from sampling.prompts import open_prompts

# Processes wait for the slowest at the end, and for rank 0's download at the start.
TIMEOUT_SECONDS = 24 * 3600.0


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample on all processes, write one file."""
    given, started = parse_settings(SampleDDPSettings, argv, PROGRAM, __doc__), time.perf_counter()
    texts = given.general.text.read()
    with distributed.world(given.general.compute.device, TIMEOUT_SECONDS) as world:
        pipeline = Pipeline.open(given, world.device)
        prepared = pipeline.prepare()
        prompts = open_prompts(
            given.general.text, pipeline.network, pipeline.info, world.device, texts, guided=prepared.takes_null
        )
        distributed.allow_tf32(prepared.config.compute.allows_tf32)  # in the thread that decodes, too
        job = Job(pipeline, prepared, world, prompts)
        ready = time.perf_counter()
        with distributed.raise_on_all_ranks():
            job.sample()
        if world.is_main:
            seconds, made = time.perf_counter() - ready, sum(map(job.file.rows_in, job.missing))
            samples = f"{job.writer.unit}s"
            path = job.finish(
                {
                    "world_size": world.size,
                    "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
                    samples: made,
                    "seconds": round(seconds, 2),
                    f"{samples}_per_second": round(made / seconds, 3),
                    "seconds_before": round(ready - started, 2),
                }
            )
            print(f"Saved {job.total:,} {samples if job.total != 1 else job.writer.unit} to {path}")
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
