"""Load of long jobs: memory, open files and threads of sample_ddp.py and the evaluator over many images.

    python -m benchmarks.load --images 50000

A debug network on pixels with random weights samples the images, and the evaluator reads them with an Inception network
of 1/16 of the width. Linux only: figures come from /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

SIDE = 8  # pixels
BATCH = 250
DIVISOR = 16  # of the Inception network's channels
REFERENCE = 1000  # images
METRICS = "is,fid"


class Load(NamedTuple):
    """Load of a stage.

    Attributes:
        stage: "sample_ddp.py" or "evaluator".
        images: Number of images that went through it.
        seconds: Time of the whole stage.
        peak_mb: Largest resident memory.
        growth_mb: Growth of resident memory per 1,000 images, between 10 % and 100 % of them.
        files: Smallest and largest number of open files in that range.
        threads: The same of threads.
    """

    stage: str
    images: int
    seconds: float
    peak_mb: float
    growth_mb: float
    files: tuple[int, int]
    threads: tuple[int, int]


class Watch:
    """Recorder of the load of this process."""

    def __init__(self, total: int) -> None:
        self.total, self.images, self.start = total, 0, time.perf_counter()
        self._rows: list[tuple[int, float, int, int]] = []

    def add(self, images: int) -> None:
        """Count images, and record the load after them."""
        self.images += images
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory = int(status["VmRSS"].split()[0]) / 1024
        self._rows.append((self.images, memory, len(os.listdir("/proc/self/fd")), int(status["Threads"])))

    def result(self, stage: str) -> Load:
        """The load of the stage."""
        late = [row for row in self._rows if row[0] >= self.total / 10]
        growth = (late[-1][1] - late[0][1]) / max(1, late[-1][0] - late[0][0]) * 1000
        files, threads = ((int(min(row[i] for row in late)), int(max(row[i] for row in late))) for i in (2, 3))
        seconds, peak = time.perf_counter() - self.start, max(row[1] for row in self._rows)
        return Load(stage, self.images, round(seconds, 1), round(peak), round(growth, 3), files, threads)


def sample(folder: Path, images: int) -> Load:
    """Sample the images in this process; they are folder/samples.npz."""
    import sample_ddp
    from data.sample_file import SampleFile
    from models import create_model
    from runtime.checkpoint import save_checkpoint

    network = create_model("DiT-debug/2", sample_shape=(3, SIDE, SIDE), num_classes=10)
    meta = {
        "format": 2,
        "model": {"name": "DiT-debug/2", **dataclasses.asdict(network.config)},
        "process": {"name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon"},
        "encoder": {"name": "none"},
        "data": {"image_shape": [3, SIDE, SIDE]},
        "step": 1,
    }
    save_checkpoint(folder / "0000001.safetensors", {"ema-0.9999": network.state_dict()}, meta)
    watch, write = Watch(images), SampleFile.write

    def watched(self: SampleFile, chunk: int, rows: Any) -> None:
        write(self, chunk, rows)
        watch.add(self.rows_in(chunk))

    argv = f"--num-fid-samples {images} --per-proc-batch-size {BATCH} --num-sampling-steps 2 --cfg-scale 1 --device cpu"
    files = ["--ckpt", str(folder / "0000001.safetensors"), "--output", str(folder / "samples.npz")]
    with mock.patch.object(SampleFile, "write", watched):
        sample_ddp.main([*files, *argv.split()])
    return watch.result("sample_ddp.py")


def evaluate(folder: Path, images: int) -> Load:
    """Evaluate folder/samples.npz in this process."""
    from benchmarks.inception_graph import synthetic_graph
    from evaluator.__main__ import main as run_evaluator
    from evaluator.inception.network import InceptionNetwork

    (folder / "narrow.pb").write_bytes(synthetic_graph(divisor=DIVISOR))
    rows = np.random.default_rng(0).integers(0, 256, (REFERENCE, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=rows)
    watch, features = Watch(images), InceptionNetwork.features

    def watched(self: InceptionNetwork, batch: Any) -> Any:
        found = features(self, batch)
        watch.add(len(batch))
        return found

    files = [str(folder / "reference.npz"), str(folder / "samples.npz")]
    flags = ["--weights", str(folder / "narrow.pb"), "--cache-dir", str(folder), "--metrics", METRICS]
    with mock.patch.object(InceptionNetwork, "features", watched):
        run_evaluator([*files, *flags, "--device", "cpu"])
    watch.images -= REFERENCE
    return watch.result("evaluator")


def measure(images: int) -> list[Load]:
    """Run both stages, each in a separate process."""
    stages: tuple[Callable[[Path, int], Load], ...] = (sample, evaluate)
    with tempfile.TemporaryDirectory() as name:
        loads = []
        for stage in stages:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                loads.append(pool.submit(stage, Path(name), images).result())
        with np.load(Path(name) / "samples.npz") as file:
            assert len(file["arr_0"]) == len(file["arr_1"]) == images
        scores = json.loads((Path(name) / "samples.scores.json").read_text())
        assert scores["samples"]["images"] == images
    return loads


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flag, print a JSON line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="number of images")
    for load in measure(parser.parse_args(argv).images):
        print(json.dumps(load._asdict()), flush=True)


if __name__ == "__main__":
    main()
