"""Recorded numbers of the official HunYuan-DiT with Skip-Cache, and diffusers' network with the recorded weights."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanDiT2DModel
from torch import Tensor

from tests.golden_data import arrays, table

GOLDEN = arrays("hunyuan/io")
POLICIES = table("hunyuan/policy")


def recorded_transformer() -> Any:
    """The network with its recorded weights, strictly loaded, in evaluation mode."""
    transformer = HunyuanDiT2DModel(**table("hunyuan/config")["model"])
    transformer.load_state_dict(arrays("hunyuan/state_dict"))
    return transformer.eval()


def text_of(case: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Text arguments of the network in a case, "fwd" or "traj"."""
    return {
        "encoder_hidden_states": GOLDEN[f"{case}.clip"][rows],
        "text_embedding_mask": GOLDEN[f"{case}.clip_mask"][rows],
        "encoder_hidden_states_t5": GOLDEN[f"{case}.t5"][rows],
        "text_embedding_mask_t5": GOLDEN[f"{case}.t5_mask"][rows],
    }
