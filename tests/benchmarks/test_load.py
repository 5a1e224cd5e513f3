"""Long jobs hold a constant number of files and threads, and their memory does not grow with the images."""

import sys

import pytest

from benchmarks.load import Watch, measure


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="figures come from /proc")
def test_growth_is_that_of_the_last_nine_tenths(monkeypatch):
    watch, held = Watch(100), []
    for i in range(10):
        held.append(bytearray(b"x" * (i == 4) * 8 * 2**20))
        watch.add(10)
    load = watch.result("test")
    assert load.images == 100 and 70 < load.growth_mb < 200 and load.files[0] > 0 and load.threads[0] > 0


@pytest.mark.slow
def test_50_000_images_take_no_more_memory_files_or_threads_than_5_000():
    for load in measure(50_000):
        assert load.images == 50_000 and load.growth_mb < 1, load
        assert load.files[1] - load.files[0] <= 2 and load.threads[0] == load.threads[1], load
