"""Small networks with outputs in closed form, and stand-ins that record their calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.predictions import Prediction
from models import ModelOutput, Network, TimeConvention
from models.contract import Conditioning

CLIP = (3, 4, 8, 12)  # frames, channels, height, width
MEAN, DEVIATION = 0.7, 0.25  # of data with a known score


class Toy(Network):
    """Elementwise network on any shape: tanh(w x) + t + an embedding of the label; state is what it added.

    Args:
        shape: Shape of a sample.
        convention: Units of t.
        learn_sigma: Add as many channels of zeros.
    """

    def __init__(
        self, shape: tuple[int, ...] = CLIP, convention: TimeConvention = "index", *, learn_sigma: bool = False
    ) -> None:
        super().__init__()
        self.time_convention = convention  # type: ignore[misc]
        self.sample_shape, self.keeps_state = shape, True
        self.out_channels = shape[-3] * (2 if learn_sigma else 1)
        self.config = SimpleNamespace(class_dropout_prob=0.25, num_classes=10)
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.table = nn.Parameter(torch.linspace(-1, 1, 11))
        self.seen: list[tuple[Tensor, Conditioning]] = []

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        return {"y": torch.full((rows,), 10, device=self.weight.device)}

    def forward(
        self, x: Tensor, t: float | Tensor, *, y: Tensor, state: Any = None, features_at: tuple[int, ...] = ()
    ) -> ModelOutput:
        self.seen.append((torch.as_tensor(t), {"y": y}))
        return self.output(x, t, self.table[y] if state is None else state)

    def output(self, x: Tensor, t: float | Tensor, added: Tensor) -> ModelOutput:
        """Output for what the conditioning adds to each row (N,)."""
        rows = (-1, *(1,) * (x.ndim - 1))
        t = torch.as_tensor(t, dtype=x.dtype) * (1e-3 if self.time_convention == "index" else 1)
        sample = torch.tanh(self.weight * x) + t.reshape(rows if t.ndim else ()) + added.view(rows)
        if self.out_channels > x.shape[-3]:
            sample = torch.cat([sample, torch.zeros_like(sample)], dim=-3)
        return ModelOutput(sample, added)


class TextToy(Toy):
    """The same with text: adds the mean of a text's features over its mask."""

    conditioning = ("text", "text_mask")

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        raise ValueError("unconditional rows of text come from the data")

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        text: Tensor,
        text_mask: Tensor,
        state: Any = None,
        features_at: tuple[int, ...] = (),
    ) -> ModelOutput:
        self.seen.append((torch.as_tensor(t), {"text": text, "text_mask": text_mask}))
        weights = text_mask / text_mask.sum(dim=1, keepdim=True)
        return self.output(x, t, (text.mean(dim=2) * weights).sum(dim=1) if state is None else state)


class RecordingNetwork:
    """Predicts label + 1 everywhere, keeps the rows it was evaluated on as state, and records every call.

    Attributes:
        rows: Batch size of each call.
        fresh: Whether each call came without state.
        times: t of each call.
    """

    def __init__(self, out_channels: int, *, stateful: bool = True) -> None:
        self.out_channels, self.stateful = out_channels, stateful
        self.rows: list[int] = []
        self.fresh: list[bool] = []
        self.times: list[float | Tensor] = []

    def __call__(self, x: Tensor, t: float | Tensor, *, y: Tensor, state: Any = None) -> ModelOutput:
        assert state is None or state == len(x), "state of other rows was handed back"
        self.rows.append(len(x))
        self.fresh.append(state is None)
        self.times.append(t)
        sample = (y + 1.0).view(-1, *(1,) * (x.ndim - 1))
        shape = (len(x), *x.shape[1:-3], self.out_channels, *x.shape[-2:])
        return ModelOutput(sample.expand(shape), state=len(x) if self.stateful else None)


def true_prediction(prediction: Prediction, x_start: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """The output of a network that knows the answer, written out here once more."""
    return {
        "epsilon": noise,
        "x_start": x_start,
        "v": alpha * noise - sigma * x_start,
        "velocity": x_start - noise,
    }[prediction]


def exact_prediction(prediction: Prediction, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The expected output at x = alpha x_start + sigma noise, for data N(MEAN, DEVIATION^2)."""
    off = (x - alpha * MEAN) / ((alpha * DEVIATION) ** 2 + sigma**2)
    return true_prediction(prediction, MEAN + alpha * DEVIATION**2 * off, sigma * off, alpha, sigma)
