"""Stages of the evaluator: on a GPU as cases of the report, on a CPU each in a separate process.

Weights are synthetic (inception_graph.py): speed does not depend on them. Features after the network are
random numbers of the real shapes.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.inception_graph import synthetic_graph
from benchmarks.timing import Case, Row
from evaluator.features import extract_features
from evaluator.inception.backend import Features
from evaluator.inception.network import InceptionNetwork, load_network
from evaluator.metrics import (
    DistancePrecision,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    precision_recall,
)
from evaluator.npz import ImageFile
from evaluator.scores import ADM_METRICS, ImageSet, compute_scores
from evaluator.statistics import Statistics, feature_statistics
from runtime.distributed import World

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GROUP = "evaluator"  # of the report's rows
REAL_BATCHES = 2  # of a dry run, which the network really evaluates, so that it takes its memory


@dataclass(frozen=True)
class EvaluatorSizes:
    """Sizes of everything; the defaults are the published protocol."""

    divisor: int = 1  # of the network's number of channels
    side: int = 256  # of the images, in pixels
    pool: int = 2048  # number of features
    spatial: int = 2023  # number of features
    reference: int = 10_000  # images of the reference
    samples: int = 50_000  # images that are evaluated
    images: int = 256  # images of a timed run of the network
    batch: int = 64  # images at a time
    few: int = 1000  # rows of a set with a singular covariance


PUBLISHED = EvaluatorSizes()
TINY = EvaluatorSizes(divisor=16, side=16, pool=128, spatial=24, reference=40, samples=60, images=4, batch=2, few=20)


def random_features(rows: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Features as after a ReLU, (rows, width) float32 >= 0, neighbours correlated."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(rows, width, generator=generator, device=device)
    return features.add_(features.roll(1, dims=1), alpha=0.5).relu_()


def random_images(count: int, side: int) -> npt.NDArray[np.uint8]:
    """Noise, (count, side, side, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def make_network(sizes: EvaluatorSizes, device: torch.device | str = "cpu") -> InceptionNetwork:
    """The Inception network with synthetic weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pb"
        path.write_bytes(synthetic_graph(sizes.divisor))
        return load_network(path, device)


# ----------------------------------------------------------------------------------------------------------------------
# Cases of the GPU's report


def evaluator_cases(device: torch.device, sizes: EvaluatorSizes) -> list[Case]:
    """All parts of an evaluation but reading; the first case is the network."""
    reference = random_features(sizes.reference, sizes.pool, 0, device)
    samples = random_features(sizes.samples, sizes.pool, 1, device)
    network = make_network(sizes, device)
    images = random_images(sizes.batch, sizes.side)

    def run_network(_: None) -> Features:
        return [network.features(images) for _ in range(sizes.images // sizes.batch)][-1]

    def spatial_statistics() -> list[Statistics]:
        rows = sizes.few + sizes.spatial
        return [feature_statistics(random_features(rows, sizes.spatial, seed)) for seed in (2, 3)]

    shown = f"{sizes.reference:,} and {sizes.samples:,}"
    work: dict[str, Callable[[None], object]] = {
        f"Inception Score of {sizes.samples:,}": lambda _: inception_score(network.probabilities(samples)),
        f"FID of {shown}": lambda _: frechet_distance_from_features(reference, samples),
        f"precision and recall of {shown}": lambda _: precision_recall(reference, samples),
    }
    return [
        Case(f"features, {sizes.side} x {sizes.side}", lambda: None, run_network, images=sizes.images),
        *(Case(name, lambda: None, run) for name, run in work.items()),
        Case("sFID of given statistics", spatial_statistics, lambda pair: frechet_distance(*pair)),
    ]


def extrapolated_seconds(rows: Sequence[Row], sizes: EvaluatorSizes) -> float | None:
    """Seconds of a whole evaluation without reading, from the cases' times; None if they did not run."""
    ours = [row for row in rows if row.group == GROUP]
    if not ours:
        return None
    per_image = ours[0].seconds / ours[0].images
    return per_image * (sizes.reference + sizes.samples) + sum(row.seconds for row in ours[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Stages on a CPU, each alone in a process, so that its memory can be measured


@dataclass(frozen=True)
class Stage:
    """Result of one stage."""

    name: str  # in tables
    seconds: float  # time of the work, without preparation
    memory: int  # peak of the whole process in bytes, libraries and preparation included
    images: int = 0  # number of images; 0 where that means nothing
    facts: Mapping[str, float] = field(default_factory=dict)  # other numbers
    seconds_goal: float | None = None  # largest time that is good; None without a goal


def run_alone(work: Callable[..., Stage], threads: int, *arguments: object) -> Stage:
    """Run a stage in a fresh process with a number of CPU threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(work, *arguments).result()


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(name: str, work: Callable[[], object], images: int = 0, fact: str | None = None) -> Stage:
    """Time the work of a stage, which may return a number that is kept under the name `fact`."""
    start = time.perf_counter()
    result = work()
    facts = {}
    if fact is not None:
        assert isinstance(result, SupportsFloat)
        facts[fact] = float(result)
    return Stage(name, time.perf_counter() - start, peak_memory(), images, facts)


class SparseFile(io.FileIO):
    """A file that skips zeros instead of writing them, so that gigabytes of black images take no space."""

    def write(self, data: ReadableBuffer) -> int:
        """Write, or leave a hole."""
        data = memoryview(data)
        if len(data) < 4096 or np.frombuffer(data, np.uint8).any():
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


def write_black_images(path: Path, count: int, side: int) -> Path:
    """Write an .npz of black images, of full size to readers and of a few kilobytes on the disk."""
    with SparseFile(path, "w") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
            np.lib.format.write_array_header_1_0(entry, header)
            row = side * side * 3
            rows_at_a_time = max(1, (1 << 22) // row)
            for start in range(0, count, rows_at_a_time):
                entry.write(bytes(min(rows_at_a_time, count - start) * row))
    return path


def reading(sizes: EvaluatorSizes) -> Stage:
    """Read every image of the samples once."""
    with tempfile.TemporaryDirectory() as folder:
        file = ImageFile(write_black_images(Path(folder) / "a.npz", sizes.samples, sizes.side))
        batches = file.batches(0, file.count, sizes.batch)
        return _timed("reading", lambda: sum(batch.nbytes for batch in batches) / 1e9, sizes.samples, "gigabytes")


def digest(sizes: EvaluatorSizes) -> Stage:
    """Compute the samples' sha256, and the CRC-32 of the pixels in the same pass."""
    with tempfile.TemporaryDirectory() as folder:
        file = ImageFile(write_black_images(Path(folder) / "a.npz", sizes.samples, sizes.side))
        return _timed("sha256 and CRC-32 of the file (while the network runs)", file.verified_sha256, sizes.samples)


def features(sizes: EvaluatorSizes) -> Stage:
    """Evaluate the network."""
    network, images = make_network(sizes), random_images(sizes.batch, sizes.side)
    network.features(images)
    batches = sizes.images // sizes.batch
    name = f"features, {sizes.side} x {sizes.side}"
    return _timed(name, lambda: [network.features(images) for _ in range(batches)][-1], batches * sizes.batch)


def statistics(sizes: EvaluatorSizes) -> Stage:
    """Compute mean and covariance of the samples' pool features."""
    rows = random_features(sizes.samples, sizes.pool, 0)
    return _timed(f"statistics of {sizes.samples:,} x {sizes.pool:,}", lambda: feature_statistics(rows))


def _pair(rows: int, width: int) -> list[Tensor]:
    return [random_features(rows, width, seed) for seed in (0, 1)]


def distance(sizes: EvaluatorSizes, rows: int, name: str) -> Stage:
    """Compute the Frechet distance of given statistics."""
    a, b = map(feature_statistics, _pair(rows, sizes.pool))
    return _timed(name, lambda: frechet_distance(a, b), fact="distance")


def distance_from_features(sizes: EvaluatorSizes) -> Stage:
    """Compute the Frechet distance of few rows, without their covariances."""
    a, b = _pair(sizes.few, sizes.pool)
    name = f"Frechet distance of {sizes.few:,} rows"
    return _timed(name, lambda: frechet_distance_from_features(a, b), fact="distance")


def general_square_root(sizes: EvaluatorSizes, rows: int) -> Stage:
    """Compute the Frechet distance by a square root of the product of covariances, as ADM does."""
    from scipy.linalg import sqrtm

    a, b = map(feature_statistics, _pair(rows, sizes.pool))

    def compute() -> float:
        root = float(np.trace(sqrtm(a.covariance.numpy() @ b.covariance.numpy())).real)
        shift = a.mean - b.mean
        return float(shift @ shift + a.covariance.trace() + b.covariance.trace()) - 2 * root

    return _timed("the same by a general square root (scipy)", compute, fact="distance")


def manifolds(sizes: EvaluatorSizes, precision: DistancePrecision) -> Stage:
    """Compute precision and recall of as many samples as references."""
    a, b = _pair(sizes.reference, sizes.pool)
    name = f"precision and recall, {sizes.reference:,} x {sizes.reference:,}, {precision}"
    return _timed(name, lambda: precision_recall(a, b, precision=precision))


class DryRunBackend:
    """A backend with the network's memory but hardly any of its time: most features are random numbers."""

    def __init__(self, sizes: EvaluatorSizes) -> None:
        self.network, self.sizes, self.calls = make_network(sizes), sizes, 0

    def features(self, images: npt.NDArray[np.uint8]) -> Features:
        """Random features of (N, H, W, 3) images."""
        self.calls += 1
        if self.calls <= REAL_BATCHES:
            self.network.features(images)
        widths = (self.sizes.pool, self.sizes.spatial)
        return Features(*(random_features(len(images), width, self.calls) for width in widths))

    def probabilities(self, pool: Tensor) -> Tensor:
        """Class probabilities of the network."""
        return self.network.probabilities(pool)


def dry_run(sizes: EvaluatorSizes) -> Stage:
    """Run a whole evaluation at full size, files and metrics included, without the network's time."""
    world, backend = World(0, 1, torch.device("cpu")), DryRunBackend(sizes)

    def extract(path: Path, count: int) -> ImageSet:
        extracted = extract_features(
            ImageFile(path), backend, count, batch_size=sizes.batch, spatial=True, world=world, title=path.name
        )
        assert extracted is not None  # the only process is the main one
        return ImageSet(extracted.pool, None, extracted.spatial, backend.probabilities)

    with tempfile.TemporaryDirectory() as folder:
        counts = {Path(folder) / "reference": sizes.reference, Path(folder) / "samples": sizes.samples}
        for path, count in counts.items():
            write_black_images(path, count, sizes.side)

        def evaluate() -> None:
            reference, samples = (extract(*item) for item in counts.items())
            scores = compute_scores(ADM_METRICS, reference, samples, "adm")
            assert all(map(math.isfinite, scores.values()))

        return _timed("everything but the network", evaluate)
