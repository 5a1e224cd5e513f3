"""Files of a latent store: raw latents of an encoder, extracted once.

A folder holds `manifest.json` (the settings), shards, `labels.npy`, the labels of all shards, and `index.json`, which
is written last. Shard 7 is

- `00007.npy`, float16 (images, flips, *raw shape): raw latents as an `Encoder` makes them, not scaled; one or two
  flips, the plain image first;
- `00007.json`: labels, relative paths, images that could not be read, size and sha256 of the array;
- with captions `00007.text.npy` and `00007.text.json`, of `data/caption_files.py`.

Posterior parameters are means and standard deviations. Standard deviations and not log-variances: a sample is then one
fused operation, and float16 keeps them to 2^-11 relative or, below 6e-5, to 3e-8 absolute, far below the rounding of a
mean. A log-variance near -17 would be off by 0.4 %.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.layouts import describe_layout
from data.npz_file import npy_header
from runtime.download import sha256_of
from runtime.files import atomic_path
from runtime.json_file import Json, is_intact, parse_json, read_json, write_json
from runtime.migrate import latent_index

FORMAT = 2
INDEX, MANIFEST, LABELS = "index.json", "manifest.json", "labels.npy"
PART = "part.json"  # instead of the index, in a part of a store that --shard cut; with it the part is finished
REMEDY = "run scripts/extract_latents.py again with the same settings: it makes what is missing"
_PART = r"\d{5}(\.text)?|null\.text|labels"  # names of the parts of a store, without suffix
_NOT_FINITE = 0x7C00  # float16 bits without the sign: infinity; NaNs are above it

Raw = npt.NDArray[np.float16]


class Encoded(NamedTuple):
    """Some consecutive images of a shard."""

    raw: Raw  # (n, flips, *raw shape) float16
    labels: list[int]  # n class numbers
    paths: list[str]  # n paths relative to the image folder
    skipped: list[tuple[str, str]]  # (path, reason) of the images that could not be read; they have no row


def is_finite(raw: Raw) -> bool:
    """Check for NaN and infinity by the bits, several times faster than `np.isfinite`."""
    return raw.size == 0 or int((raw.view(np.uint16) & 0x7FFF).max()) < _NOT_FINITE


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Array and description of a shard."""
    return folder / f"{number:05d}.npy", folder / f"{number:05d}.json"


def array_path(folder: Path, shard: Json) -> Path:
    """Array of a shard in the index."""
    return folder / next(name for name in shard["files"] if name.endswith(".npy"))


