"""Conversion of a DiT to diffusers' DiTTransformer2DModel, and back.

That class repeats the timestep and label embedders in every block, keeps q, k and v apart, and computes positions
itself. Its timestep frequencies end at 1/10000, where the official ones would reach it one place later; the setting
that decides it (`downscale_freq_shift`) is not part of a saved config and has to be made after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.dit import DiT
from models.layers import sincos_position_table

NORM_EPS = 1e-6  # of the official layer norms; the default there is 1e-5

# Our names in a block -> theirs; our timestep embedder is outside the blocks
_IN_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def to_diffusers(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Name the weights of a DiT as diffusers does: embedders copied into every block, qkv in three, no positions."""
    mapped: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        mapped |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for ours, theirs in _OUTSIDE.items()}
        for i in range(depth):
            for ours, theirs in _IN_BLOCK.items():
                source = ours if ours.startswith("t_embedder") else f"blocks.{i}.{ours}"
                mapped[f"transformer_blocks.{i}.{theirs}.{kind}"] = weights[f"{source}.{kind}"]
            for part, third in zip("qkv", weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                mapped[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] = third
    for i in range(depth):
        labels = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        mapped[labels] = weights["y_embedder.embedding_table.weight"]
    return mapped


def is_diffusers(weights: Mapping[str, Tensor]) -> bool:
    """True for weights by the names of a DiTTransformer2DModel."""
    return "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" in weights


def from_diffusers(weights: Mapping[str, Tensor], grid: int | None = None) -> dict[str, Tensor]:
    """Name the weights of a DiTTransformer2DModel as ours: the inverse of `to_diffusers`, with positions.

    Args:
        weights: Its state dict.
        grid: Tokens of a side; None for 16, that of 256 pixels with patches of 2.

    Raises:
        ValueError: If a name is missing, or the embedders of its blocks differ, which ours cannot do.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    mapped: dict[str, Tensor] = {}
    try:
        for kind in ("weight", "bias"):
            mapped |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for ours, theirs in _OUTSIDE.items()}
            for i in range(depth):
                block = f"transformer_blocks.{i}"
                for ours, theirs in _IN_BLOCK.items():
                    name = ours if ours.startswith("t_embedder") else f"blocks.{i}.{ours}"
                    _enter(mapped, f"{name}.{kind}", weights[f"{block}.{theirs}.{kind}"])
                parts = [weights[f"{block}.attn1.to_{part}.{kind}"] for part in "qkv"]
                mapped[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        for i in range(depth):
            labels = weights[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"]
            _enter(mapped, "y_embedder.embedding_table.weight", labels)
    except KeyError as error:
        raise ValueError(f"diffusers' layout, but {error.args[0]} is missing") from error
    side = grid or 16
    bias = mapped["x_embedder.proj.bias"]
    mapped["pos_embed"] = sincos_position_table(len(bias), side, side)[None].to(bias)
    return mapped


def _enter(mapped: dict[str, Tensor], name: str, value: Tensor) -> None:
    if not torch.equal(mapped.setdefault(name, value), value):
        raise ValueError(f"diffusers' layout, but its blocks have different {name}, which is one for all here")


def diffusers_config(network: DiT) -> dict[str, object]:
    """Return the arguments of DiTTransformer2DModel for a network; a ValueError if diffusers has no such model."""
    config = network.config
    channels, height, width = config.sample_shape
    if height != width:
        raise ValueError(f"diffusers' DiT is for squares, not {height} x {width}")
    if config.class_dropout_prob == 0:
        raise ValueError("diffusers' DiT has a null class, which a network with class_dropout_prob 0 has no row for")
    if config.mlp_ratio != 4:
        raise ValueError(f"diffusers' DiT has an mlp_ratio of 4, not {config.mlp_ratio}")
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": channels,
        "out_channels": network.out_channels,
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": NORM_EPS,
    }


def correct_timesteps(transformer: nn.Module) -> nn.Module:
    """Set the timestep frequencies, which no saved config holds, of a loaded DiTTransformer2DModel."""
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer


def diffusers_network(network: DiT) -> nn.Module:
    """Build diffusers' network with our weights, which computes the same function.

    Raises:
        ValueError: If diffusers has no such model.
    """
    from diffusers import DiTTransformer2DModel  # heavy, and only exports need it

    converted: Any = DiTTransformer2DModel(**diffusers_config(network))
    converted.load_state_dict(to_diffusers(network.state_dict(), network.config.depth))
    return correct_timesteps(converted.eval())
