"""Networks to test with: random ones of every family, their inputs, and variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from models import Network


def randomise(network: Network, seed: int = 0) -> Network:
    """Draw all parameters at random, for evaluation: fresh networks predict 0 and would agree with anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 2500
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return network.eval()


def debug_name(family: str) -> str:
    """The model of a family with the smallest numbers in its config; of about equal ones the first."""

    def size(name: str) -> int:
        numbers = dataclasses.asdict(models.model_config(name)).values()
        return sum(number for number in numbers if isinstance(number, int)).bit_length()

    return min(models.FAMILIES[family].configs, key=size)


def sample_shape(family: str, *image: int) -> tuple[int, ...]:
    """(C, H, W), with the family's debug number of frames in front if its samples are clips."""
    return (*models.model_config(debug_name(family)).sample_shape[:-3], *image)


def debug_network(family: str, **overrides: Any) -> Network:
    """A family's smallest network with random weights."""
    return randomise(models.create_model(debug_name(family), **overrides))


# Settings that make another network of a family, and the value that does: the invariants hold for that one too.
VARIED: dict[str, Any] = {"cache_depth": 1, "learn_sigma": False, "encoder_depth": None}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every family as it is, and once more for each setting of `VARIED` that it takes: name -> family, overrides."""
    result: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in models.FAMILIES}
    for family in models.FAMILIES:
        for field, value in VARIED.items():
            with suppress(ValueError):  # of families that do not know the setting, or refuse the value
                models.model_config(debug_name(family), **{field: value})
                result[f"{family}, {field} {value}"] = family, {field: value}
    return result


def inputs(network: Network, rows: int = 2) -> tuple[Tensor, float, dict[str, Tensor]]:
    """x, a time in the network's units, and conditioning, for `network(x, t, **conditioning)`."""
    x = torch.randn(rows, *network.sample_shape)
    t = {"index": 500.0, "unit": 0.5}[network.time_convention]
    return x, t, conditioning(network, range(rows))


def conditioning(network: Network, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Conditioning of numbered rows: a label or a text for each number, some with masked words."""
    if "text" in network.conditioning:
        words, width = network.config.text_length, network.config.text_width
        texts = [torch.randn(words, width, generator=torch.Generator().manual_seed(number)) for number in numbers]
        kept = [torch.arange(words) < words - number % 3 for number in numbers]
        return {"text": torch.stack(texts), "text_mask": torch.stack(kept).float()}
    return {name: torch.tensor(numbers) % network.config.num_classes for name in network.conditioning}


def unconditional(network: Network, rows: int) -> dict[str, Tensor]:
    """Unconditional rows: the network's, or those that data have of texts."""
    if "text" in network.conditioning:
        return conditioning(network, [1000] * rows)
    return network.null_conditioning(rows)


def labelled(family: str) -> bool:
    """True for a family whose networks take labels."""
    return "num_classes" in models.FAMILIES[family].config.__dataclass_fields__


def small_autoencoder(folder: Path) -> Any:
    """A random AutoencoderKL (factor 2, 4 latent channels, scale 0.25), saved in `folder` and returned."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.25,
    )
    vae.save_pretrained(folder)
    return vae.eval()
