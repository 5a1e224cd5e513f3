"""Measure how costs grow with images, ranks and bytes: a constant for each, and the exponent of the growth.

    python -m benchmarks.growth [--folder /tmp]

Every cost is measured at sizes that double twice or more: CPU time of this process on one thread, the least of three.
The exponent is the slope between logarithms of size and time: 1 is linear, 0 does not grow. Scratch files go to
the folder: a state of up to 1 GB, and 32,000 empty images.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.report import aligned
from data.dataset import GlobalBatches
from data.image_folder import ImageFolder
from data.latent_files import FORMAT, MANIFEST, Encoded, write_index, write_shard
from data.latents import LatentShards
from diffusion import FlowMatching
from diffusion.loss import DiffusionLoss
from models import create_model
from runtime.groups import save_checkpoint
from runtime.json_file import write_json
from runtime.saver import BackgroundSaver, State

ROUNDS = 3
SHARD = 10_000  # images
LOCAL_BATCH = 32
STEPS = 50  # of which keys and draws are made at a time


class Cost(NamedTuple):
    """A cost that grows.

    Attributes:
        name: What is done.
        unit: What the sizes count.
        sizes: Sizes to measure, ascending.
        prepare: Function of a scratch folder and a size that returns the call to time.
        calls: Times that one call does it.
    """

    name: str
    unit: str
    sizes: Sequence[int]
    prepare: Callable[[Path, int], Callable[[], object]]
    calls: int = 1


def opening(folder: Path, images: int) -> Callable[[], object]:
    """Opening of a latent store with names as in ImageNet."""
    encoder = {"name": "ema", "sha256": "0" * 64, "stochastic": True, "scaling_factor": 0.5}
    classes = [f"n{number:08d}" for number in range(1000)]
    about = {"format": FORMAT, "classes": classes, "image_shape": [3, 8, 8], "row_shape": [1, 2, 1, 1]}
    folder.mkdir()
    write_json(folder / MANIFEST, {**about, "encoder": encoder, "batch_size": 32})
    starts = range(0, images, SHARD)
    for number, start in enumerate(starts):
        rows = range(start, min(start + SHARD, images))
        labels = [row * 1000 // images for row in rows]
        paths = [f"{classes[label]}/{classes[label]}_{row}.JPEG" for label, row in zip(labels, rows, strict=True)]
        raw = np.zeros((len(rows), 1, 2, 1, 1), np.float16)
        write_shard(folder, number, (1, 2, 1, 1), [Encoded(raw, labels, paths, [])])
    write_index(folder, len(starts))
    return lambda: LatentShards(folder)


def scanning(folder: Path, images: int) -> Callable[[], object]:
    """Scan of an image folder of 100 classes."""
    for label in range(100):
        (folder / f"n{label:08d}").mkdir(parents=True)
    for number in range(images):
        (folder / f"n{number % 100:08d}" / f"{number}.JPEG").touch()
    return lambda: ImageFolder(folder, 8)


def keys_of(images: int, ranks: int) -> Callable[[], object]:
    """Keys of some steps of one rank, in the middle of an epoch, with its order known."""
    batches = GlobalBatches(
        images, LOCAL_BATCH * ranks, rank=ranks // 2, world=ranks, seed=0, steps=range(1, STEPS * (ROUNDS + 2))
    )
    stream = iter(batches)
    next(stream)
    return lambda: [*itertools.islice(stream, STEPS)]


def order(folder: Path, images: int) -> Callable[[], object]:
    """Order of a new epoch."""
    steps = itertools.count()
    return lambda: next(iter(GlobalBatches(images, 1, rank=0, world=1, seed=next(steps), steps=range(1))))


def draws(folder: Path, ranks: int) -> Callable[[], object]:
    """Times, noise and dropped labels of some steps of one rank, at a fixed local batch."""
    loss = DiffusionLoss(create_model("DiT-S/2", sample_shape=(4, 32, 32), learn_sigma=False), FlowMatching(), seed=0)
    first = LOCAL_BATCH * (ranks // 2)
    rows = range(first, first + LOCAL_BATCH)
    return lambda: [loss.draw(step, LOCAL_BATCH * ranks, rows) for step in range(STEPS)]


def saved(folder: Path, megabytes: int) -> Callable[[], object]:
    """A whole save of a state of so many megabytes."""
    folder.mkdir()
    state = {"model": {str(i): torch.zeros(250_000) for i in range(megabytes)}}
    return lambda: save_checkpoint(folder / "0000001.safetensors", state, {})


def paused(folder: Path, megabytes: int) -> Callable[[], object]:
    """The pause of a save of so many megabytes; the file before it is written by then."""
    folder.mkdir()
    state = {"model": {str(i): torch.zeros(250_000) for i in range(megabytes)}}
    saver = BackgroundSaver(folder, lambda path, step: None)
    saver.prepare(state)

    def save() -> None:
        saver.save(State(1, state, {}))
        saver.wait()  # which takes no CPU time of this thread

    return save


COSTS = (
    Cost("opening a latent store", "image", (20_000, 160_000, 1_280_000), opening),
    Cost("scanning an image folder", "image", (2_000, 8_000, 32_000), scanning),
    Cost("order of an epoch", "image", (160_000, 1_280_000, 10_240_000), order),
    Cost("keys of a step", "image", (160_000, 1_280_000, 10_240_000), lambda _, n: keys_of(n, 8), STEPS),
    Cost("keys of a step, batch of a rank fixed", "rank", (1, 8, 64), lambda _, n: keys_of(1_280_000, n), STEPS),
    Cost("draws of a step, batch of a rank fixed", "rank", (1, 8, 64), draws, STEPS),
    Cost("whole save", "megabyte", (64, 256, 1024), saved),
    Cost("pause of a save", "megabyte", (64, 256, 1024), paused),
)


def seconds(call: Callable[[], object]) -> float:
    """Least CPU time of some calls of this thread, after one to warm up."""
    found = []
    for _ in range(ROUNDS + 1):
        before = time.thread_time()
        call()
        found.append(time.thread_time() - before)
    return min(found[1:])


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def measure(cost: Cost, folder: Path) -> tuple[list[float], float]:
    """Seconds at each size, and the exponent."""
    times = []
    for size in cost.sizes:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            times.append(seconds(cost.prepare(Path(scratch) / "scratch", size)) / cost.calls)
    return times, exponent(cost.sizes, times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of scratch files")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    rows = []
    for cost in COSTS:
        times, power = measure(cost, folder)
        sizes = ", ".join(f"{size:,}" for size in cost.sizes)
        shown = ", ".join(f"{each * 1e3:.3g}" for each in times)
        each = f"{times[-1] / cost.sizes[-1] * 1e6:.3g} us per {cost.unit}" if power > 0.5 else "does not grow"
        rows.append([f"{cost.name}, by {cost.unit}s", sizes, shown, f"{power:.2f}", each])
    print(aligned(["cost", "sizes", "ms of CPU time", "exponent", "constant"], rows, left=2))


if __name__ == "__main__":
    main()
