"""Recorded numbers of the official text-to-video network, and the networks they belong to.

The official layout of clips is (N, C, F, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.latte_t2v import LatteT2V, LatteT2VConfig, SkipLatteT2V, SkipLatteT2VConfig
from tests.golden_data import arrays, table

UNREAD = "caption_projection.y_embedding"  # a buffer that the official state dict has


def recorded_fields() -> dict[str, Any]:
    """Fields of our config for the official one; the length of texts has no part in it."""
    model = table("latte_t2v/config")["model"]
    side = model["sample_size"]
    return {
        "depth": 2 * model["num_layers"],
        "hidden_size": model["num_attention_heads"] * model["attention_head_dim"],
        "num_heads": model["num_attention_heads"],
        "patch_size": model["patch_size"],
        "sample_shape": (model["video_length"], model["in_channels"], side, side),
        "base_size": side // model["patch_size"],
        "text_width": model["caption_channels"],
        "text_length": 5,
    }


def recorded_weights() -> dict[str, Tensor]:
    """The recorded weights without the buffer that is never read."""
    return {name: value for name, value in arrays("latte_t2v/state_dict").items() if name != UNREAD}


def recorded_network(**overrides: Any) -> SkipLatteT2V:
    """The network with its recorded weights, strictly loaded, in evaluation mode."""
    network = SkipLatteT2V(SkipLatteT2VConfig(**{**recorded_fields(), **overrides}))
    network.load_state_dict(recorded_weights())
    return network.eval()


def plain_network(**overrides: Any) -> LatteT2V:
    """The same without its skip units."""
    network = LatteT2V(LatteT2VConfig(**{**recorded_fields(), **overrides}))
    network.load_state_dict({k: v for k, v in recorded_weights().items() if not k.startswith("skip_")})
    return network.eval()


def golden() -> dict[str, Tensor]:
    """All recorded arrays, clips in our layout: those of five axes, and outputs of trajectories."""
    swapped = {}
    for name, value in arrays("latte_t2v/io").items():
        if name.endswith("model_out"):
            value = value.transpose(2, 3)
        elif value.ndim == 5:
            value = value.transpose(1, 2)
        swapped[name] = value.contiguous()
    return swapped


def without_frame_positions(network: LatteT2V) -> LatteT2V:
    """The same network, for which frames have no positions."""
    positions = network.positions
    network.positions = lambda frames, grid: (positions(frames, grid)[0], None)  # type: ignore[method-assign]
    return network


def unfused(x: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """Multiply and add with two roundings, as the official code does."""
    return x * factor + added


def modulate_unfused(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulate tokens as the official code does."""
    return unfused(x, 1 + scale, shift)


def multiply_add_unfused(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add a gated update as the official code does."""
    return unfused(gate, update, x)


def total_norm(network: torch.nn.Module, *parts: str) -> Tensor:
    """Norm of the gradient over parameters in these parts; without any, over all."""
    gradients = [
        p.grad for name, p in network.named_parameters() if p.grad is not None and (not parts or name.startswith(parts))
    ]
    return torch.nn.utils.get_total_norm(gradients)
