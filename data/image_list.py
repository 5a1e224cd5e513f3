"""Images that a text file lists: the single frames that published recipes train behind the clips of UCF101."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from data.clip_settings import Crop
from data.clips import crop_frame
from data.image_folder import UnreadableImageError, decode_image
from data.packed_names import PackedNames
from runtime.download import sha256_of


class ImageList:
    """Images of a text file with a path a line, relative to its folder, read one by one.

    A label is the first folder of the path that is named like a class or, as published, the second word of the file's
    name between underscores (`v_Archery_g01_c01_0001.jpg`). Empty lines count for nothing.

    Args:
        path: The file.
        classes: Names of classes, in the order of their labels; without any, images have the label 0.
        size: (H, W) to which images are cropped; those of this size stay as they are.
        crop: Kind of crop.
        channels: 3 for RGB, 1 for grey.
        strict: An image that cannot be read is an error.

    Raises:
        ValueError: Naming the file, and the line without a class, or the first image if there is no such file.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], size: tuple[int, int], *, crop: Crop, channels: int, strict: bool
    ) -> None:
        self._flag = f"--joint-image-list {path}"
        self._path, self._size, self._crop, self._channels, self._strict = path, size, crop, channels, strict
        try:
            with path.open(encoding="utf-8", errors="surrogateescape") as lines:
                self._paths = PackedNames(line.strip() for line in lines if line.strip())
            self.sha256 = sha256_of(path)
        except OSError as error:
            raise ValueError(f"{self._flag}: cannot be read ({error.strerror})") from error
        if not len(self):
            raise ValueError(f"{self._flag}: names no image; give a path a line")
        numbers = {name: number for number, name in enumerate(classes)}
        self._labels = np.array([self._find_label(i, numbers) for i in range(len(self))], np.int32)
        if not self.file(0).is_file():
            raise ValueError(f"{self._flag}: no file {self.file(0)}; paths are relative to the list's folder")
        # Shared with the loader's workers, as in `ImageFolder`
        self._damaged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def file(self, index: int) -> Path:
        """File of an image."""
        return self._path.parent / self._paths[index]

    def label(self, index: int) -> int:
        """Label of an image."""
        return int(self._labels[index])

    def read(self, index: int) -> Tensor | None:
        """Decode and crop an image: (C, H, W), uint8, or float32 in [-1, 1] with published crops.

        Returns:
            The image; None, after a warning that names it once, if it cannot be read.

        Raises:
            UnreadableImageError: If it cannot be read and `strict` is set.
        """
        if self._damaged[index]:
            return None
        file = self.file(index)
        try:
            return crop_frame(decode_image(file.read_bytes(), self._channels), self._size, self._crop)
        except (UnreadableImageError, OSError) as error:
            reason = error.reason if isinstance(error, UnreadableImageError) else error.strerror
            message = f"{file}: cannot be read: {reason}; replace the file, or take its line out of {self._path}"
            if self._strict:
                raise UnreadableImageError(message) from error
            self._damaged[index] = True
            warnings.warn(f"{message}; until then others replace it", stacklevel=2)
            return None

    def _find_label(self, index: int, numbers: Mapping[str, int]) -> int:
        if not numbers:
            return 0
        path = PurePosixPath(self._paths[index])
        for name in (*path.parts[:-1], *path.name.split("_")[1:2]):
            if name in numbers:
                return numbers[name]
        raise ValueError(
            f"{self._flag}: {path}: no folder of it, and not the second word of its name, is a class of the videos"
        )
