"""Idx files, the format of MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST, QMNIST), gzipped or not.

A file is a header (two zero bytes, a code of the numbers' type, the number of dimensions, their sizes in big-endian
32-bit numbers) and the numbers. Source: LeCun, Cortes and Burges, the MNIST database.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.array_images import ArrayImages, array_digest
from data.dataset import DatasetSettings

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGES = re.compile(r"(?P<start>.*)images(?P<dot>[-.])idx[34]-ubyte(?P<gz>\.gz)?", re.IGNORECASE)
MAX_BYTES = 1 << 33  # of the numbers of a file; more does not fit in memory


class IdxImages(ArrayImages):
    """Images of an idx file, with the digest of both files' numbers."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], *, flip: bool, seed: int) -> None:
        names = np.unique(labels)  # some relatives count from 1
        places = np.searchsorted(names, labels).astype(np.int64)
        super().__init__(images, places, list(map(str, names.tolist())), flip=flip, seed=seed)
        self._digest = array_digest(images, labels)  # of the labels as they are in the file


def open_idx(settings: DatasetSettings) -> IdxImages:
    """Open idx files as a data set, by default not mirrored: a digit or a letter would become another sign.

    The path is a folder with one file of training images, or the file of images itself; the labels are next to it,
    under the name with "labels" and "idx1".

    Raises:
        ValueError: Naming the file that is missing, damaged or of another kind.
    """
    path = find_images(settings.require_path("a folder of idx files"))
    pixels, labels = load_idx(path)
    own, channels = pixels.shape[1:3], pixels.shape[3]
    if settings.size not in (None, own):
        raise ValueError(f"{path}: its images are {own[0]} x {own[1]}; leave out --image-size")
    if settings.channels not in (0, channels):
        raise ValueError(f"{path}: its images have {channels} channels, not {settings.channels}")
    return IdxImages(pixels, labels, flip=bool(settings.flip), seed=settings.seed)


def load_idx(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load a file of images and its labels: (N, H, W, 1 or 3) uint8 and (N,) int64.

    Raises:
        ValueError: Naming the file that is missing, damaged or of another kind.
    """
    images, labels = read_idx(path), read_idx(labels_of(path))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{path}: holds {images.dtype} of shape {images.shape}, not images (N, H, W) or (N, H, W, 3)")
    pixels = images.astype(np.uint8)[..., None] if images.ndim == 3 else images.astype(np.uint8)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(pixels) or not len(pixels):
        raise ValueError(f"{labels_of(path)}: labels {labels.shape} {labels.dtype} for {len(pixels)} images")
    return pixels, labels.astype(np.int64)


def load_split(path: Path, split: Literal["train", "test"]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load the training images that a path means, or the test images next to them ("t10k" instead of "train").

    Raises:
        ValueError: Naming the file that is missing or damaged.
    """
    images = find_images(path)
    return load_idx(images if split == "train" else images.with_name(images.name.replace("train", "t10k")))


def find_images(path: Path) -> Path:
    """The file of images that a path means.

    Raises:
        ValueError: If there is none, or several in a folder.
    """
    if path.is_file():
        if IMAGES.fullmatch(path.name) is None:
            raise ValueError(f"{path}: not named like a file of images, such as train-images-idx3-ubyte.gz")
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    found = sorted(each for each in path.iterdir() if "train" in each.name.lower() and IMAGES.fullmatch(each.name))
    by_name = {each.name.removesuffix(".gz"): each for each in reversed(found)}  # the unpacked one of a pair
    if len(by_name) != 1:
        names = ", ".join(sorted(by_name)) or "none"
        raise ValueError(f"{path}: expected one file such as train-images-idx3-ubyte.gz, and found {names}; give one")
    return next(iter(by_name.values()))


def labels_of(images: Path) -> Path:
    """The file of labels of a file of images, gzipped or not; a ValueError if there is none."""
    match = IMAGES.fullmatch(images.name)
    assert match is not None  # of `find_images`
    plain = images.with_name(f"{match['start']}labels{match['dot']}idx1-ubyte")
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.is_file():
            return path
    raise ValueError(f"{images}: its labels, {plain.name} or {plain.name}.gz, are missing")


def read_idx(path: Path) -> npt.NDArray[np.generic]:
    """Read the numbers of an idx file, in native byte order.

    Raises:
        ValueError: If it is damaged, truncated, or something else.
    """
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        with opened as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in DTYPES:
                raise ValueError("not an idx file")
            shape = [int.from_bytes(file.read(4), "big") for _ in range(head[3])]
            dtype = np.dtype(DTYPES[head[2]])
            size = math.prod(shape) * dtype.itemsize
            if size > MAX_BYTES:
                raise ValueError(f"its header asks for {size:,} bytes")
            content = file.read(size + 1)  # to the end, where gzip compares its checksum
    except (OSError, EOFError, zlib.error, ValueError) as error:  # BadGzipFile is an OSError
        raise ValueError(f"{path}: damaged, truncated or not an idx file ({error})") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise ValueError(f"{path}: damaged or truncated; its header names {size:,} bytes, and it holds {more}")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))
