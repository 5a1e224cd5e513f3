"""Features of whole files: the same for any number of processes, kept between evaluations, errors on all at once."""

import resource
import threading

import numpy as np
import pytest
import torch

from evaluator.features import (
    CACHE_KEY,
    FileFeatures,
    extract_features,
    load_features,
    read_ahead,
    save_features,
    share_of_rank,
)
from evaluator.inception.backend import Features
from evaluator.inception.network import load_network
from evaluator.npz import BadImageFile, ImageFile
from evaluator.statistics import feature_statistics
from runtime.distributed import World
from runtime.tensor_file import write_tensors
from tests.inception_files import make_images, write_npz
from tests.processes import run_ranks

ALONE = World(0, 1, torch.device("cpu"))

# Run by every process: two files' features, then a file that only one process finds damaged
SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
from evaluator.features import extract_features, save_features
from evaluator.inception.network import load_network
from evaluator.npz import ImageFile
from runtime import distributed
from runtime.errors import UserError

weights, images, folder = map(Path, sys.argv[1:])
with distributed.world("cpu", timeout_seconds=60) as world:
    backend = load_network(weights)
    options = dict(spatial=True, world=world, title="test")
    for batch_size in (2, 5):
        found = extract_features(ImageFile(images), backend, 9, batch_size=batch_size, **options)
        assert (found is not None) == world.is_main
        if found is not None:
            save_features(found, folder / f"{world.size}-{batch_size}.safetensors")
    file = ImageFile(images)
    if world.rank == world.size - 1:
        file.path = folder / "gone.npz"
    try:
        extract_features(file, backend, 9, batch_size=2, **options)
    except UserError as error:
        (folder / f"error-{world.rank}-of-{world.size}").write_text(str(error))
"""


class Brightness:
    """A network whose features are an image's pixels; notes the batches."""

    def __init__(self):
        self.batches = []

    def features(self, images):
        self.batches.append(len(images))
        rows = torch.from_numpy(images).float().flatten(start_dim=1)
        return Features(rows[:, :4].clone(), rows)

    def probabilities(self, pool):
        return pool.softmax(dim=1)


def extract(file, backend, count=None, **options):
    options = {"batch_size": 4, "spatial": True, "world": ALONE, "title": "test"} | options
    return extract_features(file, backend, file.count if count is None else count, **options)


@pytest.fixture
def images():
    return make_images(9, (3, 2))


@pytest.fixture
def file(tmp_path, images):
    return ImageFile(write_npz(tmp_path / "a.npz", images))


# ----------------------------------------------------------------------------------------------------------------------
# One process


def test_every_image_once_in_order(file, images):
    backend = Brightness()
    found = extract(file, backend)
    rows = images.reshape(9, -1).astype(np.float32)
    assert backend.batches == [4, 4, 1]
    assert torch.equal(found.pool, torch.from_numpy(rows[:, :4]))
    wanted = feature_statistics(rows)
    assert found.spatial.count == 9
    torch.testing.assert_close(found.spatial.mean, wanted.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.spatial.covariance, wanted.covariance, rtol=1e-12, atol=1e-9)


def test_sums_are_taken_in_large_parts(file, images, monkeypatch):
    monkeypatch.setattr("evaluator.features.ROWS_PER_UPDATE", 6)
    found = extract(file, Brightness(), batch_size=2)
    wanted = feature_statistics(images.reshape(9, -1).astype(np.float32))
    torch.testing.assert_close(found.spatial.covariance, wanted.covariance, rtol=1e-12, atol=1e-9)


def test_a_prefix_and_no_spatial_features(file, images):
    backend = Brightness()
    found = extract(file, backend, 5, spatial=False)
    assert backend.batches == [4, 1] and len(found.pool) == 5 and found.spatial is None
    assert extract(file, backend, 1).spatial is None  # one image has no covariance


@pytest.mark.parametrize("where", ["pool", "spatial"])
def test_features_that_are_not_finite(file, where):
    class Broken(Brightness):
        def features(self, images):
            found = super().features(images)
            if len(images) == 1:  # the ninth image
                getattr(found, where)[0, 0] = torch.nan
            return found

    match = {"pool": r"of 1 image\(s\) are NaN or infinite, first of image 8; are", "spatial": "NaN .* in 1 of 9 rows"}
    with pytest.raises(BadImageFile, match=f"a.npz: .*{match[where]}.*weights damaged"):
        extract(file, Broken())


def test_the_next_batch_is_read_in_a_thread_and_order_is_kept():
    threads = []

    def items():
        for number in range(5):
            threads.append(threading.current_thread() is threading.main_thread())
            yield number

    assert list(read_ahead(items())) == list(range(5))
    assert threads == [False] * 5


