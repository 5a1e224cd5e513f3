"""Reading images from .npz files: the recorded cases, every layout, and everything that can be wrong with a file."""

import hashlib
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from evaluator import npz
from evaluator.npz import BadImageFile, ImageFile
from tests.golden_data import GOLDEN
from tests.inception_files import make_images, write_npz

FOLDER = GOLDEN / "evaluator"
READERS = next(c for c in json.loads((FOLDER / "manifest.json").read_text())["cases"] if c["name"] == "readers")
LAYOUTS = ["images_plain", "images_compressed", "images_fortran"]
LARGE = make_images(20, (64, 64))  # zipfile reads 4,096 bytes at once, and finds damage in files as small by itself
GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}


def read(file, start=0, stop=None, size=4):
    return list(file.batches(start, file.count if stop is None else stop, size))


def pack(path, arrays, compression=zipfile.ZIP_STORED):
    """An .npz by any compression, from arrays or the bytes of entries."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in arrays.items():
            buffer = io.BytesIO(value if isinstance(value, bytes) else b"")
            if not isinstance(value, bytes):
                np.save(buffer, value)
            archive.writestr(f"{name}.npy", buffer.getvalue())
    return path


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
    assert file.open({}, overwrite=False) == [0]
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
        (np.zeros((4, 6, 5, 1), np.uint8), r"of shape \(4, 6, 5, 1\); expected \(N, H, W, 3\); repeat the channel"),
        (np.zeros((6, 5, 3), np.uint8), r"of shape \(6, 5, 3\); expected"),
        (np.zeros((0, 6, 5, 3), np.uint8), "is empty"),
        (np.array([None, {}]), "arr_0 is object; expected uint8"),
        (np.zeros(4, [("a", np.uint8)]), r"arr_0 is \[\('a', 'u1'\)\]; expected uint8"),
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


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_digest_of_whole_files(tmp_path, compressed, order):
    path = write_npz(tmp_path / "a.npz", np.asarray(LARGE, order=order), compressed, **GOOD)
    np.savez(tmp_path / "b.npz", **GOOD)
    for each in (path, tmp_path / "b.npz", pack(tmp_path / "c.npz", {"arr_1": LARGE, "arr_0": LARGE})):
        wanted = hashlib.sha256(each.read_bytes()).hexdigest()
        assert all(ImageFile(each).verified_sha256(read_to_end=whole) == wanted for whole in (True, False))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("place", [100, 4321, -1])
def test_damaged_stored_pixels_are_found_by_the_digest(tmp_path, order, place):
    path = write_npz(tmp_path / "a.npz", np.asarray(LARGE, order=order), **GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(LARGE.tobytes(order)) + place % LARGE.size] ^= 1
    path.write_bytes(content)
    file = ImageFile(path)
    read(file)  # nothing shows
    with pytest.raises(BadImageFile, match="a.npz: its images are damaged: arr_0 has the CRC-32 .*, and had"):
        file.verified_sha256()


def test_damaged_compressed_pixels_behind_the_wanted_ones_are_found_by_the_digest(tmp_path):
    content = bytearray(write_npz(tmp_path / "a.npz", LARGE, compressed=True).read_bytes())
    entry = zipfile.ZipFile(tmp_path / "a.npz").getinfo("arr_0.npy")
    content[30 + entry.compress_size - 200] ^= 64
    (tmp_path / "a.npz").write_bytes(content)
    file = ImageFile(tmp_path / "a.npz")
    assert np.array_equal(read(file, stop=4)[0], LARGE[:4])
    file.verified_sha256()
    with pytest.raises(BadImageFile, match="a.npz: its images are damaged or cut short"):
        file.verified_sha256(read_to_end=False)


class Pipe(io.BytesIO):
    """A stream that cannot go back, so that zipfile writes checksums behind the entries."""

    def seekable(self):
        return False

    def tell(self):
        raise OSError("a pipe")


def test_a_checksum_behind_the_entry_is_known(tmp_path):
    pipe = Pipe()
    pack(pipe, {"arr_0": LARGE})
    content = pipe.getvalue()
    assert content[14:18] == bytes(4)  # the place of the checksum before the entry
    (tmp_path / "a.npz").write_bytes(content)
    assert ImageFile(tmp_path / "a.npz").verified_sha256() == hashlib.sha256(content).hexdigest()


def test_a_file_that_goes_away_before_the_digest(tmp_path, images):
    path = write_npz(tmp_path / "a.npz", images)
    file = ImageFile(path)
    path.unlink()
    with pytest.raises(BadImageFile, match="a.npz: its images are damaged or cut short .*No such file"):
        file.verified_sha256()


@pytest.mark.parametrize(("order", "message"), [("C", "it ends early"), ("F", "mmap length is greater")])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, images, order, message):
    path = write_npz(tmp_path / "a.npz", np.asarray(images, order=order))
    file = ImageFile(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImageFile, match=f"a.npz: its images are damaged or cut short .*{message}"):
        read(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damaged_at", ["start", "middle"])
def test_damage_under_any_compression(tmp_path, compression, damaged_at):
    content = bytearray(pack(tmp_path / "a.npz", {"arr_0": make_images(20, (64, 64))}, compression).read_bytes())
    place = 50 if damaged_at == "start" else len(content) // 2
    content[place : place + 40] = b"\xff" * 40
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BadImageFile, match="a.npz: .*(damaged|cut short|cannot be read)") as caught:
        read(ImageFile(tmp_path / "a.npz"))
    assert "(None)" not in str(caught.value)


def test_damaged_statistics_under_any_compression(tmp_path):
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        content = bytearray(pack(tmp_path / "a.npz", GOOD, compression).read_bytes())
        content[50:70] = b"\xff" * 20
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(BadImageFile, match="a.npz: its statistics cannot be used"):
            assert ImageFile(tmp_path / "a.npz").statistics


def mark(path, name, flags=0, method=None):
    """Sets flags, or the compression, of an entry in both of its headers."""
    content = bytearray(path.read_bytes())
    for signature, at, name_at in ((b"PK\x03\x04", 6, 30), (b"PK\x01\x02", 8, 46)):
        place = content.index(signature)
        while content[place + name_at : place + name_at + len(name)] != name.encode():
            place = content.index(signature, place + 1)
        content[place + at] |= flags
        if method is not None:
            content[place + at + 2] = method
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"flags": 1}, "is encrypted, password required"), ({"method": 99}, "compression .*not supported")],
)
def test_entries_that_zipfile_cannot_open(tmp_path, images, changes, message):
    for name, match in (("arr_0", "not an .npz file"), ("sigma", "its statistics cannot be used")):
        path = pack(tmp_path / "a.npz", {"arr_0": images, **GOOD})
        mark(path, name, **changes)
        with pytest.raises(BadImageFile, match=f"a.npz: {match}.*{message}"):
            assert ImageFile(path).statistics


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(10, 6, 5, 3)", b" 10, 6, 5, 3 "),
        (b"(10, 6, 5, 3)", b"(-10,-6,5, 3)"),
        (b", }", b", ("),
        (b"'shape'", b"b'shap'"),
    ],
    ids=["no tuple", "negative", "no end", "keys of two kinds"],
)
def test_headers_that_say_nonsense(tmp_path, images, old, new):
    buffer = io.BytesIO()
    np.save(buffer, images)
    assert buffer.getvalue().count(old) == 1
    path = pack(tmp_path / "a.npz", {"arr_0": buffer.getvalue().replace(old, new)})
    with pytest.raises(BadImageFile, match="a.npz: arr_0 is (no NumPy array|empty)"):
        ImageFile(path)


def test_compressed_fortran_order_is_not_decompressed_at_any_size(tmp_path, images, monkeypatch):
    scattered = np.asarray(images, order="F")
    monkeypatch.setattr(npz, "LARGEST_WHOLE", 900)
    assert ImageFile(write_npz(tmp_path / "a.npz", scattered, True)).count == 10  # 900 bytes
    monkeypatch.setattr(npz, "LARGEST_WHOLE", 899)
    with pytest.raises(BadImageFile, match=r"a.npz: arr_0 is compressed in Fortran.* 900 bytes.* \(np.ascontiguous"):
        ImageFile(tmp_path / "a.npz")
    for other in (write_npz(tmp_path / "b.npz", scattered), write_npz(tmp_path / "c.npz", images, True)):
        assert ImageFile(other).count == 10


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(4)}, r"\(mean and covariance must be \(D,\) and \(D, D\)"),
        ({"sigma_s": np.full((2, 2), np.nan)}, "mean or covariance has NaN"),
        ({"mu_s": np.array(["a", "b"])}, "cannot be used"),
        ({"sigma": np.array([{}])}, "allow_pickle"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "with D >= 1"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "covariance is not symmetric"),
        ({"mu": np.zeros(3, complex)}, r"\(mu is complex128; expected real numbers"),
        ({"sigma_s": np.zeros((2, 2), [("a", float)])}, r"\(sigma_s is \[\('a', '<f8'\)\]; expected real numbers"),
        ({"mu": np.array(["1", "2", "3"])}, r"\(mu is <U1; expected real numbers"),
        ({"mu": np.zeros(3, "m8[s]")}, r"\(mu is timedelta64\[s\]; expected real numbers"),
    ],
)
def test_statistics_that_are_none(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **{**GOOD, **changes})
    with pytest.raises(BadImageFile, match=f"a.npz: its statistics .*{message}"):
        assert ImageFile(tmp_path / "a.npz").statistics


def test_statistics_that_are_no_arrays(tmp_path):
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    for value, message in ((b"a word", r"mu is \|S6"), (huge.getvalue(), ".")):
        path = pack(tmp_path / "a.npz", GOOD | {"mu": value})
        with pytest.raises(BadImageFile, match=f"a.npz: its statistics cannot be used \\({message}"):
            assert ImageFile(path).statistics


def test_statistics_of_any_real_kind_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", **{name: value.astype(">f4") for name, value in GOOD.items()})
    found = ImageFile(tmp_path / "a.npz").statistics
    assert found is not None and found.pool.covariance.equal(torch.eye(3, dtype=torch.float64))


def test_statistics_without_images_are_enough(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    file = ImageFile(tmp_path / "a.npz")
    assert file.count == 0 and file.size is None and file.statistics is not None


def test_statistics_of_pool_features_alone(tmp_path):
    np.savez(tmp_path / "a.npz", mu=GOOD["mu"], sigma=GOOD["sigma"])
    statistics = ImageFile(tmp_path / "a.npz").statistics
    assert statistics is not None and statistics.pool is not None and statistics.spatial is None


@pytest.mark.parametrize(("kept", "missing"), [("mu", "sigma"), ("sigma", "mu"), ("mu_s", "sigma_s")])
def test_half_of_the_statistics_is_refused(tmp_path, kept, missing):
    np.savez(tmp_path / "a.npz", **{kept: GOOD[kept]})
    with pytest.raises(BadImageFile, match=f"a.npz: has {kept} but not {missing}; a mean and a covariance go together"):
        ImageFile(tmp_path / "a.npz")
