"""A latent store as it is opened for training: its images or clips, and single frames of other clips behind each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.dataset import DatasetSettings, Example, Key
from data.image_folder import is_flipped
from data.latents import LatentShards, unstack
from runtime.seeds import derive_seed


class JointLatents(LatentShards):
    """Clips of a latent store with single frames of others behind them, each with the label or caption of its clip.

    Which frames follow a clip depends on (seed, epoch, index) alone; of a frame only its own bytes are read.

    Args:
        folder: Output of scripts/extract_latents.py, of clips.
        joint_images: Number I of frames behind every clip.
        flip: Mirror at random, the frames behind a clip alike and by a draw of their own; None does so if both flips
            are stored.
        seed: Seed of frames and flips.
        trust_stamps: As for `LatentShards`.

    Raises:
        ValueError: As `LatentShards`, and for a store of images.
    """

    def __init__(
        self,
        folder: Path,
        *,
        joint_images: int,
        flip: bool | None = None,
        seed: int = 0,
        trust_stamps: bool = False,
    ) -> None:
        super().__init__(folder, flip=flip, seed=seed, trust_stamps=trust_stamps)
        if len(self.raw_shape) != 4:
            raise ValueError(f"--joint-images {joint_images}: follow clips, and {folder} holds latents of images")
        self._joint, (self._frames, *_) = joint_images, self.raw_shape
        self.image_shape, self.raw_shape = (
            (self._frames + joint_images, *shape[1:]) for shape in (self.image_shape, self.raw_shape)
        )

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """The items of a batch, which a DataLoader asks for at once.

        Returns:
            For each key raw latents (F + I, C, H, W) float16; labels "y" () and "image_labels" (I,), or captions "text"
            (1 + I, L, K) and "text_mask" (1 + I, L), or {} without either; the index of the clip.
        """
        clips, labels, indices = self.gather(keys)
        draws = [np.random.default_rng(derive_seed("joint images", self._seed, *key)) for key in keys]
        others = np.stack([draw.integers(len(self), size=self._joint) for draw in draws])
        frames = np.stack([draw.integers(self._frames, size=self._joint) for draw in draws])
        flips = np.repeat([self._flip is True and is_flipped(key, self._seed + 1) for key in keys], self._joint)
        images = torch.from_numpy(self._read(others.ravel(), flips.tolist(), frames.ravel().tolist()))
        raw = torch.cat([clips, images.view(len(keys), self._joint, *images.shape[1:])], 1)
        given: Iterable[dict[str, Tensor]] = [{}] * len(keys)
        if self.classes:
            given = unstack({"y": labels, "image_labels": torch.from_numpy(self._labels[others])})
        elif self._texts:
            captions = self._captions(np.column_stack([indices.numpy(), others]).ravel())
            given = unstack({name: leaf.unflatten(0, (len(keys), -1)) for name, leaf in captions.items()})
        return list(zip(raw.unbind(), given, indices.tolist(), strict=True))


def open_latents(settings: DatasetSettings) -> LatentShards:
    """Open a latent store; a ValueError if there is none, or it is of images of another shape."""
    folder, joint = settings.require_path("a folder of latents"), settings.joint_images
    kind: Callable[..., LatentShards] = partial(JointLatents, joint_images=joint) if joint else LatentShards
    latents = kind(folder, flip=settings.flip, seed=settings.seed, trust_stamps=settings.trust_stamps)
    if settings.frames == 1 and not joint:
        latents.make_clips()
    frames = latents.image_shape[:-3] if settings.frames is None else (settings.frames + joint,)
    expected = (*frames, settings.channels, *(settings.size or latents.image_shape[-2:]))
    if latents.image_shape != expected:
        raise ValueError(f"the latents are of images {latents.image_shape}, not {expected}; check size and channels")
    return latents
