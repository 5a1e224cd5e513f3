"""A family of small networks of clips, registered by tests only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from models import ModelOutput
from sampling.config import KINDS
from tests.checkpoints import write_network
from tests.toys import Toy

NAME = "toy clips"
FRAMES, CHANNELS, HEIGHT, WIDTH = SHAPE = (3, 3, 7, 12)  # one side is odd


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    sample_shape: tuple[int, ...] = SHAPE
    num_classes: int = 10  # 0: unconditional
    class_dropout_prob: float = 0.25


class ClipNetwork(Toy):
    """A `Toy` with a config."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(tuple(config.sample_shape))
        self.config, self.blocks = config, torch.nn.ModuleList()  # type: ignore[assignment]
        self.conditioning = ("y",) if config.num_classes else ()  # type: ignore[misc]

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        if not self.conditioning:
            raise ValueError("this network takes no labels")
        return super().null_conditioning(rows)

    def forward(
        self, x: Tensor, t: float | Tensor, *, y: Tensor | None = None, state: Any = None, features_at: Any = ()
    ) -> ModelOutput:
        return super().forward(x, t, y=torch.zeros(len(x), dtype=torch.int64) if y is None else y, state=state)

    def cost(self) -> dict[str, int]:
        return {"all": 1}


def register(put: Callable[[Any, Any, Any], None] = dict.__setitem__) -> None:
    """Add the family to the registry and to the owners of settings, by `monkeypatch.setitem` in tests."""
    put(models.FAMILIES, "Clips", models.Family(ClipNetwork, ClipConfig, {NAME: {}}))
    put(KINDS[0].owners, "Clips", ClipConfig)


def write_clips(path: Path, config: ClipConfig | None = None, **meta: Any) -> Path:
    """A checkpoint of such a network; the family is registered."""
    return write_network(path, NAME, ClipNetwork(config or ClipConfig()), **meta)
