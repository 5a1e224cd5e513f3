"""Tiny random transformers of diffusers, with inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, LatteTransformer3DModel
from torch import Tensor, nn

from sampling.hunyuan import rotary_table

CLASSES = ("HunyuanDiT2DModel", "LatteTransformer3DModel", "DiTTransformer2DModel")


def tiny_transformer(name: str, layers: int = 6, **config: Any) -> Any:
    """A transformer of width 16 for latents of 4 x 8 x 8; every parameter is random."""
    shared = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": layers}
    shared |= {"patch_size": 2, "sample_size": 8}
    adaptive = {"out_channels": 8, "norm_elementwise_affine": False, "attention_bias": True, "norm_eps": 1e-6}
    adaptive["activation_fn"] = "gelu-approximate"
    if name == "HunyuanDiT2DModel":
        text = {"cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 5, "text_len_t5": 6}
        kinds = {"hidden_size": 16, "use_style_cond_and_image_meta_size": False, **text}
        transformer: Any = HunyuanDiT2DModel(**{**shared, **kinds, **config})
    elif name == "LatteTransformer3DModel":
        text = {"cross_attention_dim": 16, "caption_channels": 16, "video_length": 3, "norm_type": "ada_norm_single"}
        transformer = LatteTransformer3DModel(**{**shared, **adaptive, **text, **config})
    else:
        transformer = DiTTransformer2DModel(**{**shared, **adaptive, "num_embeds_ada_norm": 11, **config})
    with torch.no_grad():
        for parameter in transformer.parameters():
            nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


def tiny_inputs(name: str, rows: int = 2, seed: int = 0) -> dict[str, Any]:
    """Samples and conditioning of some rows, all but the timestep."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    if name == "DiTTransformer2DModel":
        return {"hidden_states": normal(4, 8, 8), "class_labels": torch.arange(seed, seed + rows) % 11}
    if name == "LatteTransformer3DModel":
        return {"hidden_states": normal(4, 3, 8, 8), "encoder_hidden_states": normal(5, 16)}
    return {
        "hidden_states": normal(4, 8, 8),
        "encoder_hidden_states": normal(5, 16),
        "text_embedding_mask": torch.ones(rows, 5, dtype=torch.int64),
        "encoder_hidden_states_t5": normal(6, 16),
        "text_embedding_mask_t5": torch.ones(rows, 6, dtype=torch.int64),
        "image_rotary_emb": rotary_table(8, (4, 4)),
    }


def lists_of_blocks(transformer: nn.Module) -> list[nn.ModuleList]:
    """Lists of blocks, which run in turn."""
    names = ("blocks", "transformer_blocks", "temporal_transformer_blocks")
    return [getattr(transformer, name) for name in names if hasattr(transformer, name)]


def count_blocks(transformer: nn.Module) -> list[list[tuple[int, int]]]:
    """(list, number) of the blocks that run, of each evaluation from now on: those whose attention does."""
    ran: list[list[tuple[int, int]]] = []
    transformer.register_forward_pre_hook(lambda *_: ran.append([]))
    for which, blocks in enumerate(lists_of_blocks(transformer)):
        for i, block in enumerate(blocks):
            block.attn1.register_forward_hook(lambda *_, place=(which, i): ran[-1].append(place))
    return ran