def write_shard(folder: Path, number: int, row_shape: Sequence[int], parts: Iterable[Encoded]) -> None:
    """Stream the images of a shard to disk: first the array, then the description, which marks it as finished.

    `row_shape` is that of one image: flips, then the shape of raw latents.
    """
    array, description_path = shard_paths(folder, number)
    description_path.unlink(missing_ok=True)
    lists: dict[str, list[object]] = {"skipped": [], "labels": [], "paths": []}
    with atomic_path(array) as temporary:
        with temporary.open("wb") as file:
            size = file.write(npy_header((0, *row_shape), np.dtype(np.float16)))
            for part in parts:
                file.write(np.ascontiguousarray(part.raw).data)
                for name, values in lists.items():
                    values += getattr(part, name)
            count = len(lists["labels"])
            file.seek(0)
            header = npy_header((count, *row_shape), np.dtype(np.float16))
            assert file.write(header) == size  # NumPy pads for a longer first axis
        totals = {"count": count, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
        description = {**totals, **lists}
    write_json(description_path, description, indent=None)


class PathsDigest:
    """Digest of the encoder and of the paths of all images, shard by shard, in their order."""

    def __init__(self, encoder_sha256: str) -> None:
        self._digest = hashlib.sha256(encoder_sha256.encode())

    def update(self, paths: Sequence[str]) -> None:
        """Take in the paths of the next shard."""
        self._digest.update("\n".join(paths).encode(errors="surrogateescape"))
        self._digest.update(b"\n" if paths else b"")

    def hexdigest(self) -> str:
        """The digest as text."""
        return self._digest.hexdigest()


def finished_shard(folder: Path, number: int) -> Json | None:
    """The description of a shard that is complete, judged by the size of its array; None for any other."""
    array, description_path = shard_paths(folder, number)
    try:
        description = read_json(description_path)
        return description if array.stat().st_size == description["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(
    folder: Path, shard_count: int, more_files: Callable[[str], Json] = lambda name: {}, **more: object
) -> Json:
    """Write labels.npy and index.json from the manifest and the descriptions of all shards.

    The index has a digest of all paths, so that opening a store parses no description.

    Args:
        folder: Folder of the shards.
        shard_count: Number of shards.
        more_files: Function of a shard's name, "00007", that returns the records of further files of it.
        **more: Further members.

    Raises:
        ValueError: If a shard is not finished.
    """
    manifest = latent_index(read_json(folder / MANIFEST))
    shards, labels, digest = [], list[int](), PathsDigest(manifest["encoder"]["sha256"])
    for number in range(shard_count):
        array, path = shard_paths(folder, number)
        description = finished_shard(folder, number)
        if description is None:
            raise ValueError(f"{array}: not finished; {REMEDY}")
        files = {
            array.name: {"bytes": description["bytes"], "sha256": description["sha256"]},
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)},
            **more_files(array.stem),
        }
        shards.append({"count": description["count"], "skipped": len(description["skipped"]), "files": files})
        labels += description["labels"]
        digest.update(description["paths"])
    with atomic_path(folder / LABELS) as temporary:
        np.save(temporary, np.array(labels, dtype=np.int64))
        record = {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    more |= {"labels": record, "digest": digest.hexdigest()}
    totals = {name: sum(shard[name] for shard in shards) for name in ("count", "skipped")}
    index = {**manifest, **totals, **more, "shards": shards}
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path) -> Json:
    """Read index.json, of this format or the one before.

    Raises:
        ValueError: Naming the file, if it is missing, damaged or without images.
    """
    path = folder / INDEX
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")
    try:
        index = parse_json(path.read_text())
    except FileNotFoundError as error:
        if (folder / PART).exists():
            raise ValueError(f"{folder}: part of a store; scripts/merge.py puts all parts together") from error
        if (folder / MANIFEST).exists() or shard_files(folder):
            raise ValueError(f"{path}: missing; the extraction is not finished, {REMEDY}") from error
        nothing = f"{folder}: holds no latents of scripts/extract_latents.py (no {INDEX}); give its --output"
        raise ValueError(describe_layout(folder) or nothing) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {REMEDY}") from error
    index = latent_index(index) if isinstance(index, dict) else {}
    if index.get("format") != FORMAT:
        raise ValueError(f"{path}: not an index of latents in format {FORMAT} or 1; extract with --overwrite")
    missing = {"classes", "image_shape", "row_shape", "encoder", "count", "shards"} - index.keys()
    missing |= {"name", "sha256", "stochastic"} - index.get("encoder", {}).keys()
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; {REMEDY}")
    if not index["count"]:
        raise ValueError(f"{path}: no images; none could be read at extraction, see `skipped` in the shards")
    return index


def check_index(folder: Path) -> None:
    """Raise a ValueError if index.json has a checksum that it does not match."""
    index = json.loads((folder / INDEX).read_text())
    if index.get("format") == FORMAT and not is_intact(index):  # earlier formats have no checksum
        raise ValueError(f"{folder / INDEX}: edited or damaged, it does not match its checksum; {REMEDY}")


def remove_partial(folder: Path) -> None:
    """Remove temporary files of a killed extraction."""
    for path in folder.glob(".*"):
        if re.fullmatch(rf"\.({_PART}|index|part|manifest)\.(\d+\.tmp\.(npy|json)|json\.\d+\.probe)", path.name):
            path.unlink(missing_ok=True)


