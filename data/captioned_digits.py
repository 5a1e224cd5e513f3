"""The embedded captions: digits of two sizes, placed in pictures and moving in clips, with a sentence each.

"a small seven moving right" is a clip, "a large two at the top" a picture. The digits of training and test split are
those of the other embedded sets. In training some captions leave out size or place, or both.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from data.dataset import DatasetSettings, Example, Key
from data.digits import Split, load_digits
from data.moving_digits import DIRECTIONS, FRAMES, SIDE, clip_options
from data.words import DIGITS, Words
from runtime.seeds import derive_seed

SIZES = {"small": 8, "large": 12}  # side of a digit in pixels
PLACES = {"right": "on the right", "down": "at the bottom", "left": "on the left", "up": "at the top"}
SPEED = 0.5  # pixels a frame
DETAILS = (0.7, 0.8, 0.9)  # shares of captions up to which all is said; all but the place; all but the size
KINDS = len(SIZES) * len(DIRECTIONS)
PLACES_SEED = 1


class Content(NamedTuple):
    """Content of a picture or clip."""

    digit: int  # 0 to 9
    size: str  # one of SIZES
    direction: str  # one of DIRECTIONS: where a digit moves, or is


def caption(content: Content, moving: bool, size: bool = True, place: bool = True) -> str:
    """Sentence about a picture or clip, with size and place if they are asked for."""
    where = f"moving {content.direction}" if moving else PLACES[content.direction]
    words = ("a", content.size if size else "", DIGITS[content.digit], where if place else "")
    return " ".join(word for word in words if word)


class CaptionedDigits:
    """A data set of clips (F, 1, S, S) uint8 of one digit each, with captions; with one frame, of pictures.

    Every digit is there in both sizes with every direction; its caption may leave out details.

    Args:
        split: train or test; captions of the test split leave nothing out.
        frames: F.
        side: S, in pixels.
        joint_images: Number of pictures of other digits behind every clip, with captions of their own.
        seed: Seed of what changes from epoch to epoch: these pictures, and what captions leave out.

    Attributes:
        text: Description of the captions' encoder.
        null_conditioning: Encoded empty caption, without rows.

    Raises:
        ValueError: If the square is too small for a large digit and its way.
    """

    vae = "none"
    worth_workers = False
    classes: list[str] = []  # noqa: RUF012  # none

    def __init__(
        self, split: Split, *, frames: int = FRAMES, side: int = SIDE, joint_images: int = 0, seed: int = 0
    ) -> None:
        least = max(SIZES.values()) + max(2, int(SPEED * (frames - 1)))
        if frames < 1 or side < least:
            raise ValueError(f"{frames} frames of {side} pixels: digits would leave the square; {least} are enough")
        if joint_images and frames == 1:
            raise ValueError(f"--joint-images {joint_images}: follow clips, and these are pictures, of one frame")
        digits, labels = load_digits(split)
        self._digits = {size: np.stack([_resized(digit, n) for digit in digits]) for size, n in SIZES.items()}
        self._labels, self._split, self._frames, self._side = labels, split, frames, side
        self._joint, self._seed = joint_images, seed
        self.image_shape: tuple[int, ...] = (frames + joint_images, 1, side, side)
        draws = np.random.default_rng([PLACES_SEED, split == "test"])
        self._places = draws.random((len(self), 2))
        words = Words()
        self.text = words.describe()
        self._encode = cache(lambda text: {k: v[0] for k, v in words.encode([text]).items()})
        self.null_conditioning: dict[str, Tensor] = self._encode("")

    def __len__(self) -> int:
        """Number of clips or pictures."""
        return len(self._labels) * KINDS

    def content(self, index: int) -> Content:
        """Content of a clip or picture."""
        size, direction = index // len(DIRECTIONS) % len(SIZES), index % len(DIRECTIONS)
        return Content(int(self._labels[index // KINDS]), list(SIZES)[size], list(DIRECTIONS)[direction])

    def digest(self) -> str:
        """Digest of the digits and of what is done with them."""
        content = hashlib.sha256(self._labels.tobytes())
        for digits in self._digits.values():
            content.update(digits.tobytes())
        content.update(repr((self.image_shape, self._joint, SIZES, DIRECTIONS, SPEED, DETAILS, PLACES_SEED)).encode())
        return content.hexdigest()

    def clip(self, index: int) -> npt.NDArray[np.uint8]:
        """The clip (F, S, S) of an index; of one frame it is the picture."""
        size, direction = self.content(index)[1:]
        digit = self._digits[size][index // KINDS]
        room, (row, column) = self._side - len(digit), np.array(DIRECTIONS[direction])
        if self._frames == 1:
            return self.picture(index)[None]
        steps = np.floor(SPEED * np.arange(self._frames)).astype(np.int64)
        ways = np.where(row + column > 0, steps, steps[-1] - steps)
        starts = (self._places[index] * (room + 1 - steps[-1] * np.abs([row, column]))).astype(np.int64)
        clip = np.zeros((self._frames, self._side, self._side), np.uint8)
        for frame, way in zip(clip, ways, strict=True):
            _put(frame, digit, starts + way * np.abs([row, column]))
        return clip

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """The picture (S, S) of an index: its digit near the edge that its direction points to."""
        size, direction = self.content(index)[1:]
        digit, step = self._digits[size][index // KINDS], np.array(DIRECTIONS[direction])
        room = self._side - len(digit)
        play = room // 8
        near, aside = (self._places[index] * (play + 1, 2 * play + 1)).astype(np.int64)
        along = np.where(step > 0, room - near, near)
        frame = np.zeros((self._side, self._side), np.uint8)
        _put(frame, digit, np.where(step != 0, along, room // 2 - play + aside))
        return frame

    def __getitem__(self, key: Key) -> Example:
        """The clip at `index` with a caption of this epoch, and behind it pictures of others."""
        epoch, index = key
        draws = np.random.default_rng(derive_seed("captions", self._seed, epoch, index))
        frames, captions = self.clip(index), [self._caption(index, self._frames > 1, draws)]
        others = draws.integers(0, len(self), self._joint).tolist()
        captions += [self._caption(other, False, draws) for other in others]
        frames = np.concatenate([frames, *(self.picture(other)[None] for other in others)])
        encoded = [self._encode(text) for text in captions]
        text = {name: torch.stack([row[name] for row in encoded]) for name in encoded[0]}
        joint = text if self._joint else {name: leaf[0] for name, leaf in text.items()}
        return torch.from_numpy(frames)[:, None], joint, index

    def _caption(self, index: int, moving: bool, draws: np.random.Generator) -> str:
        chance = 0.0 if self._split == "test" else draws.random()
        all_said, without_place, without_size = DETAILS
        place = chance < all_said or without_place <= chance < without_size
        return caption(self.content(index), moving, size=chance < without_place, place=place)


def _resized(digit: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A digit (H, W, 1) as (side, side)."""
    return np.asarray(Image.fromarray(digit[..., 0]).resize((side, side), Image.Resampling.BICUBIC))


def _put(frame: npt.NDArray[np.uint8], digit: npt.NDArray[np.uint8], corner: npt.NDArray[np.int64]) -> None:
    row, column = corner.tolist()
    frame[row : row + len(digit), column : column + len(digit)] = digit


def open_captioned_digits(settings: DatasetSettings) -> CaptionedDigits:
    """Open the training split; a ValueError for sizes that do not fit."""
    return CaptionedDigits("train", **clip_options(settings, "captioned digits"))
