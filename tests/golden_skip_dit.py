"""Recorded numbers of the official Skip-DiT, and the networks they belong to."""

from __future__ import annotations

from typing import Any

from models import SkipDiT
from models.skip_dit import SkipDiTConfig
from tests.golden_data import arrays, table, with_sample_shape

CASES = ("c2i_d6", "c2i_d12")
RECORDED_CACHE_DEPTH = 4  # a constant of the official code


def recorded_network(case: str, **overrides: Any) -> SkipDiT:
    """The network of a case with its recorded weights, strictly loaded, in evaluation mode."""
    settings = with_sample_shape(table(f"skip_dit/{case}/config")["model"])
    network = SkipDiT(SkipDiTConfig(**{**settings, **overrides}))
    network.load_state_dict(arrays(f"skip_dit/{case}/state_dict"))
    return network.eval()
