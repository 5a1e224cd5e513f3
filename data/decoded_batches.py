"""Images or clips decoded in loader processes, for extraction: all of them once, in fixed batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.clip_windows import ClipWindows
from data.image_folder import EncodedImages, UnreadableImageError


class Decoded(NamedTuple):
    """A batch from a loader process.

    Attributes:
        images: (n, C, H, W) uint8, those that could be read.
        indices: n indices in the image folder.
        skipped: (path, reason) of the others.
        fatal: The first error that must end the work, in one line; empty if there is none.
    """

    images: Tensor
    indices: list[int]
    skipped: list[tuple[str, str]]
    fatal: str


class DecodedBatches(Dataset[Decoded]):
    """Batches of images or clips, by ranges of indices. Errors are returned as values, so that workers survive them."""

    def __init__(self, images: EncodedImages | ClipWindows, batches: list[range], strict: bool) -> None:
        self._images, self._batches, self._strict = images, batches, strict

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __getitem__(self, position: int) -> Decoded:
        """Decode one batch."""
        images: list[Tensor] = []
        result = Decoded(torch.empty(0), [], [], "")
        for index in self._batches[position]:
            try:
                images.append(self._images.read(index))
                result.indices.append(index)
            except UnreadableImageError as error:
                result.skipped.append((self._images.path(index), error.reason))
                if self._strict:
                    return result._replace(fatal=f"--strict: {error}")
            except (OSError, ValueError) as error:
                return result._replace(fatal=f"--data-path: {error}")
        return result._replace(images=torch.stack(images)) if images else result
