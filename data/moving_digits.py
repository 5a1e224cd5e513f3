"""The embedded clips: scikit-learn's digits, each moving across a square in one of four directions at two speeds.

The digits of training and test clips are those of the images' fixed split, so no picture is in both. A clip is a
function of its split and its index alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.dataset import DatasetSettings, Example, Key
from data.digits import IMAGE_SIZE, NUM_CLASSES, Split, load_digits
from runtime.seeds import derive_seed

DIRECTIONS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}  # rows and columns of a step
SPEEDS = (0.5, 1.0)  # pixels a frame; positions are rounded down, so that digits keep their pixels
FRAMES, SIDE = 8, 16
PLACES_SEED = 0

Array = npt.NDArray[np.int64]


class ClipOptions(TypedDict):
    """Arguments of an embedded set of clips."""

    frames: int
    side: int
    joint_images: int
    seed: int


class Motion(NamedTuple):
    """Motion of the digit of a clip."""

    direction: str  # one of DIRECTIONS
    speed: float  # pixels a frame


class MovingDigits:
    """A data set of clips (F, 1, S, S) uint8 of moving digits, with their labels.

    Every digit moves in every direction at every speed, from its own place. A class is a digit and a direction.

    Args:
        split: train or test.
        frames: F.
        side: S, in pixels.
        joint_images: Number of single frames of other clips behind every clip, with labels of their own.
        seed: Seed of these frames, which change from epoch to epoch.

    Raises:
        ValueError: If the fastest digit would leave the square.
    """

    vae = "none"
    worth_workers = False

    def __init__(
        self, split: Split, *, frames: int = FRAMES, side: int = SIDE, joint_images: int = 0, seed: int = 0
    ) -> None:
        if frames < 2:
            raise ValueError(f"{frames} frames: a clip needs at least 2")
        self._room = side - IMAGE_SIZE
        if _travel(max(SPEEDS), frames) > self._room:
            least = IMAGE_SIZE + _travel(max(SPEEDS), frames)
            raise ValueError(
                f"{frames} frames of {side} pixels: digits would leave the square; {least} pixels are enough"
            )
        self._digits, self._labels = load_digits(split)
        self._frames, self._joint, self._seed = frames, joint_images, seed
        self.classes = [f"{digit} {direction}" for digit in range(NUM_CLASSES) for direction in DIRECTIONS]
        self.image_shape: tuple[int, ...] = (frames + joint_images, 1, side, side)
        draws = np.random.default_rng([PLACES_SEED, split == "test"])
        self._places: Array = draws.integers(0, 2**31, (len(self), 2))

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._labels) * len(DIRECTIONS) * len(SPEEDS)

    def motion(self, index: int) -> Motion:
        """Motion of the digit of a clip."""
        return Motion(list(DIRECTIONS)[index // len(SPEEDS) % len(DIRECTIONS)], SPEEDS[index % len(SPEEDS)])

    def digit(self, index: int) -> int:
        """The digit of a clip, 0 to 9."""
        return int(self._labels[self._picture(index)])

    def label(self, index: int) -> int:
        """Class of a clip, 0 to 39: four times its digit, plus the place of its direction in `DIRECTIONS`."""
        return self.digit(index) * len(DIRECTIONS) + index // len(SPEEDS) % len(DIRECTIONS)

    def digest(self) -> str:
        """Digest of the digits and of what is done with them."""
        content = hashlib.sha256(self._digits.tobytes() + self._labels.tobytes())
        content.update(repr((self.image_shape, self._joint, DIRECTIONS, SPEEDS, PLACES_SEED)).encode())
        return content.hexdigest()

    def clip(self, index: int) -> npt.NDArray[np.uint8]:
        """The clip (F, S, S) of an index."""
        side = self._room + IMAGE_SIZE
        clip = np.zeros((self._frames, side, side), np.uint8)
        digit, places = self._digits[self._picture(index), :, :, 0], self._positions(index)
        for frame, (row, column) in zip(clip, places, strict=True):
            frame[row : row + IMAGE_SIZE, column : column + IMAGE_SIZE] = digit
        return clip

    def __getitem__(self, key: Key) -> Example:
        """The clip at `index`, the same in every epoch, and behind it the frames of others in this epoch."""
        epoch, index = key
        clip = torch.from_numpy(self.clip(index))[:, None]
        if not self._joint:
            return clip, self.label(index), index
        draws = np.random.default_rng(derive_seed("joint images", self._seed, epoch, index))
        others = draws.integers(0, len(self), self._joint)
        images = [self.clip(int(i))[draws.integers(self._frames)] for i in others]
        labels = {
            "y": torch.tensor(self.label(index)),
            "image_labels": torch.tensor([self.label(int(i)) for i in others]),
        }
        behind: Tensor = torch.from_numpy(np.stack(images))[:, None]
        return torch.cat([clip, behind]), labels, index

    def _picture(self, index: int) -> int:
        return index // (len(DIRECTIONS) * len(SPEEDS))

    def _positions(self, index: int) -> Array:
        """Upper left corner of the digit in every frame, (F, 2): row, column."""
        motion = self.motion(index)
        steps = np.floor(motion.speed * np.arange(self._frames)).astype(np.int64)
        start, aside = self._places[index] % (self._room - steps[-1] + 1, self._room + 1)
        step = np.array(DIRECTIONS[motion.direction])
        along = start + (steps if step.sum() > 0 else steps[-1] - steps)
        return np.stack([along if moves else np.full_like(steps, aside) for moves in step != 0], axis=1)


def _travel(speed: float, frames: int) -> int:
    """Pixels from the first frame to the last."""
    return int(speed * (frames - 1))


def clip_options(settings: DatasetSettings, what: str) -> ClipOptions:
    """Options of an embedded set of square clips; a ValueError, naming it, for settings that it does not have."""
    height, width = settings.size or (SIDE, SIDE)
    if height != width:
        raise ValueError(f"the {what} are square, not {height} x {width}")
    if settings.flip:
        raise ValueError(f"--flip: the {what} are not mirrored")
    frames = settings.frames or FRAMES
    return {"frames": frames, "side": height, "joint_images": settings.joint_images, "seed": settings.seed}


def open_moving_digits(settings: DatasetSettings) -> MovingDigits:
    """Open the training split; a ValueError for sizes that do not fit."""
    return MovingDigits("train", **clip_options(settings, "moving digits"))
