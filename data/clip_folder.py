"""Clips of a folder of videos, as a data set."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.clip_settings import FRAMES, ClipSettings
from data.clips import count_places, crop_frame, frame_numbers, frames_needed
from data.dataset import DatasetSettings, Example, Key, sides
from data.image_folder import UnreadableImageError, decode_image, random_flip
from data.image_list import ImageList
from data.video_files import check_pyav, read_frames
from data.video_listing import Video, digest_of_videos, list_videos
from runtime.seeds import derive_seed

NAMED = 20  # videos that cannot be used are named one by one, up to so many
TRIES = 100  # frames at random places, until one can be read


class ClipFolder:
    """A folder of videos, or of folders of frames, with a folder per class or none.

    In every epoch a clip of each video is taken, at a place that depends on (seed, epoch, index) alone. A video that
    cannot be decoded is replaced by the next one that can be, as images are. Videos that are known to be damaged or too
    short when the folder is opened are named, and left out.

    Args:
        root: The folder.
        image_size: Side of square crops, or (H, W).
        frames: Number of frames of a clip.
        settings: Cutting of clips.
        joint_images: Number of single frames of random videos behind every clip, with labels of their own.
        joint_list: Text file of images that take the place of these frames, and are not mirrored.
        channels: 3 for RGB, 1 for grey.
        flip: Mirror at random, all frames of a clip alike.
        seed: Seed of places, flips and single frames.
        strict: A video that cannot be decoded is an error.

    Raises:
        ValueError: If the folder has no usable video, or a setting does not fit.
    """

    vae = "ema"
    worth_workers = True

    def __init__(
        self,
        root: Path,
        image_size: int | tuple[int, int],
        *,
        frames: int = FRAMES,
        settings: ClipSettings = ClipSettings(),  # noqa: B008  # it is frozen
        joint_images: int = 0,
        joint_list: Path | None = None,
        channels: int = 3,
        flip: bool = True,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        size = sides(image_size)
        if settings.clip_crop != "adm" and size[0] != size[1]:
            raise ValueError(f"--clip-crop {settings.clip_crop}: makes squares, not {size[0]} x {size[1]}")
        self._root, self._size, self._frames, self._settings = root, size, frames, settings
        self._joint, self._channels, self._flip, self._seed, self._strict = joint_images, channels, flip, seed, strict
        self.image_shape: tuple[int, ...] = (frames + joint_images, channels, *size)
        self.classes, videos, labels = list_videos(root)
        places = [count_places(settings.clip_window, video.length, frames, settings.frame_interval) for video in videos]
        self._say_what_is_unused(videos, places)
        kept = [i for i, count in enumerate(places) if count]
        self._videos, self._labels = [videos[i] for i in kept], [labels[i] for i in kept]
        self._places = [places[i] for i in kept]
        self._ends = np.cumsum([video.length for video in self._videos])  # frames up to and with each video
        if any(not video.is_folder for video in self._videos):
            check_pyav()
        self._images: ImageList | None = None
        if joint_list is not None:
            crop = settings.clip_crop
            self._images = ImageList(joint_list, self.classes, size, crop=crop, channels=channels, strict=strict)
        # Shared with the loader's workers, as in `ImageFolder`
        self._damaged = torch.zeros(len(self._videos), dtype=torch.bool).share_memory_()

    def _say_what_is_unused(self, videos: Sequence[Video], places: Sequence[int]) -> None:
        """Name damaged and incomplete videos, and count those that are too short; a ValueError if none is left."""
        unreadable = [video for video in videos if not video.length]
        if unreadable and self._strict:
            raise ValueError(f"{self._root / unreadable[0].path}: cannot be read: {unreadable[0].problem}")
        odd = [video for video in videos if video.problem]
        for video in odd[:NAMED]:
            what = "" if video.length else "cannot be read, and is left out: "
            warnings.warn(f"{self._root / video.path}: {what}{video.problem}", stacklevel=4)
        if len(odd) > NAMED:
            warnings.warn(f"{self._root}: so are {len(odd) - NAMED} more videos", stacklevel=4)
        if uneven := [video for video in videos if video.length and not video.is_folder and video.times is None]:
            warnings.warn(
                f"{self._root}: {len(uneven)} videos have a variable frame rate (the first is {uneven[0].path}); clips "
                "count frames, not seconds",
                stacklevel=4,
            )
        short = [video for video, count in zip(videos, places, strict=True) if video.length and not count]
        needed = frames_needed(self._settings.clip_window, self._frames, self._settings.frame_interval)
        many = f"{len(short)} of {len(videos)} videos are too short"
        many += f": {self._frames} frames at --frame-interval {self._settings.frame_interval} need {needed}"
        first = f"{short[0].path} has {short[0].length}" if short else ""
        if not any(places):
            reason = f"{many}; {first}" if short else f"none of its {len(videos)} videos can be read"
            raise ValueError(f"{self._root}: {reason}")
        if short:
            warnings.warn(f"{self._root}: {many} ({first}); these are left out", stacklevel=4)

    def __len__(self) -> int:
        """Number of videos from which clips are taken."""
        return len(self._videos)

    def __getitem__(self, key: Key) -> Example:
        """A clip of the video at `index` as it is in `epoch`, or of its replacement, and single frames behind it.

        Returns:
            The clip (F + I, C, H, W), uint8, or float32 in [-1, 1] with published crops; its label, labels of both
            kinds with single frames ("y" (), "image_labels" (I,)), or {} without classes; index of the video.

        Raises:
            UnreadableImageError: If it cannot be decoded and `strict` is set.
            ValueError: If no video at all can be decoded.
            OSError: If a file cannot be opened.
        """
        epoch, first = key
        for index in itertools.chain(range(first, len(self)), range(first)):
            start = derive_seed("window", self._seed, epoch, index) % self._places[index]
            clip = self._read_or_skip(index, self.numbers(index, start))
            if clip is None:
                continue
            clip = random_flip(clip, (epoch, index), self._seed) if self._flip else clip
            label = self._labels[index]
            if not self._joint:
                return clip, (label if self.classes else {}), index
            images, labels = self._single_frames(epoch, index)
            both = {"y": torch.tensor(label), "image_labels": torch.tensor(labels)}
            return torch.cat([clip, images]), (both if self.classes else {}), index
        raise ValueError(f"{self._root}: none of its {len(self)} videos can be read")

    def _single_frames(self, epoch: int, index: int) -> tuple[Tensor, list[int]]:
        """Frames (I, C, H, W) at random places among those of all videos, or listed images; and their labels."""
        draws = np.random.default_rng(derive_seed("joint images", self._seed, epoch, index))
        images, labels = list[Tensor](), list[int]()
        for _ in range(self._joint * TRIES):
            image, label = self._single_frame(draws)
            if image is not None:
                images.append(image)
                labels.append(label)
            if len(images) == self._joint:
                frames = torch.stack(images)
                mirrored = self._flip and self._images is None
                return random_flip(frames, (epoch, index), self._seed + 1) if mirrored else frames, labels
        raise ValueError(f"{self._root}: hardly any of its frames can be read")

    def _single_frame(self, draws: np.random.Generator) -> tuple[Tensor | None, int]:
        """A random frame or listed image (C, H, W), None if it cannot be read; and its label."""
        if self._images is not None:
            place = int(draws.integers(len(self._images)))
            return self._images.read(place), self._images.label(place)
        place = int(draws.integers(self._ends[-1]))
        video = int(np.searchsorted(self._ends, place, side="right"))
        clip = self._read_or_skip(video, [place - int(self._ends[video]) + self._videos[video].length])
        return None if clip is None else clip[0], self._labels[video]

    @property
    def unreadable(self) -> list[str]:
        """Paths of damaged videos met so far by this process and its workers, relative to the root."""
        return [self.path(index) for index in self._damaged.nonzero().flatten().tolist()]

    def digest(self) -> str:
        """Digest of the paths, sizes and numbers of frames of the videos that are used, and of a list of images."""
        digest = digest_of_videos(self._videos)
        return (
            digest if self._images is None else hashlib.sha256(f"{digest} {self._images.sha256}".encode()).hexdigest()
        )

    def path(self, index: int) -> str:
        """Path of a video relative to the root, with forward slashes."""
        return self._videos[index].path

    def label(self, index: int) -> int:
        """Label of a video, 0 without classes."""
        return self._labels[index]

    def count_places(self, index: int) -> int:
        """Number of first frames that a clip of a video may have."""
        return self._places[index]

    def numbers(self, index: int, start: int) -> list[int]:
        """Numbers of the frames of a clip of a video."""
        settings, count = self._settings, self._videos[index].length
        return frame_numbers(settings.clip_window, count, start, self._frames, settings.frame_interval)

    def read(self, index: int, numbers: Sequence[int]) -> Tensor:
        """Decode and crop some frames of a video, not mirrored: (len(numbers), C, H, W).

        Raises:
            UnreadableImageError: Naming the file, if one cannot be decoded.
            OSError: Naming the file, if it cannot be opened.
        """
        size, crop = self._size, self._settings.clip_crop
        return torch.stack([crop_frame(frame, size, crop) for frame in self.decode(index, numbers)])

    def files(self, index: int, numbers: Sequence[int]) -> list[Path]:
        """Files that hold some frames of a video: its own, or one a frame."""
        video = self._videos[index]
        path = self._root / video.path
        return [path] if video.frames is None else [path / video.frames.name(number) for number in numbers]

    def decode(self, index: int, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode some frames of a video as they are, one by one; raises the errors of `read`."""
        video = self._videos[index]
        path = self._root / video.path
        if video.frames is None:
            yield from read_frames(path, video.info, numbers, self._channels)
            return
        for file in self.files(index, numbers):
            data = file.read_bytes()
            try:
                yield decode_image(data, self._channels)
            except UnreadableImageError as error:
                raise UnreadableImageError(f"{file}: {error}; replace or remove the file", error.reason) from error

    def _read_or_skip(self, index: int, numbers: Sequence[int]) -> Tensor | None:
        if self._damaged[index]:
            return None
        try:
            return self.read(index, numbers)
        except UnreadableImageError as error:
            if self._strict:
                raise
            self._damaged[index] = True
            warnings.warn(f"{error}; until then the next readable video replaces it", stacklevel=2)
            return None


def open_clip_folder(settings: DatasetSettings) -> ClipFolder:
    """Open a folder of videos, by default clips of 16 frames of 256 x 256; a ValueError if it does not fit."""
    return ClipFolder(
        settings.require_path("a folder of videos"),
        settings.size or (256, 256),
        frames=settings.frames or FRAMES,
        settings=settings.clips,
        joint_images=settings.joint_images,
        joint_list=settings.joint_list,
        channels=settings.channels,
        flip=settings.flip is not False,
        seed=settings.seed,
        strict=settings.strict,
    )
