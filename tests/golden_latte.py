"""Recorded numbers of the official Latte with skips, and the networks they belong to."""

from __future__ import annotations

from typing import Any

from models.latte import Latte, LatteConfig, SkipLatte, SkipLatteConfig
from tests.golden_data import arrays, table

CASES = ("c2v_cond", "c2v_uncond", "c2v_depth8")


def recorded_fields(case: str) -> dict[str, Any]:
    """Fields of our config for a case's official one."""
    model = table(f"latte/{case}/config")["model"]
    fields = {name: model[name] for name in ("depth", "hidden_size", "num_heads", "patch_size", "learn_sigma")}
    shape = (model["num_frames"], model["in_channels"], model["input_size"], model["input_size"])
    return {**fields, "sample_shape": shape, "num_classes": model["num_classes"] if model["extras"] == 2 else 0}


def recorded_network(case: str, **overrides: Any) -> SkipLatte:
    """The network of a case with its recorded weights, strictly loaded, in evaluation mode."""
    network = SkipLatte(SkipLatteConfig(**{**recorded_fields(case), **overrides}))
    network.load_state_dict(arrays(f"latte/{case}/state_dict"))
    return network.eval()


def plain_network(case: str, **overrides: Any) -> Latte:
    """The same without its skip units."""
    network = Latte(LatteConfig(**{**recorded_fields(case), **overrides}))
    weights = arrays(f"latte/{case}/state_dict")
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("skip_")})
    return network.eval()
