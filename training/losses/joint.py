"""Loss of clips, with single images behind their frames if asked for: joint image-video training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.loss import Batch, DiffusionLoss, Draws, LossSettings, row_generators
from diffusion.schedules import append_dims
from models import ModelOutput
from models.latte import Latte
from models.latte_t2v import LatteT2V
from runtime.settings import setting

IMAGES_DROPPED = "images_dropped"
TEXTS = {"text", "text_mask"}  # (N, 1 + I, ...) in joint data: those of the clip, then those of its images
# Names of a clip's conditioning -> those of its images' own
OF_IMAGES = {"y": "image_labels", "text": "image_text", "text_mask": "image_text_mask"}


@dataclass(frozen=True, kw_only=True)
class JointLossSettings(LossSettings):
    """Training of a network for clips.

    Raises:
        ValueError: Naming the field, its value and what would be right.
    """

    joint_images: int = setting(0, "single frames of other videos that are trained behind every clip")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.joint_images < 0:
            raise ValueError(f"joint_images must be at least 0, not {self.joint_images}")

    @property
    def images_behind(self) -> int:
        """I, the number of images behind every clip."""
        return self.joint_images

    def network_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a clip (F, C, H, W) in data of F frames and the images (F + I, C, H, W)."""
        if shape[0] <= self.joint_images:
            raise ValueError(f"the data has {shape[0]} frames and images, and {self.joint_images} of them are images")
        return (shape[0] - self.joint_images, *shape[1:])


class JointLoss(DiffusionLoss):
    """Mean loss of the F frames of a clip and of I images, which share its timestep.

    A row's label or text is dropped by one draw, those of all its images by another. Without images it is the diffusion
    loss. An unconditional network does without the labels of the data.

    Source: the training code released with arXiv 2411.17616, after arXiv 2401.03048, section 3.4.
    """

    network: Latte | LatteT2V
    settings: JointLossSettings
    Settings = JointLossSettings

    @property
    def data_shape(self) -> tuple[int, ...]:
        """(F + I, C, H, W) of a row."""
        frames, *image = self.network.sample_shape
        return (frames + self.settings.joint_images, *image)

    def draw_extra(self, step: int, rows: range, device: torch.device | str) -> dict[str, Tensor]:
        """Rows (N,) bool in which the images lose their labels or texts."""
        if not (self.settings.joint_images and self.dropout_prob):
            return {}
        draws = [
            torch.rand((), generator=generator, device=device)
            for generator in row_generators(IMAGES_DROPPED, self.seed, step, rows, device)
        ]
        return {IMAGES_DROPPED: torch.stack(draws) < self.dropout_prob}

    def evaluate(self, x_t: Tensor, batch: Batch, draws: Draws, number: int = 0, **options: object) -> ModelOutput:
        """Evaluate the network at noisy clips and images.

        Raises:
            ValueError: If images of a conditional network come without labels or texts.
        """
        own = dict(batch.conditioning) if self.network.conditioning else {}
        images = {clip: own.pop(name) for clip, name in OF_IMAGES.items() if name in own}
        if self.settings.joint_images:
            for name in TEXTS & own.keys():
                own[name], images[name] = own[name][:, 0], own[name][:, 1:]
        dropped = draws.extra.get(IMAGES_DROPPED)
        if images and dropped is not None:
            null = batch.null or self.network.null_conditioning(len(dropped))
            images = {k: torch.where(append_dims(dropped, v), null[k].unsqueeze(1), v) for k, v in images.items()}
        clips = Batch(batch.x_start, own, batch.index, batch.image, batch.null)
        of_images = {OF_IMAGES[clip]: value for clip, value in images.items()}
        return super().evaluate(x_t, clips, draws, number, **of_images, **options)
