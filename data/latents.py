"""Training on a latent store, which may be larger than memory: only the rows of a batch are read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.autoencoders import OFFICIAL_VAES
from data.caption_files import NULL, StoredText
from data.dataset import Example, Key
from data.encoders import FP32, Encoder, LatentScaling, Shape, open_encoder
from data.image_folder import is_flipped
from data.latent_files import (
    INDEX,
    LABELS,
    REMEDY,
    ArrayFile,
    Json,
    PathsDigest,
    Raw,
    array_path,
    check_index,
    check_sha256,
    check_size,
    compare_sha256,
    is_finite,
    map_array,
    read_index,
)
from runtime.json_file import parse_json

_ROWS_AT_A_TIME = 256


class LatentShards:
    """A latent store as a data set; its items are raw latents, with labels or, if the store has any, captions.

    The index and the descriptions of shards are compared with their checksums here; an array at its first use, in the
    process that reads it.

    Args:
        folder: Output of scripts/extract_latents.py.
        flip: Mirror at random, as `random_flip` does; None does so if both flips are stored.
        seed: Seed of the flips.
        trust_stamps: Use arrays that are not newer than the index without comparing their checksums.

    Attributes:
        raw_shape: Shape of an item.

    Raises:
        ValueError: Naming the file that is missing, cut short or does not match the index, and what to do.
    """

    worth_workers = True
    _digest: str

    def __init__(self, folder: Path, *, flip: bool | None = None, seed: int = 0, trust_stamps: bool = False) -> None:
        index = read_index(folder)
        self._folder, self._seed, self._flip, self._trust_stamps = folder, seed, flip, trust_stamps
        try:
            self._open(index)
        except (AttributeError, KeyError, OverflowError, StopIteration, TypeError) as error:
            check_index(folder)
            raise ValueError(f"{folder / INDEX}: not an index of latents ({error!r}); {REMEDY}") from error
        check_index(folder)  # last, because the other messages say more

    def _open(self, index: Json) -> None:
        self._shards, self._encoder = index["shards"], index["encoder"]
        self.classes: list[str] = index["classes"]
        self.image_shape: tuple[int, ...] = tuple(index["image_shape"])
        self.vae: str = self._encoder["name"]
        flips, *raw_shape = index["row_shape"]
        self.raw_shape: tuple[int, ...] = tuple(raw_shape)
        if self._flip and flips < 2:
            raise ValueError(
                f"{self._folder / INDEX}: holds no mirrored images; extract with --both-flips, or set --no-flip"
            )
        self._flip = flips == 2 and self._flip is not False
        self._row_shape = (flips, *raw_shape)
        self._frame_axis: tuple[int, ...] = ()  # in front of a row: (1,) where images are clips of one frame
        self._ends = np.cumsum([shard["count"] for shard in self._shards])
        # Shared with the loader's workers, which share the pages of the file, too
        self._checked = torch.zeros(len(self._shards), dtype=torch.bool).share_memory_()
        self._open_arrays()
        self._labels = self._read_labels(index)
        self._texts: list[StoredText] = []
        if "text" in index:
            self._open_text(index["text"])

    def __len__(self) -> int:
        """Number of images; flips of one image count once."""
        return int(self._ends[-1])

    def __getitem__(self, key: Key) -> Example:
        """(Raw latents in float16, label, index) of the image at `index` as it is in `epoch`."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """The items of a batch, which a DataLoader asks for at once."""
        raw, labels, indices = self.gather(keys)
        given: list[int | dict[str, Tensor]] = labels.tolist() if self.classes else [{}] * len(keys)
        if self._texts:
            given = [*unstack(self._captions(indices.numpy()))]
        return list(zip(raw.unbind(), given, indices.tolist(), strict=True))

    def gather(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Read a batch: raw latents (n, *raw_shape) float16, labels (n,) int64, indices (n,) int64.

        Raises:
            IndexError: If an index is out of range.
            ValueError: Naming the file, if it is not what was written, or its latents are not finite.
        """
        indices = np.array([index for _, index in keys], dtype=np.int64)
        if len(keys) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must be in [0, {len(self)})")
        raw = self._read(indices, [self._flip is True and is_flipped(key, self._seed) for key in keys])
        raw = raw.reshape(len(raw), *self._frame_axis, *raw.shape[1:])
        return torch.from_numpy(raw), torch.from_numpy(self._labels[indices]), torch.from_numpy(indices)

    def make_clips(self) -> None:
        """Give images as clips of one frame, which networks for clips take."""
        if len(self.raw_shape) == 3:
            self._frame_axis = (1,)
            self.raw_shape, self.image_shape = (1, *self.raw_shape), (1, *self.image_shape)

    def _read(self, indices: npt.NDArray[np.int64], flips: Sequence[bool], frames: Sequence[int] | None = None) -> Raw:
        """Read raw latents of images or clips, or a frame of each of the clips; raises the errors of `gather`."""
        shards, rows = self._locate(indices)
        for position in {*shards.tolist()}:
            self._check_array(position)
        shape = self._row_shape[1 if frames is None else 2 :]
        raw, parts = np.empty((len(indices), *shape), np.float16), frames or [0] * len(indices)
        rows = rows * self._row_shape[0] + np.array(flips, dtype=np.int64)
        files = [self._files[shard] for shard in shards.tolist()]
        places = list(zip(files, rows.tolist(), raw, parts, strict=True))
        for file, row, out, part in places:
            file.prefetch(row, out.nbytes, part)
        for file, row, out, part in places:
            file.read_into(row, out, part)
        if not is_finite(raw):
            bad = next(i for i, row in enumerate(raw) if not is_finite(row))
            path = array_path(self._folder, self._shards[shards[bad]])
            name = self.path(int(indices[bad]))
            raise ValueError(f"{path}: the latents of {name} are not finite; delete the file and {REMEDY}")
        return raw

    def _captions(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Encoded captions of images or clips: "text" (n, L, K) and "text_mask" (n, L), float32."""
        shards, rows = self._locate(indices)
        found: dict[str, Tensor] = {}
        for shard in np.unique(shards):  # each file is mapped once
            places = np.flatnonzero(shards == shard)
            for name, leaf in self._texts[shard].rows(rows[places].tolist()).items():
                found.setdefault(name, leaf.new_empty(len(indices), *leaf.shape[1:]))[places] = leaf
        return found

    def path(self, index: int) -> str:
        """Path of an image relative to the folder that it was extracted from."""
        (shard,), (row,) = self._locate(np.array([index]))
        return json.loads(self._description(int(shard)).read_text())["paths"][row]

    def verify(self) -> None:
        """Check checksums of all arrays, and that all latents are finite; a ValueError names the first bad file."""
        for shard, array in zip(self._shards, self.shards, strict=True):
            check_sha256(array_path(self._folder, shard), shard)
            for start in range(0, len(array), _ROWS_AT_A_TIME):
                if not is_finite(array[start : start + _ROWS_AT_A_TIME]):
                    path = array_path(self._folder, shard)
                    raise ValueError(f"{path}: holds NaN or infinity; delete it and {REMEDY}")
        for text in self._texts:
            text.verify()

    def _check_array(self, position: int) -> None:
        """Compare the arrays of a shard with their checksums, once for this process and its workers."""
        if self._checked[position]:
            return
        shard, stamp = self._shards[position], (self._folder / INDEX).stat().st_mtime_ns
        for name in shard["files"]:
            path = self._folder / name
            if path.suffix == ".npy" and not (self._trust_stamps and path.stat().st_mtime_ns <= stamp):
                check_sha256(path, shard)
        self._checked[position] = True

    def encoder(self, vae: str | None = None, device: torch.device | str = "cpu") -> StoredEncoder:
        """The encoder of these items, which decodes with `vae` (a value of `--vae`; None is that of the extraction).

        Raises:
            ValueError: For "none", and for an autoencoder that is not the one of these latents.
        """
        if vae == "none":
            raise ValueError(f"{self._folder} holds latents of the autoencoder {self.vae!r}; give that one")
        encoder = StoredEncoder(vae or self.vae, device, self._encoder, self.raw_shape, self.image_shape)
        if encoder.name != self.vae and {encoder.name, self.vae} != set(OFFICIAL_VAES):
            encoder.load()
        return encoder

    def __getstate__(self) -> dict[str, object]:
        """The members without the open files."""
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Open the files again, in the process of a worker."""
        self.__dict__.update(state)
        self._open_arrays()

    @property
    def shards(self) -> list[Raw]:
        """One memory-mapped array (images, flips, *raw_shape) per shard, mapped at each call."""
        return [map_array(array_path(self._folder, s), (s["count"], *self._row_shape)) for s in self._shards]

    def _open_arrays(self) -> None:
        self._files: list[ArrayFile] = []
        for shard in self._shards:
            for name, record in shard["files"].items():
                check_size(self._folder / name, record["bytes"])
            self._files.append(ArrayFile(array_path(self._folder, shard), (shard["count"], *self._row_shape)))

    def digest(self) -> str:
        """Digest of the paths of all images, in their order, and of the encoder."""
        return self._digest

    def _open_text(self, record: Json) -> None:
        """Open the encoded captions, which take the place of labels."""
        self.text: Json = record["encoder"]
        null = StoredText(self._folder, NULL, record["null"], 1, self.text)
        null.verify()
        self.null_conditioning = {name: leaf[0] for name, leaf in null.rows([0]).items()}
        self._texts = [
            StoredText(self._folder, array_path(self._folder, shard).stem, shard["files"], shard["count"], self.text)
            for shard in self._shards
        ]
        self.classes = []
        digests = [text.sha256 for text in self._texts]
        self._digest = hashlib.sha256("\n".join([self._digest, self.text["sha256"], *digests]).encode()).hexdigest()

    def _read_labels(self, index: Json) -> npt.NDArray[np.int64]:
        """Read the labels of all images, and the digest; of stores without labels.npy from the descriptions.

        A description is compared with its checksum in either case.
        """
        record = index.get("labels")
        labels, digest = list[npt.NDArray[np.int64]](), PathsDigest(self._encoder["sha256"])
        for position, shard in enumerate(self._shards):
            path = self._description(position)
            content = path.read_bytes()
            if record is None:
                labels.append(parse_labels(path, content, shard["count"], digest))
            compare_sha256(path, shard, hashlib.sha256(content).hexdigest())
        if record is None:
            self._digest = digest.hexdigest()
            return np.concatenate(labels)
        self._digest = index["digest"]
        path = self._folder / LABELS
        content = path.read_bytes() if path.exists() else b""
        compare_sha256(path, {"files": {LABELS: record}}, hashlib.sha256(content).hexdigest())
        found: npt.NDArray[np.int64] = np.lib.format.read_array(io.BytesIO(content))
        return found

    def _description(self, position: int) -> Path:
        return array_path(self._folder, self._shards[position]).with_suffix(".json")

    def _locate(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shards and rows of images."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - np.concatenate([[0], self._ends])[shards]


def parse_labels(path: Path, content: bytes, count: int, digest: PathsDigest) -> npt.NDArray[np.int64]:
    """Labels in the description of a shard, and its paths into the digest; a ValueError names a damaged file."""
    try:
        description = parse_json(content)
        labels = description["labels"]
        digest.update(description["paths"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of a shard; delete it and {REMEDY}") from error
    if len(labels) != count:
        raise ValueError(f"{path}: {len(labels)} labels instead of {count}; delete it and {REMEDY}")
    return np.array(labels, dtype=np.int64)


def unstack(leaves: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Rows of tensors by name, one by one."""
    return (dict(zip(leaves, row, strict=True)) for row in zip(*leaves.values(), strict=True))


class StoredEncoder(Encoder):
    """Encoder of a latent store, which holds raw latents already; the autoencoder is loaded at the first decoding.

    `recorded` is the encoder in the store's index; the shapes are those of an item and of the images before encoding.
    """

    def __init__(
        self, name: str, device: torch.device | str, recorded: Json, raw_shape: Shape, image_shape: Shape
    ) -> None:
        super().__init__(name)
        self._recorded, self._raw_shape, self._image_shape = recorded, raw_shape, image_shape
        self._device = device
        self._decoder: Encoder | None = None
        self.precision = recorded.get("precision", FP32)
        self.stochastic, self.settings = recorded["stochastic"], recorded.get("settings", {})
        self.scaling = LatentScaling.from_config(recorded, self.latent_shape(image_shape)[-3])

    def raw_shape(self, image_shape: Shape) -> Shape:
        """Shape of an item; a ValueError for images of another shape than those that were encoded."""
        if tuple(image_shape) != self._image_shape:
            raise ValueError(f"the latents are of images {self._image_shape}, not {tuple(image_shape)}")
        return self._raw_shape

    def latent_shape(self, image_shape: Shape) -> Shape:
        """Shape of the latents of an item."""
        *frames, channels, height, width = self.raw_shape(image_shape)
        return *frames, channels // 2 if self.stochastic else channels, height, width

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The items themselves, which are raw latents; a ValueError for pixels."""
        if pixels.shape[1:] != self._raw_shape:
            raise ValueError(f"takes stored latents {self._raw_shape}, not {tuple(pixels.shape[1:])}")
        return pixels

    def encoder_sha256(self) -> str:
        """The fingerprint in the store."""
        sha256: str = self._recorded["sha256"]
        return sha256

    def describe(self) -> dict[str, object]:
        """The description in the store, with the name of the autoencoder that decodes."""
        kept = {key: value for key, value in self._recorded.items() if key != "decoder_sha256"}
        return dict(self._recorded) if self.name == self._recorded["name"] else {**kept, "name": self.name}

    def check_same(self, recorded: Json) -> None:
        """Raise a ValueError if a description is that of another encoder, or of latents in another precision."""
        super().check_same(recorded)
        self.check_precision(recorded)

    def load(self) -> Encoder:
        """Load the autoencoder.

        Raises:
            ValueError: If it cannot be loaded, or is not the one that encoded.
        """
        if self._decoder is None:
            loaded = open_encoder(self.name, self._image_shape, self._device)
            loaded.check_same(self._recorded)
            self._decoder = loaded
        return self._decoder

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped; a ValueError as `load` raises it."""
        return self.load().decode(latents)
