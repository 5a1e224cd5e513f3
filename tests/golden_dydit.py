"""The networks that the recorded numbers of the official DyDiT belong to, and its masks and gate noise."""

from __future__ import annotations

import torch
from torch import Tensor

from models import DyDiT, ModelOutput
from models.dydit import DyDiTConfig
from tests.golden_data import arrays, table, with_sample_shape

TINY = ("v2_tiny", "v1_tiny")


def golden_dydit(name: str) -> DyDiT:
    """One of `TINY` with its recorded weights, strictly loaded, in evaluation mode."""
    network = DyDiT(DyDiTConfig(**with_sample_shape(table(f"dydit/{name}/config"))))
    network.load_state_dict(arrays(f"dydit/{name}/state_dict"))
    return network.eval()


def golden_gate_noise(golden: dict[str, Tensor]) -> Tensor:
    """Logistic noise (N, L, G) from the recorded Gumbel variables of a training step."""
    gates = [golden[f"gumbel.{gate}_g1"] - golden[f"gumbel.{gate}_g2"] for gate in ("attn", "token", "mlp")]
    return torch.cat([part.flatten(2) for part in gates], dim=2)


def assert_masks(out: ModelOutput, golden: dict[str, Tensor], prefix: str = "out.") -> None:
    """Asserts that masks are the recorded ones exactly."""
    for mask, name in zip(out.aux, ("attn_mask", "mlp_mask", "token_mask"), strict=True):
        recorded = golden[prefix + name]
        assert mask.dtype == torch.float32
        assert torch.equal(mask, recorded.squeeze(-1) if name == "token_mask" else recorded), name
