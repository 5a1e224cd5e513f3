"""Long jobs hold a constant number of files and threads, and their memory does not grow with the images."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks.load import Load, Row, Watch, evaluate, growth, measure, measure_training, sample
from data.sample_file import SampleFile

IMAGES = 5_000
LEAK = 5000  # bytes per image; from so few images growth is known to 2 MB per 1,000

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="figures come from /proc")


def test_growth_is_that_of_the_last_nine_tenths():
    watch = Watch(100)
    watch.add(10)
    ((images, memory, files, threads),) = watch._rows
    assert images == 10 and memory > 10 and files > 2 and threads > 0
    watch._rows = [Row(10 * i, 50.0 + 9 * (i < 1) + 0.3 * i, 5 + (i == 7), 3) for i in range(11)]
    result = watch.result("test")
    assert (result.growth_mb, result.files, result.threads) == (30, (5, 6), (3, 3))
    assert result.peak_mb > memory


def test_single_buffers_are_no_growth_and_a_leak_under_them_is():
    noise = np.random.default_rng(0).choice([0, 5, 30], 90)
    for leak in (0, 1):
        rows = [Row(1000 * i, 300 + leak * i + float(extra), 5, 3) for i, extra in enumerate(noise, start=10)]
        assert growth(rows) == pytest.approx(leak, abs=0.1)


def test_memory_that_was_freed_is_not_counted():
    def grown(kept_bytes: int) -> float:
        watch, kept, sizes = Watch(1000), [], np.random.default_rng(1)
        for _ in range(50):
            scratch = [bytes(int(size)) for size in sizes.integers(1000, 60_000, 100)]  # 3 MB from the C library
            kept.append(b"x" * kept_bytes)
            del scratch
            watch.add(20)
        return watch.result("test").growth_mb

    assert grown(0) < 1 and grown(20 * 10_000) == pytest.approx(10, rel=0.2)


def leaking_sample(folder: Path, images: int) -> Load:
    kept, write = [], SampleFile.write

    def leaky(file: SampleFile, chunk: int, rows: np.ndarray) -> None:
        kept.append(b"x" * (LEAK * len(rows)))
        write(file, chunk, rows)

    with mock.patch.object(SampleFile, "write", leaky):
        return sample(folder, images)


def leaking_evaluate(folder: Path, images: int) -> Load:
    from evaluator.inception.network import InceptionNetwork

    kept, features = [], InceptionNetwork.features

    def leaky(network: InceptionNetwork, batch: np.ndarray) -> object:
        kept.append(b"x" * (LEAK * len(batch)))
        return features(network, batch)

    with mock.patch.object(InceptionNetwork, "features", leaky):
        return evaluate(folder, images)


@pytest.mark.slow
def test_a_leak_in_either_stage_is_found():
    for leaking in measure(IMAGES, (leaking_sample, leaking_evaluate)):
        assert leaking.growth_mb > 1, leaking


@pytest.mark.slow
def test_50_000_images_take_no_more_memory_files_or_threads_than_5_000():
    for stage in measure(50_000):
        assert stage.images == 50_000 and stage.growth_mb < 1, stage
        assert stage.files[1] - stage.files[0] <= 2 and stage.threads[0] == stage.threads[1], stage


@pytest.mark.slow
def test_10_000_steps_of_training_take_no_more_memory_files_or_threads_than_1_000():
    stage = measure_training(10_000)
    assert stage.images == 10_000 and stage.growth_mb < 2, stage  # per 1,000 steps, with 20 checkpoints
    assert stage.files[1] - stage.files[0] <= 2 and stage.threads[0] == stage.threads[1], stage
