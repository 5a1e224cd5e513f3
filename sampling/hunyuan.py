"""Rotary positions of HunYuan-DiT for any size; those of diffusers are wrong where a picture is not square."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BASE = 32  # side of the grid, in tokens, that the network was first trained on


def rotary_table(head_dim: int, grid: tuple[int, int], base: int = BASE) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary positions, tokens in row-major order, (h w, head_dim) float32 each.

    The picture is scaled to fit a square of `base` x `base` and centred there. Of a row that starts at s and ends at e,
    token k of n is at s + (e - s) k / n. The first half of the channels is for the column, the second for the row;
    neighbouring channels share a frequency, 10000^(-4 j / head_dim) for pair j.

    Args:
        head_dim: Channels of an attention head, divisible by 4.
        grid: Height and width in tokens.
        base: Side of the square.

    Raises:
        ValueError: If the channels are not divisible by 4.

    Source: positions of HunYuan-DiT (arXiv 2405.08748), as released.
    """
    if head_dim % 4:
        raise ValueError(f"{head_dim} channels of a head must be divisible by 4: pairs for columns, and for rows")
    height, width = grid
    sides = (base, round(base * width / height)) if height > width else (round(base * height / width), base)
    starts = [round((base - side) / 2) for side in sides]
    rows, columns = (start + side * np.arange(n) / n for start, side, n in zip(starts, sides, grid, strict=True))
    frequencies = np.repeat(10000.0 ** (-4 * np.arange(head_dim // 4) / head_dim), 2)
    by_column = np.tile(np.outer(columns, frequencies), (height, 1))
    by_row = np.repeat(np.outer(rows, frequencies), width, axis=0)
    angles = torch.from_numpy(np.concatenate([by_column, by_row], axis=1))  # (h w, head_dim)
    return angles.cos().float(), angles.sin().float()


def correct_rotary_table(transformer: nn.Module) -> RemovableHandle:
    """Give a `HunyuanDiT2DModel` or `HunyuanDiT2DControlNetModel` the right table, whatever its pipeline passes on.

    Args:
        transformer: Such as `pipeline.transformer`.

    Returns:
        The handle: `remove()`, or the end of a `with` block, leaves positions to the caller again.

    Raises:
        ValueError: If the class is another one.
    """
    if not any(cls.__name__.startswith("HunyuanDiT2D") for cls in type(transformer).__mro__):
        raise ValueError(f"{type(transformer).__name__} is not a HunyuanDiT2DModel")
    config: Any = transformer.config
    patch, tables = config.patch_size, dict[tuple[tuple[int, int], torch.device], tuple[Tensor, Tensor]]()

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        key = (grid, x.device)
        if key not in tables:
            cos, sin = rotary_table(config.attention_head_dim, grid, 2 * BASE // patch)
            tables[key] = cos.to(x.device), sin.to(x.device)
        return args, {**kwargs, "image_rotary_emb": tables[key]}

    return transformer.register_forward_pre_hook(replace, with_kwargs=True)
