"""Load of long jobs: memory, open files and threads of sample_ddp.py and the evaluator, and of train.py.

    python -m benchmarks.load --images 50000
    python -m benchmarks.load --steps 10000

A debug network on pixels with random weights samples the images, and the evaluator reads them with an Inception network
of 1/16 of the width. Training is of a debug network on the digits, with a checkpoint every 50 steps. Linux only:
figures come from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import numpy as np

from data.pixels import Images

if TYPE_CHECKING:
    from torch import Tensor

    from evaluator.inception.backend import Features
    from training.trainer import MicroBatch

SIDE = 8  # pixels
BATCH = 250
DIVISOR = 16  # of the Inception network's channels
REFERENCE = 1000  # images
METRICS = "is,fid"
POINTS = 100  # at which the load is recorded


class Load(NamedTuple):
    """Load of a stage.

    Attributes:
        stage: "sample_ddp.py", "evaluator" or "train.py".
        images: Number of images that went through it, or of training's steps.
        seconds: Time of the whole stage.
        peak_mb: Largest resident memory.
        growth_mb: Growth of anonymous memory per 1,000 of them, between 10 % and 100 % of them.
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


class Row(NamedTuple):
    """Load after some images; anonymous memory, in MB, is that of objects and arrays, without files."""

    images: int
    memory: float
    files: int
    threads: int


class Watch:
    """Recorder of the load of this process."""

    def __init__(self, total: int) -> None:
        self.total, self.images, self.start = total, 0, time.perf_counter()
        self._rows: list[Row] = []

    def add(self, images: int) -> None:
        """Count images, and record the load after them, at some hundred points of all."""
        self.images += images
        if self.images * POINTS // self.total > len(self._rows):
            trim()
            status, files = read_status(), len(os.listdir("/proc/self/fd"))
            self._rows.append(Row(self.images, status["RssAnon"] / 1024, files, status["Threads"]))

    def result(self, stage: str) -> Load:
        """The load of the stage."""
        late = [row for row in self._rows if row.images >= self.total / 10]
        files = min(row.files for row in late), max(row.files for row in late)
        threads = min(row.threads for row in late), max(row.threads for row in late)
        seconds, peak = time.perf_counter() - self.start, read_status()["VmHWM"] / 1024
        return Load(stage, self.images, round(seconds, 1), round(peak), round(growth(late), 3), files, threads)


def read_status() -> dict[str, int]:
    """Numbers of this process that Linux keeps, memory in kB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def trim() -> None:
    """Return freed memory to the system, where the C library can: what it keeps for reuse is not a leak."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if release is not None:
        release(0)


def growth(rows: Sequence[Row]) -> float:
    """Memory in MB per 1,000 images: the median slope of all pairs of rows.

    A buffer that happens to be there when one row is recorded has no part in it.
    """
    pairs = itertools.combinations(rows, 2)
    slopes = [1000 * (late.memory - early.memory) / (late.images - early.images) for early, late in pairs]
    return statistics.median(slopes) if slopes else 0.0


def sample(folder: Path, images: int) -> Load:
    """Sample the images in this process; they are folder/samples.npz."""
    import sample_ddp
    from data.sample_file import SampleFile
    from models import create_model
    from runtime.groups import save_checkpoint

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

    def watched(self: SampleFile, chunk: int, rows: Images) -> None:
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
    watch.images = -REFERENCE  # these come first, and are not counted

    def watched(self: InceptionNetwork, batch: Images) -> Features:
        found = features(self, batch)
        watch.add(len(batch))
        return found

    files = [str(folder / "reference.npz"), str(folder / "samples.npz")]
    flags = ["--weights", str(folder / "narrow.pb"), "--cache-dir", str(folder), "--metrics", METRICS]
    with mock.patch.object(InceptionNetwork, "features", watched):
        run_evaluator([*files, *flags, "--device", "cpu"])
    return watch.result("evaluator")


def train(folder: Path, steps: int) -> Load:
    """Train in this process; two checkpoints are left."""
    from runtime.errors import run
    from train import main as run_training
    from training.trainer import Trainer

    watch, step_once = Watch(steps), Trainer.train_step

    def watched(self: Trainer, step: int, pieces: Sequence[MicroBatch]) -> Tensor:
        norm = step_once(self, step, pieces)
        watch.add(1)
        return norm

    argv = f"--dataset digits --num-classes 10 --model DiT-debug/2 --global-batch-size 12 --max-steps {steps}"
    argv += " --ckpt-every 50 --keep-last 2 --num-workers 0 --device cpu"
    with mock.patch.object(Trainer, "train_step", watched):
        assert run(run_training, "train.py", [*argv.split(), "--results-dir", str(folder)]) == 0
    assert len(list(folder.glob("*/checkpoints/*"))) == 2
    return watch.result("train.py")


def measure_stage(stage: Callable[[Path, int], Load], folder: Path, count: int) -> Load:
    """Run one stage in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(stage, folder, count).result()


def measure_training(steps: int) -> Load:
    """Train in a separate process."""
    with tempfile.TemporaryDirectory() as name:
        return measure_stage(train, Path(name), steps)


def measure(images: int, stages: Sequence[Callable[[Path, int], Load]] = (sample, evaluate)) -> list[Load]:
    """Run both stages, each in a separate process."""
    with tempfile.TemporaryDirectory() as name:
        loads = [measure_stage(stage, Path(name), images) for stage in stages]
        with np.load(Path(name) / "samples.npz") as file:
            assert len(file["arr_0"]) == len(file["arr_1"]) == images
        scores = json.loads((Path(name) / "samples.scores.json").read_text())
        assert scores["samples"]["images"] == images
    return loads


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, print a JSON line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="number of images")
    parser.add_argument("--steps", type=int, help="number of training steps; trains instead")
    settings = parser.parse_args(argv)
    for load in measure(settings.images) if settings.steps is None else [measure_training(settings.steps)]:
        print(json.dumps(load._asdict()), flush=True)


if __name__ == "__main__":
    main()
