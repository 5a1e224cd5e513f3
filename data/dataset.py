"""Interface between data sets and the trainer, and the order of images in training.

The images of each step are a function of (seed, step), independent of ranks, workers and restarts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from data.clip_settings import ClipSettings
from data.columns import ColumnSettings
from runtime import distributed
from runtime.errors import RankError, UserError
from runtime.json_file import Json
from runtime.seeds import derive_seed
from runtime.stores import fetch

T = TypeVar("T")
Key = tuple[int, int]  # (epoch, index)
Example = tuple[Tensor, int | Mapping[str, Tensor], int]  # (image, label or conditioning, index)


class Dataset(Protocol):
    """A training set: any object with these members."""

    classes: list[str]  # names; a class's label is its position. Empty for data without classes
    image_shape: tuple[int, ...]  # (C, H, W), or (F, C, H, W) for clips
    vae: str  # value of `--vae` if the user gives none
    worth_workers: bool  # loading takes long enough for separate processes
    # Data with captions also have `text`, the description of their encoder (data/text_encoders.py), and
    # `null_conditioning`, the encoded empty caption without rows

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, key: Key) -> Example:
        """An image as it is in an epoch.

        Args:
            key: (epoch, index).

        Returns:
            Image: uint8 in `image_shape`, or float32 in [-1, 1]; a data set of latents returns raw latents of any
            float type. Label: a class number, or a dict of tensors that the network takes as conditioning, each of
            one shape for all images. Index: that of the image, which may differ from the key's where a damaged image
            was replaced.
        """


def conditioning(labels: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditioning of a collated batch: labels (N,) become {"y": labels}, a dict of tensors stays as it is."""
    return {"y": labels} if isinstance(labels, Tensor) else dict(labels)


def text_of(dataset: Dataset) -> Json | None:
    """Description of the encoder of a data set's captions: "name", "width", "length", "sha256"; None without any."""
    return getattr(dataset, "text", None)


def digest_of(dataset: Dataset) -> str | None:
    """Digest of what a data set holds, the same on every machine with the same files; None if it has none."""
    digest = getattr(dataset, "digest", None)
    return None if digest is None else str(digest())


def with_sizes(paths: str, sizes: str) -> str:
    """Digest of files by those of their paths, which alone was recorded at first, and of their sizes."""
    return f"{paths} sizes {sizes}"


def is_same_data(recorded: str, dataset: Dataset) -> bool:
    """True if a recorded digest, or the one of the paths that was recorded at first, is that of a data set."""
    now = digest_of(dataset)
    return now is not None and recorded in (now, now.partition(" sizes ")[0])


def check_same_data(dataset: Dataset, flag: str = "--data-path") -> None:
    """Check that all ranks read the same data; a collective operation.

    Raises:
        UserError: On every rank, naming one that differs from rank 0.
    """
    facts = {"images": len(dataset), "classes": list(dataset.classes), "files": digest_of(dataset)}
    first, *others = distributed.objects_from_all_ranks(facts)
    for rank, own in enumerate(others, start=1):
        for name, value in own.items():
            if value != first[name]:
                detail = f" ({first[name]} and {value})" if name == "images" else ""
                raise UserError(f"{flag}: rank {rank} has other {name} than rank 0{detail}; is the disk the same?")


def read_batches(loader: Iterable[T], flag: str = "--data-path") -> Iterator[T]:
    """Iterate over a loader of a data set.

    Raises:
        RankError: In one line, for a ValueError or OSError of the data set, in this process or a worker.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            first, *traceback = str(error).strip().splitlines()  # a worker sends a traceback, which ends in TYPE: TEXT
            message = traceback[-1].partition(": ")[2] if traceback else first
            break
        yield batch
    del batches  # its workers end now, and not after the timeout of a late collection
    raise RankError(f"{flag}: {message}")


class DatasetSettings(NamedTuple):
    """Settings that a data set is opened with; None leaves the choice to the data set."""

    path: Path | None  # root of an image folder, or folder of latents; the embedded digits need none
    size: tuple[int, int] | None  # (H, W)
    channels: int  # 3 for RGB, 1 for grey; the digits are grey
    flip: bool | None = None  # mirror at random; None does so for photographs and not for digits
    seed: int = 0  # of the flips
    strict: bool = False  # an image that cannot be read is an error, instead of being replaced and named
    trust_stamps: bool = False  # use stored latents that are not newer than their index without checksums
    frames: int | None = None  # of a clip; None is what the data have, or the data set's own number
    joint_images: int = 0  # single frames of other clips behind every clip
    joint_list: Path | None = None  # text file of images in the place of these
    clips: ClipSettings = ClipSettings()  # cutting of clips from videos
    columns: ColumnSettings = ColumnSettings()  # of tables and shards
    held_out: bool = False  # data of a validation
    captioned: bool = False  # captions take the place of labels, and a folder needs no classes

    def require_path(self, content: str, *, is_pattern: bool = False) -> Path:
        """The folder, copied here from an object store, unless it is a pattern; a ValueError if none is given."""
        if self.path is None:
            raise ValueError(f"{content} needs --data-path")
        return self.path if is_pattern else fetch(self.path, self.flag)

    @property
    def flag(self) -> str:
        """Flag of the path."""
        return "--eval-data-path" if self.held_out else "--data-path"


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of one number or two."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


class GlobalBatches:
    """Keys of an endless stream of shuffled epochs, cut into global batches, and each of those into a slice per rank.

    Batches cross the end of an epoch, so no image is ever dropped, and a data set smaller than a batch works. For the
    `batch_sampler` of a DataLoader.

    Args:
        length: Images in the data set.
        global_batch: Images per step over all ranks.
        rank: Rank of this process.
        world: Number of processes, a divisor of `global_batch`.
        seed: Seed of the shuffles.
        steps: Range of step numbers.
    """

    def __init__(self, length: int, global_batch: int, *, rank: int, world: int, seed: int, steps: range) -> None:
        self._length, self._global_batch, self._seed, self._steps = length, global_batch, seed, steps
        self._local = range(rank * global_batch // world, (rank + 1) * global_batch // world)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Key]]:
        """For each step, the (epoch, index) keys of this rank's rows, in order."""
        for step in self._steps:
            first = step * self._global_batch
            yield self._keys(first + self._local.start, first + self._local.stop)

    def _keys(self, start: int, stop: int) -> list[Key]:
        """Keys of some positions in the stream, converted at once for each epoch that they are in."""
        keys: list[Key] = []
        while start < stop:
            epoch, place = divmod(start, self._length)
            if self._order[0] != epoch:
                generator = torch.Generator().manual_seed(derive_seed("order", self._seed, epoch))
                self._order = epoch, torch.randperm(self._length, generator=generator)
            indices = self._order[1][place : place + stop - start].tolist()
            keys += [(epoch, index) for index in indices]
            start += len(indices)
        return keys
