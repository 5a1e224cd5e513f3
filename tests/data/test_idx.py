"""Idx files: what is read, and every kind of damage in one line."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import open_dataset
from data.idx import DTYPES, find_images, load_split, read_idx
from tests import runs

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 8, 8), np.uint8)
LABELS = (np.arange(12) % 3).astype(np.uint8)


def idx(array: Any, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(DTYPES[code]).tobytes()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def folder(root: Path, start: str = "train-", dot: str = "-", gz: str = "", images: Any = PICTURES) -> Path:
    kind = images.ndim
    put(root / f"{start}images{dot}idx{kind}-ubyte{gz}", idx(images))
    put(root / f"{start}labels{dot}idx1-ubyte{gz}", idx(LABELS))
    return root


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(("start", "dot"), [("train-", "-"), ("train-", "."), ("emnist-letters-train-", "-")])
def test_relatives_of_mnist_are_read(tmp_path: Path, start: str, dot: str, gz: str) -> None:
    data = open_dataset("idx", folder(tmp_path, start, dot, gz), None, 0)
    assert len(data) == 12 and data.classes == ["0", "1", "2"] and data.image_shape == (1, 8, 8) and data.vae == "none"
    image, label, index = data[0, 4]
    assert torch.equal(image, torch.from_numpy(PICTURES[4])[None]) and (label, index) == (1, 4)
    assert all(torch.equal(data[epoch, 4][0], image) for epoch in range(8)), "not mirrored"


def test_a_test_split_and_colour_and_other_labels(tmp_path: Path) -> None:
    folder(tmp_path)
    file = put(tmp_path / "t10k-images-idx4-ubyte.gz", idx(np.stack([PICTURES[:6]] * 3, -1)))
    put(tmp_path / "t10k-labels-idx1-ubyte", idx(np.array([1, 5, 26, 5, 1, 26]), 0x0C))
    data = open_dataset("idx", file, 8, 3)
    assert data.image_shape == (3, 8, 8) and data.classes == ["1", "5", "26"] and data[0, 2][1] == 2
    assert len(open_dataset("idx", tmp_path, None, 1)) == 12


def test_the_test_images_are_next_to_the_training_images(tmp_path: Path) -> None:
    folder(tmp_path)
    put(tmp_path / "t10k-images-idx3-ubyte", idx(PICTURES[:6]))
    put(tmp_path / "t10k-labels-idx1-ubyte", idx(LABELS[:6]))
    for split, count in (("train", 12), ("test", 6)):
        images, labels = load_split(tmp_path, split)
        assert np.array_equal(images[..., 0], PICTURES[:count]) and np.array_equal(labels, LABELS[:count])


def test_the_digest_is_that_of_the_numbers(tmp_path: Path) -> None:
    plain, packed = (
        open_dataset("idx", folder(tmp_path / name, gz=gz), None, 0) for name, gz in (("a", ""), ("b", ".gz"))
    )
    other = open_dataset("idx", folder(tmp_path / "c", images=255 - PICTURES), None, 0)
    assert plain.digest() == packed.digest() != other.digest()  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", DTYPES)
def test_numbers_of_every_type(tmp_path: Path, code: int) -> None:
    array = np.arange(6).reshape(2, 3)
    assert np.array_equal(read_idx(put(tmp_path / "a", idx(array, code))), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(PICTURES)[:-1], "its header names 768 bytes, and it holds 767"),
        ("train-images-idx3-ubyte", idx(PICTURES) + b"x", "and it holds more"),
        ("train-images-idx3-ubyte", b"\x00\x00", "not an idx file"),
        ("train-images-idx3-ubyte", b"\x89PNG" + bytes(20), "not an idx file"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "its header asks for"),
        ("train-images-idx3-ubyte", idx(PICTURES.astype(float), 0x0D), "holds float32 of shape"),
        ("train-images-idx3-ubyte", idx(PICTURES[0]), "not images"),
        ("train-labels-idx1-ubyte", idx(LABELS[:-1]), "labels \\(11,\\) uint8 for 12 images"),
        ("train-labels-idx1-ubyte", idx(LABELS, 0x0D), "labels \\(12,\\) float32"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    put(folder(tmp_path) / name, content)
    with pytest.raises(ValueError, match=message) as error:
        open_dataset("idx", tmp_path, None, 0)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_damaged_gzip_is_found_wherever_it_is(tmp_path: Path) -> None:
    content = gzip.compress(idx(PICTURES))
    path = tmp_path / "a.gz"
    for place in range(0, len(content), 7):
        broken = bytearray(content)
        broken[place] ^= 4
        path.write_bytes(bytes(broken))
        try:
            assert np.array_equal(read_idx(path), PICTURES)  # fields of gzip's own header
        except ValueError as error:
            assert "\n" not in str(error)
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match="damaged, truncated"):
            read_idx(path)


def test_missing_files_and_other_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        open_dataset("idx", tmp_path / "none", None, 0)
    with pytest.raises(ValueError, match="expected one file such as train-images-idx3-ubyte.gz, and found none"):
        open_dataset("idx", tmp_path, None, 0)
    folder(tmp_path)
    for size, channels, message in [(28, 0, "are 8 x 8; leave out --image-size"), (None, 3, "have 1 channels, not 3")]:
        with pytest.raises(ValueError, match=message):
            open_dataset("idx", tmp_path, size, channels)
    folder(tmp_path, "b-train-")
    with pytest.raises(ValueError, match="found b-train-images-idx3-ubyte, train-images-idx3-ubyte; give one"):
        open_dataset("idx", tmp_path, None, 0)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="its labels, train-labels-idx1-ubyte or .*.gz, are missing"):
        open_dataset("idx", tmp_path / "train-images-idx3-ubyte", None, 0)
    with pytest.raises(ValueError, match="not named like a file of images"):
        find_images(put(tmp_path / "pictures.bin", b""))


def test_a_run_trains_on_them_and_is_validated_by_the_test_split(tmp_path: Path) -> None:
    root = folder(folder(tmp_path / "data"), "t10k-")
    argv = f"--dataset idx --data-path {root} --model DiT-debug/2 --num-classes 3 --global-batch-size 4 --max-steps 2"
    argv += f" --device cpu --eval-every 2 --eval-samples 0 --eval-data-path {root / 't10k-images-idx3-ubyte'}"
    assert runs.start(tmp_path / "results", *argv.split()) == 0
    assert "Dataset contains 12 images" in runs.log(tmp_path / "results")
