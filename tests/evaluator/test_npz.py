"""Reading images from .npz files: the recorded cases, every layout, and everything that can be wrong with a file."""

import hashlib
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from evaluator.npz import BadImageFile, ImageFile
from tests.golden_data import GOLDEN
from tests.inception_files import make_images, write_npz

FOLDER = GOLDEN / "evaluator"
READERS = next(c for c in json.loads((FOLDER / "manifest.json").read_text())["cases"] if c["name"] == "readers")
LAYOUTS = ["images_plain", "images_compressed", "images_fortran"]


def read(file, start=0, stop=None, size=4):
    return list(file.batches(start, file.count if stop is None else stop, size))


@pytest.fixture
def images():
    return make_images(10, (6, 5))


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("name", LAYOUTS)
def test_golden_layouts(name):
    file = ImageFile(FOLDER / f"{name}.npz")
    batches = read(file)
    assert [len(batch) for batch in batches] == READERS["expected"]["batch_sizes"]
    pixels = np.concatenate(batches)
    assert pixels.sum() == READERS["expected"]["pixel_sum"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == READERS["expected"]["sha256"]
    assert (file.count, file.size, file.statistics) == (10, (32, 48), None)


def test_golden_wrong_key():
    with pytest.raises(ValueError, match=r"images_wrong_key.npz: has no array arr_0 \(the images\), only "):
        ImageFile(FOLDER / "images_wrong_key.npz")


def test_golden_statistics_beside_images():
    file = ImageFile(FOLDER / "reference_with_stats.npz")
    with np.load(FOLDER / "reference_with_stats.npz") as arrays:
        assert file.count == 6 and file.statistics is not None
        for found, names in zip(file.statistics, (("mu", "sigma"), ("mu_s", "sigma_s")), strict=True):
            assert np.array_equal(found.mean, arrays[names[0]].astype(np.float64))
            assert np.array_equal(found.covariance, arrays[names[1]])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("start", "stop", "size"), [(0, 10, 3), (4, 9, 2), (7, 8, 5), (3, 3, 2), (0, 10, 100)])
def test_any_part_of_any_layout(tmp_path, images, compressed, order, start, stop, size):
    path = write_npz(tmp_path / "a.npz", np.asarray(images, order=order), compressed, arr_1=np.arange(10))
    batches = read(ImageFile(path), start, stop, size)
    assert [len(batch) for batch in batches] == [min(size, stop - i) for i in range(start, stop, size)]
    assert np.array_equal(np.concatenate([images[:0], *batches]), images[start:stop])
    assert all(batch.flags.c_contiguous and batch.flags.writeable for batch in batches)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_any_version_of_the_header(tmp_path, images, version):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, images, version)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    assert np.array_equal(read(ImageFile(tmp_path / "a.npz"), size=10)[0], images)


def test_what_sample_ddp_writes(tmp_path, images):
    from data.sample_file import SampleFile

    file = SampleFile(tmp_path / "a.npz", images.shape, len(images), 0)
    assert file.take_up({}, overwrite=False) == [0]
    file.write(0, images)
    file.finish(np.arange(10))
    assert np.array_equal(np.concatenate(read(ImageFile(tmp_path / "a.npz"))), images)


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_streamed(tmp_path, compressed):
    path = write_npz(tmp_path / "a.npz", np.zeros((600, 64, 64, 3), np.uint8), compressed)  # 7.4 MB
    file = ImageFile(path)
    tracemalloc.start()
    try:
        for batch in file.batches(300, 600, 8):
            assert batch.nbytes == 8 * 64 * 64 * 3 or len(batch) == 4
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6, 5, 3), np.float32), "arr_0 is float32; expected uint8 pixels, 0 to 255"),
        (np.zeros((4, 6, 5, 3), np.int64), "arr_0 is int64; expected uint8"),
        (np.zeros((4, 3, 6, 5), np.uint8), r"of shape \(4, 3, 6, 5\); expected \(N, H, W, 3\) \(channels come last"),
        (np.zeros((4, 6, 5, 1), np.uint8), r"of shape \(4, 6, 5, 1\); expected \(N, H, W, 3\)$"),
        (np.zeros((6, 5, 3), np.uint8), r"of shape \(6, 5, 3\); expected"),
        (np.zeros((0, 6, 5, 3), np.uint8), "is empty"),
        (np.array([None, {}]), "arr_0 is object; expected uint8"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", arr_0=array, allow_pickle=True)
    with pytest.raises(BadImageFile, match=f"a.npz: .*{message}"):
        ImageFile(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_are_cut_short(tmp_path, images, compressed, kept):
    whole = write_npz(tmp_path / "whole.npz", images, compressed).read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(BadImageFile, match="a.npz: not an .npz file, or cut short"):
        ImageFile(tmp_path / "a.npz")


def test_an_array_with_fewer_pixels_than_its_header_says(tmp_path, images):
    buffer = io.BytesIO()
    np.save(buffer, images)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-7])
    with pytest.raises(BadImageFile, match="a.npz: arr_0 is cut short: 893 of 900 bytes"):
        ImageFile(tmp_path / "a.npz")


def test_damaged_compressed_pixels_are_found_while_reading(tmp_path):
    content = bytearray(write_npz(tmp_path / "a.npz", make_images(20, (64, 64)), compressed=True).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "a.npz").write_bytes(content)
    file = ImageFile(tmp_path / "a.npz")
    with pytest.raises(BadImageFile, match="a.npz: its images are damaged or cut short"):
        read(file)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, images):
    path = write_npz(tmp_path / "a.npz", images)
    file = ImageFile(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImageFile, match="a.npz: its images are damaged or cut short .*it ends early"):
        read(file)


def test_an_array_without_a_header(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no header here")
    with pytest.raises(BadImageFile, match="a.npz: arr_0 is no NumPy array"):
        ImageFile(tmp_path / "a.npz")


def test_other_files(tmp_path):
    with pytest.raises(BadImageFile, match="no.npz: there is no such file"):
        ImageFile(tmp_path / "no.npz")
    with pytest.raises(BadImageFile, match="cannot be read"):
        ImageFile(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((4, 6, 5, 3), np.uint8))
    with pytest.raises(BadImageFile, match="a.npy: not an .npz file"):
        ImageFile(tmp_path / "a.npy")
    zipfile.ZipFile(tmp_path / "empty.npz", "w").close()
    with pytest.raises(BadImageFile, match="has no array arr_0 .* only nothing"):
        ImageFile(tmp_path / "empty.npz")


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(4)}, r"\(mean and covariance must be \(D,\) and \(D, D\)"),
        ({"sigma_s": np.full((2, 2), np.nan)}, "mean or covariance has NaN"),
        ({"mu_s": np.array(["a", "b"])}, "cannot be used"),
        ({"sigma": np.array([{}])}, "allow_pickle"),
    ],
)
def test_statistics_that_are_none(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **{**GOOD, **changes})
    with pytest.raises(BadImageFile, match=f"a.npz: its statistics .*{message}"):
        assert ImageFile(tmp_path / "a.npz").statistics


def test_statistics_without_images_are_enough(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    file = ImageFile(tmp_path / "a.npz")
    assert file.count == 0 and file.size is None and file.statistics is not None


def test_statistics_of_pool_features_alone_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=GOOD["mu"], sigma=GOOD["sigma"])
    with pytest.raises(BadImageFile, match="a.npz: has mu but not mu_s, sigma_s"):
        ImageFile(tmp_path / "a.npz")
