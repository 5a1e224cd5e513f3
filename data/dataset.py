"""Interface between data sets and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

Key = tuple[int, int]  # (epoch, index)
Example = tuple[Tensor, int | Mapping[str, Tensor], int]  # (image, label or conditioning, index)


class Dataset(Protocol):
    """A training set: any object with these members.

    Attributes:
        classes: Class names; a class's label is its position. Empty for data without classes.
        image_shape: (C, H, W), or (F, C, H, W) for clips.
        vae: Value of `--vae` if the user gives none.
        worth_workers: Loading takes long enough for processes of its own.
    """

    classes: list[str]
    image_shape: tuple[int, ...]
    vae: str
    worth_workers: bool

    def __len__(self) -> int:
        """Number of images."""
        ...

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
        ...


def conditioning(labels: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditioning of a collated batch: labels (N,) become {"y": labels}, a dict of tensors stays as it is."""
    return {"y": labels} if isinstance(labels, Tensor) else dict(labels)


class DatasetSettings(NamedTuple):
    """Settings that a data set is opened with; None leaves the choice to the data set."""

    path: Path | None  # folder of the data
    size: tuple[int, int] | None  # (H, W)
    channels: int  # 3 for RGB, 1 for grey
    flip: bool | None = None  # mirror at random
    seed: int = 0  # of the flips
    strict: bool = False  # an image that cannot be read is an error

    def require_path(self, content: str) -> Path:
        """The folder; a ValueError if none is given."""
        if self.path is None:
            raise ValueError(f"{content} needs --data-path")
        return self.path


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of one number or two."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
