"""Long jobs hold a constant number of files and threads, and their memory does not grow with the images."""

import sys

import pytest

from benchmarks.load import Watch, measure, measure_training


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="figures come from /proc")
def test_growth_is_that_of_the_last_nine_tenths():
    watch = Watch(100)
    watch.add(10)
    ((images, memory, files, threads),) = watch._rows
    assert images == 10 and memory > 10 and files > 2 and threads > 0
    watch._rows = [(10 * i, 50.0 + 9 * (i > 4), 5 + (i == 7), 3) for i in range(11)]
    load = watch.result("test")
    assert (load.growth_mb, load.peak_mb, load.files, load.threads) == (100, 59, (5, 6), (3, 3))


@pytest.mark.slow
def test_50_000_images_take_no_more_memory_files_or_threads_than_5_000():
    for load in measure(50_000):
        assert load.images == 50_000 and load.growth_mb < 1, load
        assert load.files[1] - load.files[0] <= 2 and load.threads[0] == load.threads[1], load


@pytest.mark.slow
def test_10_000_steps_of_training_take_no_more_memory_files_or_threads_than_1_000():
    load = measure_training(10_000)
    assert load.images == 10_000 and load.growth_mb < 2, load  # per 1,000 steps, with 20 checkpoints
    assert load.files[1] - load.files[0] <= 2 and load.threads[0] == load.threads[1], load