def test_errors_of_the_reading_thread_arrive():
    def items():
        yield 1
        raise BadImageFile("cut short")

    found = read_ahead(items())
    assert next(found) == 1
    with pytest.raises(BadImageFile, match="cut short"):
        next(found)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize(("count", "size"), [(9, 2), (10, 5), (1, 8), (64, 64), (50_000, 64)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_runs_of_whole_batches(count, size, ranks):
    shares = [share_of_rank(count, size, rank, ranks) for rank in range(ranks)]
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])] and shares[-1][1] == count
    assert all(start % size == 0 or start == count for start, _ in shares)
    batches = [-(-(stop - start) // size) for start, stop in shares]
    assert max(batches) - min(batches) <= 1 and batches[0] == max(batches) >= 1


def on_cpu(path, spatial=True, count=9):
    return load_features(path, count=count, spatial=spatial, device=torch.device("cpu"))


# test_evaluation.py has two processes every day
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_number_of_processes_does_not_matter(tmp_path, graph, ranks):
    path = write_npz(tmp_path / "images.npz", make_images(9))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_ranks(tmp_path / "script.py", str(graph), str(path), str(tmp_path), ranks=ranks, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    backend = load_network(graph)
    for batch_size in (2, 5):  # with 5, a third process has nothing to do
        one = extract(ImageFile(path), backend, batch_size=batch_size)
        many = on_cpu(tmp_path / f"{ranks}-{batch_size}.safetensors")
        assert torch.equal(many.pool, one.pool)
        for name in ("mean", "covariance"):
            assert torch.equal(getattr(many.spatial, name), getattr(one.spatial, name))
    messages = {(tmp_path / f"error-{rank}-of-{ranks}").read_text() for rank in range(ranks)}
    assert len(messages) == 1 and "gone.npz: its images are damaged or cut short" in messages.pop()


# ----------------------------------------------------------------------------------------------------------------------
# Kept features


def test_kept_features_come_back(tmp_path, file, graph):
    made = extract(file, load_network(graph))
    path = tmp_path / "new" / "a.safetensors"
    save_features(made, path)
    kept = on_cpu(path)
    assert torch.equal(kept.pool, made.pool) and kept.spatial.count == 9
    assert torch.equal(kept.spatial.mean, made.spatial.mean)
    assert torch.equal(kept.spatial.covariance, made.spatial.covariance)
    assert on_cpu(path, spatial=False).spatial is None
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


def test_kept_features_without_what_is_wanted_are_none(tmp_path):
    path = tmp_path / "a.safetensors"
    assert on_cpu(path, spatial=False) is None
    save_features(FileFeatures(torch.ones(9, 2), None), path)
    assert on_cpu(path, spatial=False) is not None
    assert on_cpu(path) is None
    path.write_bytes(path.read_bytes()[:-5])
    assert on_cpu(path, spatial=False) is None


KEPT = {
    "pool": torch.ones(9, 4),
    "spatial_mean": torch.zeros(3, dtype=torch.float64),
    "spatial_covariance": torch.eye(3, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": torch.ones(8, 4)},
        {"pool": torch.ones(10, 4)},
        {"pool": torch.ones(9, 4, dtype=torch.float64)},
        {"pool": torch.ones(9)},
        {"pool": torch.ones(9, 4).index_fill(0, torch.tensor(8), torch.nan)},
        {"pool": torch.full((9, 4), torch.inf)},
        {"pool": None},
        {"spatial_mean": None},
        {"spatial_covariance": None},
        {"spatial_covariance": torch.eye(3)},
        {"spatial_mean": torch.zeros(3)},
        {"spatial_covariance": torch.eye(4, dtype=torch.float64)},
        {"spatial_covariance": torch.full((3, 3), torch.nan, dtype=torch.float64)},
        {"other": torch.ones(1)},
    ],
    ids=str,
)
def test_kept_features_that_nobody_wrote_are_none(tmp_path, changes):
    path = tmp_path / "a.safetensors"
    write_tensors(path, KEPT, {}, CACHE_KEY)
    assert on_cpu(path) is not None and on_cpu(path, spatial=False) is not None
    kept = {name: value for name, value in (KEPT | changes).items() if value is not None}
    write_tensors(path, kept, {}, CACHE_KEY)
    assert on_cpu(path) is None and on_cpu(path, spatial=False) is None


def test_a_flipped_bit_in_kept_features_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, KEPT, {}, CACHE_KEY)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert on_cpu(path) is None


def test_a_full_disk_is_an_os_error_and_leaves_what_was_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    save_features(FileFeatures(torch.ones(9, 4), None), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="(?i)file too large"):
            save_features(FileFeatures(torch.ones(9, 1 << 16), None), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert on_cpu(path, spatial=False).pool.shape == (9, 4) and list(tmp_path.iterdir()) == [path]