def shard_files(folder: Path) -> list[Path]:
    """Files that are named like a part of a shard; none if there is no such folder."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(rf"({_PART})\.(npy|json)", path.name))


def remove_shards(folder: Path) -> None:
    """Remove an extraction: index, shards and manifest; by that order the rest is recognised after a kill."""
    for path in (folder / INDEX, folder / PART, *shard_files(folder), folder / MANIFEST):
        path.unlink(missing_ok=True)


def check_size(path: Path, expected: int) -> None:
    """Raise a ValueError unless a file has so many bytes."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {REMEDY}") from error
    if actual != expected:
        raise ValueError(f"{path}: {actual:,} bytes instead of {expected:,}; delete it and {REMEDY}")


def check_sha256(path: Path, shard: Json) -> None:
    """Raise a ValueError unless a file of a shard is the one that was written."""
    compare_sha256(path, shard, sha256_of(path))


def compare_sha256(path: Path, shard: Json, actual: str) -> None:
    """Raise a ValueError unless this is the checksum of a file of a shard."""
    if actual != shard["files"][path.name]["sha256"]:
        raise ValueError(f"{path}: not what was written (sha256); delete it and {REMEDY}")


def map_array(path: Path, shape: tuple[int, ...]) -> np.memmap[tuple[int, ...], np.dtype[np.float16]]:
    """Memory-map the array of a shard; a ValueError unless it is a float16 array of this shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy parses the header as Python, and a damaged one fails in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a NumPy array ({reason}); delete it and {REMEDY}") from error
    if array.shape != shape or array.dtype != np.float16:
        raise ValueError(
            f"{path}: {array.dtype} {array.shape} instead of float16 {shape}; it is of another extraction, "
            f"delete it and {REMEDY}"
        )
    return array


class ArrayFile:
    """The array of a shard, of which single rows are read: only their bytes, straight into a batch.

    A row is one flip of an image; row `r` is flip `r % flips` of image `r // flips`.

    Args:
        path: Path of the file.
        shape: (images, flips, *raw shape).

    Raises:
        ValueError: As `map_array`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        array = map_array(path, shape)
        self._path, self._start, self._size = path, array.offset, 2 * math.prod(shape[2:])
        self._flips = shape[1]
        self._map: Raw | None = None
        self._advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)  # not on macOS
        if not hasattr(os, "preadv") or not array.flags.c_contiguous:
            self._map, self._advise = array.view(np.ndarray), None  # indexing memmaps is slow
            return
        # A map reads megabytes around a row, by the read-ahead of the disk
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def prefetch(self, row: int, count: int, part: int = 0) -> None:
        """Let the system begin to read `count` bytes as `read_into` does, so that the disk works on a batch at once."""
        if self._advise is not None:
            self._advise(self._descriptor, self._place(row, count, part), count, os.POSIX_FADV_WILLNEED)

    def read_into(self, row: int, out: Raw, part: int = 0) -> None:
        """Read a row, or one of the parts of equal size that it consists of, into contiguous memory.

        Raises:
            ValueError: If the file cannot be read, or was cut short after it was opened.
        """
        if self._map is not None:
            out[...] = self._map[divmod(row, self._flips)].reshape(-1, *out.shape)[part]
            return
        size, target = out.nbytes, out.data.cast("B")
        start, done = self._place(row, size, part), 0
        try:
            while done < size:
                count = os.preadv(self._descriptor, [target[done:] if done else target], start + done)
                if not count:
                    raise ValueError(f"{self._path}: cut short while in use; delete it and {REMEDY}")
                done += count
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be read ({error.strerror})") from error

    def _place(self, row: int, size: int, part: int) -> int:
        """First byte of a part of `size` bytes of a row."""
        return self._start + row * self._size + part * size
