"""Latents on disk: the moments of an autoencoder's posterior, extracted once, sampled anew at every step.

A folder holds `manifest.json` (the settings), shards, and `index.json`, which is written last. Shard 7 is

- `00007.npy`, float16 (images, flips, 2 C, h, w): C channels of means, then C of standard deviations, not scaled; one
  or two flips, the plain image first;
- `00007.json`: labels, relative paths, what could not be read, size and sha256 of the array.

Standard deviations and not log-variances: a sample is then one multiply-add, and float16 keeps them to 2^-11 relative
or, below 6e-5, to 3e-8 absolute, far below the rounding of a mean. A log-variance near -17 would be off by 0.4 %.
Arrays are memory-mapped, so a data set may be larger than memory: only the rows asked for are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.autoencoder import KLAutoencoder, open_autoencoder, sample_moments
from data.image_folder import Example, Key, is_flipped
from runtime.files import atomic_path

FORMAT = 1
INDEX, MANIFEST = "index.json", "manifest.json"
AGAIN = "run scripts/extract_latents.py again with the same settings: it makes what is missing"
_NOT_FINITE = 0x7C00  # float16 bits without the sign: infinity; NaNs are above it
_ROWS_AT_A_TIME = 256

Moments = npt.NDArray[np.float16]


class Encoded(NamedTuple):
    """Some consecutive images of a shard.

    Attributes:
        moments: (n, flips, 2 C, h, w) float16.
        labels: n class numbers.
        paths: n paths relative to the image folder.
        skipped: (path, reason) of the images that could not be read; they have no row.
    """

    moments: Moments
    labels: list[int]
    paths: list[str]
    skipped: list[tuple[str, str]]


def is_finite(moments: Moments) -> bool:
    """Whether there is no NaN and no infinity (judged by the bits: several times faster than `np.isfinite`)."""
    return moments.size == 0 or int((moments.view(np.uint16) & 0x7FFF).max()) < _NOT_FINITE


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Array and description of a shard."""
    return folder / f"{number:05d}.npy", folder / f"{number:05d}.json"


def write_shard(folder: Path, number: int, shape: Sequence[int], parts: Iterable[Encoded]) -> None:
    """Streams a shard to disk: first its array, then the description that declares it finished.

    Args:
        folder: existing folder.
        number: of the shard.
        shape: (flips, 2 C, h, w) of one image.
        parts: its images, in order.
    """
    array_path, description_path = shard_paths(folder, number)
    description_path.unlink(missing_ok=True)
    labels: list[int] = []
    paths: list[str] = []
    skipped: list[tuple[str, str]] = []
    with atomic_path(array_path) as temporary:
        with temporary.open("wb") as file:
            room = _write_header(file, (0, *shape))
            for part in parts:
                file.write(np.ascontiguousarray(part.moments).data)
                labels += part.labels
                paths += part.paths
                skipped += part.skipped
            file.seek(0)
            assert _write_header(file, (len(labels), *shape)) == room  # NumPy leaves room for the first axis to grow
        description = {
            "count": len(labels),
            "bytes": temporary.stat().st_size,
            "sha256": _sha256(temporary),
            "skipped": skipped,
            "labels": labels,
            "paths": paths,
        }
    write_json(description_path, description, indent=None)


