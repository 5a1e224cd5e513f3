"""A small network of captioned clips, as a family that tests register for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

from torch import Tensor, nn

import sampling.config
import training.config
from models import FAMILIES, Family, ModelOutput, Network
from models.layers import TimestepEmbedder
from runtime.settings import setting
from tests.runs import DIGITS

NAME = "caption toy"
CAPTIONED = ["--dataset", "captioned-digits", *DIGITS[2:], *"--num-frames 4 --image-size 14".split()]
RUN = [*CAPTIONED, "--model", NAME, *"--global-batch-size 8 --max-steps 3 --lr 2e-3 --process flow".split()]


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Config of the network."""

    axes: ClassVar[tuple[str, ...]] = ("frames", "channels", "height", "width")
    any_frames: ClassVar[bool] = True
    sample_shape: tuple[int, ...] = (4, 1, 14, 14)
    hidden_size: int = setting(16, "width of the tokens")
    text_width: int = setting(4096, "numbers of a token of text")
    text_length: int = setting(120, "tokens of a text")


class CaptionNetwork(Network):
    """Adds the mean of a text's tokens to every place; takes pictures, and clips of any number of frames."""

    conditioning = ("text", "text_mask")

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.config, self.sample_shape, self.keeps_state = config, tuple(config.sample_shape), True
        self.out_channels, width = self.sample_shape[-3], config.hidden_size
        self.x_embedder = nn.Conv2d(self.out_channels, width, 3, padding=1)
        self.t_embedder = TimestepEmbedder(width)
        self.text_embedder = nn.Linear(config.text_width, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU())])
        self.final_layer = nn.Conv2d(width, self.out_channels, 1)

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        text: Tensor,
        text_mask: Tensor | None = None,
        state: Tensor | None = None,
        features_at: tuple[int, ...] = (),
    ) -> ModelOutput:
        if state is None:
            weights = text.new_ones(text.shape[:2]) if text_mask is None else text_mask
            state = (self.text_embedder(text) * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)
        frames = self.x_embedder(x.flatten(0, -4)).unflatten(0, x.shape[:-3])
        frames = frames + (self.t_embedder(t) + state).view(-1, *(1,) * (x.ndim - 4), frames.shape[-3], 1, 1)
        hidden = frames.flatten(0, -4)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return ModelOutput(self.final_layer(hidden).view_as(x), state)

    def cost(self) -> dict[str, int]:
        return {"blocks": 9 * self.config.hidden_size**2 * self.sample_shape[0] * 14 * 14}


@dataclass(frozen=True, kw_only=True)
class PictureConfig(CaptionConfig):
    """Config of the same for pictures, without an axis of frames."""

    axes: ClassVar[tuple[str, ...]] = ("channels", "height", "width")
    sample_shape: tuple[int, ...] = (4, 8, 8)


@contextmanager
def registered(frames: bool = True) -> Iterator[None]:
    """Register the network, for clips or for pictures, for the duration of a block."""
    config = CaptionConfig if frames else PictureConfig
    row = Family(CaptionNetwork, config, {NAME: {}})
    owners = [module.KINDS[0].owners for module in (training.config, sampling.config)]
    with patch.dict(FAMILIES, {NAME: row}), patch.dict(owners[0], {NAME: config}):
        with patch.dict(owners[1], {NAME: config}):
            yield
