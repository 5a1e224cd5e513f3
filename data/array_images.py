"""Images that fit in memory, as a data set."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from data.dataset import Example, Key
from data.image_folder import random_flip
from data.pixels import Images


def array_digest(images: Images, labels: npt.NDArray[np.int64]) -> str:
    """Digest of images (N, H, W, C) and labels (N,)."""
    total = hashlib.sha256(np.ascontiguousarray(images).data)
    total.update(np.ascontiguousarray(labels).data)
    return total.hexdigest()


class ArrayImages:
    """A data set of images (N, H, W, C) uint8 that fit in memory, with labels (N,) int64; `flip` mirrors at random."""

    vae = "none"
    worth_workers = False

    def __init__(
        self, images: Images, labels: npt.NDArray[np.int64], classes: list[str], *, flip: bool = False, seed: int = 0
    ) -> None:
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self._labels = labels.tolist()
        self.classes = classes
        self.image_shape: tuple[int, ...] = tuple(self._images.shape[1:])
        self._flip, self._seed = flip, seed
        self._digest: str | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def digest(self) -> str:
        """Digest of all images and labels, in their order."""
        if self._digest is None:  # computed once: every checkpoint has it
            pixels = self._images.permute(0, 2, 3, 1).contiguous().numpy()
            self._digest = array_digest(pixels, np.array(self._labels, np.int64))
        return self._digest

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it is in `epoch`."""
        image = self._images[key[1]]
        return random_flip(image, key, self._seed) if self._flip else image, self._labels[key[1]], key[1]