def finished_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """The description of a shard that is complete, judged by the size of its array; None for any other."""
    array_path, description_path = shard_paths(folder, number)
    try:
        description = json.loads(description_path.read_text())
        return description if array_path.stat().st_size == description["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(folder: Path, shard_count: int) -> dict[str, Any]:
    """Writes index.json from the manifest and the descriptions of all shards, and returns it.

    Raises:
        ValueError: naming a shard that is not finished.
    """
    shards = []
    for number in range(shard_count):
        array_path, description_path = shard_paths(folder, number)
        description = finished_shard(folder, number)
        if description is None:
            raise ValueError(f"{array_path}: not finished; {AGAIN}")
        files = {
            array_path.name: {"bytes": description["bytes"], "sha256": description["sha256"]},
            description_path.name: {
                "bytes": description_path.stat().st_size,
                "sha256": _sha256(description_path),
            },
        }
        shards.append({"count": description["count"], "skipped": len(description["skipped"]), "files": files})
    totals = {name: sum(shard[name] for shard in shards) for name in ("count", "skipped")}
    index = {**json.loads((folder / MANIFEST).read_text()), **totals, "shards": shards}
    write_json(folder / INDEX, index)
    return index


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """One JSON document, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def remove_partial(folder: Path) -> None:
    """Removes what a killed extraction left half written."""
    for path in folder.glob(".*.tmp.*"):
        if re.fullmatch(r"\.(\d{5}|index|manifest)\.\d+\.tmp\.(npy|json)", path.name):
            path.unlink(missing_ok=True)


def shard_files(folder: Path) -> list[Path]:
    """What is named like a part of a shard; nothing, if there is no such folder."""
    return sorted(path for path in folder.glob("[0-9]*") if re.fullmatch(r"\d{5}\.(npy|json)", path.name))


def remove_shards(folder: Path) -> None:
    """Removes an extraction: index, manifest and shards, the index first."""
    for path in (folder / INDEX, folder / MANIFEST, *shard_files(folder)):
        path.unlink(missing_ok=True)


class LatentShards:
    """A folder of latent shards behind the interface of `ImageFolder`; it hands out moments instead of images.

    Args:
        folder: what scripts/extract_latents.py wrote.
        flip: mirror at random, as `random_flip` does; None does so if both flips are stored.
        seed: of the flips.

    Attributes:
        classes: class names; a class's label is its position.
        image_shape: (C, H, W) of the images behind the latents.
        moments_shape: (2 C, h, w) of what an item holds.
        scale: the autoencoder's scaling factor.
        vae: value of `--vae` at extraction.
        shards: one memory-mapped array (images, flips, 2 C, h, w) a shard.

    Raises:
        ValueError: naming the file that is missing, cut short or no match for the index, and what to do.
    """

    worth_workers = True

    def __init__(self, folder: Path, *, flip: bool | None = None, seed: int = 0) -> None:
        index = _read_index(folder)
        self._folder, self._seed, self._shards = folder, seed, index["shards"]
        self.classes: list[str] = index["classes"]
        self.image_shape: tuple[int, ...] = tuple(index["image_shape"])
        self.scale, self.vae = float(index["scale"]), str(index["vae"])
        self._encoder_sha256 = str(index["encoder_sha256"])
        flips, *moments_shape = index["moments_shape"]
        self.moments_shape: tuple[int, ...] = tuple(moments_shape)
        if flip and flips < 2:
            raise ValueError(f"{folder / INDEX}: holds no mirrored images; extract with --both-flips, or set --no-flip")
        self._flip = flips == 2 and flip is not False
        self._row_shape = (flips, *moments_shape)
        self._ends = np.cumsum([shard["count"] for shard in self._shards])
        self._map_shards()
        self._labels = self._read_labels()

    def __len__(self) -> int:
        """Number of images; each counts once, whatever its flips."""
        return int(self._ends[-1])

    def __getitem__(self, key: Key) -> Example:
        """((2 C, h, w) float16 moments, label, index) of the image at `index` as it looks in `epoch`."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """The items of a whole batch, which a DataLoader asks for at once."""
        moments, labels, indices = self.gather(keys)
        return list(zip(moments.unbind(), labels.tolist(), indices.tolist(), strict=True))

    def gather(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Reads a batch.

        Args:
            keys: n pairs (epoch, index).

        Returns:
            Moments (n, 2 C, h, w) float16, labels (n,) int64, indices (n,) int64.

        Raises:
            IndexError: if an index is out of range.
            ValueError: naming file and image, if its moments are not finite.
        """
        indices = np.array([index for _, index in keys], dtype=np.int64)
        if len(keys) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must lie in [0, {len(self)})")
        shards, rows = self._place(indices)
        moments = np.empty((len(keys), *self.moments_shape), np.float16)
        for out, shard, row, key in zip(moments, shards.tolist(), rows.tolist(), keys, strict=True):
            out[...] = self._arrays[shard][row, int(self._flip and is_flipped(key, self._seed))]
        if not is_finite(moments):
            self._blame_row(next(i for i, m in zip(indices.tolist(), moments, strict=True) if not is_finite(m)))
        return torch.from_numpy(moments), torch.from_numpy(self._labels[indices]), torch.from_numpy(indices)

    def path(self, index: int) -> str:
        """Path of an image relative to the folder that it was extracted from."""
        (shard,), (row,) = self._place(np.array([index]))
        description = shard_paths(self._folder, self._number(int(shard)))[1]
        return json.loads(description.read_text())["paths"][row]

    def verify(self) -> None:
        """Reads everything: checksums of all files, and that all moments are finite.

        Raises:
            ValueError: naming the first file that differs, and what to do.
        """
        for shard, array in zip(self._shards, self._arrays, strict=True):
            for name, wanted in shard["files"].items():
                if _sha256(self._folder / name) != wanted["sha256"]:
                    raise ValueError(f"{self._folder / name}: not what was written (sha256); delete it and {AGAIN}")
            for start in range(0, len(array), _ROWS_AT_A_TIME):
                if not is_finite(array[start : start + _ROWS_AT_A_TIME]):
                    raise ValueError(f"{_data_file(self._folder, shard)}: holds NaN or infinity; delete it and {AGAIN}")

    def autoencoder(self, vae: str | None = None, device: torch.device | str = "cpu") -> StoredLatents:
        """The way from these moments to latents, and from latents to pixels.

        Args:
            vae: what decodes, a value of `--vae`; None takes the one of the extraction. It is loaded at need.
            device: where it decodes.

        Raises:
            ValueError: for "none".
        """
        if vae == "none":
            raise ValueError(f"{self._folder} holds latents of the autoencoder {self.vae!r}; they cannot do without")
        return StoredLatents(
            self.moments_shape,
            self.image_shape,
            self.scale,
            vae=vae or self.vae,
            encoder_sha256=self._encoder_sha256,
            device=device,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: pickling one would copy the whole array to the worker."""
        return {name: value for name, value in self.__dict__.items() if name not in ("shards", "_arrays")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the files anew, in a worker of its own memory."""
        self.__dict__.update(state)
        self._map_shards()

    def _map_shards(self) -> None:
        self.shards: list[np.memmap[Any, np.dtype[np.float16]]] = []
        for shard in self._shards:
            for name, wanted in shard["files"].items():
                _check_size(self._folder / name, wanted["bytes"])
            self.shards.append(_map_array(_data_file(self._folder, shard), (shard["count"], *self._row_shape)))
        self._arrays: list[Moments] = [shard.view(np.ndarray) for shard in self.shards]  # indexing memmaps is slow

    def _read_labels(self) -> npt.NDArray[np.int64]:
        labels: list[int] = []
        for position, shard in enumerate(self._shards):
            path = shard_paths(self._folder, self._number(position))[1]
            try:
                found = json.loads(path.read_text())["labels"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not the description of a shard; delete it and {AGAIN}") from error
            if len(found) != shard["count"]:
                raise ValueError(f"{path}: {len(found)} labels instead of {shard['count']}; delete it and {AGAIN}")
            labels += found
        return np.array(labels, dtype=np.int64)

    def _number(self, position: int) -> int:
        return int(_data_file(self._folder, self._shards[position]).stem)

    def _place(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shards and rows of images."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - np.concatenate([[0], self._ends])[shards]

    def _blame_row(self, index: int) -> None:
        (shard,), _ = self._place(np.array([index]))
        path = _data_file(self._folder, self._shards[int(shard)])
        raise ValueError(f"{path}: the moments of {self.path(index)} are not finite; delete the file and {AGAIN}")


class StoredLatents:
    """The `Autoencoder` of latents on disk: encoding is sampling; only decoding needs the real one.

    Args:
        moments_shape: (2 C, h, w).
        image_shape: (C, H, W) of the images behind them.
        scale: the autoencoder's scaling factor.
        vae: value of `--vae`; loaded when something is decoded for the first time.
        encoder_sha256: what its `encoder_sha256` must be.
        device: where it decodes.
    """

    weight_bytes = 0  # to encode, that is

    def __init__(
        self,
        moments_shape: tuple[int, ...],
        image_shape: tuple[int, ...],
        scale: float,
        *,
        vae: str,
        encoder_sha256: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scale = scale
        self._moments_shape, self._image_shape = moments_shape, image_shape
        self._vae, self._encoder_sha256, self._device = vae, encoder_sha256, device
        self._decoder: KLAutoencoder | None = None

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, h, w) of the stored latents.

        Raises:
            ValueError: for images of another shape than those behind the latents.
        """
        if tuple(image_shape) != self._image_shape:
            raise ValueError(f"the latents are of images {self._image_shape}, not {tuple(image_shape)}")
        double, height, width = self._moments_shape
        return double // 2, height, width

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents from moments (N, 2 C, h, w): a sample of the posterior, made from the given noise."""
        return sample_moments(images, noise, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped.

        Raises:
            ValueError: if the autoencoder cannot be loaded, or is not the one that encoded.
        """
        if self._decoder is None:
            self._decoder = self._load()
        return self._decoder.decode(latents)

    def _load(self) -> KLAutoencoder:
        loaded = open_autoencoder(self._vae, self._image_shape[-1], self._device)
        if not isinstance(loaded, KLAutoencoder) or loaded.encoder_sha256() != self._encoder_sha256:
            raise ValueError(f"the autoencoder {self._vae!r} is not the one that made these latents")
        return loaded


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; the extraction is not finished, {AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: not an index of latents in format {FORMAT}; extract with --overwrite")
    wanted = {"classes", "image_shape", "scale", "vae", "encoder_sha256", "moments_shape", "shards", "count"}
    if missing := sorted(wanted - index.keys()):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; {AGAIN}")
    if not index["count"]:
        raise ValueError(f"{path}: no images; none could be read at extraction, see `skipped` in the shards")
    return index


def _data_file(folder: Path, shard: dict[str, Any]) -> Path:
    return folder / next(name for name in shard["files"] if name.endswith(".npy"))


def _check_size(path: Path, wanted: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {AGAIN}") from error
    if found != wanted:
        raise ValueError(f"{path}: {found:,} bytes instead of {wanted:,}; delete it and {AGAIN}")


def _map_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: not a NumPy array ({error}); delete it and {AGAIN}") from error
    if array.shape != shape or array.dtype != np.float16:
        raise ValueError(
            f"{path}: {array.dtype} {array.shape} instead of float16 {shape}; it is of another extraction, "
            f"delete it and {AGAIN}"
        )
    return array


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_header(file: Any, shape: tuple[int, ...]) -> int:
    descr = np.lib.format.dtype_to_descr(np.dtype(np.float16))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.tell()
