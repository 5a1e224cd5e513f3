import numpy as np
import pytest

from data.sample_file import SampleFile


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)


def write(path, images, order):
    file = SampleFile(path, images.shape)
    file.create()
    padded = np.concatenate([images, images[:50]])
    for start in order:
        SampleFile(path, images.shape).write(start, padded[start : start + 70])
    file.finish(np.arange(600))


def test_rows_arrive_in_order_whoever_wrote_first(tmp_path, images):
    write(tmp_path / "a.npz", images, range(0, 600, 70))
    write(tmp_path / "b.npz", images, reversed(range(0, 600, 70)))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "arr_1"]
        assert np.array_equal(loaded["arr_0"], images) and loaded["arr_0"].dtype == np.uint8
        assert np.array_equal(loaded["arr_1"], np.arange(600)) and loaded["arr_1"].dtype == np.int64
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_nothing_stands_under_the_final_name_before_the_end(tmp_path, images):
    file = SampleFile(tmp_path / "a.npz", images.shape)
    file.create()
    file.write(0, images[:10])
    assert not (tmp_path / "a.npz").exists()
    file.discard()
    assert not list(tmp_path.iterdir())
